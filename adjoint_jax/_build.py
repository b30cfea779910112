"""From the options of the command line to samplers, metrics, adjoints and optimisers. Each misfit is one sentence; nothing is ignored in silence."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax

from . import _prompted, _scoring, checkpoints, grids
from ._misfits import at_least, finite, known, made, positive
from ._options import Guide, Sample
from ._prompted import Opened
from .adjoints import AdjointDEIS
from .checkpoints import _files as layout
from .experiments import mesh
from .experiments.engines import ADJOINTS
from .experiments.options import recorded
from .experiments.projections import PROJECTIONS, projection
from .guide import Given, Sampler, Steering, Variables
from .solvers import DDIM, DEIS, DPMSolverPP, Exponential, ExponentialRK, SDEDPMSolverPP

DIGITS = checkpoints.EMBEDDED / "digits"
SIZE, LABEL = 28, 3
"""Of the embedded digits: pixels, and the default class to start from."""

SAMPLERS: dict[str, tuple[Callable, tuple[str, ...]]] = {
    "ddim": (DDIM, ("eta",)),
    "deis": (DEIS, ("order",)),
    "dpmpp": (DPMSolverPP, ("order",)),
    "exponential": (Exponential, ("order", "sigma_data", "tau")),
    "heun": (partial(ExponentialRK, diffrax.Heun()), ("sigma_data",)),
    "sde-dpmpp": (SDEDPMSolverPP, ("order", "tau")),
}
GRIDS = ("uniform", "quadratic", "log_snr", "karras", "edm", "beta", "vp", "angle", "shifted", "linspace", "trailing", "leading")
DRIVES = {"noise": "x_T", "injected": "noise", "embedding": "embedding"}
OPTIMISERS = ("adam", "adabelief", "adagrad", "adamax", "amsgrad", "lion", "nadam", "radam", "rmsprop", "sgd", "sign_sgd", "yogi")


def sampler(options: Sample) -> tuple[Sampler, Given, Variables]:
    """What is sampled, from which arrays, and the noise and embedding to start from, laid out on the devices."""
    at_least(options, 1, "batch", "steps", "size")
    at_least(options, 0, "seed")
    finite(options, "guidance")
    devices = mesh.make(options.mesh, options.batch)
    solver = made("sampler", options.sampler, SAMPLERS, "", options)
    grid = getattr(grids, known("grid", options.grid, GRIDS))
    path = DIGITS if options.checkpoint is None else checkpoints.fetched(options.checkpoint)
    opened = (_prompted.opened if _prompted.takes_text(path) else _opened)(options, path)
    times = grids.check(opened.process, grid(opened.process, options.steps, t_start=options.t_start, t_end=options.t_end))
    sampling = opened.sampler(times, solver)
    variables = sampling.noises(jax.random.key(options.seed), (options.batch, *opened.shape))
    if opened.embedding is not None:
        variables["embedding"] = jax.tree.map(lambda each: jnp.repeat(each[None], options.batch, axis=0), opened.embedding)
    rest = mesh.everywhere(Given(None, jnp.float32(options.guidance), opened.null, None), devices)
    return sampling, rest._replace(params=mesh.weights(opened.params, devices)), mesh.spread(variables, devices)


def _opened(options: Sample, path: Path) -> Opened:
    """A network of classes, or an unconditional one."""
    _prompted.refuse_text(options, path)
    network, params, process, prediction = checkpoints.load(path)
    shape = image_shape(options, path, params)
    embedding, null = _embedding(options, params)
    if embedding is None and options.guidance != 1:
        raise ValueError("This checkpoint is unconditional: --guidance needs classes.")
    return Opened(partial(Sampler, network, process, prediction, guided=options.guidance != 1), process, params, embedding, null, shape)


def _embedding(options: Sample, params: Any) -> tuple[Any, Any]:
    """The class embedding `[E]` of the label, and that of the null class; None for an unconditional network."""
    table = params.get("class_embedding", {}).get("embedding")
    if table is None:
        if "class_embedding" in params:
            raise ValueError("This checkpoint computes its class embedding instead of looking it up in a table: only tables can be driven.")
        if options.label is not None:
            raise ValueError("This checkpoint is unconditional: leave --label out.")
        return None, None
    label = LABEL if options.label is None and options.checkpoint is None else options.label
    if label is None or not 0 <= label < len(table):
        raise ValueError(f"This checkpoint has the classes 0 to {len(table) - 1}; got --label {label}: give one of them.")
    return table[label], table[-1]


def image_shape(options: Any, path: Path, params: Any) -> tuple[int, ...]:
    """`[H, W, C]` of what a UNet2D samples."""
    if "conv_in" not in params:
        raise ValueError(f"{path} holds no UNet2D: the command line samples UNets of classes, or a Stable Diffusion folder by --prompt.")
    size = options.size or layout.read_json(layout.folders(path)[0] / layout.CONFIG).get("sample_size")
    if size is None and options.checkpoint is None:
        size = SIZE
    if size is None:
        raise ValueError(f"{path} does not say how large its images are: give --size in pixels.")
    return (*np.broadcast_to(size, 2).tolist(), params["conv_in"]["kernel"].shape[2])


def optimiser(options: Guide, learning_rate: Any = None) -> optax.GradientTransformation:
    """The optimiser of the options, at another learning rate if one is given."""
    positive(options, "learning_rate")
    rate = options.learning_rate if learning_rate is None else learning_rate
    return getattr(optax, known("optimiser", options.optimiser, OPTIMISERS))(rate)


def steering(options: Guide) -> tuple[Steering, Given, Variables]:
    """What is steered, the arrays that stay, and those to start from."""
    at_least(options, 1, "iterations", "save_every", "adjoint_steps")
    at_least(options, 0, "penalty")
    adjoint = made("adjoint", options.adjoint, ADJOINTS, "adjoint_", options)
    names = "noise+embedding" if options.drive == "both" else options.drive
    driven = tuple(DRIVES[known("drive", name, [*DRIVES, "both"])] for name in names.split("+"))
    projection(known("project", options.project, list(PROJECTIONS)), options.radius)
    sampling, given, variables = sampler(options)
    if "embedding" in driven and "embedding" not in variables:
        raise ValueError("This checkpoint is unconditional and has no embedding to drive: use --drive noise.")
    if driven == ("embedding",) and (options.project not in ("shell", "none") or options.radius is not None or options.penalty):
        raise ValueError("--project, --radius and --penalty are of noise, and --drive embedding leaves it alone: leave them out.")
    if "noise" in driven and "noise" not in variables:
        raise ValueError(f"--sampler {options.sampler} injects no noise here: use sde-dpmpp, or ddim with --eta 1, or leave injected out of --drive.")
    metric = _scoring.metric(options, sampling.like(variables["x_T"]))
    given = given._replace(metric=mesh.everywhere(metric, mesh.of(variables)))
    steered = Steering(sampling, adjoint, optimiser(options), driven, options.project, options.radius, options.penalty)
    return steered, given, variables


describe, target = _scoring.describe, _scoring.target


def compared(options: Guide, steered: Steering) -> dict[str, diffrax.AbstractAdjoint | str]:
    """The adjoint that was used, and the continuous one at half the steps."""
    fewer = max(1, options.steps // 2)
    given = {key.removeprefix("adjoint_"): value for key, value in recorded(options).items() if key.startswith("adjoint_")}
    used = f"{options.adjoint}({', '.join(f'{key}={value}' for key, value in given.items() if value is not None)}), used"
    return {used: steered.adjoint, f"AdjointDEIS(steps={fewer})": AdjointDEIS(steps=fewer)}
