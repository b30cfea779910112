"""Truncated gradients: the last steps are differentiated, and the state that they start from is a constant.

With x_{i+1} = Phi_i(x_i; theta) and sg the identity without derivative,

    LastK         dL/dtheta of Phi_{N-1}(... Phi_{N-K}(sg(x_{N-K}); theta) ...; theta)                               (1)
    RandomK       (1) with K uniform on 1 .. most                                                              (2)
    LowVariance   the mean over k of dL/dx_N d Phi(sg(x^k); theta)/dtheta,    x^k = (alpha_{N-1}/alpha_N) x_N + s xi^k,
                  s^2 = sigma_{N-1}^2 (1 - e^(-2 (lam_N - lam_{N-1}))),    xi^k ~ N(0, I)                          (3)

Phi in (3) being DDIM's step. They are biased towards what the last steps can change, and say nothing of x_T, whose gradient is zero.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from .._numerics import namespace, zeros_like
from .._traced import in_order
from ..solvers import DDIM
from ..solvers._base import as_dtype
from ..splitting import level
from ._base import AbstractSamplerAdjoint
from ._computation import Computation, run_forward, saved
from .discrete import DiscreteAdjoint, constant


class LastK(AbstractSamplerAdjoint):
    """The exact gradient through the last k steps only, equation (1); DRaFT-K. Biased: see `aj.audit`.

    Cost: N forward, then k (forward + backward); memory: k states. Exact in what the last k steps are given: parameters, conditioning, noise,
    the grid. Zero in x_T and in what only earlier steps see. k >= N is `DiscreteAdjoint`, x_T included.

    Args:
        k: number of steps, at least 1.
    Raises:
        ValueError: for another k.
    Reference: Clark, Vicol, Swersky & Fleet, Directly fine-tuning diffusion models on differentiable rewards (ICLR 2024), DRaFT-K.

        g = jax.grad(lambda p: loss(aj.sample(term, x_T, {**args, "params": p}, grid=ts, adjoint=aj.LastK(1))))(params)
    """

    k: int = eqx.field(static=True)

    def __init__(self, k: int):
        self.k = _at_least_one(k, "LastK's k")

    def run(self, computation: Computation) -> tuple[Any, Any]:
        return _run_last(computation, self.k)


class RandomK(AbstractSamplerAdjoint):
    """The exact gradient through the last K steps, K uniform on 1 .. most and drawn from `key`, equation (2); AlignProp.

    Cost and memory are those of `LastK(most)` whatever K, so that one compiled program serves every key.

    Args:
        key: a JAX key; a new one for each gradient.
        most: the largest K, at most the number of steps; None, all of them.
    Raises:
        ValueError: for another `most`.
    Reference: Prabhudesai, Goyal, Pathak & Fragkiadaki, Aligning text-to-image diffusion models with reward backpropagation (2023).

        g = jax.grad(lambda p: loss(aj.sample(term, x_T, {**args, "params": p}, grid=ts, adjoint=aj.adjoints.RandomK(key))))(params)
    """

    key: Any
    most: int | None = eqx.field(static=True)

    def __init__(self, key: Any, most: int | None = None):
        self.key, self.most = key, None if most is None else _at_least_one(most, "RandomK's most")

    def run(self, computation: Computation) -> tuple[Any, Any]:
        steps = computation.steps
        most = steps if self.most is None else min(self.most, steps)
        k = jax.random.randint(self.key, (), 1, most + 1)
        # x_T is a constant even where K = N
        return _run_last(eqx.tree_at(lambda c: c.opaque, computation, jnp.arange(steps) == steps - k, is_leaf=lambda leaf: leaf is None), most)


class LowVariance(AbstractSamplerAdjoint):
    """The gradient through DDIM's last step, averaged over `samples` new noisings of the sample, equation (3); DRaFT-LV.

    Cost: N forward, then `samples` (forward + backward); memory: one state a noising. dL/dx_N is taken once, at the sample; the paper takes it at
    each of the new ones, which an adjoint does not see: for a reward that bends on the scale of one step the two differ. Zero in x_T, noise and grid.

    Args:
        key: a JAX key; a new one for each gradient.
        samples: number of noisings, at least 1.
    Raises:
        ValueError: for another number; at a gradient, for a saved trajectory or a pair.
    Reference: Clark, Vicol, Swersky & Fleet (ICLR 2024), DRaFT-LV.

        g = jax.grad(lambda p: loss(aj.sample(term, x_T, {**args, "params": p}, grid=ts, adjoint=aj.adjoints.LowVariance(key))))(params)
    """

    key: Any
    samples: int = eqx.field(static=True)

    def __init__(self, key: Any, samples: int = 2):
        self.key, self.samples = key, _at_least_one(samples, "LowVariance's samples")

    def run(self, computation: Computation) -> tuple[Any, Any]:
        if computation.save or computation.paired:
            raise ValueError("LowVariance differentiates a sample alone: use LastK(1) for a saved trajectory or an aj.Paired.")
        term, ts = computation.term, constant(computation.ts)[-2:]
        x, _ = _run_constant(computation, computation.steps)
        x = x[0]
        before, end = (level(term.process, t) for t in ts)
        xp = namespace(before.alpha)
        spread = before.sigma * xp.sqrt(-xp.expm1(-2 * (end.lam - before.lam)))
        weights = constant([jnp.asarray(weight, x.dtype) for weight in (before.alpha / end.alpha, spread)])
        rows = as_dtype(DDIM().table(term.process, term.prediction, ts), x.dtype)
        args = computation.after(computation.steps - 1, (x, None)).args
        step = lambda noisy: DiscreteAdjoint().run(Computation(term, DDIM(), noisy, args, ts, rows, save=False))[0]  # noqa: E731

        def total(sum_: Any, k: Any) -> tuple[Any, None]:
            xi = jax.random.normal(jax.random.fold_in(self.key, k), x.shape, x.dtype)
            return sum_ + step(weights[0] * x + weights[1] * xi), None

        mean = jax.lax.scan(total, zeros_like(x), jnp.arange(self.samples))[0] / self.samples
        return x + (mean - jax.lax.stop_gradient(mean)), None


def _at_least_one(k: int, what: str) -> int:
    if k < 1:
        raise ValueError(f"{what} is a number, at least 1; got {k!r}.")
    return int(k)


def _run_constant(computation: Computation, steps: int) -> tuple[Any, Any]:
    """The carry after the first steps and the values on the way, without derivative."""
    still = constant(computation)
    record = lambda _, following: saved(following, computation.save, computation.paired)  # noqa: E731
    inputs = jax.tree.map(lambda leaf: leaf[:steps], still.inputs())
    # a network may close over what is differentiated, so the outcome is made constant too
    return constant(run_forward(in_order(still.step), still.shared()[0], still.carry(), inputs, record))


def _run_last(computation: Computation, k: int) -> tuple[Any, Any]:
    """(1)."""
    head = computation.steps - k
    if head <= 0:
        return DiscreteAdjoint().run(computation)
    carry, early = _run_constant(computation, head)
    x, late = DiscreteAdjoint().run(computation.after(head, carry))
    return x, jax.tree.map(lambda early, late: jnp.concatenate([early, late]), early, late)
