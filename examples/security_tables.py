"""What a security audit found: the counting of (4) in `security_audit`, its tables, curves and pictures."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from tuning import Arrival, standing

from adjoint_jax.experiments import pictures, recorded, report
from adjoint_jax.experiments.statistics import rate, wilson

RANDOM = "random"


class Attack(NamedTuple):
    """One item: who is attacked, by which gradient (or `RANDOM`), in which ball, with how many updates a round."""

    judge: str
    engine: str
    radius: float
    updates: int


class Outcome(NamedTuple):
    """The classes asked for `[B]`, what each reader read of the original noise's samples `[B]`, and of each item's after each round `[rounds, B]`."""

    labels: np.ndarray
    before: dict[str, np.ndarray]
    rounds: dict[Attack, dict[str, np.ndarray]]
    reached: dict[Attack, float]

    @classmethod
    def of(cls, labels: np.ndarray, before: dict[str, np.ndarray], items: Sequence[Attack], history: Sequence[Mapping[str, Any]]) -> "Outcome":
        """From the rows of a run, as many for each item."""
        each = len(history) // len(items)
        rows = {item: history[i * each : (i + 1) * each] for i, item in enumerate(items)}
        rounds = {item: {name: np.asarray([row["readings"][name] for row in mine]) for name in before} for item, mine in rows.items()}
        return cls(labels, before, rounds, {item: mine[-1]["reached"] for item, mine in rows.items()})

    def right(self, judge: str) -> np.ndarray:
        """Which images count, `[B]`: those that the reader read right before."""
        return self.before[judge] == self.labels

    def misread(self, item: Attack, judge: str) -> np.ndarray:
        """(4) after each round, `[rounds, images that count]`."""
        right = self.right(judge)
        return self.rounds[item][judge][:, right] != self.labels[right]

    def final(self, item: Attack, judge: str) -> tuple[int, int]:
        """(misread after the last round, counted)."""
        return int(self.misread(item, judge)[-1].sum()), int(self.right(judge).sum())

    def shares(self, item: Attack) -> np.ndarray:
        """The share that the attacked reader misreads after each round, `[rounds]`."""
        wrong = self.misread(item, item.judge)
        return wrong.sum(axis=1) / max(wrong.shape[1], 1)

    def any_round(self, item: Attack, judge: str) -> tuple[int, int]:
        """(misread after one round or more, counted)."""
        return int(self.misread(item, judge).any(axis=0).sum()), int(self.right(judge).sum())

    def by_class(self, item: Attack, judge: str) -> list[tuple[int, int]]:
        """`final`, for each class."""
        asked = self.labels[self.right(judge)]
        return [(int(self.misread(item, judge)[-1][asked == label].sum()), int((asked == label).sum())) for label in np.unique(self.labels)]

    def shared(self, item: Attack, other: str) -> tuple[int, int]:
        """(misread by the other too, misread by the attacked), of the images that both read right before."""
        wrong = [self.right(name) & (self.rounds[item][name][-1] != self.labels) for name in (item.judge, other)]
        return int((wrong[0] & wrong[1]).sum()), int((wrong[0] & self.right(other)).sum())

    @property
    def readers(self) -> list[str]:
        return list(self.before)

    @property
    def main(self) -> Attack:
        """The first engine, an exact one, against the first reader at the main radius."""
        return next(iter(self.rounds))

    @property
    def race(self) -> list[Attack]:
        """The engines at the main radius; the first one first."""
        rest = [item for item in self.rounds if item.engine not in (self.main.engine, RANDOM)]
        return [self.main, *rest]

    @property
    def radii(self) -> list[float]:
        return sorted({item.radius for item in self.rounds})

    def curve(self, judge: str) -> list[Attack]:
        """The first engine against a reader (or, for the empty name, random signs) in balls that grow."""
        engine = self.main.engine if judge else RANDOM
        return sorted((item for item in self.rounds if (item.judge, item.engine) == (judge, engine)), key=lambda item: item.radius)


def _share(pair: tuple[int, int]) -> float:
    return pair[0] / max(pair[1], 1)


def _rate(pair: tuple[int, int]) -> str:
    return rate(*pair) if pair[1] else "none counted"


def _entry(pair: tuple[int, int]) -> dict[str, Any]:
    return {"misread": pair[0], "counted": pair[1], "wilson": wilson(*pair) if pair[1] else None}


def results(found: Outcome, target: float) -> dict[str, Any]:
    """The claims as numbers; of the race those that do not depend on a clock."""
    readers = found.readers
    race = {}
    for item in found.race:
        shares = found.shares(item)
        hit = np.flatnonzero(shares >= target)
        race[item.engine] = {
            **_entry(found.final(item, item.judge)),
            "updates_a_round": item.updates,
            "share_after_each_round": shares.tolist(),
            "round_of_target": int(hit[0]) + 1 if len(hit) else None,
        }
    curve = lambda judge, pick: {str(item.radius): {reader: _entry(pick(item, reader)) for reader in readers} for item in found.curve(judge)}  # noqa: E731
    return {
        "read_right_before": {reader: _entry((int(found.right(reader).sum()), len(found.labels)))["misread"] for reader in readers},
        "samples": len(found.labels),
        "main_radius": found.main.radius,
        "attacked": {judge: curve(judge, found.final) for judge in readers},
        "random_signs": curve("", found.final),
        "random_signs_any_draw": curve("", found.any_round),
        "by_class": {judge: [_entry(pair) for pair in found.by_class(_at_main(found, judge), judge)] for judge in readers},
        "largest_move_in_radii": max(found.reached.values()),
        "race": race,
        "target": target,
    }


def _at_main(found: Outcome, judge: str) -> Attack:
    return next(item for item in found.curve(judge) if item.radius == found.main.radius)


def views(found: Outcome, images: Mapping[str, Any], seconds: Mapping[str, float]) -> dict[str, bytes]:
    """The pictures: samples of each class, success against the radius, and the race."""
    reader, rows, radius = found.readers[0], {}, f"R = {found.main.radius:g}"
    misread = found.right(reader) & (found.rounds[found.main][reader][-1] != found.labels)
    chosen = [max(np.flatnonzero(found.labels == label), key=lambda i: (misread[i], found.right(reader)[i], -i)) for label in np.unique(found.labels)]
    for name, which in (("original noise", "before"), (f"gradient, {radius}", "attacked"), (f"random signs, {radius}", "random")):
        rows[name] = np.asarray(images[which])[chosen]
    read = found.rounds[found.main][reader][-1]
    titles = [f"{found.labels[i]}, read {read[i]}" for i in chosen]
    lines: dict[str, tuple[Sequence[float], Sequence[float]]] = {}
    for attacked in (*found.readers, ""):
        for other in found.readers:
            curve = found.curve(attacked)
            name = f"gradient against {attacked}" if attacked else "random signs"
            lines[f"{name}, read by {other}"] = [item.radius for item in curve], [_share(found.final(item, other)) for item in curve]
    race = {}
    for item in found.race:
        shares = found.shares(item)
        race[item.engine] = ([k * item.updates * seconds[item.engine] for k in range(len(shares) + 1)], [0.0, *shares.tolist()])
    return {
        "samples.png": pictures.table_of_images(rows, titles),
        "radius.png": pictures.curves(lines, "radius R, in standard deviations of the noise", "share misread"),
        "race.png": pictures.curves(race, "seconds of updates", f"share misread at R = {found.main.radius:g}"),
    }


def document(
    found: Outcome,
    note: str,
    options: Any,
    seconds: Mapping[str, float],
    spent: Mapping[str, int],
    audited: Sequence[tuple[str, Any]],
    times: Sequence[float],
) -> bytes:
    """The report; seconds and evaluations of the network are those of one update by each engine."""
    reader, signs, radius = found.readers[0], _at_main(found, ""), found.main.radius
    lead = (
        f"Inside an l_inf ball of {radius:g} standard deviations about its own noise, the exact gradient finds noise whose sample the {reader} "
        f"classifier misreads for {_rate(found.final(found.main, reader))} of the samples that it read right before; random signs in the same ball "
        f"do for {_rate(found.final(signs, reader))}, and {found.rounds[signs][reader].shape[0]} draws of them, each looked at, for "
        f"{_rate(found.any_round(signs, reader))}. "
    )
    for other in found.readers[1:]:
        lead += f"{other}, which was not attacked, misreads {_rate(found.final(found.main, other))} of the samples from the same noise. "
    before = ", ".join(f"{name} {int(found.right(name).sum())} of {len(found.labels)}" for name in found.readers)
    words = (
        f"{note} Read right from the original noise, and counted: {before}. Success is read off the sample of the last noise, drawn anew; intervals "
        f"are Wilson's at 95 %. No noise was farther from the original than {max(found.reached.values()):.6f} of its radius."
    )
    return report.document(
        "Security audit by adversarial noise",
        lead + "\n\n" + report.picture("samples.png", "of each class a sample, misread if one is"),
        report.section("By radius", words, _by_radius(found), report.picture("radius.png", "share misread by radius"), MEANING),
        report.section(f"By class, at R = {radius:g}", _by_class(found)),
        report.section(f"Engines at equal wall time, at R = {radius:g}", *_raced(found, options.target, seconds, spent)),
        report.audited(audited),
        report.cost(times, more={f"one update by {name}": f"{value:.2f} s, {spent[name]} {EVALUATIONS}" for name, value in seconds.items()}),
        report.options(recorded(options)),
    )


EVALUATIONS = "evaluations of the network, forward and backward, for the whole batch"
MEANING = (
    "What a second reader misreads as well may be an image that has become another digit, or none; what it reads right is a blind spot of the first. "
    "The rows of random signs say how much comes of a ball of that size whatever the direction."
)


def _by_radius(found: Outcome) -> str:
    rows = []
    for judge in found.readers:
        others = [other for other in found.readers if other != judge]
        for item in found.curve(judge):
            cells = [_rate(found.final(item, reader)) for reader in found.readers]
            rows.append((item.radius, f"gradient against {judge}", *cells, *(" / ".join(map(str, found.shared(item, other))) for other in others)))
    for item in found.curve(""):
        extra = [""] * (len(found.readers) - 1)
        rows.append((item.radius, "random signs, one draw", *[_rate(found.final(item, reader)) for reader in found.readers], *extra))
        draws = f"random signs, any of {len(found.misread(item, found.readers[0]))} draws"
        rows.append((item.radius, draws, *[_rate(found.any_round(item, reader)) for reader in found.readers], *extra))
    shared = ["both misread / attacked misreads"] * (len(found.readers) - 1)
    return report.table(("R", "noise", *(f"misread by {reader}" for reader in found.readers), *shared), rows)


def _by_class(found: Outcome) -> str:
    head, columns = ["class"], []
    for judge in found.readers:
        for item, name in ((_at_main(found, judge), "gradient"), (_at_main(found, ""), "random signs")):
            head.append(f"{judge}, {name}")
            columns.append([_rate(pair) for pair in found.by_class(item, judge)])
    return report.table(head, [(label, *cells) for label, *cells in zip(np.unique(found.labels), *columns, strict=True)])


def _raced(found: Outcome, target: float, seconds: Mapping[str, float], work: Mapping[str, int]) -> tuple[str, str, str]:
    """A sentence on who was first, the table, and the picture."""
    limit = min(len(found.misread(item, item.judge)) * item.updates * seconds[item.engine] for item in found.race)
    rows, first = [], {}
    for item in found.race:
        shares, pace = found.shares(item), item.updates * seconds[item.engine]
        hit = np.flatnonzero(shares >= target)
        if len(hit):
            updates = (int(hit[0]) + 1) * item.updates
            first[item.engine] = Arrival(updates * seconds[item.engine], updates, work[item.engine])
        done = int(limit / pace * (1 + 1e-9))
        at = f"{100 * shares[done - 1]:.1f} %" if done else "0 %: no round was over"
        cells = (f"{seconds[item.engine]:.2f} s", item.updates, f"{first[item.engine].seconds:.1f} s" if len(hit) else "not reached", at)
        rows.append((item.engine, *cells, _rate(found.final(item, item.judge))))
    winner = min(first, key=lambda engine: first[engine].seconds) if first else None
    words = f"{winner} is the first to {100 * target:.0f} %.{standing(first, seconds)}" if winner else f"None reaches {100 * target:.0f} %."
    head = ("gradient", "an update", "updates a round", f"to {100 * target:.0f} % misread", f"after {limit:.1f} s", "after all rounds")
    how = (
        f" A round is as many whole updates as come nearest to the network evaluations of one by {found.main.engine}, and at least one, a backward "
        "evaluation counted as one; its seconds are those of the updates alone, the sampling that judges it left out. The seconds are of this "
        "machine; all else is of the seed."
    )
    return words + how, report.table(head, rows), report.picture("race.png", "share misread by seconds")
