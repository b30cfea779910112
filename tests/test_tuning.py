"""Weights and embeddings tuned through a sampler, on networks of one level: the gradient is that of what is claimed, runs repeat and resume."""

import functools
import json
from dataclasses import replace
from pathlib import Path

import effect
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.ndimage
import scipy.stats
import stylise
import tuning
from test_cli import SCHEDULER, UNET, save_random

import adjoint_jax as aj
from adjoint_jax import _build, checkpoints
from adjoint_jax.checkpoints import lora
from adjoint_jax.experiments import metrics, run as run_module
from adjoint_jax.experiments.engines import drawn, engine
from adjoint_jax.experiments.features import convolutions, style_of
from adjoint_jax.experiments.options import read_config
from adjoint_jax.experiments.statistics import interval, mean, rate
from adjoint_jax.guide import Given, Sampler
from adjoint_jax.models import ConvClassifier

pytestmark = pytest.mark.usefixtures("as_the_program_runs")
SAME = ("results.json", "final.npz", "history.jsonl")


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nets")
    network = save_random(folder / "network", UNET.clone(num_class_embeds=5), SCHEDULER)
    np.savez(folder / "flow_vit.npz", **flow_vit(np.random.default_rng(0)))
    classifier = save_random(folder / "classifier", ConvClassifier(features=(8,), classes=4, norm_num_groups=4))
    return {"checkpoint": network, "classifier": classifier, "flow_vit": str(folder / "flow_vit.npz")}


@pytest.fixture(scope="module", autouse=True)
def _toy():
    """The network of a checkpoint reduced to its first and last convolution, since tracing a whole one is most of a small run's time."""
    real = _build.sampler

    def sampler(options):
        found, given, variables = real(options)
        return replace(found, network=two_layers), given, variables

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_build, "sampler", sampler)
        yield


def two_layers(x, t, args):
    params = args["params"]
    convolve = lambda x, name: jax.lax.conv_general_dilated(  # noqa: E731
        x, params[name]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    shift = params["class_embedding"]["embedding"][args["cond"]][:, None, None, :8]
    return convolve(jnp.tanh(convolve(x, "conv_in") + shift), "conv_out")


def features_of(module, params):
    return jax.tree_util.Partial(functools.partial(convolutions, module), params)


def flow_vit(rng, width=8, rows=11):
    """Random weights of the transformer of `own_network`."""
    outer = {"pos_embed": (16, width), "patch_embed.weight": (width, 49), "patch_embed.bias": (width,), "y_encoder.weight": (rows, 2 * width)}
    shapes = {**outer, "unpatch.weight": (width, 49), "unpatch.bias": (49,)}
    inner = {"self_attn.in_proj_weight": (3 * width, width), "self_attn.in_proj_bias": (3 * width,), "self_attn.out_proj.weight": (width, width)}
    inner |= {f"{name}.weight": (width, width) for name in ("linear1", "linear2")}
    inner |= {f"{name}.bias": (width,) for name in ("self_attn.out_proj", "linear1", "linear2", "norm1", "norm2")}
    inner |= {f"{name}.weight": (width,) for name in ("norm1", "norm2")}
    shapes |= {f"transformer.{i}.{name}": shape for i in range(4) for name, shape in inner.items()}
    return {name: (0.5 * rng.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()}


def fine_tuning(nets, out, **changes):
    small = {"size": 8, "steps": 2, "batch": 2, "iterations": 2, "held": 2, "looks": 2, "save_every": 1, "engines": ("discrete",)}
    given = {name: nets[name] for name in ("checkpoint", "classifier")}
    return stylise.Options(out=str(out), style="bold", **{**given, **small, **changes})


def embedding(nets, out, **changes):
    small = {
        "grid": "uniform",
        "t_end": 0.1,
        "steps": 2,
        "batch": 2,
        "iterations": 2,
        "fresh": 2,
        "save_every": 1,
        "engine": "discrete",
        "compared": (),
        "label": 1,
        "radius": 0.01,
    }
    given = {name: nets[name] for name in ("flow_vit", "classifier")}
    return effect.Options(out=str(out), **{**given, **small, "effects": ("slant:0.3",), **changes})


RUNS = {
    "weights": (stylise.main, fine_tuning),
    "lora": (stylise.main, functools.partial(fine_tuning, rank=2, learning_rate=0.05)),
    "embedding": (effect.main, embedding),
}


@pytest.fixture(scope="module")
def finished(nets, tmp_path_factory):
    """A run of each kind to its end, when it is asked for."""

    @functools.cache
    def run(name):
        main, options = RUNS[name]
        main(options(nets, out := tmp_path_factory.mktemp(name) / "run"))
        return out

    return run


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name == "lora" else ()) for name in RUNS])
def test_a_run_stopped_between_its_saves_ends_as_an_unbroken_one(nets, finished, tmp_path, monkeypatch, name):
    main, options = RUNS[name]
    save = run_module.Run.save

    def stopping(run, progress, views):
        save(run, progress, views)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_module.Run, "save", stopping)
        with pytest.raises(KeyboardInterrupt):
            main(options(nets, tmp_path / "run"))
    main(options(nets, tmp_path / "run", resume=True))
    for file in (*SAME, *(("lora.safetensors",) if name == "lora" else ())):
        assert (tmp_path / "run" / file).read_bytes() == (finished(name) / file).read_bytes(), file
    assert {file.name for file in (tmp_path / "run").iterdir()} == {file.name for file in finished(name).iterdir()}


def test_what_is_saved_gives_the_images_of_the_report(nets, finished):
    options = fine_tuning(nets, "none")
    _, params, _, _ = aj.load(finished("weights") / "model")
    sampler, given, _ = _build.sampler(replace(options, label=0))
    held = sampler.noises(jax.random.fold_in(jax.random.key(0), stylise.HELD), (2, 8, 8, 1))
    images = jax.jit(sampler.__call__)(given._replace(params=params), {**held, "embedding": jnp.arange(2)})
    with np.load(finished("weights") / "final.npz") as final:
        assert np.abs(final["images/discrete"] - final["images/before"]).max() > 1e-4
        np.testing.assert_allclose(images, final["images/discrete"], atol=1e-4)


def test_a_lora_is_saved_as_it_was_tuned(nets, tmp_path):
    options = fine_tuning(nets, tmp_path, rank=2, targets="conv1|conv_in")
    module, params = checkpoints.load_model(nets["checkpoint"])
    start = stylise.bare(lora.init_lora(params, options.targets, options.rank, jax.random.key(0)))
    tuned = jax.tree.map(lambda leaf: leaf + 0.1, start)
    problem = stylise.Tuning(None, None, (), 1.0, 1.0, kept_apart=True)
    arrays = stylise.Arrays(Given(params, None, None, None), None, None, None)
    for first, last in zip(jax.tree.leaves(params), jax.tree.leaves(problem.given(arrays, start).params), strict=True):
        np.testing.assert_array_equal(first, last)
    for _ in range(2):  # the second time, as after a kill, it stays
        stylise.save(options, tmp_path, tuned)
    read = lora.merge(params, lora.load_lora(tmp_path / "lora.safetensors", {"unet": module})["unet"])
    for wanted, found in zip(jax.tree.leaves(problem.given(arrays, tuned).params), jax.tree.leaves(read), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def network(x, t, args):
    """A smooth v that depends on everything."""
    shift = jnp.sin(args["cond"].astype(x.dtype))[:, None, None, None]
    return jnp.tanh(x * args["params"]["a"] + shift + args["params"]["b"]) * (0.5 + t / 2000)


def test_the_gradient_is_that_of_the_objective(nets):
    process = aj.VPCosine()
    sampler = Sampler(network, process, "v", aj.grids.log_snr(process, 3), aj.DPMSolverPP(2))
    module, params = checkpoints.load_model(nets["classifier"])
    styled = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 8, 1)), jnp.float32)
    problem = stylise.Tuning(sampler, optax.adam(0.1), (8, 8, 1), 0.5, 1.5, kept_apart=False)
    start = {"a": jnp.float32(0.7), "b": jnp.asarray(np.random.default_rng(1).normal(size=(8, 8, 1)), jnp.float32)}
    other = jax.tree.map(lambda leaf: 0.8 * leaf, start)
    arrays = stylise.Arrays(Given(start, None, None, None), jnp.arange(4), style_of(features_of(module, params), styled), jax.random.key(0))
    gradient, (style, content) = jax.jit(problem.gradient, static_argnums=(3, 4))(arrays, other, jnp.asarray(3), 2, "kept")
    variables = problem.variables(arrays, jax.random.fold_in(jax.random.key(0), 3), 2, 6)
    assert variables["embedding"].tolist() == [2, 3]

    def grams(images):
        _, seen = module.apply({"params": params}, images, capture_intermediates=True)
        flat = seen["intermediates"]["conv_0"]["__call__"][0].reshape(len(images), 64, 8)
        return jnp.matrix_transpose(flat) @ flat / 64

    @jax.jit
    def objective(weights):
        images, original = (problem.sampler(Given(w, None, None, None), variables, aj.DirectAdjoint()) for w in (weights, start))
        wanted = jnp.mean(grams(styled), axis=0)
        distance = jnp.mean((grams(images) - wanted) ** 2) / jnp.mean(wanted**2)
        alike = [jnp.corrcoef(*(metrics.blurred(each, 1.5)[i].ravel() for each in (images, original)))[0, 1] for i in range(2)]
        return distance, 1 - sum(alike) / 2

    np.testing.assert_allclose((style, content), objective(other), rtol=1e-4)
    wanted = jax.jit(jax.grad(lambda weights: objective(weights)[0] + 0.5 * objective(weights)[1]))(other)
    for name in wanted:
        np.testing.assert_allclose(gradient[name], wanted[name], rtol=1e-3, atol=1e-3 * float(jnp.abs(wanted[name]).max()))


def test_every_engine_gets_the_same_work(nets):
    options = fine_tuning(nets, "none", engines=("kept", "last-k:1", "discrete"), iterations=30, steps=4)
    counts, updates = stylise.budget(options, _build.sampler(replace(options, label=0))[0])
    assert counts == {"kept": (8, 4), "last-k:1": (9, 1), "discrete": (12, 4)}  # four of them forward for the original sample
    assert updates == {"kept": 30, "last-k:1": round(30 * 16 / 11), "discrete": round(30 * 16 / 20)}


def test_the_report_and_its_numbers(finished):
    results = json.loads((finished("weights") / "results.json").read_text())
    report = (finished("weights") / "report.md").read_text()
    assert results["claim"] in report
    assert "What was run" in report
    assert "Evaluations of the network are those in one update" in report
    assert [point for point, *_ in results["audit"]] == ["first", "last"]
    assert [error for _, _, error, _ in results["audit"]] == [0, 0]
    row = json.loads((finished("embedding") / "results.json").read_text())["effects"]["slant:0.3"]
    np.testing.assert_allclose(row["moved"], 0.01, rtol=1e-3)  # the ball's radius


def test_measurements_of_digits():
    rows, columns = np.indices((28, 28))
    bar = lambda width, shear: np.where(np.abs(columns - 14 + shear * (rows - 14)) < width / 2, 1.0, -1.0)[None, 4:24, :, None]  # noqa: E731
    images = jnp.asarray(np.concatenate([bar(2.9, 0.0), bar(4.9, 0.0), bar(2.9, 0.5), bar(2.9, -0.5)]), jnp.float32)
    np.testing.assert_allclose(tuning.thickness(images)[:2], [2 * 60 / 46, 2 * 100 / 50])
    np.testing.assert_allclose(tuning.slant(images), [0, 0, 0.5, -0.5], atol=0.02)
    np.testing.assert_allclose(tuning.upright(images), [0, 0, 0.5, -0.5], atol=0.051)
    assert tuning.thickness(-jnp.ones((1, 8, 8, 1))).tolist() == [0]
    thick, thin = (tuning.thickness(tuning.EFFECTS[name](images)) for name in ("bold", "thin"))
    assert (thick > tuning.thickness(images)).all()
    assert (thin < tuning.thickness(images)).all()


def test_a_reader_that_is_absent_is_left_out_and_named(capsys):
    assert list(tuning.readers(lambda images: images, "nowhere.npz", (28, 28, 1))) == ["the classifier"]
    assert "the weights of LeNet are not at nowhere.npz" in capsys.readouterr().err


def test_where_the_default_stands():
    fast, slow = tuning.Arrival(2.0, 36, 2), tuning.Arrival(6.0, 6, 36)
    said = " The default, discrete, takes 3.00 times as long as greedy: 6 updates of 36 network evaluations against 36 of 2."
    assert tuning.standing({"greedy": fast, "discrete": slow}, ["kept", "greedy", "discrete"]) == said
    assert tuning.standing({"greedy": slow, "kept": fast}, ["greedy", "kept"]) == " The exact gradient, kept, is the first."
    assert tuning.standing({"greedy": fast, "kept": slow}, ["greedy", "kept", "discrete"]) == " The default, discrete, does not arrive."
    assert tuning.standing({"greedy": fast}, ["greedy", "deis"]) == ""
    assert (
        tuning.standing(dict.fromkeys(("greedy", "kept"), tuning.Arrival(0.0, 0, 2)), ["greedy", "kept"])
        == " The exact gradient, kept, is the first."
    )


def test_yes_and_no_have_the_interval_of_a_share():
    assert effect.told([0.0] * 10) == rate(0, 10)
    assert effect.told([0.25, 0.75]) == mean([0.25, 0.75])


def test_likeness_and_features(nets):
    rng = np.random.default_rng(0)
    one, other = (jnp.asarray(rng.normal(size=(2, 8, 8, 1)), jnp.float32) for _ in range(2))
    blur = lambda image: scipy.ndimage.gaussian_filter(np.asarray(image, np.float64), (1.5, 1.5, 0), mode="nearest", radius=(5, 5, 0)).ravel()  # noqa: E731
    wanted = [np.corrcoef(blur(a), blur(b))[0, 1] for a, b in zip(one, other, strict=True)]
    likeness = jax.jit(metrics.likeness, static_argnums=0)
    np.testing.assert_allclose(likeness(1.5, one, other), wanted, atol=1e-5)
    np.testing.assert_allclose(likeness(1.5, one, 0.3 * one - 2), 1, atol=1e-5)
    module, params = checkpoints.load_model(nets["classifier"])
    score = style_of(features_of(module, params), one[:1])
    np.testing.assert_allclose(score(one[:1]), 0, atol=1e-6)
    assert [layer.shape for layer in convolutions(module, params, one)] == [(2, 8, 8, 8)]
    silent = features_of(module, jax.tree.map(jnp.zeros_like, params))
    np.testing.assert_allclose(jax.tree_util.Partial(score.func, silent, *score.args[1:])(one), -1, rtol=1e-5)  # one layer, one unit of distance


def test_engines_that_draw_and_the_interval_of_a_mean():
    key = jax.random.key(7)
    assert drawn(engine("random-k:3"), key).key == key
    assert drawn(engine("low-variance:3"), key).samples == 3
    assert drawn(engine("last-k:3"), key) == aj.LastK(3)
    values = [1.0, 2.5, 0.5, 3.0]
    wanted = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    np.testing.assert_allclose(interval(values), (1.75, wanted.low, wanted.high))


@pytest.mark.parametrize(("name", "kind"), [("stylise", stylise.Options), ("effect", effect.Options)])
def test_configs_are_options(name, kind):
    files = list((Path(__file__).parents[1] / "configs").glob(f"{name}*.toml"))
    assert len(files) > 1
    for file in files:
        found = kind(**read_config(str(file), kind))
        for each in found.engines if name == "stylise" else (found.engine, *found.compared):
            engine(each)
        assert f"--config configs/{file.name} --out runs/{file.stem}" in file.read_text()


REFUSED = [
    (fine_tuning, {"engines": ("greedy",)}, "different ways through the sampler's steps"),
    (fine_tuning, {"engines": ("kept", "kept")}, "different ways through the sampler's steps"),
    (fine_tuning, {"targets": "conv"}, "give its --rank"),
    (fine_tuning, {"rank": 2, "targets": "nowhere"}, "found 0 kernels"),
    (fine_tuning, {"style": "cubist"}, "--style cubist is not known"),
    (fine_tuning, {"prompt": "a cat"}, "--prompt is a text for a text-to-image pipeline"),
    (fine_tuning, {"looks": 1}, "--looks must be at least 2"),
    (fine_tuning, {"mesh": "data=4", "held": 4, "engines": ("low-variance:1",)}, "which no device of a --mesh has"),
    (embedding, {"mesh": "data=4", "fresh": 4, "engine": "low-variance:1"}, "which no device of a --mesh has"),
    (embedding, {"flow_vit": "any.npz", "checkpoint": None, "size": 8}, "leave --size and --negative out"),
    (embedding, {"effects": ("slant:much",)}, "give a number"),
    (embedding, {"effects": ("image:10",)}, "a number below 10"),
    (embedding, {"effects": ("glow:1",)}, "The effect glow:1 is not known"),
    (embedding, {"effects": ()}, "at least one"),
    (embedding, {"engine": "greedy"}, "leaves the sampler out"),
    (embedding, {"label": 10}, "classes 0 to 9"),
    (embedding, {"flow_vit": "nowhere.npz"}, "takes the place of --checkpoint"),
]


@pytest.mark.parametrize("options", [fine_tuning, embedding])
def test_a_classifier_of_images_in_colour_reads_no_grey_ones(nets, tmp_path, options):
    colour = save_random(tmp_path / "colour", ConvClassifier(features=(8,), classes=4, norm_num_groups=4, in_channels=3))
    with pytest.raises(ValueError, match=r"colour reads images \[H, W, 3\], and these are \[H, W, 1\]: give a --classifier for them\.$"):
        (stylise.main if options is fine_tuning else effect.main)(options(nets, tmp_path / "run", classifier=colour))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("options", "changes", "said"), REFUSED)
def test_what_does_not_fit_is_refused_in_a_sentence(nets, tmp_path, options, changes, said):
    main = stylise.main if options is fine_tuning else effect.main
    with pytest.raises(ValueError, match=said) as caught:
        main(replace(options(nets, tmp_path / "run"), **changes))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
