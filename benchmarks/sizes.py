"""Gradient memory of networks of published sizes, planned from their shapes alone: no weights, nothing run.

    python benchmarks/sizes.py                                  all, float32, an hour's compilation on two cores
    python benchmarks/sizes.py --networks sd15 --pixels 512     one
    python benchmarks/sizes.py --dtype bfloat16 --remat

Each row of a plan is the temporaries of the gradient in (x_T, condition) of a sample of one image, beside the weights, by the programs of the
backend it runs on. `--remat` recomputes each block in the backward pass. A CPU has no fused attention: it holds the matrix of an attention, heads
x tokens x tokens, which a GPU does not.
"""

import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import tyro

import adjoint_jax as aj
from adjoint_jax.checkpoints._adapters import FirstChannels
from adjoint_jax.models import ADM, SD3Transformer, UNet2DCondition

SDXL_CONDITIONS = {"encoder_hidden_states": (1, 77, 2048), "text_embeds": (1, 1280), "time_ids": (1, 6)}
NETWORKS: dict[str, tuple[Any, Any, int]] = {
    "sd15": (UNet2DCondition(cross_attention_dim=768), (1, 77, 768), 8),
    "sdxl": (
        UNet2DCondition(
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        ),
        SDXL_CONDITIONS,
        8,
    ),
    "sd3-medium": (
        SD3Transformer(num_layers=24, num_attention_heads=24, pos_embed_max_size=192, caption_projection_dim=1536, sample_size=128),
        {"encoder_hidden_states": (1, 333, 4096), "pooled_projections": (1, 2048)},
        8,
    ),
    "adm-256": (
        ADM(
            image_size=256,
            model_channels=256,
            out_channels=6,
            num_res_blocks=2,
            attention_resolutions=(8, 16, 32),
            channel_mult=(1, 1, 2, 2, 4, 4),
            num_head_channels=64,
            use_scale_shift_norm=True,
            resblock_updown=True,
        ),
        None,
        1,
    ),
}
"""The module, the shapes of its condition, and how many pixels of the image are one of x, along a side."""


@dataclass(frozen=True)
class Config:
    networks: tuple[str, ...] = tuple(NETWORKS)
    pixels: tuple[int, ...] = (512, 1024)
    """Of a side of the image."""
    steps: int = 20
    dtype: str = "float32"
    """Of the weights and conditions; the state is float32."""
    remat: bool = False
    gib: float = 80.0
    """The budget."""


def abstract(shapes: Any, dtype: Any) -> Any:
    """Arrays in place of their shapes."""
    return jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, dtype), shapes, is_leaf=lambda leaf: isinstance(leaf, tuple))


def main(config: Config) -> None:
    jax.config.update("jax_disable_most_optimizations", True)  # of the machine code alone: what is kept in memory is decided before
    process, dtype = aj.VPLinear(), jnp.dtype(config.dtype)
    grid = aj.grids.log_snr(process, config.steps)
    print(f"{config.dtype}, remat={config.remat}, {config.steps} steps, one image, {jax.default_backend()}")
    for name in config.networks:
        module, condition, factor = NETWORKS[name]
        module = module.clone(remat=config.remat)
        params = jax.eval_shape(module.init, jax.random.key(0), *module.dummy_inputs)["params"]
        count = sum(leaf.size for leaf in jax.tree.leaves(params))
        params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), params)
        term = aj.DiffusionTerm(FirstChannels(aj.linen(module), module.in_channels), process, "eps")
        args = {"params": params} | ({} if condition is None else {"cond": abstract(condition, dtype)})
        wrt = ("x_T",) if condition is None else ("x_T", "args['cond']")
        for pixels in config.pixels:
            side, began = pixels // factor, time.time()
            x = jax.ShapeDtypeStruct((1, side, side, module.in_channels), jnp.float32)
            plan = aj.plan(term, x, args, grid=grid, budget_bytes=int(config.gib * 2**30), wrt=wrt)
            weights, seconds = f"{count} parameters ({count * dtype.itemsize / 2**30:.2f} GiB)", time.time() - began
            print(f"\n{name}, x {x.shape}, {weights}, planned in {seconds:.0f} s\n\n{plan}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Config))
