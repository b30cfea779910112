"""Several devices, in one process or in many: the images of a batch are spread over all of them, the weights lie whole on each, or in parts.

A mesh `data=4,fsdp=2` is 8 devices in two named axes. Images of a batch do not interact, so that of an objective sum_b f(x_b, p) over them

    dL/dx_b    = df/dx (x_b, p)                               takes no word between devices,                                     (1)
    dL/dp      = sum over devices of  sum_{b there} df/dp (x_b, p)    takes one sum, when the backward pass is over.               (2)

(1) is left to `jax.jit`: arrays are laid out (`batched`, `everywhere`), the computation follows them. Of (2) the compiler makes a sum a step
inside the backward loop; `gradient` does what (2) says. Along `fsdp` each weight lies cut along its longest axis that divides (`weights`), and
so do its gradient and the optimiser's state: `gradient` puts the weights together once, before the loop, and leaves each device its part of
the sum. Results are those of one device but for the order of these sums.

Without a mesh (None) every function here is the identity, `jax.jit` or `jax.value_and_grad`.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

from .._numerics import fetched

AXES = DATA, FSDP = ("data", "fsdp")
IMAGES = P(AXES)
"""Images are spread over both axes."""


def begin(distributed: bool) -> None:
    """Makes this process one of several, before anything else asks JAX for its devices: where told to, or where JAX_COORDINATOR_ADDRESS is set.

    Where JAX does not know by itself who is who (from a TPU, Slurm, Open MPI or Kubernetes), JAX_NUM_PROCESSES and JAX_PROCESS_ID say so too.
    Raises ValueError where the processes do not find each other.
    """
    if not (distributed or "JAX_COORDINATOR_ADDRESS" in os.environ) or jax.distributed.is_initialized():
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        numbers: dict[str, Any] = {
            key: int(os.environ[f"JAX_{key.upper()}"]) for key in ("num_processes", "process_id") if f"JAX_{key.upper()}" in os.environ
        }
        jax.distributed.initialize(**numbers)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(
            f"--distributed: this process did not find the others ({error}): set JAX_COORDINATOR_ADDRESS to host:port of process 0, "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID, or start it where JAX finds them itself."
        ) from error


def first() -> bool:
    """Whether this is the process that writes."""
    return jax.process_index() == 0


def wait(name: str) -> None:
    """Until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def make(text: str | None, batch: int) -> Mesh | None:
    """The mesh `data=4,fsdp=2` of all devices, for batches of `batch` images. Raises ValueError where it does not fit them."""
    if text is None:
        if jax.process_count() > 1:
            raise ValueError(f"{jax.process_count()} processes share one run by --mesh alone: give --mesh data={jax.device_count()}.")
        return None
    sizes = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name not in AXES or name in sizes or not (size.isdecimal() and int(size)):
            raise ValueError(f"--mesh {text} has {part!r} where an axis was expected: give data=8, fsdp=8, or both as in data=4,fsdp=2.")
        sizes[name] = int(size)
    total = int(np.prod(list(sizes.values())))
    if total != jax.device_count():
        raise ValueError(f"--mesh {text} is of {total} devices, and there are {jax.device_count()} ({jax.default_backend()}): give that product.")
    if batch % total:
        raise ValueError(f"A batch of {batch} images does not divide over the {total} devices of --mesh {text}: give a multiple of {total}.")
    return jax.make_mesh(tuple(sizes.get(name, 1) for name in AXES), AXES, axis_types=(AxisType.Auto,) * 2)


def words(mesh: Mesh | None) -> str:
    """The devices, for a report."""
    kind = jax.devices()[0].device_kind
    if mesh is None:
        return f"1 {kind}"
    return f"{mesh.size} {kind} ({', '.join(f'{name} = {size}' for name, size in mesh.shape.items())}) in {jax.process_count()} process(es)"


def put(leaf: Any, sharding: Any) -> Any:
    """An array that every process has, laid out so; each device takes its part."""
    whole = host(leaf)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def batched(tree: Any, mesh: Mesh | None, axis: int = 0) -> Any:
    """Arrays whose axis `axis` is that of the images, spread over the devices."""
    return tree if mesh is None else jax.tree.map(lambda leaf: put(leaf, NamedSharding(mesh, _images(axis))), tree)


def image_axes(variables: dict[str, Any]) -> dict[str, int]:
    """Of each of the variables of `guide` the axis of the images."""
    return {name: value.ndim - variables["x_T"].ndim if name == "noise" else 0 for name, value in variables.items()}


def spread(variables: dict[str, Any], mesh: Mesh | None) -> dict[str, Any]:
    """The variables of `guide`, their images spread over the devices."""
    return {name: batched(variables[name], mesh, axis) for name, axis in image_axes(variables).items()}


def everywhere(tree: Any, mesh: Mesh | None) -> Any:
    """Arrays whole on every device."""
    return tree if mesh is None else jax.tree.map(lambda leaf: put(leaf, NamedSharding(mesh, P())), tree)


def weights(tree: Any, mesh: Mesh | None) -> Any:
    """Weights, cut along `fsdp`."""
    return tree if mesh is None else jax.tree.map(lambda leaf: put(leaf, NamedSharding(mesh, _cut(np.shape(leaf), mesh))), tree)


def together(state: Any) -> Any:
    """A state of which some leaves lie on a mesh (others are an optimiser's counters, made of nothing): these are put everywhere."""
    mesh = of(state)
    if mesh is None:
        return state
    return jax.tree.map(lambda leaf: leaf if of(leaf) else everywhere(leaf, mesh), state)


def staying(step: Callable[[Any, Any], Any], state: Any) -> Callable[[Any, Any], Any]:
    """A jitted `step(given, state) -> (state, seen)`; on a mesh the state stays laid out as `state` is, and `seen` comes to every device."""
    mesh = of(state)
    if mesh is None:
        return step
    return jax.jit(step, out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, state), NamedSharding(mesh, P())))


def gradient(objective: Callable[..., Any], mesh: Mesh | None = None, axes: Sequence[Any] = (0,)) -> Callable[..., Any]:
    """`(params, *args) -> ((total, seen), gradient in params)` of `objective(params, *args) -> (total, seen)`, by (2).

    Args:
        objective: `total` is a sum over the images of the batch, with no term of the weights alone; in `seen` the images' axis comes first.
        mesh: params are laid out by `weights(params, mesh)`, and so is the gradient. None: one device.
        axes: of each of `args` the axis of the images, or None for what they share; trees of these as in `jax.vmap`.
    """
    whole = jax.value_and_grad(objective, has_aux=True)
    if mesh is None:
        return whole
    specs = jax.tree.map(lambda axis: P() if axis is None else _images(axis), tuple(axes), is_leaf=lambda axis: axis is None)

    def share(params: Any, *args: Any) -> Any:
        cuts = jax.tree.map(lambda leaf: _cut(leaf.shape, mesh), params)

        def on_each(params: Any, *args: Any) -> Any:
            params = jax.tree.map(_joined, params, cuts)  # varying before the sampler's custom_vjp: or its loop would hold a sum a step
            (total, seen), found = whole(params, *args)
            return (jax.lax.psum(total, AXES), seen), jax.tree.map(_summed, found, cuts)

        return jax.shard_map(on_each, mesh=mesh, in_specs=(cuts, *specs), out_specs=((P(), IMAGES), cuts))(params, *args)

    return share


def host(leaf: Any) -> np.ndarray:
    """An array of the devices, in this process's own memory."""
    return np.asarray(fetched(leaf))


def replaced(array: np.ndarray, k: int, entry: Any) -> np.ndarray:
    """A state on the host with `entry`, an array of the devices, at k."""
    found = np.array(array)
    found[k] = host(entry)
    return found


def _images(axis: int) -> P:
    return P(*[None] * axis, AXES)


def _cut(shape: Sequence[int], mesh: Mesh) -> P:
    """How a weight of this shape lies: cut along its longest axis that `fsdp` divides, the first of equals; whole where there is none."""
    able = [axis for axis, size in enumerate(shape) if size and size % mesh.shape[FSDP] == 0]
    if mesh.shape[FSDP] == 1 or not able:
        return P()
    return P(*[None] * max(able, key=lambda axis: shape[axis]), FSDP)


def _joined(leaf: Any, cut: P) -> Any:
    """The whole weight, this device's own."""
    if cut:
        leaf = jax.lax.all_gather(leaf, FSDP, axis=len(cut) - 1, tiled=True)
    return jax.lax.pcast(leaf, (DATA,) if cut else AXES, to="varying")


def _summed(leaf: Any, cut: P) -> Any:
    """(2), of which this device has its part."""
    if not cut:
        return jax.lax.psum(leaf, AXES)
    return jax.lax.psum(jax.lax.psum_scatter(leaf, FSDP, scatter_dimension=len(cut) - 1, tiled=True), DATA)


def of(tree: Any) -> Mesh | None:
    """The mesh on which an array of the tree lies."""
    shardings = [leaf.sharding for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    meshes = [sharding.mesh for sharding in shardings if isinstance(sharding, NamedSharding)]
    return next((mesh for mesh in meshes if isinstance(mesh, Mesh)), None)
