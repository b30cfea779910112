"""The options of the command line: two frozen dataclasses, whose defaults a TOML file may change."""

import dataclasses
import tomllib
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Sample:
    """Draws samples and writes samples.png and samples.npz."""

    config: str | None = None
    """A TOML file of options, snake_case, that differ from the defaults; flags override it."""
    out: str = "runs/sample"
    """The folder to write; must be absent or empty."""
    checkpoint: str | None = None
    """A folder in diffusers' layout, or the id org/name of one on the Hugging Face hub; by default the embedded digits."""
    size: int | None = None
    """Height and width of the images in pixels; by default the checkpoint's sample_size."""
    label: int | None = None
    """The class that is sampled; by default 3 for the embedded digits, none for an unconditional network."""
    guidance: float = 1.0
    """Scale of classifier-free guidance, with the last class as the null one; 1 is none and takes half the work."""
    sampler: str = "dpmpp"
    """ddim, deis, dpmpp, exponential or heun."""
    order: int | None = None
    """Order of deis, dpmpp and exponential; by default 3, 2 and 2."""
    sigma_data: float | None = None
    """Assumed standard deviation of the data: the frame of exponential (1 by default) and heun (infinite by default)."""
    grid: str = "log_snr"
    """uniform, quadratic, log_snr, karras, edm, angle, trailing or leading."""
    steps: int = 12
    """Steps of the sampler."""
    t_start: float | None = None
    """Where the grid starts, in the process's own time; by default at its noise end."""
    t_end: float | None = None
    """Where the grid ends; by default at the process's data end."""
    batch: int = 16
    """Number of images."""
    seed: int = 0
    """Seed of the noise."""


@dataclass(frozen=True)
class Guide(Sample):
    """Drives the noise and/or the class embedding by gradient through the whole sampler, so that a metric of the images rises."""

    out: str = "runs/guide"
    """The folder to write; must be absent or empty, or hold the run to --resume."""
    resume: bool = False
    """Continue the run in --out where its last save left it; starts it where there is none."""
    metric: str = "classifier"
    """classifier, image, or module:function with images [B, H, W, C] in [-1, 1] -> scores [B], higher is better."""
    target: int | None = None
    """The class whose log-probability the metric classifier is; by default 8 for the embedded classifier."""
    classifier: str | None = None
    """A folder with a ConvClassifier; by default the embedded one."""
    target_image: str | None = None
    """The PNG whose mean squared distance, negated, the metric image is."""
    drive: str = "noise"
    """noise, embedding or both."""
    project: str = "shell"
    """shell keeps the noise at the norm of Gaussian noise after each update, none does not."""
    adjoint: str = "discrete"
    """discrete (exact), direct (exact, all in memory), deis, or published (AdjointDEIS as published)."""
    adjoint_steps: int | None = None
    """Steps of the adjoints deis and published; by default those of the sampler."""
    adjoint_order: int | None = None
    """Order of deis (1 to 4, by default 3) and published (1 or 2, by default 2)."""
    adjoint_sigma_data: float | None = None
    """The frame of deis, by default 1."""
    optimiser: str = "adam"
    """adam, adabelief, adagrad, adamax, amsgrad, lion, nadam, radam, rmsprop, sgd, sign_sgd or yogi, of optax."""
    learning_rate: float = 0.05
    """Learning rate of the optimiser."""
    iterations: int = 25
    """Updates."""
    save_every: int = 5
    """Iterations between saves of the state that --resume starts from."""


@dataclass(frozen=True)
class Convert:
    """Writes a checkpoint of another project or layout as a folder in diffusers' layout."""

    source: str
    """A folder in diffusers' layout or the id org/name of one on the hub; or one file, .safetensors, .ckpt or .pt: of Stable Diffusion 1, 2 or XL,
    guided-diffusion, DiffAE or EDM."""
    target: str
    """The folder to write; must be absent or empty."""
    kind: str | None = None
    """ldm (Stable Diffusion) or the class of a network, ADM, DiffAE and so on; by default recognised by the tensors' names."""
    config: str | None = None
    """A JSON file of entries of the configuration, which the tensors' shapes do not tell; for Stable Diffusion by component, {"unet": {...}}."""
    variant: str | None = None
    """Which of a folder's several weights, fp16 or bf16; by default those in full precision."""
    dtype: str | None = None
    """float32, float16 or bfloat16, to cast to; by default each tensor keeps its own."""
    weights: str = "ema"
    """ema or raw: which of two sets of weights in one file."""
    prediction: str | None = None
    """epsilon or v_prediction: what a Stable Diffusion predicts; has to be given for version 2."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    local_files_only: bool = False
    """Take what is in the hub's cache and ask nobody."""


KINDS = {"guide": Guide, "sample": Sample, "convert": Convert}
UNSAVED = ("config", "out", "resume", "save_every")


def read_config(path: str, kind: type) -> dict[str, Any]:
    """The options in a TOML file. Raises ValueError for an unknown key or a value of another type than the option's."""
    try:
        values = tomllib.loads(Path(path).read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}.") from error
    hints = {name: hint for name, hint in typing.get_type_hints(kind).items() if name not in ("config", "resume")}
    if unknown := [key for key in values if key not in hints]:
        raise ValueError(f"{path} has the unknown key{'s' * (len(unknown) > 1)} {', '.join(unknown)}: known are {', '.join(hints)}.")
    for key, value in values.items():
        allowed = typing.get_args(hints[key]) if isinstance(hints[key], types.UnionType) else (hints[key],)
        if float in allowed and type(value) is int:
            values[key] = float(value)
        elif type(value) not in allowed:
            wanted = " or ".join(each.__name__ for each in allowed if each is not types.NoneType)
            raise ValueError(f"{path} has {key} = {value!r} where {'an' if wanted[0] in 'aeiou' else 'a'} {wanted} was expected.")
    return values


def recorded(options: Sample) -> dict[str, Any]:
    """The options that decide what a run computes."""
    return {key: value for key, value in dataclasses.asdict(options).items() if key not in UNSAVED}
