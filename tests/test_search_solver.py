"""The experiment of solver search, small: the same bytes twice and after a stop, its numbers by other ways, its refusals."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import search_report
import search_solver
from test_mesh import close

import adjoint_jax as aj
from adjoint_jax.experiments import command, run as run_module
from adjoint_jax.experiments.options import read_config
from adjoint_jax.search import _candidates

pytestmark = pytest.mark.usefixtures("as_the_program_runs")
COMPARED = ("results.json", "final.npz", "history.jsonl", "schedule_3.json")


def network(x, t, args):
    """A smooth v that depends on everything."""
    shift = args["params"][args["cond"]][:, None, None, None]
    return jnp.tanh(x * shift + jnp.roll(x, 1, axis=1)) - 0.5 * x * jnp.cos(0.002 * t)


PROCESS = aj.VPDiscrete(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))
TERM = aj.DiffusionTerm(network, PROCESS, "v")
SHAPE = (4, 4, 1)


NUMBERS = {"images": 2, "fresh": 3, "shown": 2, "tries": 3, "descents": 0, "starts": 2, "fine_steps": 8, "reference_steps": 12}
SMALL = search_solver.Options(nfe=(3,), gradient_nfe=3, gradient_images=2, **NUMBERS)


def search(out, **changed):
    """The experiment for a network in a formula, with two grids and one splitting for the usual samplers."""
    every, params = _candidates.fixed_grids, jnp.linspace(-0.5, 0.7, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search_solver, "SPLITTINGS", ("data",))
        patch.setattr(_candidates, "fixed_grids", lambda *given: {name: every(*given)[name] for name in ("uniform", "log_snr")})
        patch.setattr(search_solver, "problem_of", lambda _: search_solver.Problem(TERM, params, 4, SHAPE, lambda x: x, None))
        search_solver.main(dataclasses.replace(SMALL, out=str(out), **changed))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("search") / "run"
    search(out)
    return out


def test_a_run_stopped_twice_ends_in_the_same_bytes(finished, tmp_path, monkeypatch):
    save = run_module.Run.save

    def stopping(run, progress, views=None):
        save(run, progress, views)
        if len(progress.history) in (1, 2):
            raise KeyboardInterrupt

    monkeypatch.setattr(run_module.Run, "save", stopping)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            search(tmp_path / "run", resume=True)
    monkeypatch.undo()
    search(tmp_path / "run", resume=True)
    for name in COMPARED:
        assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes()


@pytest.mark.slow
def test_a_search_on_a_mesh_is_one_on_one_device(tmp_path):
    even = {"images": 4, "fresh": 4, "gradient_images": 4}
    for name, more in {"one": {}, "several": {"mesh": "data=2,fsdp=2", "checkpointer": "orbax"}}.items():
        search(tmp_path / name, **even, **more)
    close(*(dict(np.load(each)) for each in (tmp_path / "several" / "final.npz", tmp_path / "one" / "final.npz")), 1e-5)
    assert (tmp_path / "several" / "schedule_3.json").read_bytes() == (tmp_path / "one" / "schedule_3.json").read_bytes()


def relative(x, reference):
    return [np.linalg.norm(each - other) / np.linalg.norm(other) for each, other in zip(x, reference, strict=True)]


def test_its_numbers_by_other_ways(finished):
    out = finished
    results = json.loads((out / "results.json").read_text())
    with np.load(out / "final.npz") as file:
        final = {name: file[name].astype(np.float64) for name in file.files}
    row = results["evaluations"]["3"]
    errors = {name: relative(final[name][0], final["reference"]) for name in ("searched", "usual")}
    for name, found in errors.items():
        np.testing.assert_allclose(row[name], np.prod(found) ** (1 / 3), rtol=1e-5)
    assert row["better"] == sum(np.less(errors["searched"], errors["usual"]))
    x_T = PROCESS.sigma(999.0) * jax.random.normal(jax.random.fold_in(jax.random.key(0), 1), (3, *SHAPE))
    args = {"params": jnp.linspace(-0.5, 0.7, 4), "cond": jnp.arange(3)}
    schedule = aj.Schedule.load(out / "schedule_3.json")
    np.testing.assert_allclose(aj.sample(TERM, x_T, args, grid=np.array(schedule.times), solver=schedule), final["searched"][0], atol=1e-4)
    error, grid = row["families"]["DPM-Solver++(2M)"]
    own = aj.sample(TERM, x_T, args, grid=getattr(aj.grids, grid)(PROCESS, 3), solver=aj.DPMSolverPP(2))
    np.testing.assert_allclose(error, np.prod(relative(np.asarray(own), final["reference"])) ** (1 / 3), rtol=1e-2)

    def loss(x):
        made = aj.sample(TERM, x, {**args, "cond": jnp.arange(2)}, grid=np.array(schedule.times), solver=schedule, adjoint=aj.DirectAdjoint())
        return sum(jnp.mean((made[i] - final["reference"][1 - i]) ** 2) for i in range(2))

    np.testing.assert_allclose(jax.grad(loss)(x_T[:2]), final["gradient_searched"], rtol=1e-3, atol=1e-5)
    measured = np.linalg.norm(final["gradient_searched"] - final["gradient_reference"]) / np.linalg.norm(final["gradient_reference"])
    np.testing.assert_allclose(results["gradients"]["gradients"]["searched"][0], measured, rtol=1e-5)
    assert results["gradients"]["autodiff"][0] < 1e-5


def test_schedules_that_were_saved_are_used_again(finished, tmp_path):
    search(tmp_path / "run", schedules=str(finished))
    before, after = (json.loads((folder / "results.json").read_text()) for folder in (finished, tmp_path / "run"))
    assert before == after
    assert "aj.Schedule.load" in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--nfe", "5", "90"), "--nfe are numbers from 2 to one less than --fine-steps, 60; got (5, 90)."),
        (("--gradient-nfe", "7"), "--gradient-nfe must be one of --nfe, (5, 8, 10); got 7."),
        (("--fresh", "3"), "--shown and --gradient-images are of the --fresh noises, 3; got 6, 8."),
        (("--tries", "-1"), "--tries must be at least 0; got -1."),
        (("--flow-vit", __file__, "--size", "8"), "--flow-vit says how large its images are: leave --size out."),
        (("--flow-vit", "nowhere.npz"), "names mnist_flow_vit.npz of the shared data; got nowhere.npz."),
    ],
)
def test_refusals_are_one_sentence_and_write_nothing(tmp_path, capsys, arguments, sentence):
    with pytest.raises(SystemExit) as stopped:
        command(search_solver.main, search_solver.Options, ["--out", str(tmp_path / "out"), *arguments])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(sentence)
    assert not (tmp_path / "out").exists()


def test_the_configs_hold_known_options():
    for name in ("search_solver", "search_solver_flow_vit"):
        search_solver.checked(search_solver.Options(**read_config(f"configs/{name}.toml", search_solver.Options)))


def test_every_usual_sampler_has_a_name():
    names = [
        search_report.Key(sampler, splitting, "uniform").family for splitting in ("data", "noise", 0.5) for sampler in _candidates.named(4, splitting)
    ]
    assert len(set(names)) == len(names)
    assert set(search_report.NAMES.values()) <= set(names)


def test_the_embedded_digits_and_their_reference():
    problem = search_solver.problem_of(search_solver.Options())
    assert (problem.shape, problem.classes) == ((28, 28, 1), 10)
    x_T, of_each = problem.batch(jax.random.key(0), 12)
    assert x_T.shape == (12, 28, 28, 1)
    assert of_each["cond"].tolist() == [*range(10), 0, 1]
    grid = problem.finest(400)
    assert (grid[0], grid[-1]) == (999, 0)
    assert 300 < len(grid) <= 401
    assert (np.diff(grid) < 0).all()
    np.testing.assert_array_equal(grid, np.round(grid))
