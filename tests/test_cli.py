"""The command line: what it writes, that a killed run ends as an unbroken one, and each refusal as one sentence with nothing written."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from adjoint_jax import _build, _misfits, _scoring, checkpoints, cli
from adjoint_jax._options import Guide
from adjoint_jax.checkpoints import _models
from adjoint_jax.experiments import options as options_module, run as run_module
from adjoint_jax.experiments.options import read_config
from adjoint_jax.models import ConvClassifier, UNet2D

ROOT = Path(__file__).parents[1]
ONE_LEVEL = {"block_out_channels": (8,), "layers_per_block": 1, "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
UNET = UNet2D(in_channels=1, out_channels=1, norm_num_groups=4, attention_head_dim=None, add_attention=False, **ONE_LEVEL)
SCHEDULER = {"_class_name": "DDPMScheduler", "prediction_type": "v_prediction"}
EVERY = {"before.png", "after.png", "metric.png", "history.jsonl", "report.md", "config.json", "state.npz", "final.npz"}

pytestmark = pytest.mark.usefixtures("as_the_program_runs")


def save_random(path, module, scheduler=None, spoil=None):
    """A checkpoint of random weights."""
    rng = np.random.default_rng(0)
    shapes = _models.shapes(module)
    params = jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32), shapes)
    if spoil is not None:
        params = spoil(params)
    checkpoints.save(path, module, params, scheduler)
    return str(path)


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    """Folders of a conditional and an unconditional network of one level, and of a classifier; images are 8 x 8."""
    folder = tmp_path_factory.mktemp("nets")
    classifier = ConvClassifier(features=(8,), classes=4, norm_num_groups=4)
    return {
        "conditional": save_random(folder / "conditional", UNET.clone(num_class_embeds=4), SCHEDULER),
        "unconditional": save_random(folder / "unconditional", UNET, SCHEDULER),
        "huge": save_random(folder / "huge", UNET, SCHEDULER, lambda params: jax.tree.map(lambda leaf: leaf * 1e30, params)),
        "classifier": save_random(folder / "classifier", classifier),
    }


SMALL = ("--size", "8", "--steps", "4", "--batch", "2")


def sampling(nets, *more, kind="conditional"):
    return [*SMALL, "--checkpoint", nets[kind], *(("--label", "1") if kind == "conditional" else ()), *more]


def guidance(nets, out, *more):
    own = ("--classifier", nets["classifier"], "--target", "2", "--iterations", "4", "--save-every", "2", "--out", str(out))
    return ["guide", *sampling(nets), *own, *more]


def run(*arguments):
    """The program in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, "-m", "adjoint_jax", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def history(out):
    return [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]


def assert_same_run(one, other):
    assert history(one) == history(other)
    with np.load(one / "final.npz") as a, np.load(other / "final.npz") as b:
        assert a.files == b.files
        for name in a.files:
            np.testing.assert_array_equal(a[name], b[name])


@pytest.fixture(scope="module")
def finished(nets, tmp_path_factory):
    """A run of four iterations that drives everything."""
    out = tmp_path_factory.mktemp("finished") / "run"
    cli.main(guidance(nets, out, "--drive", "both"))
    return out


def test_guide_writes_everything_and_the_metric_rises(finished):
    assert {file.name for file in finished.iterdir()} == EVERY
    rows = history(finished)
    assert [row["iteration"] for row in rows] == [0, 1, 2, 3, 4]
    assert rows[-1]["metric"] > rows[0]["metric"]
    assert set(rows[0]["gradient_norm"]) == {"x_T", "embedding"}
    assert len(rows[0]["per_image"]) == 2
    with np.load(finished / "final.npz") as final:
        shapes = {name: final[name].shape for name in final.files}
        np.testing.assert_allclose(np.linalg.norm(final["x_T"].reshape(2, -1), axis=1), 8.0, rtol=1e-3)
    assert shapes == {"x_T": (2, 8, 8, 1), "embedding": (2, 32), "images": (2, 8, 8, 1)}
    for name in ("before.png", "after.png", "metric.png"):
        Image.open(finished / name).verify()


def test_the_report_holds_the_audit_and_the_cost(finished):
    report = (finished / "report.md").read_text()
    exact = re.findall(r"\| (first|last) \| discrete\(\), used \| (x_T|embedding) \| 0.00e\+00 \| 1.0000 \|", report)
    assert exact == [("first", "embedding"), ("first", "x_T"), ("last", "embedding"), ("last", "x_T")]
    assert report.count("AdjointDEIS(steps=2)") == 4
    assert "| network evaluations an iterate, for the whole batch | 8 forward, 4 backward |" in report
    assert "MiB" in report
    assert "| guidance | `1.0` |" in report


def test_a_run_killed_at_any_moment_resumes_to_the_same_end(nets, finished, tmp_path):
    arguments = guidance(nets, tmp_path / "run", "--drive", "both", "--resume")
    process = run(*arguments)
    while not (tmp_path / "run" / "state.npz").exists():
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (tmp_path / "run" / ".state.npz.halfdone").write_bytes(b"what a kill during a write leaves")
    with np.load(tmp_path / "run" / "state.npz") as state:
        assert len(str(state["history"]).splitlines()) < 5
    cli.main(arguments)
    assert {file.name for file in (tmp_path / "run").iterdir()} == EVERY
    assert_same_run(tmp_path / "run", finished)


@pytest.mark.parametrize("stop", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_a_run_stopped_after_any_save_resumes_to_the_same_end(nets, finished, tmp_path, monkeypatch, stop):
    arguments = guidance(nets, tmp_path / "run", "--drive", "both")
    save = run_module.Run.save

    def stopping(run, progress, views):
        save(run, progress, views)
        if len(progress.history) == stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(run_module.Run, "save", stopping)
    with pytest.raises(KeyboardInterrupt):
        cli.main(arguments)
    monkeypatch.undo()
    (tmp_path / "run" / "history.jsonl").unlink()
    cli.main([*arguments, "--resume"])
    assert_same_run(tmp_path / "run", finished)


def test_a_finished_run_resumes_to_itself_and_refuses_other_options(nets, finished, capsys):
    arguments = guidance(nets, finished, "--drive", "both", "--resume")
    before = (finished / "final.npz").read_bytes()
    cli.main(arguments)
    assert (finished / "final.npz").read_bytes() == before
    refuses([*arguments, "--seed", "5", "--learning-rate", "0.2"], "learning_rate = 0.05 (now 0.2), seed = 0 (now 5); give the same", capsys)


def refuses(arguments, sentence, capsys):
    """Status 2 and one line on standard error with `sentence` in it."""
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(argument) for argument in arguments])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("adjoint-jax: ") == 1
    last = error.splitlines()[-1]
    assert last.startswith("adjoint-jax: ")
    assert sentence in last
    assert "Traceback" not in error


NONE = ("--target", "None", "--classifier", "None")
REFUSED = {
    "sampler": (("--sampler", "euler"), "--sampler euler is not known: use one of ddim, deis, dpmpp, exponential, heun, sde-dpmpp."),
    "grid": (("--grid", "cosine"), "--grid cosine is not known: use one of uniform, quadratic, log_snr,"),
    "adjoint": (("--adjoint", "dpm"), "--adjoint dpm is not known: use one of discrete, kept, direct, deis, published, published-1,"),
    "optimiser": (("--optimiser", "lbfgs"), "--optimiser lbfgs is not known: use one of adam,"),
    "drive": (("--drive", "weights"), "--drive weights is not known: use one of noise, injected, embedding, both."),
    "project": (("--project", "ball"), "--project ball is not known: use one of none, shell, chi, norm, linf, l2."),
    "option of a sampler": (("--sampler", "ddim", "--order", "2"), "--sampler ddim takes no --order: leave it out."),
    "option of an adjoint": (("--adjoint-steps", "2"), "--adjoint discrete takes no --adjoint-steps: leave it out."),
    "order": (("--order", "9"), "orders 1 to 3"),
    "steps": (("--steps", "-3"), "--steps must be at least 1; got -3."),
    "adjoint steps": (("--adjoint", "deis", "--adjoint-steps", "9"), "choose steps between 1 and 4."),
    "batch": (("--batch", "0"), "--batch must be at least 1; got 0."),
    "iterations": (("--iterations", "0"), "--iterations must be at least 1; got 0."),
    "learning rate": (("--learning-rate", "nan"), "--learning-rate must be a positive number; got nan."),
    "guidance": (("--guidance", "inf"), "--guidance must be a finite number; got inf."),
    "end of the grid": (("--t-start", "5000"), "defined for t in [-1, 999]"),
    "target": (("--target", "4"), "The classifier knows the classes 0 to 3; got --target 4"),
    "label": (("--label", "4"), "This checkpoint has the classes 0 to 3; got --label 4"),
    "checkpoint": (("--checkpoint", "nowhere"), "There is no folder at nowhere"),
    "size": (("--size", "None"), "does not say how large its images are: give --size in pixels."),
    "metric": (("--metric", "beauty", *NONE), "--metric beauty is not known: use one of classifier, image,"),
    "metric's module": (("--metric", "no_such:f", *NONE), "--metric no_such:f cannot be imported; ModuleNotFoundError: No module named 'no_such'."),
    "metric's function": (("--metric", "math:beauty", *NONE), "--metric math:beauty cannot be imported; AttributeError"),
    "metric is no function": (("--metric", "math:pi", *NONE), "--metric math:pi is a float, not a function of images."),
    "metric of another shape": (("--metric", "jax.numpy:sum", *NONE), "must give one float for each image, shape (2,); it gave"),
    "metric fails": (("--metric", "jax.numpy.linalg:inv", *NONE), "does not take images of shape (2, 8, 8, 1)"),
    "option of a metric": (("--metric", "image"), "--metric image takes no --target, --classifier: leave them out."),
    "no such ball": (("--project", "linf"), "A radius, a positive number, is for the projections linf and l2; got linf and None."),
    "radius without ball": (("--radius", "1"), "A radius, a positive number, is for the projections linf and l2; got shell and 1.0."),
    "penalty": (("--penalty", "-1"), "--penalty must be at least 0; got -1.0."),
    "ball of an embedding": (("--drive", "embedding", "--project", "linf", "--radius", "1"), "are of noise, and --drive embedding leaves it alone"),
    "penalty of an embedding": (("--drive", "embedding", "--penalty", "1"), "are of noise, and --drive embedding leaves it alone"),
    "nothing injected": (("--drive", "injected"), "--sampler dpmpp injects no noise here: use sde-dpmpp, or ddim with --eta 1, or leave injected"),
    "k of another adjoint": (("--adjoint-k", "2"), "--adjoint discrete takes no --adjoint-k: leave it out."),
    "no k": (("--adjoint", "last-k"), "--adjoint last-k needs --adjoint-k."),
    "colour": (("--metric", "colour", "--target-colour", "red", *NONE), "give --target-colour as 1 numbers in [-1, 1]"),
    "no colour": (("--metric", "colour", *NONE), "give --target-colour as 1 numbers in [-1, 1]"),
    "no image": (("--metric", "image", *NONE), "give --target-image FILE.png."),
    "image absent": (("--metric", "image", "--target-image", "nowhere.png", *NONE), "No such file or directory: 'nowhere.png'"),
}


def test_networks_of_other_kinds_are_refused():
    with pytest.raises(ValueError, match=re.escape("adm holds no UNet2D: the command line samples")):
        _build.image_shape(Guide(), Path("adm"), {"input_blocks": {}})


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_are_one_sentence_and_write_nothing(nets, tmp_path, capsys, name):
    more, sentence = REFUSED[name]
    refuses(guidance(nets, tmp_path / "out", *more), sentence, capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("size", "mode"), [((8, 9), "L"), ((8, 8), "RGB"), ((8, 8), "P")])
def test_refuses_a_target_image_of_another_shape(nets, tmp_path, capsys, size, mode):
    Image.new(mode, size).save(tmp_path / "target.png")
    arguments = guidance(nets, tmp_path / "out", "--metric", "image", "--target-image", tmp_path / "target.png", *NONE)
    refuses(arguments, "where images are sampled of (8, 8, 1) and L: resize or convert it.", capsys)


@pytest.mark.parametrize("more", [("--label", "1"), ("--guidance", "2"), ("--drive", "embedding")])
def test_refuses_classes_of_an_unconditional_network(nets, tmp_path, capsys, more):
    own = ("--metric", "jax.numpy:mean", "--out", str(tmp_path / "out"))
    refuses(["guide", *sampling(nets, *own, *more, kind="unconditional")], "This checkpoint is unconditional", capsys)


def test_refuses_a_folder_in_use(nets, finished, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    refuses(guidance(nets, finished), "exists and is not empty: give another --out, or --resume", capsys)
    refuses(guidance(nets, tmp_path, "--resume"), "exists and has no state.npz to resume from", capsys)
    refuses(["sample", *sampling(nets), "--out", tmp_path], "exists and is not empty", capsys)
    refuses(guidance(nets, tmp_path / "file"), "is a file", capsys)
    assert {file.name for file in tmp_path.iterdir()} == {"notes.txt", "file"}


def test_a_kill_during_the_first_write_leaves_nothing_to_resume(tmp_path):
    (tmp_path / ".state.npz.halfdone").write_bytes(b"half")
    run_module.claim(tmp_path, resume=True)
    assert not any(tmp_path.iterdir())


def test_refuses_a_damaged_state(nets, tmp_path, capsys):
    (tmp_path / "state.npz").write_bytes(b"PK\x03\x04 not a whole archive")
    refuses(guidance(nets, tmp_path, "--resume"), "is not the whole state of a run", capsys)


@pytest.mark.parametrize("command", ["guide", "sample"])
def test_names_the_step_at_which_the_network_gave_nan(nets, tmp_path, capsys, command):
    own = ("--metric", "test_cli:brightness") if command == "guide" else ()
    arguments = [command, *sampling(nets, *own, kind="huge"), "--out", tmp_path / "out"]
    refuses(arguments, "The state is not finite after step 0 of 4 (t = 999)", capsys)
    assert not (tmp_path / "out").exists()


def test_names_the_iteration_at_which_the_metric_gave_nan(nets, tmp_path, capsys):
    arguments = ["guide", *sampling(nets, "--metric", "test_cli:undefined", kind="unconditional"), "--out", tmp_path / "out"]
    refuses(arguments, "Iteration 0: The metric is not finite at the images [0, 1]", capsys)


def brightness(images):
    """A metric of one's own."""
    return images.mean(axis=(1, 2, 3))


def undefined(images):
    return jnp.log(-jnp.square(brightness(images)) - 1)


def test_a_metric_of_ones_own_and_an_unconditional_network(nets, tmp_path):
    arguments = sampling(nets, "--metric", "test_cli:brightness", "--iterations", "3", "--project", "none", kind="unconditional")
    cli.main(["guide", *arguments, "--sampler", "ddim", "--adjoint", "deis", "--adjoint-steps", "2", "--out", str(tmp_path / "out")])
    rows = history(tmp_path / "out")
    assert rows[-1]["metric"] > rows[0]["metric"]
    assert "deis(steps=2), used" in (tmp_path / "out" / "report.md").read_text()


def test_the_distance_to_an_image(nets, tmp_path):
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "target.png")
    options = cli.parse(["guide", "--metric", "image", "--target-image", str(tmp_path / "target.png")])
    target = np.arange(64).reshape(1, 8, 8, 1) / 127.5 - 1
    scores = _scoring.metric(options, jnp.zeros((2, 8, 8, 1)))(np.concatenate([target, target + 0.5]))
    np.testing.assert_allclose(scores, [0, -0.25], atol=1e-6)


@pytest.fixture(scope="module")
def observed(tmp_path_factory):
    """Two PNGs of 8 x 8: what was observed, and the mask of where; and the pixels of the first in [-1, 1]."""
    folder, pixels = tmp_path_factory.mktemp("observed"), np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)
    Image.fromarray(pixels).save(folder / "seen.png")
    Image.fromarray(np.where(np.arange(8)[:, None] < 4, np.full((8, 8), 255, np.uint8), 0).astype(np.uint8)).save(folder / "mask.png")
    return str(folder / "seen.png"), str(folder / "mask.png"), pixels / 127.5 - 1


def options_of(metric, observed):
    picture, mask, _ = observed
    return {
        "colour": ("--target-colour", "0.25"),
        "layout": ("--target-image", picture, "--cells", "2"),
        "inpainting": ("--target-image", picture, "--seen", mask, "--noise-level", "0.5"),
        "deblurring": ("--target-image", picture, "--blur", "0.7"),
    }[metric]


FORMULAS = {
    "colour": lambda x, y: -np.square(x.mean() - 0.25),
    "layout": lambda x, y: -np.mean(np.square((x - y).reshape(2, 4, 2, 4).mean(axis=(1, 3)))),
    "inpainting": lambda x, y: -np.mean(np.square(x - y)[:4]) / (2 * 0.5**2),
    "deblurring": lambda x, y: -np.mean(np.square(gaussian_filter(x, 0.7, mode="nearest", radius=3) - y)) / (2 * 0.1**2),
}


@pytest.mark.parametrize("metric", FORMULAS)
def test_metrics_of_an_observation(observed, metric):
    images = jax.random.uniform(jax.random.key(0), (2, 8, 8, 1), minval=-1)
    made = _scoring.metric(cli.parse(["guide", "--metric", metric, *options_of(metric, observed)]), images)
    scores, gradient = jax.jit(jax.value_and_grad(lambda x, made: jnp.sum(made(x))))(images, made)
    expected = [FORMULAS[metric](np.asarray(image[..., 0], np.float64), observed[2]) for image in images]
    np.testing.assert_allclose(made(images), expected, rtol=1e-5)
    np.testing.assert_allclose(scores, np.sum(expected), rtol=1e-5)
    assert jnp.sum(made(images + 1e-2 * gradient / jnp.linalg.norm(gradient))) > scores


def test_inpainting_by_injected_noises_in_a_ball_with_a_truncated_gradient(nets, observed, tmp_path):
    """Everything is driven; the first noise has no part in the last two steps, and the noises stay in their ball."""
    own = ("--metric", "inpainting", *options_of("inpainting", observed), "--sampler", "ddim", "--eta", "1", "--drive", "noise+injected+embedding")
    more = ("--project", "linf", "--radius", "0.1", "--adjoint", "last-k", "--adjoint-k", "2", "--learning-rate", "0.2", "--iterations", "3")
    cli.main(["guide", *sampling(nets, *own, *more), "--out", str(tmp_path / "out")])
    with np.load(tmp_path / "out" / "final.npz") as final, np.load(tmp_path / "out" / "state.npz") as state:
        moved = {name: np.abs(final[name] - state[f"state/start/{name}"]) for name in ("x_T", "noise", "embedding")}
        expected = [FORMULAS["inpainting"](np.asarray(image[..., 0], np.float64), observed[2]) for image in final["images"]]
    rows = history(tmp_path / "out")
    np.testing.assert_allclose(rows[-1]["per_image"], expected, rtol=1e-5)
    assert rows[-1]["metric"] > rows[0]["metric"]
    assert moved["noise"].shape == (4, 2, 8, 8, 1)
    assert not moved["x_T"].any()
    assert not moved["noise"][:2].any()
    assert moved["noise"][2].max() == pytest.approx(0.1, rel=1e-5)
    assert moved["embedding"].max() > 0.2
    assert "last-k(k=2), used | noise" in (tmp_path / "out" / "report.md").read_text()


def test_sample_and_the_start_of_guide_are_the_same_images(nets, finished, tmp_path):
    cli.main(["sample", *sampling(nets), "--out", str(tmp_path / "out")])
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"samples.png", "samples.npz"}
    with np.load(tmp_path / "out" / "samples.npz") as samples, np.load(finished / "state.npz") as state:
        np.testing.assert_allclose(samples["images"], state["state/before"], atol=1e-4)
    assert (tmp_path / "out" / "samples.png").read_bytes() == (finished / "before.png").read_bytes()


def test_a_config_file_changes_defaults_and_flags_override_it(tmp_path):
    (tmp_path / "a.toml").write_text('steps = 7\nlearning_rate = 1\ndrive = "both"\n')
    options = cli.parse(["guide", "--config", str(tmp_path / "a.toml"), "--steps", "9"])
    assert (options.steps, options.learning_rate, options.drive, options.batch) == (9, 1.0, "both", 16)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("stepz = 7", "has the unknown key stepz: known are out, checkpoint, size, label,"),
        ("resume = true", "has the unknown key resume"),
        ("steps = 'many'", "has steps = 'many' where an int was expected."),
        ("steps = true", "has steps = True where an int was expected."),
        ("label = 1.5", "has label = 1.5 where an int was expected."),
        ("steps = ", "is not TOML"),
    ],
)
def test_refuses_a_config_file(tmp_path, capsys, text, sentence):
    (tmp_path / "a.toml").write_text(text)
    refuses(["guide", "--config", tmp_path / "a.toml", "--out", tmp_path / "out"], sentence, capsys)
    refuses(["guide", "--config", tmp_path / "none.toml"], "No such file", capsys)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("guide_*.toml")), ids=lambda path: path.stem)
def test_the_configs_of_this_repository_hold_known_options(path):
    values = read_config(str(path), Guide)
    options = Guide(**values)
    _misfits.made("adjoint", options.adjoint, _build.ADJOINTS, "adjoint_", options)


def test_help_runs_as_a_module():
    process = run("--help")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert b"guide" in out
    assert b"sample" in out


def test_says_which_packages_are_missing(monkeypatch, capsys):
    monkeypatch.setitem(options_module.EXTRA, "no_such_module", "no-such-package")
    refuses(["sample"], "The command line needs no-such-package: pip install 'adjoint-jax[cli]'.", capsys)
