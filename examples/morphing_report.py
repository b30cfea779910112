"""What `examples/morph_faces.py` writes at its end: `results.json`, `final.npz`, pictures and `report.md`."""

from typing import Any

import numpy as np
from recognition import matched, product_average, verification
from tuning import Arrival, standing

from adjoint_jax.checkpoints._files import to_json
from adjoint_jax.experiments import Progress, Run, npz, pictures, recorded, report
from adjoint_jax.experiments.statistics import over_people, rate, wilson

Seconds = dict[tuple[str, str], float]
"""By sampler and method."""
SHOWN = 8
"""Pairs in the pictures."""
BASELINES = ("an image of each", "one image of a", "average of pixels")
"""Beside morphs: no attack, each person shown by the encoded image itself, which bounds what a morph can be hoped to reach; and two attacks
that take no model."""
LIMITS = """The model is small and was trained on images of these very people (all but the last two of each), and the faces are neither aligned nor
larger than 64 x 64. MobileFace, made for aligned colour images, is weak here: its threshold rejects half of the genuine pairs. ORL has
forty people, photographed in one place. One recogniser was attacked, with its gradient in hand, and the loss is that of the two encoded
images: how much of its fall carries over to other images of the same people is what the tables show. Each person is in several pairs,
which Wilson's intervals leave out: they are too narrow. The rates of the updates are those that suit the exact gradient, for all. So the
numbers compare gradients on one problem; they say nothing of the security of a deployed system, nor whether a person or a detector would
notice these morphs."""


def written(run: Run, made: Any, progress: Progress) -> str:
    """Writes everything; returns the claim as a sentence."""
    morphs = np.asarray(progress.state.morphs)
    results = judged(made, morphs, progress)
    sentence, seconds = _claim(made, results), made.seconds()
    run.write(
        {
            "final.npz": npz({"morphs": morphs, "pairs": made.pairs}),
            "results.json": to_json(results),
            "morphs.png": _sheet(made, morphs),
            "loss.png": pictures.curves(_lines(made, progress, seconds), "seconds a batch", "mean loss"),
            "report.md": _document(made, results, progress, seconds, sentence),
        }
    )
    return sentence


def judged(made: Any, morphs: np.ndarray, progress: Progress) -> dict[str, Any]:
    """The numbers of the report that do not depend on the machine's speed."""
    options, faces, pairs = made.options, made.faces, made.pairs
    images = faces.reshape(-1, *faces.shape[2:])
    people = np.repeat(np.arange(len(faces)), faces.shape[1])
    probes = np.delete(np.arange(faces.shape[1]), options.image)
    a, b = (faces[pairs[:, k], options.image] for k in (0, 1))
    mean = np.round((a.astype(np.float64) + b) / 2).astype(np.uint8)
    candidates: dict[Any, tuple] = {("-", name): shown for name, shown in zip(BASELINES, ((a, b), (a,), (mean,)), strict=True)}
    candidates |= {(kind, name): (morphs[s, m],) for s, kind in enumerate(options.samplers) for m, name in enumerate(options.methods)}
    rows: list[dict[str, Any]] = [{"sampler": kind, "method": name} for kind, name in candidates]
    rates: dict[str, Any] = {}
    for judge in made.judges:
        known = judge.templates(images)
        found = verification(judge.compare(known, known), people, options.match_rate)
        rates[judge.name] = found._asdict()
        for row, shown in zip(rows, candidates.values(), strict=True):
            tables = [judge.compare(judge.templates(each), known).reshape(len(each), *faces.shape[:2]) for each in shown]
            mine = np.stack([tables[k % len(tables)][np.arange(len(pairs)), pairs[:, k]] for k in (0, 1)], axis=1)
            row[judge.name] = _rates(mine[:, :, probes], mine[:, :, -options.unseen :], found.threshold)
    target = _matching(made, rates) if options.goal is None else options.goal
    driven = [{**row, **_driven(made, progress, row["sampler"], row["method"], target)} for row in rows]
    return {"pairs": len(pairs), "target": target, "verification": rates, "rows": driven}


def _matching(made: Any, verification: dict[str, Any]) -> float:
    """The loss at which a morph matches both encoded images: twice the distance at the first judge's threshold."""
    return 2 * (1 - verification[made.judges[0].name]["threshold"])


def _rates(others: np.ndarray, unseen: np.ndarray, tau: float) -> dict[str, Any]:
    """MMPMR over all probes and over those that the model never saw, as counts, and the product of averages; similarities `[N, 2, images]`."""
    passes, fresh = matched(others, tau), int(matched(unseen, tau).sum())
    count = int(passes.sum())
    share = {"matched": count, "mmpmr": count / len(others), "interval": wilson(count, len(others)), "matched_unseen": fresh}
    return {**share, "product_average": product_average(others, tau), "passes": passes.tolist()}


def _losses(progress: Progress, kind: str, name: str) -> list[float]:
    """The mean over all pairs at each iterate."""
    return np.mean([row["losses"] for row in progress.history if (row["sampler"], row["method"]) == (kind, name)], axis=0).tolist()


def _driven(made: Any, progress: Progress, kind: str, name: str, target: float) -> dict[str, Any]:
    """Losses by iterate, evaluations a morph, and those until the target was reached, of a sampler and a method."""
    if name in BASELINES:
        return {}
    losses = _losses(progress, kind, name)
    forward, backward, recogniser = made.counts(kind, name)
    reached = np.flatnonzero(np.array(losses) <= target)
    updates = int(reached[0]) if len(reached) else None
    counts = {"forward": forward, "backward": backward, "recogniser_gradients": recogniser}
    return {"losses": losses, **counts, "updates_to_target": updates}


def _lines(made: Any, progress: Progress, seconds: Seconds) -> dict[str, tuple[Any, Any]]:
    """Mean loss against seconds; of what has no updates, one point at its end."""
    lines = {}
    for (kind, name), one in seconds.items():
        losses = _losses(progress, kind, name)
        lines[f"{kind} {name}"] = (np.arange(len(losses)) * one if len(losses) > 1 else [one], losses)
    return lines


def _claim(made: Any, results: dict[str, Any]) -> str:
    """Of each sampler, the share of morphs that pass, without guidance and by the exact gradient."""
    first, second = (judge.name for judge in made.judges)
    parts = []
    for kind in made.options.samplers:
        rows = {row["method"]: row for row in results["rows"] if row["sampler"] == kind}
        said = [f"{name} {100 * row[first]['mmpmr']:.0f} % ({second} {100 * row[second]['mmpmr']:.0f} %)" for name, row in rows.items()]
        parts.append(f"{kind}: {', '.join(said)}")
    who = f"by {first}, which was optimised against ({second}, which was not)"
    return f"MMPMR at FMR {100 * made.options.match_rate:g} % over {results['pairs']} pairs, {who}: {'; '.join(parts)}."


def _document(made: Any, results: dict[str, Any], progress: Progress, seconds: Seconds, sentence: str) -> bytes:
    first, second = (judge.name for judge in made.judges)
    n, rows = results["pairs"], results["rows"]

    def cells(row: dict[str, Any], judge: str) -> list[str]:
        found = row[judge]
        shares = [rate(found["matched"], n), rate(found["matched_unseen"], n), f"{100 * found['product_average']:.1f} %"]
        return [*shares, _against(row, rows, judge, made.pairs)]

    tables, last = [], f"it alone / {made.options.methods[-1]} alone passes: the difference, by people"
    for judge in (first, second):
        head = ("sampler", "method", "last loss", "MMPMR, any other image", "MMPMR, images the model never saw", "product of averages", last)
        lines = [(row["sampler"], row["method"], f"{row['losses'][-1]:.3f}" if "losses" in row else "", *cells(row, judge)) for row in rows]
        tables += [f"By {judge}, {'optimised against' if judge == first else 'not optimised against'}:", report.table(head, lines)]
    told = report.section(
        "How many morphs pass as both people",
        "95 % intervals: Wilson's, and of differences over people, who are in several pairs each. A morph has to be more alike than the threshold to "
        "at least one other image of each person; the product of averages is the chance that it passes two guards with one image each. The first "
        "row is no attack: each person's own encoded image, a bound.",
        *tables,
    )
    own = [(name, *(f"{value:.3f}" for value in found.values())) for name, found in results["verification"].items()]
    judges = report.section(
        "The recognisers",
        f"On all pairs of the {made.faces.shape[0] * made.faces.shape[1]} images at this size; the threshold has a false match rate of "
        f"{100 * made.options.match_rate:g} %.",
        report.table(("recogniser", "rank 1", "AUC", "same person", "two people", "threshold", "genuine pairs above it"), own),
    )
    shown = [report.picture("morphs.png", "A pair a column: its two images, then a morph a row."), report.picture("loss.png", "loss")]
    parts = (told, _engines(made, results, seconds), judges, report.section("What this shows and what not", " ".join(LIMITS.split())))
    audited = report.audited(made.audited())
    cost = report.cost(progress.seconds, more={"an iterate": f"one batch of {made.options.batch} pairs under one method and sampler"})
    config = report.options(recorded(made.options))
    return report.document("Morphing attacks by gradient", "\n\n".join([sentence, *shown]), *parts, audited, cost, config)


def _against(row: dict[str, Any], rows: list[dict[str, Any]], judge: str, pairs: np.ndarray) -> str:
    """On how many pairs a method passes and the last one of its sampler does not, and the reverse; and by how much the last one's share is higher."""
    other = [each for each in rows if each["sampler"] == row["sampler"]][-1]
    if row is other or row["method"] in BASELINES:
        return ""
    mine, theirs = (np.array(each[judge]["passes"]) for each in (row, other))
    more, low, high = (100 * value for value in over_people(theirs.astype(float) - mine, pairs))
    return f"{int(np.sum(mine & ~theirs))} / {int(np.sum(theirs & ~mine))}: {more:+.0f} % [{low:.0f}, {high:.0f}]"


def _engines(made: Any, results: dict[str, Any], seconds: Seconds) -> str:
    """Gradients at equal wall time: when the target loss was reached."""
    lines, times = [], {}
    for row in (row for row in results["rows"] if "losses" in row):
        name, updates = (row["sampler"], row["method"]), row["updates_to_target"]
        if updates is not None:
            taken = updates if len(row["losses"]) > 1 else 1
            times[name] = Arrival(taken * seconds[name], taken, made.work(*name))
        reached = f"{times[name].seconds:.1f} s" if name in times else "not reached"
        work = (f"{row['forward']} + {row['backward']}", row["recogniser_gradients"])
        losses = (f"{row['losses'][k]:.3f}" for k in (0, -1))
        lines.append((*name, *losses, *work, len(row["losses"]) - 1, f"{seconds[name]:.2f} s", "" if updates is None else updates, reached))
    work = ("network, forward + backward a morph", "recogniser gradients a morph")
    head = ("sampler", "method", "first loss", "last loss", *work, "updates", "one update", "updates to target", "time to target")
    pace = f"as many as cost what {made.options.iterations} of {made.options.methods[-1]} do" if made.options.equal_work else made.options.iterations
    words = (
        f"Mean loss over all pairs. The target is {results['target']:.3f}; at {_matching(made, results['verification']):.3f}, twice the distance at "
        f"the threshold, a morph matches both encoded images. Updates: {pace}; a gradient that did not reach the target might with more. Seconds are "
        "the least of an update of a batch, all taken in turn; of what has no updates, of the whole sampler."
    )
    order = [f"{' '.join(name)} ({taken.seconds:.1f} s)" for name, taken in sorted(times.items(), key=lambda item: item[1].seconds)]
    first = f"In order of arrival: {', '.join(order)}." if order else "None reached the target."
    for kind in made.options.samplers if order else ():
        arrived = {name: taken for (sampler, name), taken in times.items() if sampler == kind}
        first += f" {kind}:{standing(arrived, made.options.methods)}"
    return report.section("Which gradient gets there first", words, first, report.table(head, lines))


def _sheet(made: Any, morphs: np.ndarray) -> bytes:
    """A column a pair."""
    options, pairs = made.options, made.pairs[:SHOWN]
    shown = {f"person {name}": made.faces[pairs[:, k], options.image] for k, name in enumerate("ab")}
    shown |= {f"{kind} {name}": morphs[s, m, :SHOWN] for s, kind in enumerate(options.samplers) for m, name in enumerate(options.methods)}
    return pictures.table_of_images({name: pictures.from_bytes(images[..., None]) for name, images in shown.items()})
