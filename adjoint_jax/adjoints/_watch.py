"""What a backward pass is watched by: the norm of the adjoint at every step, a limit for it, and where a number stops being finite.

`watch` is the identity of x. Its transpose sees a = dL/dx_i, which it may shorten to the length `clip`, and hands |a| out as the
"derivative" in a probe, a zero that enters nowhere: so the norms come with any gradient, through the same backward pass.
"""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from .._numerics import is_concrete, zeros_like
from ._computation import add_to_value, first


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def watch(clip: float | None, x: Any, probe: Any) -> Any:
    """x, of whose cotangent a the norm is the cotangent of `probe`; a is limited to the norm `clip` for each entry of the leading axis."""
    return x


def _watch_forward(clip: float | None, x: Any, probe: Any) -> tuple[Any, None]:
    return x, None


def _watch_backward(clip: float | None, _: None, a: Any) -> tuple[Any, Any]:
    norm = jnp.sqrt(jnp.sum(a**2))
    if clip is None:
        return a, norm
    size = jnp.sqrt(jnp.sum(a**2, axis=tuple(range(1, a.ndim)), keepdims=True)) if a.ndim > 1 else norm
    return a * jnp.where(size > clip, clip / jnp.where(size > clip, size, 1), 1), norm


watch.defvjp(_watch_forward, _watch_backward)


def raise_if_not_finite(found: Any, given: Any, start: Any, cotangent_states: Any, paired: bool) -> None:
    """Names the step and the input where a gradient stops being finite; silent where anything is traced."""
    if is_concrete(found, given, start, cotangent_states) and not all_finite(found):
        raise FloatingPointError(diagnosis(given, start, cotangent_states, paired))


def all_finite(tree: Any) -> bool:
    return all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array)))


def diagnosis(given: Any, cotangent: Any, cotangent_states: Any, paired: bool) -> str | None:
    """Runs `given` = (step, shared, carry, inputs), with inputs = (Inputs, probes), forwards and backwards, one step at a time.

    Returns a sentence about the first step and the inputs of which a value or a derivative is not finite, or None.
    """
    step, shared, carry, inputs = given
    steps, carries = len(inputs[0].t0), [carry]
    for i in range(steps):
        carries.append(step(shared, carries[-1], first(inputs, i)))
        if not all_finite(carries[-1][0]):
            return f"The state is not finite after {_place(inputs, i)}: the network's output is NaN, infinite or too large there."
    if not all_finite((cotangent, cotangent_states)):
        return "The gradient of the loss in the sample itself is not finite: check the loss, not the sampler."
    floats, rest = eqx.partition((step, shared), eqx.is_inexact_array)
    for i in reversed(range(steps)):
        share = jax.tree.map(lambda leaf, i=i: leaf[i], cotangent_states)
        variable, fixed = eqx.partition((carries[i], first(inputs, i)), eqx.is_inexact_array)

        def local(variable: Any, floats: Any, fixed: Any = fixed) -> Any:
            (step, shared), (carry, inputs) = eqx.combine(floats, rest), eqx.combine(variable, fixed)
            return eqx.filter(step(shared, carry, inputs), eqx.is_inexact_array)

        (cotangent, of_inputs), of_arrays = jax.vjp(local, variable, floats)[1](add_to_value(cotangent, share, paired))
        named = {"x": cotangent[0], "the solver's history": cotangent[1], "noise": of_inputs[0].noise, "a per-step leaf": of_inputs[0].per_step}
        named |= {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(of_arrays)}
        if bad := [name for name, leaf in named.items() if not all_finite(leaf)]:
            return (
                f"The gradient in {', '.join(bad)} is not finite at {_place(inputs, i)}, though the adjoint that came into this step is: "
                "the derivative of the network is NaN, infinite or too large there. Check it for sqrt, log or norms at zero and for half precision."
            )
    return None


def _place(inputs: Any, i: int) -> str:
    return f"step {i} of {len(inputs[0].t0)} (t = {float(inputs[0].t0[i]):g})"


def _name(path: Any) -> str:
    """Of a leaf of (step, (network, args))."""
    if path[0] != jax.tree_util.SequenceKey(1):
        return "an array that the network closes over"
    return ("network" if path[1] == jax.tree_util.SequenceKey(0) else "args") + jax.tree_util.keystr(path[2:])


def no_probe(x: Any) -> Any:
    """What `watch` is given where nobody asks for norms."""
    return zeros_like(x[(0,) * x.ndim])
