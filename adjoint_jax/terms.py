"""The probability-flow ODE as a diffrax term.

    dx/dt = alpha' x0(x, t) + sigma' eps(x, t)                                                                     (1)

(Song et al. 2021, eq. (13), with x = alpha x0 + sigma eps inserted). The term is plain: any diffrax solver integrates it; the splitting
belongs to the solver and to the adjoint.
"""

from typing import Any

import diffrax
import equinox as eqx
import jax.numpy as jnp

from ._types import Args, Network, State
from .networks import PREDICTIONS, as_pytree, conversions, predict
from .processes import AbstractProcess
from .splitting import level


class DiffusionTerm(diffrax.AbstractTerm):
    """A network, its noise process and what it predicts: the ODE (1) whose solution is a sample.

    Args:
        network: `network(x, t, args) -> prediction`, of the shape of x; deterministic given its arguments; t a scalar in the process's own time.
        process: a noise process, `aj.VPLinear()` and the like.
        prediction: "eps", "x0", "v", "score" or "flow".
    Raises:
        ValueError: for an unknown prediction.
        TypeError: for a process that is none.

        term = aj.DiffusionTerm(network, aj.VPLinear(), prediction="eps")
    """

    network: Any
    process: AbstractProcess
    prediction: str = eqx.field(static=True)

    def __init__(self, network: Network, process: AbstractProcess, prediction: str = "eps"):
        if not isinstance(process, AbstractProcess):
            raise TypeError(f"process must be a noise process such as aj.VPLinear(); got {type(process).__name__}.")
        if prediction not in PREDICTIONS:
            raise ValueError(f"prediction={prediction!r} is not known: use one of {', '.join(PREDICTIONS)}.")
        self.network, self.process, self.prediction = as_pytree(network), process, prediction

    def predict(self, t: Any, x: State, args: Args) -> State:
        """The network's prediction at (x, t), in the dtype of x."""
        return predict(self.network, x, t, args)

    def x0_and_eps(self, t: Any, x: State, args: Args) -> tuple[State, State]:
        """The clean state and the noise that the prediction at (x, t) stands for."""
        p = self.predict(t, x, args)
        x0, eps = conversions(self.prediction, level(self.process, jnp.asarray(t, x.dtype)))
        return x0.of_x * x + x0.of_p * p, eps.of_x * x + eps.of_p * p

    def vf(self, t: Any, y: State, args: Args) -> State:
        """dx/dt of (1)."""
        x0, eps = self.x0_and_eps(t, y, args)
        alpha_rate, sigma_rate = self.process.rates(jnp.asarray(t, y.dtype))
        return alpha_rate * x0 + sigma_rate * eps

    def contr(self, t0: Any, t1: Any, **kwargs: Any) -> Any:
        return t1 - t0

    def prod(self, vf: State, control: Any) -> State:
        return vf * control
