"""The comparison of gradients: every engine runs, for equal evaluations, twice to the same bytes; and what it says is what happened."""

import dataclasses
import json

import compare_gradients
import numpy as np
import pytest
from compare_gradients import Options
from test_cli import SCHEDULER, UNET, save_random

from adjoint_jax.experiments import Progress, Run, recorded
from adjoint_jax.models import ConvClassifier

pytestmark = pytest.mark.usefixtures("as_the_program_runs")

ENGINES = ("discrete", "last-k:1", "greedy", "guided")
APART = {"before": 0.7, "discrete": 0.6, "guided": 0.5}


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    network = save_random(folder / "network", UNET.clone(num_class_embeds=4), SCHEDULER)
    classifier = save_random(folder / "classifier", ConvClassifier(features=(8,), classes=4, norm_num_groups=4))
    small = {"size": 8, "steps": 4, "sampler": "ddim", "batch": 2, "iterations": 2, "label": 1, "target": 2, "drive": "both"}
    rates = {"engines": ENGINES, "learning_rates": (0.02, 0.1), "scales": (0.5,), "goal": -1.45}
    return Options(checkpoint=network, classifier=classifier, out=str(folder / "run"), **small, **rates)


@pytest.fixture(scope="module")
def finished(options):
    compare_gradients.main(options)
    return options


def written(options, name):
    return (compare_gradients.Path(options.out) / name).read_bytes()


def test_it_runs_every_engine_for_equal_evaluations(finished):
    results = json.loads(written(finished, "results.json"))
    assert list(results["engines"]) == sorted(ENGINES)
    counts = {name: (len(row["metric"]) - 1, row["updates"]) for name, row in results["engines"].items()}
    assert counts == {"discrete": (2, 1), "last-k:1": (4, 1), "greedy": (2, 6), "guided": (0, 0)}  # of 12, 6 and 2 evaluations an update
    exact = results["engines"]["discrete"]
    assert exact["metric"][-1] > exact["metric"][0]
    starts = {row["metric"][0] for name, row in results["engines"].items() if name != "guided"}
    assert max(starts) - min(starts) < 1e-5
    for row in results["engines"].values():
        np.testing.assert_allclose(np.mean(row["per_image"]), row["metric"][-1], rtol=1e-6)
        if row["reached"] is not None:
            assert row["metric"][row["reached"]] >= finished.goal > max(row["metric"][: row["reached"]], default=-np.inf)
    report = written(finished, "report.md").decode()
    assert all(f"| {name} |" in report for name in ENGINES)
    # at each of two rates 2 exact updates of 8 + 4, 4 of 5 + 1, and 12 of 1 + 1; one guided sample of 8 + 4
    assert "| network evaluations in all | 104 forward, 52 backward |" in report


def test_guidance_that_is_there_at_once_is_said(finished):
    race = compare_gradients.Race(finished, *compare_gradients._build.steering(finished))
    row = {"engine": "discrete", "rate": 0.1, "updates": 1, "metric": [-3.0, -1.0], "per_image": [], "reached": 1}
    rows = [row, {**row, "engine": "guided", "updates": 0, "metric": [-1.2], "reached": 0}]
    said = []
    for goal in (-1.45, -1.1):
        race.options = dataclasses.replace(finished, goal=goal)
        lead, _ = compare_gradients.claims(race, Progress(None, rows), {"discrete": 0, "guided": 1}, {"discrete": 2, "guided": 0.5}, APART, None)
        said.append("Guidance at every step is there in one sample (0.50 s, scale 0.1: -1.2)" in lead)
    assert said == [True, False]


def test_a_stopped_comparison_goes_on_to_the_same_bytes(finished, tmp_path):
    """From what a run holds after four of its seven."""
    whole = Run(compare_gradients.Path(finished.out), recorded(finished), True).restore(np.zeros((7, 2, 8, 8, 1), np.float32))
    images = np.array(whole.state)
    images[4:] = 0
    options = dataclasses.replace(finished, out=str(tmp_path / "run"))
    Run(tmp_path / "run", recorded(options)).save(whole._replace(state=images, history=whole.history[:4], seconds=whole.seconds[:4]))
    compare_gradients.main(dataclasses.replace(options, resume=True))
    for name in ("results.json", "final.npz", "history.jsonl"):
        assert written(options, name) == written(finished, name)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"adjoint": "deis"}, "leave adjoint out"),
        ({"learning_rate": 0.3}, "leave learning_rate out"),
        ({"engines": ("guided",)}, "let it be one that iterates"),
        ({"engines": ("discrete", "exact")}, "The gradient exact is not known: use one of discrete, kept,"),
        ({"engines": ("discrete", "last-k")}, "The gradient last-k needs the number of steps"),
        ({"engines": ()}, "each need a value"),
        ({"engines": ("discrete", "random-k:2")}, "The gradient random-k:2 draws anew at each update"),
        ({"learning_rates": (0.1, -0.1)}, r"--learning-rates must be positive numbers; got \(0.1, -0.1\)"),
        ({"scales": (0.5, float("nan"))}, r"--scales must be finite numbers; got \(0.5, nan\)"),
        ({"prompt": "a cat"}, "with --prompt is no image: leave it out of --engines"),
    ],
)
def test_refuses(options, tmp_path, change, sentence):
    with pytest.raises(ValueError, match=sentence):
        compare_gradients.main(dataclasses.replace(options, out=str(tmp_path / "run"), **change))
    assert not (tmp_path / "run").exists()
