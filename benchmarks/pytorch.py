"""A network's forward pass and vjp in JAX against PyTorch, in the same run, on the same weights and with as many threads.

    python benchmarks/pytorch.py --out runs/pytorch

Networks: `UNet2D` in the configuration of google/ddpm-cifar10-32 (random weights; the original is diffusers') and the 64 x 64 UNet of
`examples/own_network/unet64.py` (its torch twin is below). JAX runs each plainly and inside a loop's body, with its convolutions in order, as
adjoint_jax's loops run it. Times are minima of runs that take turns; prints ratios, and milliseconds on a GPU, and writes them to `pytorch.md`.
"""

import itertools
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]
import tyro
from costs import table
from problems import PROBLEMS

sys.path.append(str(Path(__file__).parent.parent / "examples"))
from own_network.unet64 import ATTENTION, BLOCKS, GROUPS, WIDTHS

from adjoint_jax._traced import in_order
from adjoint_jax.checkpoints import _models, _rules

CIFAR = {
    "_class_name": "UNet2DModel",
    "block_out_channels": [128, 256, 256, 256],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}


@dataclass(frozen=True)
class Config:
    out: Path = Path("runs/pytorch")
    shared: Path = Path("../shared/data")
    networks: tuple[str, ...] = ("cifar", "unet64")
    batches: tuple[int, ...] = (1, 4)
    threads: int = 1
    """Of a CPU, for both."""
    trips: int = 4
    """Of JAX's loop; its time is divided by them."""
    rounds: int = 5
    tf32: bool = True
    """On a GPU, for both: products of float32 in TensorFloat-32."""


class Pair(NamedTuple):
    """A network twice: `ours(params, x)` with x `[B, H, W, 3]`, and `theirs(x)` with x `[B, 3, H, W]`."""

    ours: Callable
    params: Any
    theirs: Callable
    size: int


def cifar(config: Config, device: str) -> Pair:
    from diffusers import UNet2DModel  # pyright: ignore

    torch.manual_seed(0)
    model: Any = UNet2DModel(**{key: value for key, value in CIFAR.items() if key != "_class_name"}).eval().requires_grad_(False)
    module, shapes = _models.read(CIFAR, "ddpm-cifar10-32")
    named = [(name, tensor.numpy()) for name, tensor in model.state_dict().items()]
    params = _rules.to_flax(_models.family_of(module), shapes, named, "diffusers", jnp.float32)
    model, t = model.to(device=device), torch.tensor(500.0, device=device)
    return Pair(lambda params, x: module.apply({"params": params}, x, jnp.float32(500.0)), params, lambda x: model(x, t).sample, 32)


def unet64(config: Config, device: str) -> Pair:
    problem = PROBLEMS["unet64"](config.shared, 1, 0)
    params = problem.args["params"]
    theirs = twin({name: torch.from_numpy(np.array(leaf)).to(device) for name, leaf in params.items()})
    return Pair(lambda params, x: problem.term.network(x, jnp.float32(150.0), {"params": params}), params, lambda x: theirs(x, 150.0), 64)


NETWORKS = {"cifar": cifar, "unet64": unet64}


def twin(params: dict[str, Any]) -> Callable:
    """`unet64` in torch's layout and words: layers take their weights in the order in which they are made."""
    of_torch = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}
    weights = {name: leaf.permute(of_torch[leaf.ndim]).contiguous() for name, leaf in params.items()}

    def network(x: Any, t: float) -> Any:
        counts = {kind: itertools.count() for kind in ("conv", "dense", "gn")}

        def taken(kind: str, part: str) -> tuple[Any, Any]:
            i = next(counts[kind])
            return weights[f"{kind}/{i}/{part}"], weights[f"{kind}/{i}/bias"]

        def conv(x: Any, stride: int = 1) -> Any:
            weight, bias = taken("conv", "kernel")
            if stride == 2:
                return F.conv2d(F.pad(x, (0, 1, 0, 1)), weight, bias, 2)
            return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)

        dense = lambda x: F.linear(x, *taken("dense", "kernel"))  # noqa: E731
        norm = lambda x: F.group_norm(x, GROUPS, *taken("gn", "scale"), eps=1e-3)  # noqa: E731
        angle = t * torch.exp(-np.log(1e4) * torch.arange(128, device=x.device) / 127)
        time = dense(F.silu(dense(torch.cat([torch.sin(angle), torch.cos(angle)])[None])))

        def block(x: Any, width: int, attend: bool) -> Any:
            shortcut = x if x.shape[1] == width else conv(x)
            shift = dense(F.silu(time))[:, :, None, None]
            x = shortcut + conv(F.silu(norm(conv(F.silu(norm(x))) + shift)))
            return attention(norm(x)) if attend else x

        def attention(x: Any) -> Any:
            flat = x.flatten(2).transpose(1, 2)
            q, k, v = dense(flat), dense(flat), dense(flat)
            mixed = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
            return x + dense(mixed).transpose(1, 2).reshape(x.shape)

        x = conv(x)
        skips = [x]
        for i, width in enumerate(WIDTHS):
            for _ in range(BLOCKS):
                x = block(x, width, i in ATTENTION)
                skips.append(x)
            if i < len(WIDTHS) - 1:
                x = conv(x, stride=2)
                skips.append(x)
        x = block(block(x, WIDTHS[-1], True), WIDTHS[-1], False)
        for i, width in reversed(list(enumerate(WIDTHS))):
            for _ in range(BLOCKS + 1):
                x = block(torch.cat([x, skips.pop()], 1), width, i in ATTENTION)
            if i:
                x = conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return conv(F.silu(norm(x)))

    return network


def programs(pair: Pair, x: np.ndarray, cotangent: np.ndarray, trips: int, device: str) -> dict[str, Callable]:
    """Forward pass and vjp, each of torch, of JAX plainly, and of JAX in a loop whose state both change, so that nothing moves out of it."""

    def vjp(params: Any, x: Any, c: Any) -> Any:
        y, transpose = jax.vjp(lambda x: pair.ours(params, x), x)
        return y, in_order(transpose)(c)[0]

    def loop(params: Any, x: Any, c: Any, both: bool) -> Any:
        def body(state: Any, _: Any) -> Any:
            x, c = state
            y, g = vjp(params, x, c) if both else (in_order(lambda x: pair.ours(params, x))(x), c)
            return (x + 1e-3 * y, c + 1e-3 * g if both else c), None

        return jax.lax.scan(body, (x, c), None, trips)[0]

    nchw = lambda x: torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1))).to(device)  # noqa: E731
    x_torch, c_torch = nchw(x), nchw(cotangent)

    def forward_torch() -> Any:
        with torch.no_grad():
            return pair.theirs(x_torch)

    def vjp_torch() -> Any:
        leaf = x_torch.detach().requires_grad_()
        y = pair.theirs(leaf)
        return y.detach(), torch.autograd.grad(y, leaf, c_torch)[0]

    args = (pair.params, jnp.asarray(x), jnp.asarray(cotangent))
    jitted = {
        "forward, JAX": jax.jit(lambda params, x, c: pair.ours(params, x)),
        "vjp, JAX": jax.jit(lambda params, x, c: (lambda y, transpose: (y, transpose(c)[0]))(*jax.vjp(lambda x: pair.ours(params, x), x))),
        "forward, JAX in a loop": jax.jit(lambda params, x, c: loop(params, x, c, False)),
        "vjp, JAX in a loop": jax.jit(lambda params, x, c: loop(params, x, c, True)),
    }
    ready = {name: (lambda compiled: lambda: jax.block_until_ready(compiled(*args)))(f.lower(*args).compile()) for name, f in jitted.items()}
    return {"forward, torch": forward_torch, "vjp, torch": vjp_torch, **ready}


def fastest(runs: dict[str, Callable], rounds: int, wait: Callable) -> dict[str, float]:
    """The least seconds of each, all of them run once in every round."""
    least = dict.fromkeys(runs, np.inf)
    for turn in range(rounds + 1):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            wait()
            if turn:  # the first warms up
                least[name] = min(least[name], time.perf_counter() - begin)
    return least


def difference(ours: Any, theirs: Any) -> float:
    ours, theirs = np.moveaxis(np.asarray(ours), -1, 1), theirs.cpu().numpy()
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def measure(config: Config, name: str, batch: int, pair: Pair, device: str) -> list[list[str]]:
    """A row for each program of a network and a batch; prints by how much the two answer differently."""
    rng = np.random.default_rng(0)
    x, cotangent = (rng.normal(size=(batch, pair.size, pair.size, 3)).astype(np.float32) for _ in range(2))
    runs = programs(pair, x, cotangent, config.trips, device)
    (y, gradient), (y_torch, gradient_torch) = runs["vjp, JAX"](), runs["vjp, torch"]()
    print(f"{name}, batch {batch}: the two differ by {difference(y, y_torch):.1e}, their gradients by {difference(gradient, gradient_torch):.1e}")
    least = fastest(runs, config.rounds, torch.cuda.synchronize if device == "cuda" else lambda: None)
    rows = []
    for kind, seconds in least.items():
        seconds /= config.trips if "loop" in kind else 1
        ratio = seconds / least[f"{kind.split(',')[0]}, torch"]
        rows.append([f"{name}, batch {batch}", kind, f"{ratio:.2f}", *([f"{1e3 * seconds:.2f}"] if device == "cuda" else [])])
    return rows


def main(config: Config) -> None:
    device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.tf32
    jax.config.update("jax_default_matmul_precision", "tensorfloat32" if config.tf32 and device == "cuda" else "float32")
    rows = []
    for name in config.networks:
        pair = NETWORKS[name](config, device)
        for batch in config.batches:
            rows += measure(config, name, batch, pair, device)
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {config.threads} thread(s)"
    head = ["network", "program", "time / torch's", *(["ms"] if device == "cuda" else [])]
    report = f"{where}; torch {torch.__version__}, jax {jax.__version__}, float32\n\n{table(head, rows)}\n"
    print(report)
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "pytorch.md").write_text(report)


if __name__ == "__main__":
    settings = tyro.cli(Config)
    if hasattr(os, "sched_setaffinity"):  # XLA makes as many threads as it may use cores, when its first program is made
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: settings.threads])
    torch.set_num_threads(settings.threads)
    main(settings)
