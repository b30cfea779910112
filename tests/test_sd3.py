"""SD3Transformer gives what diffusers' SD3Transformer2DModel gives, gradients and files included; and says what does not fit."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest

from adjoint_jax.checkpoints import _models, load_model, save
from adjoint_jax.models import SD3Transformer
from adjoint_jax.models.sd3._blocks import Block, position_table

BASE = {
    "sample_size": 12,
    "in_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 6,
    "out_channels": 4,
    "pos_embed_max_size": 9,
}
CASES = {
    "3 medium": {},
    "3.5 large": {"qk_norm": "rms_norm", "patch_size": 4, "out_channels": None},
    "3.5 medium": {"qk_norm": "rms_norm", "dual_attention_layers": (0,)},
    "dual, last": {"dual_attention_layers": (0,), "num_layers": 1},
}
TINY = SD3Transformer(**BASE | CASES["3.5 medium"])
TIMES, SIDES = np.array([3.25, 999.0], np.float32), (8, 16)  # oblong: cropped from the middle of the 9 x 9 positions
INPUTS = {
    "x": parity.draws(2, *SIDES, 4),
    "encoder_hidden_states": parity.draws(2, 5, 12, seed=2),
    "pooled_projections": parity.draws(2, 6, seed=3),
    "t": TIMES,
}
COTANGENT = parity.draws(2, *SIDES, 4, seed=1)


@functools.cache
def original(case):
    return parity.randomise(parity.original("diffusers").SD3Transformer2DModel(**BASE | CASES[case]))


@functools.cache
def torch_answer(case):
    """The answer, in NHWC, and the gradients with respect to `INPUTS`."""
    torch = parity.original("torch")
    given = {name: torch.from_numpy(np.array(parity.nchw(a) if name == "x" else a)).requires_grad_() for name, a in INPUTS.items()}
    y = original(case)(given["x"], given["encoder_hidden_states"], given["pooled_projections"], given["t"]).sample
    gradients = torch.autograd.grad(y, list(given.values()), torch.from_numpy(np.array(parity.nchw(COTANGENT))))
    return parity.nhwc(y.detach()), {name: parity.nhwc(g) if name == "x" else g.numpy() for name, g in zip(given, gradients, strict=True)}


def answer(module, params, of_params=False):
    """The answer and the gradients with respect to `INPUTS`, and to the parameters where asked for."""

    def apply(params, inputs):
        cond = {name: inputs[name] for name in ("encoder_hidden_states", "pooled_projections")}
        return module.apply({"params": params}, inputs["x"], inputs["t"], cond)

    def both(params, inputs, cotangent):
        if of_params:
            y, back = jax.vjp(apply, params, inputs)
            return y, *back(cotangent)[::-1]
        y, back = jax.vjp(functools.partial(apply, params), inputs)
        return y, *back(cotangent)

    return jax.jit(both, compiler_options=parity.QUICK)(params, jax.tree.map(jnp.asarray, INPUTS), jnp.asarray(COTANGENT))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """The tiny network of the original's file, and its parameters, of each case."""

    @functools.cache
    def load(case):
        folder = tmp_path_factory.mktemp("sd3")
        original(case).save_pretrained(folder)
        return load_model(folder)

    return load


@pytest.mark.parametrize("case", CASES)
def test_equals_diffusers(loaded, case):
    (y, gradients), (expected, theirs) = answer(*loaded(case)), torch_answer(case)
    assert y.dtype == jnp.float32
    assert parity.relative(y, expected) < 1e-4
    for name in INPUTS:
        assert parity.relative(gradients[name], theirs[name]) < 1e-3, name


def test_diffusers_reads_what_is_saved(tmp_path, loaded):
    module, params = loaded("3.5 medium")
    save(tmp_path / "ours", module, params)
    again = parity.original("diffusers").SD3Transformer2DModel.from_pretrained(tmp_path / "ours")
    assert tuple(again.config.dual_attention_layers) == (0,)
    for name, tensor in parity.tensors(original("3.5 medium")):
        np.testing.assert_array_equal(dict(parity.tensors(again))[name], tensor)


@pytest.mark.parametrize(("case", "i", "scale"), [("3.5 medium", 0, 1.0), ("3.5 large", 0, 1e-3), ("3.5 medium", 1, 1e-3)])
def test_block(loaded, case, i, scale):
    """On its own; tokens near 1e-3 have a variance near the norms' epsilon, and so have queries and keys of layers as small as that."""
    torch, last = parity.original("torch"), i == 1
    theirs, params = copy.deepcopy(original(case).transformer_blocks[i]), loaded(case)[1][f"transformer_blocks_{i}"]
    small = {name: jax.tree.map(lambda leaf: scale * leaf, params["attn"][name]) for name in ("to_q", "to_k", "add_k_proj")}
    params = params | {"attn": params["attn"] | small}
    inputs = scale * parity.draws(2, 6, 16), scale * parity.draws(2, 3, 16, seed=1), parity.draws(2, 16, seed=2)
    with torch.no_grad():
        for name in small:
            for parameter in getattr(theirs.attn, name).parameters():
                parameter.mul_(scale)
        context, x = theirs(*(torch.from_numpy(a) for a in inputs))
    block = Block(heads=2, head_dim=8, norm=True, dual=not last and "medium" in case, last=last)
    ours = jax.jit(block.apply, compiler_options=parity.QUICK)({"params": params}, *(jnp.asarray(a) for a in inputs))
    assert parity.relative(ours[0], x) < 1e-5
    if last:
        assert ours[1] is None
        assert context is None
    else:
        assert parity.relative(ours[1], context) < 1e-5


def test_a_fresh_table_holds_the_sinusoids():
    expected = dict(original("3.5 medium").pos_embed.named_buffers())["pos_embed"].numpy()
    np.testing.assert_allclose(position_table(9, 6, 16, jnp.float32), expected, atol=1e-6)


def test_recomputing_and_the_gradient_in_the_weights(loaded):
    """`remat` changes neither; that of the table of positions is zero, as it is of the text's part of the last block that nobody reads."""
    module, params = loaded("3.5 medium")
    kept, recomputed = (answer(module.clone(remat=remat), params, of_params=True) for remat in (False, True))
    for ours, theirs in zip(jax.tree.leaves(recomputed), jax.tree.leaves(kept), strict=True):
        assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)
    zero = {jax.tree_util.keystr(path, simple=True, separator="/") for path, leaf in jax.tree.leaves_with_path(kept[2]) if not np.any(leaf)}
    unread = {"add_q_proj/bias", "add_q_proj/kernel", "norm_added_q/scale"}
    assert zero == {"pos_embed/pos_embed"} | {f"transformer_blocks_1/attn/{n}" for n in unread}


MEDIUM = {"num_layers": 24, "num_attention_heads": 24, "pos_embed_max_size": 192}
PUBLISHED = {
    "3 medium": (MEDIUM, 2_028_328_000, 56_623_104),
    "3.5 medium": (
        MEDIUM | {"pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))},
        2_243_171_520,
        226_492_416,
    ),
    "3.5 large": ({"num_layers": 38, "num_attention_heads": 38, "pos_embed_max_size": 192, "qk_norm": "rms_norm"}, 8_056_627_520, 89_653_248),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    """Parameters, and the positions, which the original counts as a buffer. Ours are counted on a block of each kind."""
    options, parameters, buffers = PUBLISHED[name]
    options = options | {"caption_projection_dim": 64 * options["num_attention_heads"]}
    duals = len(options.get("dual_attention_layers", ()))
    few = options | {"num_layers": 3, "dual_attention_layers": (0,) if duals else ()}  # dual or plain, plain, last
    counts = {key: sum(leaf.size for leaf in jax.tree.leaves(tree)) for key, tree in _models.shapes(SD3Transformer(**few)).items()}
    kinds = [counts.pop(f"transformer_blocks_{i}") for i in range(3)]
    plain = options["num_layers"] - 1 - duals
    assert sum(counts.values()) + duals * kinds[0] + plain * kinds[1] + kinds[2] == parameters + buffers
    torch, diffusers = parity.original("torch"), parity.original("diffusers")
    with torch.device("meta"):
        model = diffusers.SD3Transformer2DModel(**options)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(b.numel() for b in model.buffers()) == buffers


shapes = functools.cache(_models.shapes)


def out(module, x=(2, 8, 8, 4), t=(), cond=((2, 5, 12), (2, 6)), dtype=jnp.float32, of_cond=jnp.float32):
    """The abstract answer; `cond` is the two shapes, or what is given instead."""
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes(TINY))
    x, t = jax.ShapeDtypeStruct(x, dtype), jax.ShapeDtypeStruct(t, jnp.float32)
    if isinstance(cond, tuple):
        arrays = [jax.ShapeDtypeStruct(shape, of_cond) for shape in cond]
        cond = dict(zip(("encoder_hidden_states", "pooled_projections"), arrays, strict=False))
    return jax.eval_shape(lambda params, x, t, cond: module.apply({"params": params}, x, t, cond), params, x, t, cond)


@pytest.mark.parametrize("cond", [((2, 5, 12), (2, 6)), ((5, 12), (6,))])
def test_one_conditioning_may_serve_a_batch(cond):
    assert out(TINY, cond=cond).shape == (2, 8, 8, 4)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.bfloat16, jnp.float16])
def test_keeps_the_dtype(dtype):
    with jax.numpy_dtype_promotion("standard"):  # Flax's own norms promote half precision to float32 and back
        assert out(TINY, t=(2,), dtype=dtype).dtype == dtype


ERRORS = {
    "channels": (TINY, {"x": (2, 8, 8, 3)}, r"\[B, H, W, 4\].*got \(2, 8, 8, 3\)"),
    "resolution": (TINY, {"x": (2, 9, 8, 4)}, "multiples of 2"),
    "size": (TINY, {"x": (2, 8, 20, 4)}, "at most 18; got"),
    "norm": (TINY.clone(qk_norm="layer_norm"), {}, "qk_norm='layer_norm' is not known"),
    "width": (TINY.clone(caption_projection_dim=8), {}, "equal caption_projection_dim; got 16 and 8"),
    "unconditional": (TINY, {"cond": None}, "give cond as a dict of .* got NoneType"),
    "no summary": (TINY, {"cond": ((2, 5, 12),)}, r"got \['encoder_hidden_states'\]"),
    "batch": (TINY, {"cond": ((3, 5, 12), (2, 6))}, r"encoder_hidden_states are floats, \[T, 12\] or \[2, T, 12\]; got float32 \(3, 5, 12\)"),
    "summary": (TINY, {"cond": ((2, 5, 12), (2, 7))}, r"pooled_projections are floats, \[6\] or \[2, 6\]; got float32 \(2, 7\)"),
    "integers": (TINY, {"of_cond": jnp.int32}, r"got int32 \(2, 5, 12\)"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_says_what_does_not_fit(case):
    module, arguments, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        out(module, **arguments)
