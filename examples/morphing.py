"""Morphs of two faces by a diffusion autoencoder: encoding, averaging, and the loss of a recogniser that a morph climbs down.

Of two images a, b with z = encoder(x) and the recogniser's features v:

    ODE     x_T by inverting the sampler's ODE under z                                                              (1)
    SDE     x_T and noises n_i of CycleDiffusion's encoder (`adjoint_jax.solvers.cycle`), along one path of the forward process for both, or
            one each. Along one, noises of two faces are all but the same (cosines 1 to 0.8 from noise to data) and (3) comes near to the
            mean of the images; along two they are independent                                                     (2)
    start   z = (z_a + z_b)/2,    x_T = m(x_T^a, x_T^b),    n_i = m(n_i^a, n_i^b),
            m(u, w) = (|u| + |w|)/2 (u + w)/|u + w|,   slerp half-way: a mean of independent noises would be short by sqrt 2          (3)
    loss    L(x) = d(v, v_a) + d(v, v_b) + |d(v, v_a) - d(v, v_b)|,    v = v(x),   d(u, w) = 1 - <u, w>/(|u| |w|)              (4)
    greedy  at each step of the sampler eps is replaced by  argmin_eps L(x0(x, eps)),  from the network's own, a few steps of Adam,
            the best eps of each image kept                                                                         (5)

References: Blasingame & Liu, AdjointDEIS (NeurIPS 2024), whose released code steps x_T and z down the gradient (50 steps of 0.01), draws a
noise for each time on its own where (2) has a path, and does not drive the noises; Greedy-DiM (2024) for (5), with 50
steps of Adam(0.01, 0.5, 0.9); (4) is the identity loss of both, of Zhang et al., MIPGAN (2021).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from train_faces import blocks, pixels

import adjoint_jax as aj
from adjoint_jax.guide import Sampler, Variables
from adjoint_jax.networks import conversions
from adjoint_jax.splitting import level


class Model(NamedTuple):
    """A diffusion autoencoder: the checkpoint of its UNet, and its encoder `encode(x) -> z` of images `[B, H, W, 1]` in [-1, 1]."""

    unet: Any
    encode: Callable[[Any], Any]

    @property
    def term(self) -> aj.DiffusionTerm:
        return aj.DiffusionTerm(self.unet.network, self.unet.process, self.unet.prediction)


def half_way(u: Any, w: Any, axes: tuple[int, ...] = (-3, -2, -1)) -> Any:
    """m of (3), over `axes`; zeros where both are."""
    norm = lambda x: jnp.sqrt(jnp.sum(x**2, axis=axes, keepdims=True))  # noqa: E731
    length = norm(u + w)
    return jnp.where(length > 0, (u + w) / jnp.where(length > 0, length, 1), 0) * (norm(u) + norm(w)) / 2


def encoded(model: Model, sampler: Sampler, images: Any, steps: int, path: Any = None) -> Variables:
    """(1) or, given the noises `path` `[N, B, h, w, c]` of (2), the noises too; a sampler of either kind makes these variables an image again."""
    x, z = blocks(images), model.encode(images)
    args = {"params": model.unet.params, "cond": z}
    if path is None:
        fine = aj.grids.log_snr(model.unet.process, steps, t_start=sampler.grid[0], t_end=sampler.grid[-1])
        return {"x_T": aj.invert(model.term, x, args, grid=fine, solver=sampler.solver), "embedding": z}
    x_T, noise = aj.solvers.encode_noise(model.term, x, args, grid=sampler.grid, solver=sampler.solver, noise=path)
    return {"x_T": x_T, "noise": noise, "embedding": z}


def between(a: Variables, b: Variables) -> Variables:
    """(3)."""
    return {name: (a[name] + b[name]) / 2 if name == "embedding" else half_way(a[name], b[name]) for name in a}


def identity_loss(v: Any, v_a: Any, v_b: Any) -> Any:
    """(4) of features of norm 1, `[B, D]`: `[B]`."""
    d_a, d_b = (1 - jnp.sum(v * other, axis=1) for other in (v_a, v_b))
    return d_a + d_b + jnp.abs(d_a - d_b)


def score(recognise: Callable[[Any, Any], Any], params: Any, v_a: Any, v_b: Any, x: Any) -> Any:
    """Minus (4) of states `[B, h, w, 4]`: the metric that is climbed. `recognise(params, images)` gives features of norm 1."""
    return -identity_loss(recognise(params, pixels(x)), v_a, v_b)


class Greedy(eqx.Module):
    """(5), as a network that predicts eps: any sampler takes it. Its `args["params"]` are `{"network": ..., "metric": ...}`."""

    term: aj.DiffusionTerm
    steps: int = eqx.field(static=True)
    optimiser: optax.GradientTransformation = eqx.field(static=True)

    def __call__(self, x: Any, t: Any, args: Any) -> Any:
        params = args["params"]
        clean = conversions("eps", level(self.term.process, jnp.asarray(t, x.dtype)))[0]
        metric = lambda eps: params["metric"](clean.of_x * x + clean.of_p * eps)  # noqa: E731
        better = lambda scores, best, eps, kept: jnp.where((scores > best)[:, None, None, None], eps, kept)  # noqa: E731

        def body(carry: Any, _: Any) -> tuple[Any, None]:
            eps, state, kept, best = carry
            (_, scores), gradient = jax.value_and_grad(lambda eps: ((found := metric(eps)).sum(), found), has_aux=True)(eps)
            updates, state = self.optimiser.update(-gradient, state)
            return (eps + updates, state, better(scores, best, eps, kept), jnp.maximum(scores, best)), None

        eps = self.term.x0_and_eps(t, x, {**args, "params": params["network"]})[1]
        start = (eps, self.optimiser.init(eps), eps, jnp.full(len(x), -jnp.inf, x.dtype))
        (eps, _, kept, best), _ = jax.lax.scan(body, start, None, self.steps)
        return better(metric(eps), best, eps, kept)
