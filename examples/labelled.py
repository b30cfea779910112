"""A sampler that draws images of classes that are asked for: the embedded digits, or a checkpoint with a table of class embeddings."""

from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
from jax.sharding import Mesh

from adjoint_jax import _build, checkpoints, grids
from adjoint_jax.experiments import mesh
from adjoint_jax.guide import Given, Sampler


class Sampling(Protocol):
    """What has to be told."""

    @property
    def checkpoint(self) -> str | None: ...
    @property
    def size(self) -> int | None: ...


class Labelled(NamedTuple):
    """`network(x, t, {"params": params, "cond": labels or embeddings})` with `process` and `prediction`; `table` `[classes + 1, E]`, the null class
    last; the `shape` `[H, W, C]` of an image."""

    network: Any
    params: Any
    process: Any
    prediction: str
    table: Any
    shape: tuple[int, ...]

    @property
    def classes(self) -> int:
        return len(self.table) - 1

    def sampler(self, solver: Any, steps: int, guidance: float, devices: Mesh | None = None) -> tuple[Sampler, Given]:
        """On a grid even in lam, the arrays laid out on `devices`; without a metric yet."""
        grid = grids.log_snr(self.process, steps)
        sampler = Sampler(self.network, self.process, self.prediction, grid, solver, guided=guidance != 1)
        params, (scale, null) = mesh.weights(self.params, devices), mesh.everywhere((jnp.float32(guidance), self.table[-1]), devices)
        return sampler, Given(params, scale, null, None)


def labelled(options: Sampling) -> Labelled:
    """The checkpoint `options.checkpoint`, by default the embedded digits. Raises ValueError for one without a table of classes."""
    path = _build.DIGITS if options.checkpoint is None else checkpoints.fetched(options.checkpoint)
    network, params, process, prediction = checkpoints.load(path)
    table = params.get("class_embedding", {}).get("embedding")
    if table is None:
        raise ValueError(f"{path} has no table of class embeddings: give a checkpoint that is asked for classes.")
    shape = _build.image_shape(options, path, params)
    return Labelled(network, params, process, prediction, table, shape)
