"""A class-conditional vision transformer for rectified flow on MNIST, from its published weights (`mnist_flow_vit.npz` of the shared data).

It was trained on x_s = s x1 + (1 - s) noise and predicts x1, the clean image in [0, 1]: with `aj.FlowMatching()`, t = 1 - s, it predicts "x0".
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import adjoint_jax as aj

PATCH, HEADS, LAYERS, NULL = 7, 4, 4, 10


def load_flow_vit(path: str | Path) -> tuple[aj.DiffusionTerm, dict[str, Any]]:
    """The term and the weights: `aj.sample(term, x_T, {"params": weights, "cond": labels}, ...)`, x_T `[B, 28, 28, 1]`."""
    with np.load(path) as file:
        params = {name: jnp.asarray(value) for name, value in file.items()}
    return aj.DiffusionTerm(flow_vit, aj.FlowMatching(), "x0"), params


def chosen_flow_vit(path: str, checkpoint: str | None) -> tuple[aj.DiffusionTerm, dict[str, Any]]:
    """The same by options of a command. Raises ValueError for a file that is absent, and beside a checkpoint."""
    if checkpoint is not None or not Path(path).is_file():
        raise ValueError(f"--flow-vit takes the place of --checkpoint, and names mnist_flow_vit.npz of the shared data; got {path}.")
    return load_flow_vit(path)


def flow_vit(x: Any, t: Any, args: Any) -> Any:
    """The clean image; args["cond"] is a label, `[B]` labels (10 is the null class), or embeddings `[B, 128]` in their place."""
    params, cond = args["params"], args["cond"]
    cond = jnp.asarray(cond)
    if jnp.issubdtype(cond.dtype, jnp.integer):
        cond = params["y_encoder.weight"][jnp.broadcast_to(cond, x.shape[:1])]
    batch, side, width = len(x), x.shape[1] // PATCH, params["pos_embed"].shape[-1]
    patches = x.reshape(batch, side, PATCH, side, PATCH).transpose(0, 1, 3, 2, 4).reshape(batch, side**2, PATCH**2)
    tokens = patches @ params["patch_embed.weight"].reshape(width, -1).T + params["patch_embed.bias"] + params["pos_embed"]
    time = jnp.broadcast_to(_waves(1 - jnp.asarray(t, x.dtype), 2 * width), (batch, 2 * width))
    tokens = jnp.concatenate([tokens, time.reshape(batch, 2, width), cond.astype(x.dtype).reshape(batch, 2, width)], axis=1)
    for i in range(LAYERS):
        tokens = _layer(tokens, {name.removeprefix(f"transformer.{i}."): value for name, value in params.items()})
    pixels = tokens[:, : side**2] @ params["unpatch.weight"].reshape(width, -1) + params["unpatch.bias"]
    return pixels.reshape(batch, side, side, PATCH, PATCH).transpose(0, 1, 3, 2, 4).reshape(x.shape)


def _waves(t: Any, width: int) -> Any:
    angle = t * jnp.exp(-jnp.log(1e4) * jnp.arange(width // 2) / (width // 2 - 1)).astype(t.dtype)
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)])


def _layer(x: Any, p: dict[str, Any]) -> Any:
    """Attention and two dense layers, each normalised after it is added."""
    batch, length, width = x.shape
    q, k, v = jnp.split((x @ p["self_attn.in_proj_weight"].T + p["self_attn.in_proj_bias"]).reshape(batch, length, 3 * HEADS, -1), 3, axis=2)
    scores = jax.nn.softmax(jnp.einsum("bqhc,bkhc->bhqk", q, k) / np.sqrt(width // HEADS).astype(x.dtype), axis=-1)  # float64 stays float64
    mixed = jnp.einsum("bhqk,bkhc->bqhc", scores, v).reshape(batch, length, width)
    x = _norm(x + mixed @ p["self_attn.out_proj.weight"].T + p["self_attn.out_proj.bias"], p["norm1.weight"], p["norm1.bias"])
    inner = jax.nn.gelu(x @ p["linear1.weight"].T + p["linear1.bias"], approximate=False)
    return _norm(x + inner @ p["linear2.weight"].T + p["linear2.bias"], p["norm2.weight"], p["norm2.bias"])


def _norm(x: Any, weight: Any, bias: Any) -> Any:
    return jax.nn.standardize(x, axis=-1, epsilon=1e-5) * weight + bias
