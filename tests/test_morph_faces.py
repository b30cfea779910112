"""The morphing experiment, small: its mathematics against plain loops, what it writes, going on after a stop, refusals."""

import json

import jax
import jax.numpy as jnp
import morph_faces
import numpy as np
import optax
import pytest
from morphing import Greedy, between, encoded, half_way, identity_loss
from morphing_report import BASELINES
from recognition import binary_patterns, chi_square, histograms, matched, product_average, threshold, verification
from shared import ROOT, shared
from test_cli import SCHEDULER, save_random
from test_mesh import close
from train_faces import UNET as FACES, blocks, pixels

from adjoint_jax.experiments import Run, command, recorded
from adjoint_jax.experiments.options import read_config
from adjoint_jax.guide import Given, Sampler
from adjoint_jax.models import ConvClassifier, UNet2D

pytestmark = pytest.mark.usefixtures("as_the_program_runs")
UNET = UNet2D(
    in_channels=4,
    out_channels=4,
    block_out_channels=(8,),
    layers_per_block=1,
    down_block_types=("DownBlock2D",),
    up_block_types=("UpBlock2D",),
    norm_num_groups=4,
    attention_head_dim=None,
    add_attention=False,
    class_embed_type="identity",
)
SAMPLERS, METHODS, EQUAL = ("sde-own",), ("none", "discrete"), ("greedy-dim:2", "last-k:1", "published-1:2", "discrete")


def graph(folder, rng):
    """A recogniser of 16 x 16 images in the layout of MobileFace's two files: convolution, batch norm, clip, one filter a channel, dense."""
    nodes, arrays = [{"op": "null", "name": "data", "inputs": []}], {}

    def add(op, name, attrs=None, **weights):
        read = [[len(nodes) - 1, 0, 0]]
        for part, value in weights.items():
            nodes.append({"op": "null", "name": f"{name}_{part}", "inputs": []})
            arrays[f"{'aux' if 'moving' in part else 'arg'}:{name}_{part}"] = np.asarray(value, np.float32)
            read.append([len(nodes) - 1, 0, 0])
        nodes.append({"op": op, "name": name, "attrs": attrs or {}, "inputs": read})

    shape = {"kernel": "(3, 3)", "pad": "(1, 1)"}
    add("_minus_scalar", "minus", {"scalar": "127.5"})
    add("_mul_scalar", "mul", {"scalar": "0.0078125"})
    add("Convolution", "conv", {**shape, "stride": "(2, 2)"}, weight=rng.normal(size=(6, 3, 3, 3)), bias=rng.normal(size=6))
    add("BatchNorm", "bn", gamma=rng.normal(size=6), beta=rng.normal(size=6), moving_mean=rng.normal(size=6), moving_var=rng.uniform(1, 2, 6))
    add("_maximum_scalar", "max", {"scalar": "0"})
    add("_minimum_scalar", "min", {"scalar": "6"})
    add("Convolution", "each", {**shape, "stride": "(2, 2)", "num_group": "6"}, weight=rng.normal(size=(6, 1, 3, 3)))
    add("Flatten", "flat")
    add("FullyConnected", "fc", weight=rng.normal(size=(8, 96)))
    (folder / "MobileFace_Identification_V2-symbol.json").write_text(json.dumps({"nodes": nodes}))
    np.savez(folder / "mobileface_v2.npz", **arrays)


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """Four people of ten images, a model and a recogniser, all random."""
    folder, rng = tmp_path_factory.mktemp("faces"), np.random.default_rng(0)
    save_random(folder / "unet", UNET, SCHEDULER)
    save_random(folder / "encoder", ConvClassifier(features=(8,), classes=32, norm_num_groups=4))
    people = np.kron(rng.uniform(0, 255, size=(4, 1, 7, 6)), np.ones((16, 16)))[..., :92] + rng.normal(0, 20, size=(4, 10, 112, 92))
    np.savez(folder / "orl_faces.npz", x=np.clip(people, 0, 255).astype(np.uint8).reshape(-1, 112, 92), y=np.repeat(np.arange(4), 10))
    graph(folder, rng)
    sizes = {"size": 16, "recogniser-size": 16, "pairs": 4, "batch": 2, "steps": 3, "iterations": 2, "encoding-steps": 4, "cells": 2}
    numbers = {"match-rate": 0.05, "learning-rate": 0.01}
    flags = [part for name, value in (sizes | numbers).items() for part in (f"--{name}", str(value))]
    return ["--data", str(folder), "--model", str(folder), *flags, "--samplers", *SAMPLERS, "--methods", *METHODS]


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    command(morph_faces.main, morph_faces.Options, [*arguments, "--out", str(out)])
    return out


def test_what_it_writes(finished):
    results = json.loads((finished / "results.json").read_text())
    found = {(row["sampler"], row["method"]): row for row in results["rows"]}
    assert set(found) == {*(("-", name) for name in BASELINES), *((kind, name) for kind in SAMPLERS for name in METHODS)}
    for kind in SAMPLERS:
        losses = found[kind, "discrete"]["losses"]
        assert losses[-1] < losses[0]
        assert found[kind, "discrete"]["backward"] == 2 * 3
        np.testing.assert_allclose(losses[0], found[kind, "none"]["losses"][0], atol=0.02)  # that of 8-bit images
    with np.load(finished / "final.npz") as final:
        assert final["morphs"].shape == (1, 2, 4, 16, 16)
        assert final["morphs"].std() > 0
        assert (final["pairs"][:, 0] < final["pairs"][:, 1]).all()
        assert len(np.unique(final["pairs"], axis=0)) == 4
    report = (finished / "report.md").read_text()
    assert report.count("| start, sde-own | discrete | ") == 3
    assert {file.name for file in finished.glob("*.png")} == {"morphs.png", "loss.png"}


def test_a_run_goes_on_after_a_kill_to_the_same_bytes(arguments, finished, tmp_path):
    """From what a run holds after three of its four batches."""
    made = made_of(arguments)
    whole = Run(finished, recorded(made.options), True).restore(made.begun())
    morphs = np.array(whole.state.morphs)
    morphs[:, 1, 2:] = 0
    part = whole._replace(state=whole.state._replace(morphs=morphs), history=whole.history[:3], seconds=whole.seconds[:3])
    Run(tmp_path / "run", recorded(made.options)).save(part)
    command(morph_faces.main, morph_faces.Options, [*arguments, "--out", str(tmp_path / "run"), "--resume"])
    for name in ("final.npz", "results.json", "history.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes()


@pytest.mark.parametrize(("kinds", "methods"), [(("ode",), EQUAL[2:]), pytest.param(("ode", "sde"), EQUAL, marks=pytest.mark.slow)], ids=str)
def test_the_work_of_the_last_method(arguments, tmp_path, kinds, methods):
    """In three steps an exact update takes 6 + 3 evaluations, one through the last step 4 + 1, and at two nodes 3 + 2 + 2."""
    more = ("--pairs", "2", "--samplers", *kinds, "--methods", *methods, "--equal-work", "--goal", "9")
    command(morph_faces.main, morph_faces.Options, [*arguments, *more, "--out", str(tmp_path / "run")])
    rows = {(row["sampler"], row["method"]): row for row in json.loads((tmp_path / "run" / "results.json").read_text())["rows"]}
    for kind in kinds:
        assert [len(rows[kind, name]["losses"]) - 1 for name in methods] == [0, 4, 3, 2][-len(methods) :]
        assert rows[kind, "discrete"]["losses"][-1] < rows[kind, "discrete"]["losses"][0]
        assert "greedy-dim:2" not in methods or rows[kind, "greedy-dim:2"]["recogniser_gradients"] == 3 * 2
    report = (tmp_path / "run" / "report.md").read_text()
    assert "The target is 9.000;" in report
    assert "Updates: as many as cost what 2 of discrete do" in report
    assert " ".join(f"{kind}: The default, discrete, is the first." for kind in kinds) in report  # the start is at the target


@pytest.mark.slow
def test_morphs_on_a_mesh_are_those_of_one_device(arguments, tmp_path):
    for name, more in {"one": (), "several": ("--mesh", "data=2,fsdp=2", "--checkpointer", "orbax")}.items():
        command(morph_faces.main, morph_faces.Options, [*arguments, "--batch", "4", *more, "--out", str(tmp_path / name)])
    close(*(dict(np.load(each)) for each in (tmp_path / "several" / "final.npz", tmp_path / "one" / "final.npz")), 1e-3)  # bytes
    one, several = (json.loads((tmp_path / name / "results.json").read_text())["rows"][-1]["losses"] for name in ("one", "several"))
    np.testing.assert_allclose(several, one, rtol=1e-5)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--samplers", "euler"), "--samplers euler is not known: use one of ode, sde, sde-own."),
        (("--methods", "dim"), "The gradient dim is not known"),
        (("--methods", "greedy-dim:"), "The method greedy-dim: lacks a number of updates"),
        (("--pairs", "7"), "--pairs must be at most 6, and a multiple of --batch; got 7 and 2."),
        (("--image", "8"), "--image must be one of the 8 that the model was trained on, from 0; got 8."),
        (("--methods", "discrete", "none", "--equal-work"), "--equal-work measures by the last of --methods, and none has no updates"),
        (("--goal", "0"), "--goal must be a positive number; got 0.0."),
        (("--iterations", "0"), "--iterations must be at least 1; got 0."),
        (("--recogniser-size", "24"), "The recogniser does not take images of 24 x 24, --recogniser-size: "),
    ],
)
def test_refuses(arguments, tmp_path, capsys, flags, sentence):
    with pytest.raises(SystemExit):
        command(morph_faces.main, morph_faces.Options, [*arguments, *flags, "--out", str(tmp_path / "out")])
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_half_way_is_slerp_and_the_loss_the_worse_of_two():
    rng = np.random.default_rng(0)
    u, w = rng.normal(size=(2, 3, 4, 4, 2))
    w = w * np.linalg.norm(u.reshape(3, -1), axis=1).reshape(3, 1, 1, 1) / np.linalg.norm(w.reshape(3, -1), axis=1).reshape(3, 1, 1, 1)
    for one, other, found in zip(u, w, half_way(u, w), strict=True):
        angle = np.arccos(np.sum(one * other) / np.sum(one**2))
        np.testing.assert_allclose(found, np.sin(angle / 2) / np.sin(angle) * (one + other), rtol=1e-5, atol=1e-6)
    assert np.array_equal(half_way(jnp.zeros((1, 2, 2, 1)), jnp.zeros((1, 2, 2, 1))), np.zeros((1, 2, 2, 1)))
    v = rng.normal(size=(3, 5, 8))
    v /= np.linalg.norm(v, axis=-1, keepdims=True)
    worse = [2 * max(1 - v[0, i] @ v[1, i], 1 - v[0, i] @ v[2, i]) for i in range(5)]
    np.testing.assert_allclose(identity_loss(*v), worse, rtol=1e-5)


def test_the_faces_at_hand_are_the_network_of_the_script_and_make_faces_of_noise_that_was_a_face():
    """Faces that the model never saw, to noise and back in twenty steps, with their own encoding and with another's."""
    made = morph_faces.Morphing(morph_faces.Options(data=str(shared("data")), model=str(ROOT / "examples" / "faces"), steps=20))
    assert made.model.unet.network.module == FACES
    faces = morph_faces.as_states(made.faces[:2, -1])
    x_T, z = (encoded(made.model, made.sampler("ode"), faces, 20)[name] for name in ("x_T", "embedding"))
    given = Given(made.model.unet.params, jnp.float32(1), None, None)
    own, other = (pixels(made.sampled("ode", 0)(given, {"x_T": x_T, "embedding": each})) for each in (z, z[::-1]))
    errors = [float(jnp.sqrt(jnp.mean((each - faces) ** 2))) for each in (own, other)]
    assert errors[0] < 0.06
    assert errors[1] > 2 * errors[0]


def test_pixels_undo_blocks():
    x = np.arange(2 * 4 * 6).reshape(2, 4, 6, 1)
    np.testing.assert_array_equal(pixels(blocks(x)), x)
    np.testing.assert_array_equal(blocks(x)[0, 1, 2], [x[0, 2, 4, 0], x[0, 2, 5, 0], x[0, 3, 4, 0], x[0, 3, 5, 0]])


def made_of(arguments, **more):
    """The experiment of a command line."""
    import tyro

    flags = [part for name, value in more.items() for part in (f"--{name}", value)]
    return morph_faces.checked(tyro.cli(morph_faces.Options, args=[*arguments, *flags]))


def test_encodings_are_decoded(arguments):
    """The SDE's to rounding, whatever the path, and the ODE's the better the shorter the steps; a face half-way to itself is itself."""
    made = made_of(arguments)
    images = morph_faces.as_states(made.faces[:2, 0])
    path = jax.random.normal(jax.random.key(3), (3, 2, 8, 8, 4))
    given = Given(made.model.unet.params, jnp.float32(1), None, None)
    variables = encoded(made.model, made.sampler("sde"), images, 4, path)
    np.testing.assert_allclose(pixels(made.sampler("sde")(given, between(variables, variables))), images, atol=2e-4)
    errors = []
    for steps in ("4", "16"):
        finer = made_of(arguments, **{"steps": steps, "encoding-steps": steps})
        found = finer.sampler("ode")(given, finer.encodings("ode", 1)[1])
        images = morph_faces.as_states(finer.faces[finer.pairs[2:, 1], 0])
        errors.append(float(jnp.sqrt(jnp.mean((pixels(found) - images) ** 2))))
    assert errors[1] < 0.5 * errors[0]


def test_greedy_steps_only_improve_and_without_length_change_nothing(arguments):
    made = made_of(arguments)
    rng = np.random.default_rng(0)
    x, z, v_a, v_b = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 8, 8, 4), (2, 32), (2, 8), (2, 8)))
    metric = jax.tree_util.Partial(made.score, made.recogniser[1], *(v / jnp.linalg.norm(v, axis=1, keepdims=True) for v in (v_a, v_b)))
    given, variables = Given(made.model.unet.params, jnp.float32(1), None, metric), {"x_T": x, "embedding": z}
    greedy = given._replace(params={"network": given.params, "metric": given.metric})
    args = {"params": greedy.params, "cond": z}
    t = jnp.float32(made.sampler("ode").grid[1])
    clean = lambda network: made.model.term.__class__(network, made.model.term.process, "eps").x0_and_eps(t, x, args)[0]  # noqa: E731
    before = made.model.term.x0_and_eps(t, x, {**args, "params": given.params})[0]
    after = clean(Greedy(made.model.term, 4, optax.adam(0.05)))
    gains = given.metric(after) - given.metric(before)
    assert (gains > -1e-5).all()
    assert gains.max() > 0.01
    still = Greedy(made.model.term, 1, optax.sgd(0.0))
    plain = made.sampler("ode")
    np.testing.assert_allclose(Sampler(still, plain.process, "eps", plain.grid, plain.solver)(greedy, variables), plain(given, variables), atol=1e-4)


def test_thresholds_and_success_rates_by_plain_loops():
    rng = np.random.default_rng(0)
    people = np.repeat(np.arange(6), 4)
    table = rng.normal(size=(24, 24))
    table = table + table.T + 2 * (people[:, None] == people[None])
    pairs = [(i, j) for i in range(24) for j in range(i)]
    genuine, impostor = ([table[i, j] for i, j in pairs if (people[i] == people[j]) == same] for same in (True, False))
    found = verification(table, people, 0.05)
    assert sum(s > found.threshold for s in impostor) <= 0.05 * len(impostor) < sum(s >= found.threshold for s in impostor)
    assert found.threshold == threshold(np.array(impostor), 0.05)
    np.testing.assert_allclose(found.auc, np.mean([g > i for g in genuine for i in impostor]))
    np.testing.assert_allclose(found.true_match_rate, np.mean([g > found.threshold for g in genuine]))
    nearest = [people[max((j for j in range(24) if j != i), key=lambda j, i=i: table[i, j])] for i in range(24)]
    np.testing.assert_allclose(found.rank_1, np.mean(nearest == people))
    morphs, tau = rng.normal(size=(30, 2, 5)), 1.0
    passed = [all(any(s > tau for s in images) for images in morph) for morph in morphs]
    assert matched(morphs, tau).tolist() == passed
    chances = [np.mean([s > tau for s in morph[0]]) * np.mean([s > tau for s in morph[1]]) for morph in morphs]
    np.testing.assert_allclose(product_average(morphs, tau), np.mean(chances))


def test_binary_patterns_by_plain_loops():
    """One pixel at a time, by scipy's interpolation; and flat ground is one code."""
    from scipy.ndimage import map_coordinates

    image = np.random.default_rng(0).integers(0, 256, size=(9, 10)).astype(float)
    angles = 2 * np.pi * np.arange(8) / 8
    words = []
    for i, j in np.ndindex(image.shape):
        around = map_coordinates(image, [i - 2 * np.cos(angles), j + 2 * np.sin(angles)], order=1, mode="nearest")
        words.append("".join(str(int(value >= image[i, j] - 1e-9)) for value in around))
    changes = lambda word: sum(a != b for a, b in zip(word, word[1:] + word[:1], strict=True))  # noqa: E731
    codes = binary_patterns(image[None])[0].ravel()
    numbers = sorted(int(word[::-1], 2) for word in (f"{n:08b}" for n in range(256)) if changes(word) <= 2)
    assert len(numbers) == 58
    assert codes.tolist() == [numbers.index(int(word[::-1], 2)) if changes(word) <= 2 else 58 for word in words]
    assert (binary_patterns(np.full((1, 5, 5), 7)) == 57).all()
    counted = histograms(image[None], 2)
    assert counted.shape == (1, 4 * 59)
    np.testing.assert_allclose(counted.sum(), 4)
    np.testing.assert_allclose(chi_square(counted, counted), 0)
    np.testing.assert_allclose(chi_square(np.array([[1.0, 0]]), np.array([[0, 1.0], [0.5, 0.5]])), [[-2, -0.25 / 1.5 - 0.5]])


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("morph_faces*.toml")), ids=lambda path: path.stem)
def test_the_configs_hold_known_options(path):
    options = morph_faces.Options(**read_config(str(path), morph_faces.Options))
    assert options.pairs % options.batch == 0
    assert {"none", "kept"} < set(options.methods)
