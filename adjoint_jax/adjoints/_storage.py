"""What the forward pass stores of the steps that the backward pass recomputes, and the loop that runs back over it.

One level: the memory of every step, in the device's or in the host's memory. Several levels: N steps are cut into segments of
n = ceil(N^((l-1)/l)), the carry at the start of each is stored, and the backward pass runs each segment again with one level less:

    memory(N, l) = N/n carries + memory(n, l - 1) = O(l N^(1/l)),      work = (l - 1) more forward passes.            (1)

The last segment is shorter where n does not divide N.
"""

from collections.abc import Callable
from math import ceil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

HOST = jax.memory.Space.Host if hasattr(jax, "memory") else None


def cut(tree: Any, at: int) -> tuple[Any, Any]:
    """The first `at` entries of every array of a stacked pytree, and the others."""
    return jax.tree.map(lambda leaf: leaf[:at], tree), jax.tree.map(lambda leaf: leaf[at:], tree)


def joined(before: Any, after: Any) -> Any:
    """Two stacked pytrees behind each other; either may be None."""
    if before is None or after is None:
        return after if before is None else before
    return jax.tree.map(lambda one, other: jnp.concatenate([one, other]), before, after)


def _segments(steps: int, levels: int) -> tuple[int, int]:
    size = max(ceil(steps ** ((levels - 1) / levels) - 1e-9), 1)
    return steps // size, size


def stored_bytes(steps: int, levels: int, carry: int, memory: int) -> int:
    """The most that is stored at once, equation (1), for the bytes of a carry and of a step's memory. The rest goes before the whole segments."""
    if levels == 1:
        return steps * memory
    count, size = _segments(steps, levels)
    rest = steps - count * size
    last = carry + stored_bytes(rest, levels - 1, carry, memory) if rest else 0
    return count * carry + max(stored_bytes(size, levels - 1, carry, memory), last)


class Storage(NamedTuple):
    """`step(carry, inputs_i)`; what of a carry a step's transpose needs, `remember` and `recall`; what of it is returned, `saved`."""

    step: Callable
    remember: Callable
    recall: Callable
    saved: Callable
    levels: int
    on_host: bool

    def segments(self, inputs: Any) -> tuple[int, int]:
        """(number of whole segments, steps in each)."""
        return _segments(_length(inputs), self.levels)

    def store(self, carry: Any, inputs: Any) -> tuple[Any, Any, Any]:
        """Runs the steps: the last carry, what is stored, what is returned; None for the latter two where there are no steps."""
        if not _length(inputs):
            return carry, None, None
        if self.levels == 1:
            carry, (memories, states) = jax.lax.scan(self._step, carry, inputs)
            return carry, memories, states

        def segment(carry: Any, inputs: Any) -> tuple[Any, Any]:
            following, states = jax.lax.scan(self._silent_step, carry, inputs)
            return following, (carry, states)

        count, size = self.segments(inputs)
        whole, rest = cut(inputs, count * size)
        carry, (starts, states) = jax.lax.scan(segment, carry, _folded(whole, size))
        states = _unfolded(states)
        if not _length(rest):
            return carry, (starts, None), states
        following, (start, more) = segment(carry, rest)
        return following, (starts, start), joined(states, more)

    def transpose(self, pull: Callable, stored: Any, inputs: Any, cotangent_states: Any, acc: Any) -> tuple[Any, Any]:
        """Backwards through the steps by pull(carry, inputs_i, acc, cotangent_state_i) -> acc, cotangent of inputs_i."""
        if not _length(inputs):
            return acc, None
        if self.levels == 1:

            def body(acc: Any, slices: Any) -> tuple[Any, Any]:
                memory, inputs, cotangent_state = slices
                return pull(self.recall(self._fetched(memory)), inputs, acc, cotangent_state)

            return jax.lax.scan(body, acc, (stored, inputs, cotangent_states), reverse=True)
        lower = self._replace(levels=self.levels - 1)

        def segment(acc: Any, slices: Any) -> tuple[Any, Any]:
            start, inputs, cotangent_states = slices
            _, stored, _ = lower._replace(saved=lambda carry: None).store(start, inputs)
            return lower.transpose(pull, stored, inputs, cotangent_states, acc)

        count, size = self.segments(inputs)
        starts, start = stored
        (whole, rest), (states, rest_states) = cut(inputs, count * size), cut(cotangent_states, count * size)
        later = None
        if start is not None:
            acc, later = segment(acc, (start, rest, rest_states))
        acc, earlier = jax.lax.scan(segment, acc, (starts, _folded(whole, size), _folded(states, size)), reverse=True)
        return acc, joined(_unfolded(earlier), later)

    def _step(self, carry: Any, inputs: Any) -> tuple[Any, Any]:
        following, states = self._silent_step(carry, inputs)
        return following, (self._sent(self.remember(*carry)), states)

    def _silent_step(self, carry: Any, inputs: Any) -> tuple[Any, Any]:
        following = self.step(carry, inputs)
        return following, self.saved(following)

    def _sent(self, memory: Any) -> Any:
        return jax.device_put(memory, HOST) if self.on_host else memory

    def _fetched(self, memory: Any) -> Any:
        return jax.device_put(memory, jax.memory.Space.Device) if self.on_host else memory


def _length(inputs: Any) -> int:
    return len(jax.tree.leaves(inputs)[0])


def _folded(tree: Any, size: int) -> Any:
    return jax.tree.map(lambda leaf: leaf.reshape(-1, size, *leaf.shape[1:]), tree)


def _unfolded(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), tree)
