"""The security audit and the inversions: what they count, what they are bound by, and that a run is a function of its options."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import invert_and_edit
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import security_audit
from judges import Judge, judges
from labelled import Labelled, labelled
from security_tables import RANDOM, Attack, Outcome
from shared import shared
from test_mesh import close

import adjoint_jax as aj
from adjoint_jax import checkpoints
from adjoint_jax.experiments.metrics import margin
from adjoint_jax.experiments.options import read_config

SAME = ("results.json", "final.npz", "history.jsonl")
SHAPE, PROCESS = (4, 4, 1), aj.VPCosine()
PATTERN = np.random.default_rng(0).normal(size=(16, 1)).astype(np.float32)
TABLE = jnp.asarray([[0.1], [-0.2], [0.0]], jnp.float32)

pytestmark = pytest.mark.usefixtures("as_the_program_runs")


def network(x, t, args):
    """A smooth eps that depends on everything."""
    return jnp.tanh(args["params"] * x + 0.3 * jnp.sin(3 * x[:, ::-1]) + jnp.broadcast_to(args["cond"], (len(x), 1))[:, None, None])


def two_logits(offset, images):
    """Those of a classifier of two classes."""
    z = images.reshape(len(images), 16) @ PATTERN - offset
    return jnp.concatenate([-z, z + 0.1 * jnp.sin(z)], axis=1)


def toy_judges(*_):
    return {"toy": Judge("toy", jax.jit(two_logits), jnp.float32(0.0))}, "There is no second reader."


@pytest.fixture(scope="module", autouse=True)
def _toys():
    """Both experiments on a network of two classes of 4 x 4 pixels and on a classifier that reads some of its samples as either."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (security_audit, invert_and_edit):
            patch.setattr(module, "labelled", lambda _: Labelled(network, jnp.float32(0.7), PROCESS, "eps", TABLE, SHAPE))
            patch.setattr(module, "judges", toy_judges)
        yield


def auditing(out, **more):
    given = {"steps": 4, "per_class": 8, "engines": ("kept", "greedy"), "radii": (0.2, 0.6), "main_radius": 0.6, "rounds": 2, "rate": 0.5}
    return security_audit.Options(**{**given, "out": str(out), **more})


def editing(out, **more):
    given = {"images": "absent.npz", "methods": ("ddim", "bdia"), "per_class": 2, "steps": (4,), "edit_steps": 4, "guidance": (2.0,)}
    return invert_and_edit.Options(**{**given, "iterations": 3, "radius": 0.5, "kappa": 100.0, "out": str(out), **more})


def finished(main, options):
    main(options)
    return Path(options.out)


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    return finished(security_audit.main, auditing(tmp_path_factory.mktemp("audit") / "run"))


@pytest.fixture(scope="module")
def edited(tmp_path_factory):
    return finished(invert_and_edit.main, editing(tmp_path_factory.mktemp("edit") / "run"))


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
def test_a_stopped_run_ends_as_an_unbroken_one(whole, make, main, kind, pictures, tmp_path, monkeypatch, request):
    out = request.getfixturevalue(whole)
    assert {file.name for file in out.iterdir()} == {*SAME, *pictures, "report.md", "config.json", "state.npz"}
    step = kind.step

    def dies(self, state, k):
        if k == 5:
            raise Killed
        return step(self, state, k)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "step", dies)
        with pytest.raises(Killed):
            main(make(tmp_path / "run"))
    finished(main, make(tmp_path / "run", resume=True))
    for name in SAME:
        assert (tmp_path / "run" / name).read_bytes() == (out / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("whole", "make", "main"), [("audited", auditing, security_audit.main), ("edited", editing, invert_and_edit.main)])
def test_a_run_on_a_mesh_is_one_on_one_device(whole, make, main, tmp_path, request):
    out = finished(main, make(tmp_path / "run", mesh="data=2,fsdp=2", checkpointer="orbax"))
    close(*(dict(np.load(each)) for each in (out / "final.npz", request.getfixturevalue(whole) / "final.npz")), 1e-5)
    with pytest.raises(ValueError, match="does not divide over the 4 devices of --mesh data=4"):
        main(make(tmp_path / "odd", mesh="data=4", per_class=1))


def test_the_margin_is_positive_where_another_class_is_read():
    logits = np.random.default_rng(0).normal(size=(20, 4))
    labels = np.arange(20) % 4
    found = margin(lambda images: images, jnp.asarray(labels), jnp.asarray(logits))
    for row, label, value in zip(logits, labels, found, strict=True):
        np.testing.assert_allclose(value, max(np.delete(row, label)) - row[label], rtol=1e-5)
    np.testing.assert_array_equal(np.asarray(found) > 0, logits.argmax(axis=1) != labels)


def test_an_update_is_a_step_along_the_sign_of_the_gradient_and_ends_at_the_original_ball():
    setup = security_audit.problem(auditing("unused", per_class=1))
    given, start = setup.against("toy"), setup.variables["x_T"]

    def total(x):
        args = {"params": given.params, "cond": setup.variables["embedding"]}
        term = aj.DiffusionTerm(network, PROCESS, "eps")
        logits = two_logits(0.0, aj.sample(term, x, args, grid=setup.sampler.grid, adjoint=aj.DirectAdjoint()))
        rows = jnp.arange(len(x))
        return jnp.sum(logits[rows, 1 - setup.labels] - logits[rows, setup.labels])  # of two classes the other one

    update = security_audit.updater(setup.sampler, aj.DiscreteAdjoint())
    gradient = np.asarray(jax.jit(jax.grad(total))(start))
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


def test_the_audit_judges_the_sample_of_the_last_noise(audited):
    found = json.loads((audited / "results.json").read_text())
    setup = security_audit.problem(auditing("unused"))
    spread = float(PROCESS.sigma(setup.sampler.grid[0]))
    with np.load(audited / "final.npz") as final:
        noise, start, labels = final["x_T"], final["start"], final["labels"]

    def read(x):
        args = {"params": setup.given.params, "cond": TABLE[labels]}
        images = aj.sample(aj.DiffusionTerm(network, PROCESS, "eps"), jnp.asarray(x), args, grid=setup.sampler.grid)
        return np.argmax(two_logits(0.0, images), axis=1)

    right = read(start) == labels
    main = found["attacked"]["toy"]["0.6"]["toy"]
    assert 0 < right.sum() == main["counted"] < len(labels)
    assert main["misread"] == (read(noise[0])[right] != labels[right]).sum()
    assert main["misread"] > found["random_signs"]["0.6"]["toy"]["misread"]
    np.testing.assert_allclose(
        np.abs(noise - start[None]).max(axis=(1, 2, 3, 4)), [0.6 * spread] * 2 + [0.2 * spread, 0.2 * spread, 0.6 * spread], rtol=1e-5
    )
    assert set(found["race"]) == {"kept", "greedy"}
    report = (audited / "report.md").read_text()
    assert "There is no second reader." in report
    assert "read by LeNet" not in report


def test_a_round_of_every_engine_has_about_the_same_work():
    options = auditing("unused", steps=12, engines=("discrete", "kept", "greedy"))
    items = security_audit.plan(options, security_audit.problem(options))
    updates = {item.engine: item.updates for item in items}
    assert updates == {"discrete": 1, "kept": 2, "greedy": 18, RANDOM: 1}  # 12 + 12 + 12 evaluations, 12 + 12, 1 + 1


def by_hand(x, cond, grid):
    """DDIM in steps written out: to the clean state and the noise, and together again at the next time."""
    for s, t in pairwise(grid):
        (a, b), (c, d) = ((float(PROCESS.alpha(each)), float(PROCESS.sigma(each))) for each in (s, t))
        eps = network(x, s, {"params": 0.7, "cond": cond})
        x = c * (x - b * eps) / a + d * eps
    return x


def test_the_round_trip_of_ddim_is_that_by_hand(edited):
    grid = aj.grids.log_snr(PROCESS, 4)
    with np.load(edited / "final.npz") as final:
        images, own, made = (final[name] for name in ("images", "own", "made"))
    noise = by_hand(jnp.asarray(images), TABLE[own], grid[::-1])
    np.testing.assert_allclose(made[0], by_hand(noise, TABLE[own], grid), rtol=1e-3, atol=1e-3)
    assert np.abs(made[0] - images).max() > 0.05


@pytest.mark.parametrize("method", ["rex", "cycle"])
def test_the_other_methods_come_back(method):
    term, args, grid = aj.DiffusionTerm(network, PROCESS, "eps"), {"params": 0.7, "cond": TABLE[0]}, aj.grids.log_snr(PROCESS, 2)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, *SHAPE)), jnp.float32)
    code = invert_and_edit.encode(method, term, x, args, grid, jax.random.key(0))
    np.testing.assert_allclose(invert_and_edit.decode(method, term, code, args, grid), x, atol=1e-3)
    other = invert_and_edit.decode(method, term, code, {**args, "cond": TABLE[1]}, grid)
    assert np.abs(other - x).max() > 0.05


def test_only_ddim_loses_the_image_and_what_is_counted_is_what_was_made(edited):
    found = json.loads((edited / "results.json").read_text())
    errors = {row["method"]: row["rms"] for row in found["round_trips"]}
    assert errors["bdia"] < 0.1 * errors["ddim"]
    with np.load(edited / "final.npz") as final:
        images, own, new, made = (final[name].astype(np.float64) for name in ("images", "own", "new", "made"))
    assert (own != new).all()
    for row, pictures in zip(found["edits"], made[2:], strict=True):
        read = np.argmax(two_logits(0.0, pictures.astype(np.float32)), axis=1)
        assert row["read_as_new"]["toy"]["images"] == (read == new).sum()
        np.testing.assert_allclose(row["distance"], np.mean(np.sqrt(np.mean((pictures - images) ** 2, axis=(1, 2, 3)))), rtol=1e-6)
    # in 4 steps: trips 4 + 4, edits 4 + 2 x 4, new noise 2 x 4, and 4 + 4 beside three gradients, each of 8 and 4
    assert "| network evaluations in all | 80 forward, 12 backward |" in (edited / "report.md").read_text()


def test_the_gradient_edit_climbs_inside_its_ball():
    options = editing("unused")
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
        (auditing, security_audit.problem, {"engines": ("greedy",)}, r"The first of --engines is one of kept, discrete, direct"),
        (auditing, security_audit.problem, {"engines": ("kept", "magic")}, r"The gradient magic is not known: use one of"),
        (auditing, security_audit.problem, {"target": 1.5}, r"--target is a share of the samples"),
        (auditing, security_audit.problem, {"rounds": 0}, r"--rounds must be at least 1; got 0\."),
        (auditing, security_audit.problem, {"guidance": float("nan")}, r"--guidance must be a finite number"),
        (editing, invert_and_edit.problem, {"methods": ("edict",)}, r"--methods edict is not known"),
        (editing, invert_and_edit.problem, {"steps": ()}, r"--steps are the steps of round trips"),
        (editing, invert_and_edit.problem, {"guidance": ()}, r"--methods and --guidance need one entry at least"),
        (editing, invert_and_edit.problem, {"guidance": (1.0, float("nan"))}, r"--guidance must be finite numbers; got \(1\.0, nan\)"),
        (editing, invert_and_edit.problem, {"kappa": 0.0}, r"--kappa must be a positive number"),
    ],
)
def test_refusals_are_one_sentence(make, problem, options, sentence):
    with pytest.raises(ValueError, match=sentence) as refused:
        problem(make("unused", **options))
    assert "\n" not in str(refused.value)


def test_too_few_images_that_are_read_right(monkeypatch):
    blind = Judge("blind", lambda _, images: jnp.tile(jnp.array([1.0, -1.0]), (len(images), 1)), ())
    monkeypatch.setattr(invert_and_edit, "judges", lambda *_: ({"blind": blind}, ""))
    with pytest.raises(ValueError, match="Of the classes 1 fewer than 2 images are read right: give a lower --per-class"):
        invert_and_edit.problem(editing("unused"))


def test_the_embedded_networks_and_whom_they_do_not_go_with(monkeypatch):
    drawn = labelled(security_audit.Options())
    assert (drawn.shape, drawn.classes) == ((28, 28, 1), 10)
    readers, note = judges(None, "absent.npz", drawn.shape, 10)
    assert note == "There is no second reader: the weights of LeNet are not at absent.npz."
    assert list(readers) == ["embedded"]
    assert "left out: images are 8 x 8 x 1." in judges(None, "absent.npz", (8, 8, 1), 10)[1]
    with pytest.raises(ValueError, match="The classifier embedded knows 10 classes where the sampler draws 4"):
        judges(None, "absent.npz", drawn.shape, 4)
    with pytest.raises(ValueError, match="holds a UNet2D where a ConvClassifier was expected"):
        judges(str(checkpoints.EMBEDDED / "digits"), "absent.npz", drawn.shape, 10)
    with pytest.raises(ValueError, match=r"The embedded classifier reads images \[H, W, 1\], and these are \[H, W, 3\]"):
        judges(None, "absent.npz", (28, 28, 3), 10)
    bare = checkpoints.Checkpoint(network, {"conv_in": {}}, PROCESS, "eps")
    monkeypatch.setattr(checkpoints, "load", lambda _: bare)
    with pytest.raises(ValueError, match="has no table of class embeddings"):
        labelled(security_audit.Options())


def test_lenet_is_the_second_reader_where_its_weights_are():
    readers, note = judges(None, str(shared("data/mnist_lenet5.npz")), (28, 28, 1), 10)
    assert list(readers) == ["embedded", "LeNet"]
    assert note == "The second reader is LeNet, weights mnist_lenet5.npz."
    with np.load(shared("data/mnist.npz")) as file:
        images, labels = file["x_test"][::250, :, :, None] / np.float32(127.5) - 1, file["y_test"][::250]
    assert all((judge.read(images) == labels).mean() > 0.9 for judge in readers.values())


@pytest.mark.parametrize("name", ["security_audit", "invert_and_edit"])
def test_the_config_is_one_of_its_options(name):
    module = {"security_audit": security_audit, "invert_and_edit": invert_and_edit}[name]
    path = Path(__file__).parents[1] / "configs" / f"{name}.toml"
    assert module.Options(**read_config(str(path), module.Options))
    assert f"python examples/{name}.py --config configs/{name}.toml --out runs/{name}" in path.read_text()
