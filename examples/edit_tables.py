"""What inversion and editing found: tables and pictures of `invert_and_edit`."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from adjoint_jax.experiments import pictures, recorded, report
from adjoint_jax.experiments.statistics import rate, wilson

TRIP, EDIT, FRESH, DRIVEN = "round trip", "edit", "new noise", "gradient edit"
NAMES = {"ddim": "DDIM", "bdia": "BDIA", "rex": "Rex", "cycle": "CycleDiffusion"}


class Item(NamedTuple):
    """An iterate of the run: what is done, by which method, in how many steps, at which guidance."""

    kind: str
    method: str
    steps: int
    guidance: float

    @property
    def words(self) -> str:
        """What was done, without the steps."""
        name = NAMES[self.method]
        return {TRIP: name, EDIT: name, FRESH: "new noise", DRIVEN: f"{name} and gradient"}[self.kind]


class Outcome(NamedTuple):
    """The images' classes and those that they are to become, `[B]`, and the rows of the run, one an item."""

    own: np.ndarray
    new: np.ndarray
    items: Sequence[Item]
    rows: Sequence[Mapping[str, Any]]
    work: Sequence[tuple[int, int]]
    """(forward, backward) evaluations of the network by each item, the whole batch as one."""

    def of(self, *kinds: str) -> list[tuple[Item, Mapping[str, Any]]]:
        """The items of some kinds with their rows."""
        return [(item, row) for item, row in zip(self.items, self.rows, strict=True) if item.kind in kinds]

    @property
    def readers(self) -> list[str]:
        return list(self.rows[0]["readings"])

    def hits(self, row: Mapping[str, Any], reader: str) -> int:
        """How many are read as what they were to become."""
        return int((np.asarray(row["readings"][reader]) == self.new).sum())

    def trip(self, method: str, steps: int) -> tuple[float, float]:
        """(largest, root mean square) error of a round trip."""
        row = next(row for item, row in self.of(TRIP) if (item.method, item.steps) == (method, steps))
        return row["largest"], _rms(row)

    def edits(self) -> list[tuple[Item, Mapping[str, Any]]]:
        return self.of(EDIT, DRIVEN, FRESH)


def _rms(row: Mapping[str, Any]) -> float:
    return float(np.sqrt(np.mean(np.square(row["distance"]))))


def results(found: Outcome) -> dict[str, Any]:
    """The claims as numbers."""
    trips = [{"method": item.method, "steps": item.steps, "largest": row["largest"], "rms": _rms(row)} for item, row in found.of(TRIP)]
    count, names = len(found.new), found.readers
    edits = [
        {
            **item._asdict(),
            "distance": float(np.mean(row["distance"])),
            "read_as_new": {name: {"images": found.hits(row, name), "of": count, "wilson": wilson(found.hits(row, name), count)} for name in names},
        }
        for item, row in found.edits()
    ]
    return {"round_trips": trips, "edits": edits}


def views(found: Outcome, images: np.ndarray, made: np.ndarray) -> dict[str, bytes]:
    """The pictures: one image of each class there and back, the same edited, and the error by steps."""
    shown = [int(np.flatnonzero(found.own == label)[0]) for label in np.unique(found.own)]
    index = {item: k for k, item in enumerate(found.items)}
    fewest = min(item.steps for item, _ in found.of(TRIP))
    back, edited = {"original": images[shown]}, {"original": images[shown]}
    for item, _ in found.of(TRIP):
        if item.steps == fewest:
            back[f"{item.words}, {item.steps} steps"] = made[index[item]][shown]
    for item, _ in found.edits():
        edited[f"{item.words}, w = {item.guidance:g}"] = made[index[item]][shown]
    titles = [f"{found.own[i]}" for i in shown], [f"{found.own[i]} to {found.new[i]}" for i in shown]
    methods = dict.fromkeys(item.method for item, _ in found.of(TRIP))
    steps = sorted({item.steps for item, _ in found.of(TRIP)})
    lines = {NAMES[method]: (steps, [max(found.trip(method, n)[1], 1e-9) for n in steps]) for method in methods}
    return {
        "reconstructions.png": pictures.table_of_images(back, titles[0]),
        "edits.png": pictures.table_of_images(edited, titles[1]),
        "error.png": pictures.curves(lines, "steps", "root mean square error of the round trip", log=True),
    }


def document(found: Outcome, note: str, options: Any, audited: Sequence[tuple[str, Any]], times: Sequence[float]) -> bytes:
    """The report."""
    steps, count = max(item.steps for item, _ in found.of(TRIP)), len(found.new)
    ends = ", ".join(f"{NAMES[method]} to {found.trip(method, steps)[1]:.1e}" for method in options.methods)
    scale, reader = options.guidance[0], found.readers[0]
    edits = [(item, row) for item, row in found.edits() if item.guidance == (1 if item.kind == DRIVEN else scale)]
    told = "; ".join(f"{item.words} {rate(found.hits(row, reader), count)} at {np.mean(row['distance']):.3f}" for item, row in edits)
    lead = (
        f"In float32 and {steps} steps, images come back from their noise with a root mean square error of: {ends} (pixels in [-1, 1]). Under "
        f"another label, at guidance {scale:g}, the {reader} classifier reads as the new class, at a mean distance from the originals: {told}."
    )
    forward, backward = np.sum(found.work, axis=0)
    cost = {"network evaluations in all": f"{forward} forward, {backward} backward"}
    parts = [
        report.section("Round trips", note, _trips(found), report.picture("error.png", "error by steps"), TRIPS),
        report.section("Class edits", _edits(found), report.picture("reconstructions.png", "there and back"), EDITS),
        *([report.audited(audited)] if audited else []),
        report.cost(times, more=cost),
        report.options(recorded(options)),
    ]
    return report.document("Inversion and editing", lead + "\n\n" + report.picture("edits.png", "originals and edits"), *parts)


TRIPS = (
    "DDIM's inverse asks the network at the wrong end of each step, so that its error falls with the steps and is there in exact arithmetic. The "
    "other three are inverse but for rounding."
)
EDITS = (
    "The distance is the root mean square over an image's pixels, in [-1, 1], averaged over the images. An edit succeeds where it is read as the "
    "new class; that it is one of this image shows in a distance below that of new noise, and in the pictures. The gradient climbs the first reader, "
    "so that its row is judged by the other. That a solver comes back exactly does not by itself make its edits better: the table says."
)


def _trips(found: Outcome) -> str:
    steps = sorted({item.steps for item, _ in found.of(TRIP)})
    methods = dict.fromkeys(item.method for item, _ in found.of(TRIP))
    rows = [(NAMES[method], *("{:.1e} / {:.1e}".format(*found.trip(method, n)) for n in steps)) for method in methods]
    return report.table(("largest error / root mean square", *(f"{n} steps" for n in steps)), rows)


def _edits(found: Outcome) -> str:
    rows = []
    work = dict(zip(found.items, found.work, strict=True))
    for item, row in found.edits():
        hits = (rate(found.hits(row, name), len(found.new)) for name in found.readers)
        rows.append((item.words, f"{item.guidance:g}", *hits, f"{np.mean(row['distance']):.3f}", "{} + {}".format(*work[item])))
    return report.table(("edit by", "w", *(f"read as the new class by {name}" for name in found.readers), "distance", "network evaluations"), rows)
