"""The security audit and the inversions: what they count, what they are bound by, and that a run is a function of its options."""

import json
from dataclasses import replace
from pathlib import Path

import edit_tables
import invert_and_edit
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import security_audit
from judges import Judge
from security_tables import RANDOM, Attack, Outcome

import adjoint_jax as aj
from adjoint_jax import checkpoints
from adjoint_jax.checkpoints import _models
from adjoint_jax.experiments.metrics import margin
from adjoint_jax.experiments.options import read_config
from adjoint_jax.models import ConvClassifier, UNet2D

ONE_LEVEL = {"block_out_channels": (8,), "layers_per_block": 1, "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
UNET = UNet2D(in_channels=1, out_channels=1, norm_num_groups=4, attention_head_dim=None, add_attention=False, num_class_embeds=3, **ONE_LEVEL)
CLASSIFIER = ConvClassifier(features=(4,), classes=2, norm_num_groups=2)
SCHEDULER = {"_class_name": "DDPMScheduler", "prediction_type": "v_prediction"}
SAME = ("results.json", "final.npz", "history.jsonl")

pytestmark = pytest.mark.usefixtures("as_the_program_runs")


def random(module, scale):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(scale * rng.normal(size=leaf.shape), jnp.float32), _models.shapes(module))


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    """Folders of a network of two classes of 8 x 8 pixels and of a classifier that reads half of its samples as either."""
    folder = tmp_path_factory.mktemp("nets")
    checkpoints.save(folder / "network", UNET, random(UNET, 0.3), SCHEDULER)
    checkpoints.save(folder / "unconditional", UNET.clone(num_class_embeds=None), random(UNET.clone(num_class_embeds=None), 0.3), SCHEDULER)
    checkpoints.save(folder / "three", CLASSIFIER.clone(classes=3), random(CLASSIFIER.clone(classes=3), 1.0))
    params = random(CLASSIFIER, 1.0)
    checkpoints.save(folder / "classifier", CLASSIFIER, params)
    options = security_audit.Options(checkpoint=str(folder / "network"), classifier=str(folder / "classifier"), size=8, steps=3, per_class=8)
    setup = security_audit.problem(options)
    logits = CLASSIFIER.apply({"params": params}, setup.sampler(setup.given, setup.variables))
    params["head"]["bias"] = params["head"]["bias"] - jnp.median(logits[:, 1] - logits[:, 0]) * jnp.array([0.0, 1.0])
    checkpoints.save(folder / "halved", CLASSIFIER, params)
    return folder


def auditing(nets, out, **more):
    given = {"checkpoint": str(nets / "network"), "classifier": str(nets / "halved"), "lenet": "absent.npz", "size": 8, "steps": 3, "per_class": 4}
    return security_audit.Options(**{**given, "radii": (0.2, 0.8), "main_radius": 0.8, "rounds": 2, "out": str(out), **more})


def editing(nets, out, **more):
    given = {"checkpoint": str(nets / "network"), "classifier": str(nets / "halved"), "lenet": "absent.npz", "images": "absent.npz", "size": 8}
    small = {"per_class": 2, "steps": (3, 6), "edit_steps": 3, "guidance": (2.0,), "iterations": 3, "radius": 0.5, "kappa": 100.0}
    return invert_and_edit.Options(**{**given, **small, "out": str(out), **more})


@pytest.fixture(scope="module")
def audited(nets, tmp_path_factory):
    out = tmp_path_factory.mktemp("audit") / "run"
    with pytest.warns(UserWarning, match="published AdjointDEIS"):
        security_audit.main(auditing(nets, out))
    return out


@pytest.fixture(scope="module")
def edited(nets, tmp_path_factory):
    out = tmp_path_factory.mktemp("edit") / "run"
    invert_and_edit.main(editing(nets, out))
    return out


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    ("whole", "make", "main", "kind", "pictures"),
    [
        ("audited", auditing, security_audit.main, security_audit.Attacks, {"samples.png", "radius.png", "race.png"}),
        ("edited", editing, invert_and_edit.main, invert_and_edit.Editing, {"reconstructions.png", "edits.png", "error.png"}),
    ],
    ids=["audit", "edit"],
)
@pytest.mark.filterwarnings("ignore:The published AdjointDEIS")
def test_a_stopped_run_ends_as_an_unbroken_one(whole, make, main, kind, pictures, nets, tmp_path, monkeypatch, request):
    finished = request.getfixturevalue(whole)
    assert {file.name for file in finished.iterdir()} == {*SAME, *pictures, "report.md", "config.json", "state.npz"}
    step = kind.step

    def dies(self, state, k):
        if k == 5:
            raise Killed
        return step(self, state, k)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(kind, "step", dies)
        main(make(nets, tmp_path / "run"))
    main(make(nets, tmp_path / "run", resume=True))
    for name in SAME:
        assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes()


def test_the_margin_is_positive_where_another_class_is_read():
    logits = np.random.default_rng(0).normal(size=(20, 4))
    labels = np.arange(20) % 4
    found = margin(lambda images: images, jnp.asarray(labels), jnp.asarray(logits))
    for row, label, value in zip(logits, labels, found, strict=True):
        np.testing.assert_allclose(value, max(np.delete(row, label)) - row[label], rtol=1e-5)
    np.testing.assert_array_equal(np.asarray(found) > 0, logits.argmax(axis=1) != labels)


def test_an_update_is_a_step_along_the_sign_of_the_gradient_and_ends_at_the_original_ball(nets):
    setup = security_audit.problem(auditing(nets, "unused", per_class=1))
    given, start = setup.against("halved"), setup.variables["x_T"]
    params = checkpoints.load_model(nets / "halved")[1]

    def total(x):
        term = aj.DiffusionTerm(setup.sampler.network, setup.sampler.process, "v")
        args = {"params": given.params, "cond": setup.variables["embedding"]}
        logits = CLASSIFIER.apply({"params": params}, aj.sample(term, x, args, grid=setup.sampler.grid, adjoint=aj.DirectAdjoint()))
        rows = jnp.arange(len(x))
        return jnp.sum(logits[rows, 1 - setup.labels] - logits[rows, setup.labels])  # of two classes the other one

    update = security_audit.updater(setup.sampler, aj.DiscreteAdjoint())
    gradient = np.asarray(jax.grad(total)(start))
    x = update(given, setup.variables, start, jnp.float32(0.3), jnp.float32(0.1))
    clear = np.abs(gradient) > 1e-4 * np.abs(gradient).max()
    assert clear.mean() > 0.9
    np.testing.assert_allclose((x - start)[clear], 0.1 * np.sign(gradient)[clear], rtol=1e-4)
    for _ in range(6):
        x = update(given, setup.variables, x, jnp.float32(0.3), jnp.float32(0.1))
    np.testing.assert_allclose(np.max(np.abs(x - start)), 0.3, rtol=1e-5)
    assert np.mean(np.abs(x - start) > 0.2999) > 0.2


def test_the_published_mistakes_are_caught():
    start = jnp.zeros((1, 2, 2, 1))
    drifting = kept = start
    for _ in range(3):
        drifting = security_audit.project(drifting + 0.2, drifting, 0.2)  # about the present iterate: binds nothing
        kept = security_audit.project(kept + 0.2, start, 0.2)
    np.testing.assert_allclose(security_audit.reached(kept, start, 0.2), 1.0, rtol=1e-6)
    with pytest.raises(ValueError, match="3 radii away from the original noise"):
        security_audit.reached(drifting, start, 0.2)
    twice = Judge("twice", lambda params, images: jax.nn.softmax(images[:, 0, 0]), ())
    images = jnp.asarray([[[[40.0, 0.0, 0.0]]]])
    with pytest.raises(ValueError, match="twice answers with probabilities"):
        twice.read(images)
    once = Judge("once", lambda params, images: images[:, 0, 0], ())
    slopes = [float(jnp.abs(jax.grad(lambda images, judge=judge: judge.margins(jnp.array([0]))(images)[0])(images)).max()) for judge in (once, twice)]
    assert slopes[0] == 1
    assert slopes[1] < 1e-15


def test_what_counts_and_what_is_a_success():
    labels = np.array([0, 0, 1, 1])
    before = {"one": np.array([0, 1, 1, 1]), "two": np.array([0, 0, 1, 0])}
    main, signs = Attack("one", "exact", 0.1, 1), Attack("", RANDOM, 0.1, 1)
    rows = [
        ("one", [1, 1, 1, 1], [0, 0, 1, 0]),
        ("one", [0, 1, 0, 0], [0, 1, 0, 0]),
        ("", [1, 0, 1, 1], [0, 0, 1, 1]),
        ("", [0, 0, 1, 1], [0, 0, 1, 1]),
    ]
    history = [{"reached": 1.0, "readings": {"one": one, "two": two}} for _, one, two in rows]
    found = Outcome.of(labels, before, [main, signs], history)
    assert found.final(main, "one") == (2, 3)
    assert found.final(main, "two") == (2, 3)
    assert found.shared(main, "two") == (1, 1)
    assert found.by_class(main, "one") == [(0, 1), (2, 2)]
    assert found.final(signs, "one") == (0, 3)
    assert found.any_round(signs, "one") == (1, 3)
    np.testing.assert_allclose(found.shares(main), [1 / 3, 2 / 3])


def test_the_audit_judges_the_sample_of_the_last_noise(nets, audited):
    found = json.loads((audited / "results.json").read_text())
    params = checkpoints.load_model(nets / "halved")[1]
    setup = security_audit.problem(auditing(nets, "unused"))
    term = aj.DiffusionTerm(setup.sampler.network, setup.sampler.process, "v")
    with np.load(audited / "final.npz") as final:
        noise, start, labels = final["x_T"], final["start"], final["labels"]

    def read(x):
        images = aj.sample(term, jnp.asarray(x), {"params": setup.given.params, "cond": setup.variables["embedding"]}, grid=setup.sampler.grid)
        return np.argmax(CLASSIFIER.apply({"params": params}, images), axis=1)

    right = read(start) == labels
    main = found["attacked"]["halved"]["0.8"]["halved"]
    assert 0 < right.sum() == main["counted"]
    assert main["misread"] == (read(noise[0])[right] != labels[right]).sum()
    assert main["misread"] > found["random_signs"]["0.8"]["halved"]["misread"]
    assert np.abs(noise - start[None]).max() <= 0.8 * float(setup.sampler.spread) * (1 + 1e-5)
    assert set(found["race"]) == set(security_audit.ENGINES)
    report = (audited / "report.md").read_text()
    assert "There is no second reader: the weights of LeNet are not at absent.npz." in report
    assert "read by LeNet" not in report


def test_a_round_of_every_engine_has_the_same_work(nets):
    options = auditing(nets, "unused", steps=12)
    items = security_audit.plan(options, security_audit.problem(options))
    updates = {item.engine: item.updates for item in items}
    assert updates == {"exact": 1, "deis": 1, "published": 1, "greedy": 18, RANDOM: 1}  # 12 + 12 + 12 evaluations against 1 + 1


def by_hand(network, process, x, cond, params, grid, back):
    """DDIM in steps written out: to the clean state and the noise, and together again at the next time."""
    times = grid[::-1] if back else grid
    for s, t in zip(times[:-1], times[1:], strict=True):
        (a, b), (c, d) = ((float(process.alpha(each)), float(process.sigma(each))) for each in (s, t))
        v = network(x, jnp.float32(s), {"params": params, "cond": cond})
        x = c * (a * x - b * v) + d * (b * x + a * v)
    return x


def test_the_round_trip_of_ddim_is_that_by_hand(nets, edited):
    network, params, process, _ = aj.load(nets / "network")
    grid = aj.grids.log_snr(process, 3)
    with np.load(edited / "final.npz") as final:
        images, own, made = final["images"], final["own"], final["made"]
    cond = params["class_embedding"]["embedding"][own]
    back = by_hand(network, process, jnp.asarray(images), cond, params, grid, True)
    np.testing.assert_allclose(made[0], by_hand(network, process, back, cond, params, grid, False), atol=2e-4)


def test_only_ddim_loses_the_image_and_what_is_counted_is_what_was_made(nets, edited):
    found = json.loads((edited / "results.json").read_text())
    errors = {(row["method"], row["steps"]): row["rms"] for row in found["round_trips"]}
    assert all(errors[name, steps] < 0.1 * errors["ddim", steps] for name in ("bdia", "rex", "cycle") for steps in (3, 6))
    with np.load(edited / "final.npz") as final:
        images, new, made = final["images"], final["new"], final["made"]
        assert (final["own"] != new).all()
    params = checkpoints.load_model(nets / "halved")[1]
    for row, pictures in zip(found["edits"], made[8:], strict=True):
        read = np.argmax(CLASSIFIER.apply({"params": params}, pictures), axis=1)
        assert row["read_as_new"]["halved"]["images"] == (read == new).sum()
        np.testing.assert_allclose(row["distance"], np.mean(np.sqrt(np.mean((pictures - images) ** 2, axis=(1, 2, 3)))), rtol=1e-5)


def test_the_gradient_edit_climbs_inside_its_ball(nets):
    options = editing(nets, "unused")
    setup = invert_and_edit.problem(options)
    run = invert_and_edit.Editing(options, setup, invert_and_edit.plan(options))
    steering, given, variables = run.steering(run.items[-1])
    before = given.metric(steering.sampler(given, variables))
    after = given.metric(run.driven(run.items[-1]))
    assert float(jnp.sum(after)) > float(jnp.sum(before))
    state, _ = jax.jit(replace(steering, radius=0.01).update)(given, steering.start(variables).state)
    moved = np.linalg.norm((state.variables["x_T"] - variables["x_T"]).reshape(len(before), -1), axis=1)
    np.testing.assert_allclose(moved, 0.01 * float(steering.sampler.spread), rtol=1e-3)


@pytest.mark.parametrize(
    ("make", "problem", "options", "sentence"),
    [
        (auditing, security_audit.problem, {"main_radius": 0.5}, r"--main-radius must be one of --radii"),
        (auditing, security_audit.problem, {"engines": ("greedy",)}, r"--engines must have exact in it"),
        (auditing, security_audit.problem, {"engines": ("exact", "magic")}, r"--engines magic is not known: use one of exact, deis"),
        (auditing, security_audit.problem, {"target": 1.5}, r"--target is a share of the samples"),
        (auditing, security_audit.problem, {"rounds": 0}, r"--rounds must be at least 1; got 0\."),
        (auditing, security_audit.problem, {"guidance": float("nan")}, r"--guidance must be a finite number"),
        (auditing, security_audit.problem, {"checkpoint": "unconditional"}, r"has no table of class embeddings"),
        (auditing, security_audit.problem, {"classifier": "three"}, r"The classifier three knows 3 classes where the sampler draws 2"),
        (auditing, security_audit.problem, {"classifier": "network"}, r"holds a UNet2D where a ConvClassifier was expected"),
        (editing, invert_and_edit.problem, {"methods": ("edict",)}, r"--methods edict is not known"),
        (editing, invert_and_edit.problem, {"steps": ()}, r"--steps are the steps of round trips"),
        (editing, invert_and_edit.problem, {"guidance": ()}, r"--methods and --guidance need one entry at least"),
        (editing, invert_and_edit.problem, {"kappa": 0.0}, r"--kappa must be a positive number"),
    ],
)
def test_refusals_are_one_sentence(make, problem, options, sentence, nets):
    options = {key: str(nets / value) if key in ("checkpoint", "classifier") else value for key, value in options.items()}
    with pytest.raises(ValueError, match=sentence) as refused:
        problem(make(nets, "unused", **options))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["security_audit", "invert_and_edit"])
def test_the_config_is_one_of_its_options(name):
    module = {"security_audit": security_audit, "invert_and_edit": invert_and_edit}[name]
    path = Path(__file__).parents[1] / "configs" / f"{name}.toml"
    assert module.Options(**read_config(str(path), module.Options))
    assert f"python examples/{name}.py --config configs/{name}.toml --out runs/{name}" in path.read_text()
    assert edit_tables.NAMES.keys() == set(invert_and_edit.METHODS)
