"""Guidance: a network's prediction moved towards a condition.

Classifier-free, with p_c and p_u the predictions given the condition and without it, w the scale, phi the rescale:

    g = p_u + w (p_c - p_u)                                                                                        (1)
    g <- phi (std(p_c) / std(g)) g + (1 - phi) g,    std over one sample, n - 1 in its denominator                    (2)
    g <- p_c outside of an interval of times                                                                       (3)

By a classifier, with w the scale; x fixed, so that x0 follows eps:

    eps <- eps - w sigma grad_x log p(y | x_t),    x0 <- x0 + w (sigma^2 / alpha) grad_x log p(y | x_t)                 (4)

(1) and (4) are linear in the prediction, hence the same for all kinds; (2) is not: it depends on what the network predicts. All are functions
of x: a gradient through (4) contains the Hessian of log p(y | x_t), as it must to be one of the sampler that is run.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from .._numerics import floating, is_concrete
from .._types import Args, Network, State
from ..processes import AbstractProcess
from ..splitting import level
from ._predictions import known, target
from ._wrapping import as_pytree, hosted, per_sample, predict, samples, unhosted


class _Guided(eqx.Module):
    network: Network
    scale: Any
    rescale: Any
    interval: Any

    def __call__(self, x: State, t: Any, args: Args) -> State:
        if not isinstance(args, dict) or not {"cond", "uncond"} <= args.keys():
            raise ValueError("aj.cfg reads args['cond'] and args['uncond']: give both in args.")
        rest = {name: value for name, value in args.items() if name not in ("cond", "uncond")}
        conditional = self.network(x, t, {**rest, "cond": args["cond"]})

        def guided(conditional: State) -> State:
            unconditional = self.network(x, t, {**rest, "cond": args["uncond"]})
            answer = unconditional + per_sample(self.scale, conditional) * (conditional - unconditional)  # (1)
            return answer if self.rescale is None else _rescaled(answer, conditional, self.rescale)

        if self.interval is None:
            return guided(conditional)
        now, low, high = (floating(value, x) for value in (t, *self.interval))
        return jax.lax.cond((low <= now) & (now <= high), guided, lambda conditional: conditional, conditional)  # (3)


def _rescaled(guided: State, conditional: State, phi: Any) -> State:
    """(2). A sample without spread stays as it is; both square roots are kept off zero, where they have no derivative."""
    one = jnp.ones((), guided.dtype)
    wanted, found = (_variance(samples(p, "aj.cfg(rescale=...)")) for p in (conditional, guided))
    ratio = jnp.sqrt(jnp.where(wanted > 0, wanted, one) / jnp.where(found > 0, found, one))
    ratio = jnp.where(found > 0, jnp.where(wanted > 0, ratio, 0), one)
    return guided * (1 + per_sample(phi, guided) * (per_sample(ratio, guided) - 1))


def _variance(p: Any) -> Any:
    """Of each row, n - 1 in the denominator. `jnp.var` would do but for its float64 constant (a NaN) where x64 is on."""
    return jnp.sum((p - jnp.mean(p, axis=1, keepdims=True)) ** 2, axis=1) / (p.shape[1] - 1)


def cfg(network: Network, scale: Any, rescale: Any = 0.0, interval: Any = None) -> Network:
    """Classifier-free guidance: p_uncond + scale (p_cond - p_uncond), its spread pulled back to that of p_cond by `rescale`.

    Args:
        network: any network; it sees `args` with `cond` set to `args["cond"]`, then to `args["uncond"]`: two evaluations.
        scale: a scalar, or `[B]`; differentiable. 1 is the conditional network (still two evaluations: a scale may be traced).
        rescale: phi in [0, 1], a scalar or `[B]`; differentiable. The number 0 leaves the rescaling out. The first axis of x is the batch: under
            vmap give the sampler x[None].
        interval: (t_low, t_high) in the process's time, both ends included: guidance inside, the conditional network outside, where the
            unconditional one is not evaluated (`lax.cond`) unless t itself is batched by vmap. The gradient in t ignores the jumps.

    Raises:
        ValueError: args without `cond` or `uncond`; a concrete interval that is not two increasing times; rescale of an x without a batch axis.
    Reference: Ho & Salimans, Classifier-free diffusion guidance (2022), eq. (6), with w = scale - 1; Lin et al., Common diffusion noise schedules
        and sample steps are flawed (2023), section 3.4; Kynkäänniemi et al., Applying guidance in a limited interval (2024).

        term = aj.DiffusionTerm(aj.cfg(network, 7.5, rescale=0.7, interval=(100, 800)), process, "v")
        x_0 = aj.sample(term, x_T, {"params": params, "cond": cond, "uncond": null}, grid=ts)
    """
    if interval is not None and (len(interval) != 2 or (is_concrete(interval) and not interval[0] < interval[1])):
        raise ValueError(f"interval must be two times (t_low, t_high) with t_low < t_high; got {interval!r}.")
    absent = isinstance(rescale, (int, float)) and rescale == 0
    return _Guided(as_pytree(network), scale, None if absent else rescale, None if interval is None else tuple(interval))


class _ClassifierGuided(eqx.Module):
    network: Network
    log_prob: Any
    process: AbstractProcess
    prediction: str = eqx.field(static=True)
    scale: Any

    def __call__(self, x: State, t: Any, args: Args) -> State:
        gradient = jax.grad(lambda x: jnp.sum(self.log_prob(x, t, args)))(x)
        at = level(unhosted(self.process), floating(t, x))
        weight = target(self.prediction, at, at.sigma**2 / at.alpha, -at.sigma)  # (4)
        return predict(self.network, x, t, args) + per_sample(self.scale, x) * weight * gradient


def classifier_guidance(network: Network, log_prob: Network, process: AbstractProcess, prediction: str = "eps", scale: Any = 1.0) -> Network:
    """Guidance by a classifier of noisy states: eps - scale sigma grad_x log p(y | x_t), in whatever the network predicts.

    Args:
        network: any network; it and `log_prob` are given the same `args`.
        log_prob: `log_prob(x, t, args)` -> log p(y | x_t), `[B]` or a scalar, up to a constant; samples of a batch must not interact. Twice
            differentiable where gradients are wanted: they keep its Hessian, at the price of differentiating a gradient.
        process, prediction: those of the network; the answer is of the same kind.
        scale: a scalar, or `[B]`; differentiable. 1 samples p(x | y) where both networks are exact.

    Raises:
        ValueError: for an unknown prediction.
    "x0", "v" and "flow" are not finite at alpha = 0, "score" at sigma = 0: start and end such grids inside.
    Reference: Dhariwal & Nichol, Diffusion models beat GANs on image synthesis (2021), the form for DDIM.

        log_prob = lambda x, t, args: jax.nn.log_softmax(classifier.apply(args["classifier"], x, t))[:, 3]
        guided = aj.networks.classifier_guidance(network, log_prob, process, "eps", scale=2.0)
        x_0 = aj.sample(aj.DiffusionTerm(guided, process, "eps"), x_T, {"params": params, "classifier": weights}, grid=ts)
    """
    return _ClassifierGuided(as_pytree(network), as_pytree(log_prob), hosted(process), known(prediction), scale)
