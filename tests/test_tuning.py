"""Weights and embeddings tuned through a sampler, on networks of one level: the gradient is that of what is claimed, runs repeat and resume."""

import json
from dataclasses import replace

import effect
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import stylise
import tuning
from test_cli import SCHEDULER, UNET, save_random

import adjoint_jax as aj
from adjoint_jax import checkpoints
from adjoint_jax.checkpoints import lora
from adjoint_jax.experiments import metrics, run as run_module
from adjoint_jax.experiments.engines import drawn, engine
from adjoint_jax.experiments.features import convolutions, style_of
from adjoint_jax.experiments.statistics import interval
from adjoint_jax.models import ConvClassifier

pytestmark = pytest.mark.usefixtures("as_the_program_runs")
SAME = ("results.json", "final.npz", "history.jsonl")


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nets")
    network = save_random(folder / "network", UNET.clone(num_class_embeds=5), SCHEDULER)
    return {"checkpoint": network, "classifier": save_random(folder / "classifier", ConvClassifier(features=(8,), classes=4, norm_num_groups=4))}


def fine_tuning(nets, out, **changes):
    small = {"size": 8, "steps": 2, "batch": 2, "iterations": 2, "held": 4, "looks": 2, "save_every": 1, "engines": ("kept", "last-k:1")}
    return stylise.Options(out=str(out), style="bold", **{**nets, **small, **changes})


def embedding(nets, out, **changes):
    small = {"size": 8, "steps": 2, "batch": 2, "iterations": 2, "fresh": 4, "save_every": 1, "compared": (), "label": 1}
    return effect.Options(out=str(out), **{**nets, **small, "effects": ("slant:0.3", "image:2"), **changes})


RUNS = {
    "weights": (stylise.main, fine_tuning, {}),
    "lora": (stylise.main, fine_tuning, {"rank": 1, "targets": "conv1|to_q", "engines": ("random-k:2",)}),
    "embedding": (effect.main, embedding, {"radius": 0.01}),
}


@pytest.fixture(scope="module")
def finished(nets, tmp_path_factory):
    """A run of each kind to its end."""
    found = {}
    for name, (main, options, changes) in RUNS.items():
        found[name] = tmp_path_factory.mktemp(name) / "run"
        main(options(nets, found[name], **changes))
    return found


@pytest.mark.parametrize("name", RUNS)
def test_a_run_stopped_after_any_save_ends_as_an_unbroken_one(nets, finished, tmp_path, monkeypatch, name):
    main, options, changes = RUNS[name]
    save = run_module.Run.save

    def stopping(run, progress, views):
        save(run, progress, views)
        raise KeyboardInterrupt

    total = len((finished[name] / "history.jsonl").read_text().splitlines())
    with monkeypatch.context() as patch:
        patch.setattr(run_module.Run, "save", stopping)
        for _ in range(total):
            with pytest.raises(KeyboardInterrupt):
                main(options(nets, tmp_path / "run", resume=True, **changes))
    main(options(nets, tmp_path / "run", resume=True, **changes))
    for file in SAME:
        assert (tmp_path / "run" / file).read_bytes() == (finished[name] / file).read_bytes(), file
    assert {file.name for file in (tmp_path / "run").iterdir()} == {file.name for file in finished[name].iterdir()}


@pytest.mark.parametrize("name", ["weights", "lora"])
def test_what_is_saved_gives_the_images_of_the_report(nets, finished, name):
    out, options = finished[name], fine_tuning(nets, "none")
    network, params, process, prediction = aj.load(out / "model" if name == "weights" else nets["checkpoint"])
    if name == "lora":
        module, _ = checkpoints.load_model(nets["checkpoint"])
        params = lora.merge(params, lora.load_lora(out / "lora.safetensors", {"unet": module})["unet"])
    problem, arrays, _, _ = stylise.problem(options)
    held = problem.variables(arrays, jax.random.fold_in(arrays.key, stylise.HELD), options.held)
    term, grid = aj.DiffusionTerm(network, process, prediction), problem.sampler.grid
    images = aj.sample(term, held["x_T"], {"params": params, "cond": jnp.arange(4)}, grid=grid)
    with np.load(out / "final.npz") as final:
        found = final["images/kept" if name == "weights" else "images/random-k:2"]
        assert np.abs(found - final["images/before"]).max() > 1e-4
    np.testing.assert_allclose(images, found, rtol=1e-4, atol=1e-4)


def test_the_gradient_is_that_of_the_objective(nets):
    problem, arrays, start, _ = stylise.problem(fine_tuning(nets, "none", content=0.5))
    gradient, (style, content) = problem.gradient(arrays, start, jnp.asarray(3), 2, "kept")
    module, params = checkpoints.load_model(nets["classifier"])
    variables = problem.variables(arrays, jax.random.fold_in(jax.random.key(0), 3), 2, 6)
    assert variables["embedding"].tolist() == [2, 3]
    original = problem.sampler(arrays.given, variables)
    made = tuning.EFFECTS["bold"](problem.sampler(arrays.given, problem.variables(arrays, jax.random.fold_in(arrays.key, stylise.STYLE), 4)))

    def gram_of(image):
        flat = module.apply({"params": params}, image[None], capture_intermediates=True)[1]["intermediates"]["conv_0"]["__call__"][0].reshape(-1, 8)
        return flat.T @ flat / len(flat)

    def objective(weights):
        images = problem.sampler(arrays.given._replace(params=weights), variables, aj.DirectAdjoint())
        wanted = sum(gram_of(image) for image in made) / 4
        distance = sum(jnp.mean((gram_of(image) - wanted) ** 2) / jnp.mean(wanted**2) for image in images) / 2
        alike = [jnp.corrcoef(*(metrics.blurred(each[i][None], 2.0).ravel() for each in (images, original)))[0, 1] for i in range(2)]
        return distance + 0.5 * (1 - sum(alike) / 2)

    np.testing.assert_allclose(style + 0.5 * content, objective(start), rtol=1e-4)
    flat = lambda tree: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])  # noqa: E731
    wanted = flat(jax.grad(objective)(start))
    np.testing.assert_allclose(flat(gradient), wanted, atol=2e-3 * np.abs(wanted).max())


def test_the_report_and_its_numbers(nets, finished):
    results = json.loads((finished["weights"] / "results.json").read_text())
    report = (finished["weights"] / "report.md").read_text()
    assert results["tunings"]["kept"]["forward"] == 4  # two for the original sample
    assert results["tunings"]["last-k:1"]["updates"] == round(2 * 8 / 7)
    audit = {(point, name): (error, cosine) for point, name, error, cosine in results["audit"]}
    assert audit["first", "kept"][0] < 1e-4 < audit["first", "last-k:1"][0]
    assert results["claim"] in report
    assert "What was run" in report
    rows = json.loads((finished["embedding"] / "results.json").read_text())["effects"]
    assert all(row["moved"] <= 0.01 * (1 + 1e-5) for row in rows.values())
    assert any(abs(row["moved"] - 0.01) < 1e-6 for row in rows.values())


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


def test_likeness_and_features(nets):
    rng = np.random.default_rng(0)
    one, other = (jnp.asarray(rng.normal(size=(2, 8, 8, 1)), jnp.float32) for _ in range(2))
    blur = lambda image: scipy.ndimage.gaussian_filter(np.asarray(image, np.float64), (1.5, 1.5, 0), mode="nearest", radius=(5, 5, 0)).ravel()  # noqa: E731
    wanted = [np.corrcoef(blur(a), blur(b))[0, 1] for a, b in zip(one, other, strict=True)]
    np.testing.assert_allclose(metrics.likeness(1.5, one, other), wanted, atol=1e-5)
    np.testing.assert_allclose(metrics.likeness(1.5, one, 0.3 * one - 2), 1, atol=1e-5)
    module, params = checkpoints.load_model(nets["classifier"])
    score = style_of(module, params, one[:1])
    np.testing.assert_allclose(score(one[:1]), 0, atol=1e-6)
    assert [layer.shape for layer in convolutions(module, params, one)] == [(2, 8, 8, 8)]
    silent = jax.tree.map(jnp.zeros_like, params)
    np.testing.assert_allclose(jax.tree_util.Partial(score.func, silent, *score.args[1:])(one), -1, rtol=1e-5)  # one layer, one unit of distance


def test_engines_that_draw_and_the_interval_of_a_mean():
    key = jax.random.key(7)
    assert drawn(engine("random-k:3"), key).key == key
    assert drawn(engine("low-variance:3"), key).samples == 3
    assert drawn(engine("last-k:3"), key) == aj.LastK(3)
    values = [1.0, 2.5, 0.5, 3.0]
    wanted = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    np.testing.assert_allclose(interval(values), (1.75, wanted.low, wanted.high))


REFUSED = [
    (fine_tuning, {"engines": ("greedy",)}, "different ways through the sampler's steps"),
    (fine_tuning, {"engines": ("kept", "kept")}, "different ways through the sampler's steps"),
    (fine_tuning, {"targets": "conv"}, "give its --rank"),
    (fine_tuning, {"rank": 2, "targets": "nowhere"}, "found 0 kernels"),
    (fine_tuning, {"style": "cubist"}, "--style cubist is not known"),
    (fine_tuning, {"judge": "nowhere.npz"}, "There is no file nowhere.npz"),
    (fine_tuning, {"looks": 1}, "--looks must be at least 2"),
    (embedding, {"effects": ("slant:much",)}, "give a number"),
    (embedding, {"effects": ("image:4",)}, "a number below 4"),
    (embedding, {"effects": ("glow:1",)}, "The effect glow:1 is not known"),
    (embedding, {"effects": ()}, "at least one"),
    (embedding, {"engine": "greedy"}, "leaves the sampler out"),
    (embedding, {"label": 4}, "classes 0 to 3"),
    (embedding, {"flow_vit": "nowhere.npz"}, "takes the place of --checkpoint"),
]


@pytest.mark.parametrize(("options", "changes", "said"), REFUSED)
def test_what_does_not_fit_is_refused_in_a_sentence(nets, tmp_path, options, changes, said):
    main = stylise.main if options is fine_tuning else effect.main
    with pytest.raises(ValueError, match=said) as caught:
        main(replace(options(nets, tmp_path / "run"), **changes))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
