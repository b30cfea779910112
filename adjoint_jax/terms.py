"""The probability-flow ODE as a diffrax term, and the reverse SDE.

    dx/dt = alpha' x0(x, t) + sigma' eps(x, t)                                                                     (1)

(Song et al. 2021, eq. (13), with x = alpha x0 + sigma eps inserted). The term is plain: any diffrax solver integrates it; the splitting
belongs to the solver and to the adjoint. With f = alpha'/alpha, score = -eps/sigma and tau times the noise of the forward process, (1) is

    dx = [f x - (1 + tau^2)/2 g^2 score] dt + tau g dw      at tau = 0,      g^2 = 2 sigma (sigma' - f sigma),              (2)

w running from noise to data: over a step s -> t of decreasing times, w's increment is W(t) - W(s) of a path W on [t_N, t_0]; for a path
reversed in time, H = int (W(u) - W(t) - (u - t)/(s - t) (W(s) - W(t))) du / (s - t) keeps its sign. diffrax up to 0.7.2 changes it, and
its stochastic Runge-Kutta solvers give the drift the unsigned step there (diffrax#598, repaired by #746): both are undone here.
"""

from importlib.metadata import version
from typing import Any

import diffrax
import equinox as eqx
import jax.numpy as jnp
import lineax

from ._types import Args, Network, State
from .networks import PREDICTIONS, as_pytree, conversions, predict
from .processes import AbstractProcess
from .splitting import Splitting, level

SIGNS_LOST = tuple(int(part) for part in version("diffrax").split(".")[:3] if part.isdigit()) <= (0, 7, 2)
"""Whether diffrax's stochastic Runge-Kutta solvers lose the direction of time."""


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


class _ReverseDrift(diffrax.AbstractTerm):
    """The drift of (2): (1) - tau^2/2 g^2 score."""

    term: DiffusionTerm
    tau: Any

    def vf(self, t: Any, y: State, args: Args) -> State:
        x0, eps = self.term.x0_and_eps(t, y, args)
        at = level(self.term.process, jnp.asarray(t, y.dtype))
        more = self.tau**2 * (at.sigma_rate - at.alpha_rate / at.alpha * at.sigma)
        return at.alpha_rate * x0 + (at.sigma_rate + more) * eps

    def contr(self, t0: Any, t1: Any, **kwargs: Any) -> Any:
        return t1 - t0

    def prod(self, vf: State, control: Any) -> State:
        return vf * (-jnp.abs(control) if SIGNS_LOST else control)


class _Diffusion(eqx.Module):
    """tau g of (2), the same for every element of x."""

    process: AbstractProcess
    tau: Any

    def __call__(self, t: Any, y: State, args: Args) -> lineax.AbstractLinearOperator:
        at = level(self.process, jnp.asarray(t, y.dtype))
        g = jnp.sqrt(2 * at.sigma * (at.sigma_rate - at.alpha_rate / at.alpha * at.sigma))
        return lineax.DiagonalLinearOperator(jnp.broadcast_to(self.tau * g, y.shape))


class _Backward(diffrax.AbstractBrownianPath):
    """A Brownian path of which diffrax gets the H of the path reversed in time."""

    path: Any
    levy_area: Any = eqx.field(static=True)
    t0: Any
    t1: Any

    def __init__(self, path: diffrax.AbstractBrownianPath):
        self.path, self.levy_area, self.t0, self.t1 = path, path.levy_area, path.t0, path.t1

    def evaluate(self, t0: Any, t1: Any = None, left: bool = True, use_levy: bool = False) -> Any:
        found = self.path.evaluate(t0, t1, left, use_levy)
        return eqx.tree_at(lambda found: found.H, found, -found.H) if hasattr(found, "H") else found


def sde_terms(term: DiffusionTerm, tau: Any, path: diffrax.AbstractBrownianPath) -> diffrax.MultiTerm:
    """The reverse SDE (2), for stock SDE solvers: `diffrax.MultiTerm(drift, diffusion)`, time running from noise to data.

    The noise is additive, so Ito and Stratonovich solvers solve the same equation, and those for additive noise (`diffrax.SRA1()`) apply.
    Stock solvers know no splitting: they need steps that are short against sigma/g^2 at the data end, and alpha, sigma > 0 on the
    whole grid. The solvers of `aj.solvers` draw their own noise in `aj.sample` instead. For decreasing times only, which is not checked.

    Args:
        term: network, process and prediction.
        tau: stochasticity, at least 0; 0 is the ODE, 1 the reverse SDE.
        path: a Brownian path of the shape and the dtype of x on increasing times, [ts[-1], ts[0]] for a decreasing grid ts.
    Raises:
        TypeError: for a term or a path of another kind.
        ValueError: where a concrete tau is negative.
    Reference: Song et al., Score-based generative modeling through stochastic differential equations (2021).

        path = diffrax.VirtualBrownianTree(ts[-1], ts[0], 1e-4, x_T.shape, key, diffrax.SpaceTimeLevyArea)
        diffrax.diffeqsolve(aj.sde_terms(term, 1.0, path), diffrax.SRA1(), ts[0], ts[-1], None, x_T, args, stepsize_controller=diffrax.StepTo(ts))
    """
    if not isinstance(term, DiffusionTerm):
        raise TypeError(f"term must be an aj.DiffusionTerm(network, process, prediction); got {type(term).__name__}.")
    if not isinstance(path, diffrax.AbstractBrownianPath):
        raise TypeError(f"path must be a Brownian path such as diffrax.VirtualBrownianTree(ts[-1], ts[0], ...); got {type(path).__name__}.")
    tau = Splitting(0.0, tau).tau
    path = _Backward(path) if SIGNS_LOST and not isinstance(path, diffrax.UnsafeBrownianPath) else path  # that one knows no other steps
    return diffrax.MultiTerm(_ReverseDrift(term, tau), diffrax.ControlTerm(_Diffusion(term.process, tau), path))
