"""Files of EDM's `SongUNet` and `DhariwalUNet`: the tensors of the original, in safetensors, and a `config.json` that their owner writes.

The original pickles its networks. Where it is installed, one that is loaded as `net` becomes a folder by

    safetensors.torch.save_file(net.state_dict(), "folder/model.safetensors")
    json.dump({"_class_name": type(net.model).__name__, "precond": "edm", **net.init_kwargs}, open("folder/config.json", "w"))

with precond "edm", "vp" or "ve" for EDMPrecond, VPPrecond or VEPrecond. With sigma the noise level and also the time of the process `EDM()`, the
network F is wrapped to the denoiser D of table 1 of Karras et al. (2022):

    edm    D = c_skip x + c_out F(c_in x, log(sigma)/4)                                       predicts "x0"            (1)
    vp     D = x - sigma F(x / sqrt(1 + sigma^2), (M - 1) t(sigma)),
           t = (sqrt(beta_min^2 + 2 beta_d log(1 + sigma^2)) - beta_min) / beta_d             F is the "eps"           (2)
    ve     D = x + sigma F(x, log(sigma/2))                                                   -F is the "eps"          (3)
"""

import math
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from ...models import DhariwalUNet, SongUNet
from ...networks import edm_precondition, linen
from ...processes import EDM
from .._family import Family, Named

PREDICTED = {"edm": "x0", "vp": "eps", "ve": "eps"}
NEEDED = ("img_resolution", "in_channels", "out_channels")
EXAMPLE = '{"_class_name": "SongUNet", "precond": "edm", "img_resolution": 32, "in_channels": 3, "out_channels": 3, "channel_mult": [2, 2, 2]}'


def to_fields(config: dict[str, Any]) -> dict[str, Any]:
    """The preconditioned networks of the original count in `img_channels`. Nothing is guessed from the tensors."""
    channels = config.get("img_channels")
    fields = ({} if channels is None else {"in_channels": channels, "out_channels": channels}) | config
    fields.pop("img_channels", None)
    if missing := [name for name in NEEDED if name not in fields]:
        name = config.get("_class_name")
        raise ValueError(f"The configuration of a {name} lacks {', '.join(missing)}: write the options of its training, for example {EXAMPLE}.")
    return fields


def tensors(module: SongUNet | DhariwalUNet) -> Any:
    """The tensors without the wrapper's prefix and without the filters, constants that the configuration tells; another filter is refused."""
    taps = np.asarray(getattr(module, "resample_filter", (1, 1)), np.float64)
    expected = (np.outer(taps, taps) / taps.sum() ** 2)[None, None]

    def stripped(named: Named) -> Named:
        prefix = "model." if all(name.startswith("model.") for name, _ in named) else ""
        kept = [(name.removeprefix(prefix), tensor) for name, tensor in named]
        for name, tensor in kept:
            if name.endswith(".resample_filter") and (tensor.shape != expected.shape or not np.allclose(tensor, expected, rtol=1e-3)):
                found = np.asarray(tensor, np.float64).squeeze().round(4).tolist()
                raise ValueError(f"{name} is {found}, not that of resample_filter={taps.tolist()}: write the taps of its training into config.json.")
        return [(name, tensor) for name, tensor in kept if not name.endswith(".resample_filter")]

    return stripped


def process(module: SongUNet | DhariwalUNet, scheduler: dict[str, Any]) -> tuple[EDM, str]:
    """The process and the prediction of the preconditioned network."""
    if module.precond not in PREDICTED:
        raise ValueError(f"precond={module.precond!r} is no preconditioning: write one of {list(PREDICTED)} into config.json, for example {EXAMPLE}.")
    if scheduler:
        raise ValueError("A preconditioned network has the process EDM() and no scheduler: remove scheduler_config.json, or use load_model.")
    return EDM(), PREDICTED[module.precond]


class _Noise(eqx.Module):
    """(2) or (3): the raw network as one that predicts "eps" at t = sigma."""

    network: Any
    betas: tuple[float, float] | None = eqx.field(static=True)
    steps: int = eqx.field(static=True)

    def __call__(self, x: Any, t: Any, args: Any) -> Any:
        sigma = jnp.asarray(t, x.dtype)
        if self.betas is None:
            return -self.network(x, jnp.log(sigma) - math.log(2), args)  # (3)
        (rise, start), log = self.betas, jnp.log1p(sigma**2)
        time = 2 * log / (jnp.sqrt(start**2 + 2 * rise * log) + start)  # (2) without its difference
        return self.network(x / jnp.sqrt(1 + sigma**2), (self.steps - 1) * time, args)


def adapt(module: SongUNet | DhariwalUNet) -> Any:
    """The module preconditioned, (1)-(3)."""
    network = linen(module)
    if module.precond == "edm":
        return edm_precondition(network, module.sigma_data)
    return _Noise(network, (module.beta_d, module.beta_min) if module.precond == "vp" else None, module.M)


# Bounds of sigma and of time in training, and float16 in the network, change no number that is computed here.
FAMILIES = tuple(
    Family(
        module,
        module.__name__,
        fixed={"model_type": (module.__name__,)},
        ignored=("use_fp16", "sigma_min", "sigma_max", "epsilon_t"),
        to_fields=to_fields,
        tensors_of=tensors,
        adapt=adapt,
        process=process,
    )
    for module in (SongUNet, DhariwalUNet)
)
