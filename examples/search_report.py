"""The report of `search_solver`: its claim, tables and pictures."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

import adjoint_jax as aj
from adjoint_jax.audit import AuditRow
from adjoint_jax.experiments import Progress, pictures, report
from adjoint_jax.experiments.statistics import rate

NAMES = {
    ("Exponential(1) in lam", "noise"): "DDIM",
    ("Exponential(2) in t", "noise"): "DEIS(2)",
    ("Exponential(3) in t", "noise"): "DEIS(3)",
    ("Exponential(3) in lam", "data"): "DPM-Solver++(3M)",
    ("DPM-Solver++(2M)", "data"): "DPM-Solver++(2M)",
    ("DPM-Solver(2M)", "noise"): "DPM-Solver(2M)",
    ("UniPC-2", "data"): "UniPC-2",
    ("UniPC-3", "data"): "UniPC-3",
}
"""Usual samplers that the report always shows, by the names of their papers."""
FINALISTS = 6
"""Usual samplers that are measured on fresh noises beside those above: the best on the noises of the search."""
MEASURED = f"""The {FINALISTS} that were best on the noises of the search, and those that are always shown, each on the best of its grids,
chosen on the fresh noises themselves."""
CONTRAST = 5
"""Of the pictures of errors."""


class Key(NamedTuple):
    """A usual sampler: its name, splitting and grid."""

    sampler: str
    splitting: Any
    grid: str

    @property
    def family(self) -> str:
        splitting = self.splitting if isinstance(self.splitting, str) else f"c = {self.splitting:g}"
        return NAMES.get((self.sampler, self.splitting), f"{self.sampler}, {splitting}")


def loaded(schedule: dict[str, Any]) -> aj.Schedule:
    return aj.Schedule(**schedule)


def rows_of(history: Sequence[dict[str, Any]], kind: str) -> dict[int, dict[str, Any]]:
    return {row["evaluations"]: row for row in history if row["item"] == kind}


def samples_picture(options: Any, pixels: Any, state: Mapping[str, Any], comparisons: dict[int, dict[str, Any]]) -> bytes:
    """The reference, and of each number of evaluations the best usual sampler and the schedule, each above its error."""
    images = {name: np.asarray(pixels(state[name]))[..., : options.shown, :, :, :] for name in ("reference", "usual", "searched")}
    rows = {"reference": images["reference"]}
    for i, (n, row) in enumerate(comparisons.items()):
        for name, words in (("usual", row["best_name"]), ("searched", "searched")):
            rows[f"{n}: {words}"] = images[name][i]
            rows[f"{n}, {name}: error x {CONTRAST}"] = np.minimum(CONTRAST * np.abs(images[name][i] - images["reference"]), 2) - 1
    return pictures.table_of_images(rows, width=48)


def errors_picture(comparisons: dict[int, dict[str, Any]]) -> bytes:
    """(1) against the evaluations."""
    counts = list(comparisons)
    shown = [name for name in ("DDIM", "DPM-Solver++(2M)", "DEIS(3)", "UniPC-3") if all(name in row["families"] for row in comparisons.values())]
    lines = {name: (counts, [row["families"][name][0] for row in comparisons.values()]) for name in shown}
    lines |= {name: (counts, [row[key] for row in comparisons.values()]) for name, key in (("best usual", "usual"), ("searched", "searched"))}
    return pictures.curves(lines, "network evaluations", "error on fresh noises", log=True)


def claim(options: Any, results: dict[str, Any]) -> str:
    """The outcome in one sentence a number."""
    said = []
    for n, row in results["evaluations"].items():
        factor = row["usual"] / row["searched"]
        against = f"{row['usual']:.2e} of the best usual sampler, {row['best_name']}"
        said.append(
            f"{n} evaluations: {row['searched']:.2e} against {against}, {factor:.2f} times less, better on {row['better']} of {options.fresh}"
        )
    found = results["gradients"]["gradients"]
    apart = results["gradients"]["per_image"]
    middle = {name: np.median(each) for name, each in apart.items()}
    through = (
        f"the gradient through {options.gradient_nfe} steps is off by {found['searched'][0]:.3f} instead of {found['usual'][0]:.3f} over all images, "
        f"by {middle['searched']:.3f} instead of {middle['usual']:.3f} for the median one"
    )
    return f"Error of samples on fresh noises at {'; at '.join(said)}; {through}."


def reported(options: Any, config: dict[str, Any], progress: Progress, results: dict[str, Any]) -> bytes:
    by_count, table, picture = results["evaluations"], report.table, report.picture
    ends = [
        (n, f"{r['searched']:.2e}", f"{r['usual']:.2e}", f"{r['best_name']} on {r['families'][r['best_name']][1]}",
         f"{r['usual'] / r['searched']:.2f}", rate(r["better"], options.fresh))
        for n, r in by_count.items()
    ]  # fmt: skip
    names = sorted(
        {name for r in by_count.values() for name in r["families"]}, key=lambda name: min(by_count[n]["families"].get(name, [9])[0] for n in by_count)
    )
    cell = lambda pair: f"{pair[0]:.2e} {pair[1]}" if pair else ""  # noqa: E731
    all_rows = [("searched", *(f"{r['searched']:.2e}" for r in by_count.values()))]
    all_rows += [(name, *(cell(r["families"].get(name)) for r in by_count.values())) for name in names]
    found = results["gradients"]["gradients"]
    apart = results["gradients"]["per_image"]
    better = rate(int(np.sum(np.less(apart["searched"], apart["usual"]))), len(apart["usual"]))
    gradients = [
        (name, f"{found[key][0]:.3f}", f"{np.median(apart[key]):.3f}", f"{max(apart[key]):.3f}", f"{found[key][1]:.4f}", f"{found[key][2]:.3f}")
        for name, key in (("best usual", "usual"), ("searched", "searched"))
    ]
    halved, steps = results["reference"]["halved"], results["reference"]["steps"]
    searches = rows_of(progress.history, "search")
    tried = 0 if options.schedules else 3 * options.starts + options.tries + options.descents * 4 * 40
    spent = options.images * sum(n * (tried + len(row["ranked"])) + 7 * options.fine_steps for n, row in searches.items())
    cost = report.cost(
        progress.seconds, None, {"evaluations of the network in the searches, about, an image as one and a backward one as two": f"{spent:.1e}"}
    )
    return report.document(
        "Solver search",
        claim(options, results),
        report.section(
            "On fresh noises",
            table(("evaluations", "searched", "best usual", "which, and its grid", "times less", "fresh noises on which it is better"), ends),
            picture("errors.png", "error against evaluations"),
            picture("samples.png", "samples"),
            f"The reference has {steps} steps; one of half of them is {halved:.1e} from it. Pictures of errors are {CONTRAST} times as bright.",
        ),
        report.section("Usual samplers", MEASURED, table(("sampler", *by_count), all_rows)),
        report.section(
            f"The gradient through {options.gradient_nfe} steps",
            f"Of (2), in x_T, against that through the reference. Through the schedule it is nearer for {better} of the images.",
            table(("sampler", "relative error, all images", "median image", "worst image", "cosine", "norm ratio"), gradients),
        ),
        report.audited(
            [(f"{options.gradient_nfe} steps", AuditRow("DiscreteAdjoint, used", "x_T", *results["gradients"]["autodiff"]))], "plain autodiff"
        ),
        *(schedule_section(n, loaded(row["schedule"])) for n, row in searches.items()),
        cost,
        report.options(config),
    )


def schedule_section(n: int, schedule: aj.Schedule) -> str:
    times, choices = (
        schedule.times or (),
        zip(schedule.orders, schedule.splittings, schedule.variables, schedule.rules, schedule.correctors, strict=True),
    )
    rows = [(i, f"{times[i]:.4g}", f"{times[i + 1]:.4g}", *choice) for i, choice in enumerate(choices)]
    used = f'`schedule = aj.Schedule.load("schedule_{n}.json")`, then `aj.sample(term, x_T, args, grid=schedule.times, solver=schedule)`.'
    return report.section(
        f"The schedule of {n} evaluations",
        used,
        report.table(("step", "from t", "to t", "order", "splitting", "variable", "rule", "corrector"), rows),
    )
