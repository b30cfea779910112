"""The frame of the experiments: constraints, metrics, intervals, options, and runs that a kill cannot harm."""

import signal
import subprocess
import sys
from dataclasses import dataclass
from io import BytesIO

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.optimize
import scipy.stats
from PIL import Image

from adjoint_jax.checkpoints import _files
from adjoint_jax.experiments import Experiment, Progress, Run, command, iterate, metrics, npz, pictures, projections, recorded, report, statistics
from adjoint_jax.experiments.options import read_config
from adjoint_jax.experiments.projections import concentration, projection

RNG = np.random.default_rng(0)
IMAGE = (-3, -2, -1)


# Projections. The noise of three steps for two images of 4 x 4 x 2 entries, and x_T of the same.

SHAPES = {"x_T": (2, 4, 4, 2), "injected": (3, 2, 4, 4, 2), "several draws": (3, 2, 2, 4, 4, 2)}
SPREAD, RADIUS, N = 0.7, 0.4, 32


def onto_radius(row, radius):
    return row * radius / np.sqrt(np.sum(row**2))


def by_numpy(name, row, start):
    """Equations (1) to (5) for the entries of one image at one step."""
    if name == "shell":
        return onto_radius(row, SPREAD * np.sqrt(N))
    if name == "chi":
        low, high = SPREAD * np.sqrt(scipy.stats.chi2.ppf([0.05, 0.95], N))
        return onto_radius(row, min(max(np.linalg.norm(row), low), high))
    if name == "norm":
        return onto_radius(row, np.linalg.norm(start))
    if name == "linf":
        return np.array([min(max(x, s - SPREAD * RADIUS), s + SPREAD * RADIUS) for x, s in zip(row, start, strict=True)])
    if name == "l2":
        change, reach = row - start, SPREAD * RADIUS
        return row if np.linalg.norm(change) <= reach else start + onto_radius(change, reach)
    return row


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", projections.PROJECTIONS)
@pytest.mark.parametrize("size", [0.01, 1.0, 3.0])
def test_each_projection_is_its_equation_for_each_image_and_step(name, shape, size):
    start = RNG.normal(size=shape)
    x = start + size * RNG.normal(size=shape)
    projected = projection(name, RADIUS if name in projections.BALLS else None)(jnp.asarray(x), jnp.asarray(start), SPREAD, IMAGE)
    rows = (each.reshape(-1, N) for each in (x, start))
    expected = np.stack([by_numpy(name, row, begun) for row, begun in zip(*rows, strict=True)])
    np.testing.assert_allclose(projected, expected.reshape(shape), rtol=1e-12, atol=1e-14)
    again = projection(name, RADIUS if name in projections.BALLS else None)(projected, jnp.asarray(start), SPREAD, IMAGE)
    np.testing.assert_allclose(again, projected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("name", "order"), [("linf", np.inf), ("l2", 2)])
def test_a_ball_is_about_the_start_however_far_the_iterates_walk(name, order):
    project, start = projection(name, RADIUS), jnp.asarray(RNG.normal(size=(2, 4, 4, 2)))
    x, direction = start, jnp.asarray(RNG.normal(size=start.shape))
    for _ in range(20):
        x = project(x + 0.1 * direction, start, SPREAD, IMAGE)
    norms = np.linalg.norm(np.asarray(x - start).reshape(2, -1), ord=order, axis=1)
    np.testing.assert_allclose(norms, SPREAD * RADIUS, rtol=1e-12)


def test_the_chi_shell_holds_nine_tenths_of_all_noise():
    norms = np.linalg.norm(RNG.normal(size=(20000, N)), axis=1) * SPREAD
    onto = projection("chi")
    ends = [float(jnp.linalg.norm(onto(jnp.full((1, 4, 4, 2), size), None, SPREAD, IMAGE))) for size in (1e-3, 1e3)]
    inside = np.mean((norms > ends[0]) & (norms < ends[1]))
    assert abs(inside - 0.9) < 4 * np.sqrt(0.09 / 20000)
    assert abs(np.mean(norms < ends[0]) - 0.05) < 4 * np.sqrt(0.05 * 0.95 / 20000)


@pytest.mark.parametrize("count", [1, 3])
def test_the_penalty_is_minus_the_log_density_of_the_norm(count):
    x = RNG.normal(size=(count, 4, 4, 2))

    def by_scipy(scale):
        norms = np.linalg.norm(scale * x.reshape(count, -1), axis=1) / SPREAD
        return -np.sum(scipy.stats.chi.logpdf(norms, N)) / N

    ours = lambda scale: concentration(scale * jnp.asarray(x), SPREAD, IMAGE)  # noqa: E731
    difference = (by_scipy(1.3 + 1e-6) - by_scipy(1.3 - 1e-6)) / 2e-6
    np.testing.assert_allclose(jax.grad(ours)(1.3), difference, rtol=1e-7)
    np.testing.assert_allclose(ours(1.3) - ours(0.6), by_scipy(1.3) - by_scipy(0.6), rtol=1e-12)


def test_the_penalty_is_least_at_the_mode_of_the_norm():
    x = jnp.asarray(onto_radius(RNG.normal(size=N), SPREAD * np.sqrt(N - 1)).reshape(1, 4, 4, 2))
    np.testing.assert_allclose(jax.grad(concentration)(x, SPREAD, IMAGE), 0, atol=1e-14)


@pytest.mark.parametrize(("name", "radius"), [("ball", None), ("linf", None), ("l2", 0.0), ("linf", np.nan), ("shell", 0.1), ("none", 1.0)])
def test_refuses_a_projection(name, radius):
    with pytest.raises(ValueError, match=r"is not known: use one of none, shell|A radius, a positive number, is for the projections linf and l2"):
        projection(name, radius)


# Metrics, of three images of 6 x 8 x 2.

IMAGES, TARGET = RNG.uniform(-1, 1, size=(3, 6, 8, 2)), RNG.uniform(-1, 1, size=(6, 8, 2))
SEEN = (RNG.random((6, 8, 1)) < 0.4).astype(float)


def gaussian_filtered(images, width):
    return scipy.ndimage.gaussian_filter(images, (0, width, width, 0), mode="nearest", radius=int(np.ceil(3 * width)))


@pytest.mark.parametrize("width", [0.3, 1.0, 2.5])
def test_blur_is_scipys(width):
    np.testing.assert_allclose(metrics.blurred(jnp.asarray(IMAGES), width), gaussian_filtered(IMAGES, width), rtol=1e-12, atol=1e-14)


def log_normal(x, mean, spread):
    """Without its constant."""
    return scipy.stats.norm.logpdf(x, mean, spread) - scipy.stats.norm.logpdf(0, 0, spread)


def gram_by_loops(features):
    h, w, c = features.shape
    return np.array([[sum(features[i, j, a] * features[i, j, b] for i in range(h) for j in range(w)) / (h * w) for b in range(c)] for a in range(c)])


def features(images):
    return [images, jnp.concatenate([jnp.sin(images), images**2], axis=-1)[:, ::2]]


def style_by_numpy(image):
    layers = [(np.asarray(mine[0]), np.asarray(other[0])) for mine, other in zip(features(image[None]), features(TARGET[None]), strict=True)]
    return -sum(np.mean((gram_by_loops(mine) - gram_by_loops(other)) ** 2) for mine, other in layers)


def layout_by_numpy(image):
    cells = [(image - TARGET)[3 * i : 3 * i + 3, 4 * j : 4 * j + 4].mean(axis=(0, 1)) for i in range(2) for j in range(2)]
    return -np.mean(np.square(cells))


GRAMS = [metrics.gram(layer)[0] for layer in features(jnp.asarray(TARGET)[None])]
MEASURED = {
    "colour": (lambda x: metrics.colour(jnp.asarray([0.2, -0.3]), x), lambda x: -((x[..., 0].mean() - 0.2) ** 2 + (x[..., 1].mean() + 0.3) ** 2) / 2),
    "layout": (lambda x: metrics.layout(2, jnp.asarray(TARGET), x), layout_by_numpy),
    "inpainting": (
        lambda x: metrics.inpainting(0.1, jnp.asarray(SEEN), jnp.asarray(TARGET), x),
        lambda x: np.mean([log_normal(x[i, j, c], TARGET[i, j, c], 0.1) for i, j in np.argwhere(SEEN[..., 0]) for c in range(2)]),
    ),
    "deblurring": (
        lambda x: metrics.deblurring(0.1, 1.5, jnp.asarray(TARGET), x),
        lambda x: np.mean(log_normal(gaussian_filtered(x[None], 1.5)[0], TARGET, 0.1)),
    ),
    "style": (lambda x: metrics.style(features, GRAMS, x), style_by_numpy),
}


@pytest.mark.parametrize("name", MEASURED)
def test_each_metric_is_its_formula(name):
    metric, formula = MEASURED[name]
    np.testing.assert_allclose(metric(jnp.asarray(IMAGES)), [formula(image) for image in IMAGES], rtol=1e-10)


@pytest.mark.parametrize("name", MEASURED)
def test_each_metric_has_a_finite_gradient_everywhere_and_rises_along_it(name):
    total = jax.jit(lambda x: jnp.sum(MEASURED[name][0](x)))
    differentiated = jax.jit(jax.grad(total))
    for images in (jnp.asarray(IMAGES), jnp.broadcast_to(jnp.asarray(TARGET), IMAGES.shape), jnp.zeros(IMAGES.shape)):
        gradient = differentiated(images)
        assert jnp.isfinite(gradient).all()
        step = 1e-6 * gradient / jnp.maximum(jnp.linalg.norm(gradient), 1e-12)
        assert total(images + step) >= total(images) - 1e-14


# Statistics.


@pytest.mark.parametrize(("successes", "trials"), [(0, 1), (1, 1), (0, 20), (20, 20), (1, 10), (7, 10), (500, 1000)])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_wilson_inverts_the_score_test(successes, trials, confidence):
    low, high = statistics.wilson(successes, trials, confidence)
    rate = successes / trials

    def p_value(probability):
        return 2 * scipy.stats.norm.sf(abs(rate - probability) / np.sqrt(probability * (1 - probability) / trials)) - (1 - confidence)

    if successes:
        np.testing.assert_allclose(low, scipy.optimize.brentq(p_value, 1e-9, rate - 1e-9 * (rate == 1)), rtol=1e-9)
    if successes < trials:
        np.testing.assert_allclose(high, scipy.optimize.brentq(p_value, rate + 1e-9 * (rate == 0), 1 - 1e-9), rtol=1e-9)
    assert (low == 0) == (successes == 0)
    assert (high == 1) == (successes == trials)


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (-1, 3), (4, 3)])
def test_refuses_an_interval_of_nothing(successes, trials):
    with pytest.raises(ValueError, match="An interval needs 0 <= successes <= trials and a trial; got"):
        statistics.wilson(successes, trials)


def test_pairs_that_share_people_have_the_interval_of_the_people():
    """Of v_ab = u_a + u_b over all pairs of n people the mean is 2 mean(u), whose standard error is 2 sd(u) / sqrt(n)."""
    rng, n = np.random.default_rng(1), 60
    u, pairs = rng.normal(size=n), np.stack(np.triu_indices(n, 1), axis=1)
    middle, low, high = statistics.over_people(u[pairs].sum(axis=1), pairs)
    half = 1.96 * 2 * np.std(u) / np.sqrt(n)
    np.testing.assert_allclose(middle, 2 * np.mean(u), rtol=1e-12)
    np.testing.assert_allclose([low, high], [middle - half, middle + half], atol=0.15 * half)
    assert statistics.over_people([1, 1], [(3, 7), (7, 9)]) == (1, 1, 1)


def test_a_rate_in_words():
    assert statistics.rate(7, 10) == "70.0 % [39.7, 89.2] (7/10)"


# Runs.

START = {
    "float16": jnp.asarray([1.5, np.nan, -np.inf], jnp.float16),
    "nested": (jnp.asarray([[0.1, 1e-42]], jnp.float32), {"int32": jnp.asarray(7, jnp.int32), "none": None}),
    "uint8": jnp.arange(5, dtype=jnp.uint8),
    "bfloat16": jnp.asarray([[1 / 3, 3e38]], jnp.bfloat16),
    "key": jax.random.split(jax.random.key(3), 2),
    "other key": jax.random.key(3, impl="rbg"),
    "host": np.asarray([1 / 3, 1e300]),
    "words": np.asarray(2**63 + 1, np.uint64),
    "true": jnp.asarray([True, False]),
}


def bits(leaf):
    """The type and bytes of a leaf."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return str(jax.random.key_impl(leaf)), np.asarray(jax.random.key_data(leaf)).tobytes()
    return isinstance(leaf, jax.Array), str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()


@pytest.mark.parametrize("wide", [True, False])
def test_every_type_of_array_survives(tmp_path, wide):
    run = Run(tmp_path / "run", {"seed": 1, "sizes": (1, 2)})
    history = [{"k": 0, "metric": 0.1}, {"k": 1, "metric": float("inf")}]
    run.save(Progress(START, history, [0.5, 0.25]))
    with jax.enable_x64(wide):
        restored = Run(tmp_path / "run", {"seed": 1, "sizes": (1, 2)}, resume=True).restore(START)
    assert jax.tree.structure(restored.state) == jax.tree.structure(START)
    for found, leaf in zip(jax.tree.leaves(restored.state), jax.tree.leaves(START), strict=True):
        assert bits(found) == bits(leaf)
    assert restored.history == history
    assert restored.seconds == [0.5, 0.25]


def test_an_archive_holds_what_numpy_can_read():
    data = npz({"b": START["bfloat16"], "a": START["key"]})
    with np.load(BytesIO(data), allow_pickle=False) as archive:
        assert archive.files == ["a", "b"]
        np.testing.assert_array_equal(archive["b"], np.asarray(START["bfloat16"], np.float32))
    assert data == npz({"a": START["key"], "b": START["bfloat16"]})


def doubled(state, k):
    key = jax.random.fold_in(state["key"], k)
    x = jnp.sin(3 * state["x"]) + jax.random.normal(key, state["x"].shape, state["x"].dtype)
    return {"key": state["key"], "x": x}, {"iteration": k, "metric": float(jnp.mean(x)), "per_image": x.tolist()}


def begin():
    return {"key": jax.random.key(5), "x": jnp.asarray([0.3, 0.4], jnp.float32)}


def experiment(out, total=5, save_every=2, resume=False):
    run = Run(out, {"total": total}, resume)
    restored = run.restore(begin())
    views = lambda progress: {"view.txt": repr(progress.history[-1]).encode()}  # noqa: E731
    return run.follow(iterate(doubled, restored, total), restored, total, save_every, views, "metric")


VIEWS = ("history.jsonl", "config.json", "view.txt")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken") / "run"
    return out, experiment(out)


def test_an_iteration_goes_on_anywhere(unbroken):
    _, end = unbroken
    for stop in iterate(doubled, Progress(begin()), 5):
        progress = [stop, *iterate(doubled, stop, 5)][-1]
        assert progress.history == end.history
        np.testing.assert_array_equal(progress.state["x"], end.state["x"])
        assert len(progress.seconds) == 5
    assert list(iterate(doubled, end, 5)) == []


class Killed(BaseException):
    pass


@pytest.mark.parametrize("write", range(16))
def test_a_run_killed_at_any_write_resumes_to_the_same_files(unbroken, tmp_path, monkeypatch, write):
    out, end = unbroken
    count = iter(range(100))
    whole = _files.write_whole

    def killed(path, data):
        if next(count) == write:
            (path.parent / f".{path.name}.halfdone").write_bytes(data[: len(data) // 2])
            raise Killed
        whole(path, data)

    monkeypatch.setattr("adjoint_jax.experiments.run.write_whole", killed)
    with pytest.raises(Killed):
        experiment(tmp_path / "run")
    monkeypatch.undo()
    progress = experiment(tmp_path / "run", resume=True)
    assert progress.history == end.history
    assert {file.name for file in (tmp_path / "run").iterdir()} == {"state.npz", *VIEWS}
    for name in VIEWS:
        assert (tmp_path / "run" / name).read_bytes() == (out / name).read_bytes()
    np.testing.assert_array_equal(progress.state["x"], end.state["x"])


KILLED = """
import importlib.util, os, signal, sys
specification = importlib.util.spec_from_file_location("files", sys.argv[1])
files = importlib.util.module_from_spec(specification)
specification.loader.exec_module(files)
from pathlib import Path
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
def half(file):
    file.write(b"new" * 50000)
    file.flush()
    die()
where = sys.argv[3]
if where in ("fsync", "replace"):
    setattr(files.os, where, die)
files.write_whole(Path(sys.argv[2]), half if where == "write" else b"new" * 100000)
if where == "afterwards":
    die()
"""


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("where", ["write", "fsync", "replace", "afterwards"])
def test_a_process_killed_while_it_writes_leaves_the_old_file_or_the_new(tmp_path, where, there):
    path = tmp_path / "state.npz"
    if there:
        path.write_bytes(b"old")
    process = subprocess.run([sys.executable, "-I", "-c", KILLED, _files.__file__, path, where], check=False)
    assert process.returncode == -signal.SIGKILL
    if where == "afterwards":
        assert path.read_bytes() == b"new" * 100000
        return
    assert (path.read_bytes() == b"old") if there else not path.exists()
    assert sum(1 for _ in tmp_path.iterdir()) == 1 + there
    Run(tmp_path, {}, resume=True)
    assert [file.name for file in tmp_path.iterdir()] == ["state.npz"] * there


def test_what_is_not_a_half_written_file_stays(unbroken, tmp_path):
    experiment(tmp_path / "run")
    for name in (".hidden", ".notes.txt"):
        (tmp_path / "run" / name).write_text("mine")
    experiment(tmp_path / "run", resume=True)
    assert {".hidden", ".notes.txt"} < {file.name for file in (tmp_path / "run").iterdir()}


def test_refuses_a_run_of_another_configuration(tmp_path):
    experiment(tmp_path / "run")
    with pytest.raises(ValueError, match=r"was started with other values: total = 5 \(now 9\); give the same to resume, or another --out\.$"):
        experiment(tmp_path / "run", total=9, resume=True)


OTHERS = {
    "shape": ({"key": jax.random.key(0), "x": jnp.zeros(3, jnp.float32)}, r"an array is float32\[2\] where float32\[3\] was expected"),
    "type": ({"key": jax.random.key(0), "x": jnp.zeros(2, jnp.int32)}, r"an array is float32\[2\] where int32\[2\] was expected"),
    "name": ({"key": jax.random.key(0), "y": jnp.zeros(2, jnp.float32)}, "state/y"),
    "key": ({"key": jax.random.key(0, impl="rbg"), "x": jnp.zeros(2, jnp.float32)}, r"an array is uint32\[2\] where uint32\[4\] was expected"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_refuses_a_state_of_another_form(unbroken, name):
    out, _ = unbroken
    start, words = OTHERS[name]
    with pytest.raises(ValueError, match=f"state.npz is not the whole state of a run .*{words}.*: remove .* and start again"):
        Run(out, {"total": 5}, resume=True).restore(start)


def test_no_damage_passes_for_a_state(unbroken, tmp_path):
    """One bit of the file, or its end: either it is refused, or nothing that is read had changed."""
    out, end = unbroken
    whole = (out / "state.npz").read_bytes()
    (tmp_path / "state.npz").write_bytes(whole)
    run = Run(tmp_path, {"total": 5}, resume=True)
    refused = 0
    for trial in range(400):
        damaged = bytearray(whole)
        if trial % 4:
            damaged[RNG.integers(len(whole))] ^= 1 << int(RNG.integers(8))
        else:
            damaged = damaged[: RNG.integers(len(whole))]
        (tmp_path / "state.npz").write_bytes(damaged)
        try:
            restored = run.restore(begin())
        except ValueError:
            refused += 1
        else:
            assert restored.history == end.history
            assert restored.seconds == end.seconds
            np.testing.assert_array_equal(restored.state["x"], end.state["x"])
    assert refused > 200


# Options.


@dataclass(frozen=True)
class Options(Experiment):
    """Of a test."""

    steps: tuple[int, ...] = (5, 10)
    """Numbers of steps."""
    radii: tuple[float, ...] | None = None
    """Radii, or none."""
    rate: float = 0.1
    """A rate."""
    name: str | None = None
    """A name."""


def test_options_come_from_the_file_and_from_flags(tmp_path):
    (tmp_path / "a.toml").write_text('steps = [3]\nradii = [1, 0.5]\nrate = 2\nname = "a"\nseed = 4\n')
    found = []
    command(found.append, Options, ["--config", str(tmp_path / "a.toml"), "--name", "b", "--out", "here"])
    assert recorded(found[0]) == {"seed": 4, "steps": (3,), "radii": (1.0, 0.5), "rate": 2.0, "name": "b"}
    command(found.append, Options, ["--steps", "1", "2", "--radii", "0.1", "--save-every", "3"])
    assert recorded(found[1]) == {"seed": 0, "steps": (1, 2), "radii": (0.1,), "rate": 0.1, "name": None}
    assert (found[1].save_every, found[1].out) == (3, "runs/experiment")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("steps = 3", "has steps = 3 where a list was expected."),
        ("steps = [3.5]", "has steps = 3.5 where an int was expected."),
        ("steps = ['3']", "has steps = '3' where an int was expected."),
        ("radii = 'many'", "has radii = 'many' where a list was expected."),
        ("radii = [true]", "has radii = True where a float was expected."),
        ("rate = [1]", "has rate = [1] where a float was expected."),
        ("name = 3", "has name = 3 where a str was expected."),
        ("rates = 3", "has the unknown key rates: known are out, save_every, seed, steps, radii, rate, name."),
        ("resume = true", "has the unknown key resume: known are out, save_every, seed, steps, radii, rate, name."),
    ],
)
def test_refuses_a_value_of_another_type(tmp_path, capsys, text, sentence):
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(ValueError, match=r"a\.toml has"):
        read_config(str(tmp_path / "a.toml"), Options)
    assert refusal(lambda _: None, ["--config", str(tmp_path / "a.toml")], capsys).endswith(f"{tmp_path / 'a.toml'} {sentence}\n")


def refusal(main, argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        command(main, Options, argv)
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError, FileNotFoundError, FloatingPointError, ImportError])
def test_what_a_user_can_mend_is_one_sentence_and_status_two(capsys, error):
    def main(_):
        raise error("It was this\n  and that.")

    assert refusal(main, [], capsys) == "adjoint-jax: It was this and that.\n"


def test_what_a_user_cannot_mend_is_not_hidden():
    def main(_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        command(main, Options, [])


# Reports and pictures.


def test_a_report_is_put_together():
    text = report.document("T", "Lead.", report.section("A", report.table(("a", "b"), [(1, "x|y")]), report.picture("p.png", "words"))).decode()
    assert text == "# T\n\nLead.\n\n## A\n\n| a | b |\n| --- | --- |\n| 1 | x\\|y |\n\n![words](p.png)\n"
    cost = report.cost([1.0, 3.0], (2, 1))
    assert "4.0 s, 2.00 s for the median one" in cost
    assert "| network evaluations in all | 4 forward, 2 backward |" in cost


def test_a_sheet_shows_the_images_in_order_and_pictures_are_the_same_bytes_twice():
    images = np.linspace(-1, 1, 5)[:, None, None, None] * np.ones((5, 4, 4, 1))
    sheet = np.asarray(Image.open(BytesIO(pictures.sheet(images, columns=2, width=8))))
    assert sheet.shape == (3 * 10 + 2, 2 * 10 + 2, 3)
    assert [sheet[2 + 10 * (i // 2) + 4, 2 + 10 * (i % 2) + 4, 0] for i in range(5)] == [0, 64, 128, 191, 255]
    rows = {"one": images[:1], "two": images[:2]}
    assert pictures.table_of_images(rows, ["a", "b"]) == pictures.table_of_images(rows, ["a", "b"])
