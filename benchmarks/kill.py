"""Kills an experiment with SIGKILL at random moments, resumes it each time, and compares what it leaves with an unbroken run, to the byte.

    python benchmarks/kill.py --moments 20 -- adjoint-jax guide --steps 6 --batch 2 --iterations 12 --save-every 1
    python benchmarks/kill.py --moments 20 -- python examples/stylise.py --config configs/stylise.toml --iterations 6

The command gets `--out FOLDER --resume`. Moments are drawn from a seed: half of them lie one in each of equal parts of the unbroken run's wall
time, from its start (imports, compilation) to its end; half are the appearance of a random one of the files that are being written, so that the
kill falls into a write. A run that ends before its moment is started anew, with the moment scaled to how long it took, or an earlier write. After
each kill every file in the folder must be whole; after resuming, `final.npz`, `history.jsonl`, `results.json` and weights, where the unbroken run
has them, must be the same bytes. Prints a table, and ends with status 1 where one of these is not so.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from safetensors.numpy import load_file

from adjoint_jax.experiments.report import table
from adjoint_jax.experiments.run import HISTORY, TEMPORARY

COMPARED = ("final.npz", HISTORY, "results.json", "**/*.safetensors")
POLL = 1e-3
TRIALS = 5


class Moment(NamedTuple):
    """A share of the wall time, or the n-th file that is being written."""

    share: float
    write: int | None


class Outcome(NamedTuple):
    """The seconds that a run took, its status, and the files that it was seen to write."""

    seconds: float
    status: int
    writes: int


def moments(count: int, writes: int, seed: int) -> list[Moment]:
    """Half of them in writes, the others one in each of as many equal parts of the time."""
    rng = random.Random(seed)
    in_writes = count // 2 if writes else 0
    timed = count - in_writes
    drawn = [Moment((i + rng.random()) / timed, None) for i in range(timed)]
    return drawn + sorted(Moment(0.0, rng.randint(1, writes)) for _ in range(in_writes))


def temporaries(folder: Path) -> set[str]:
    """Files that are being written."""
    try:
        return {name for name in os.listdir(folder) if TEMPORARY.fullmatch(name)}
    except FileNotFoundError:
        return set()


def run(command: Sequence[str], out: Path, log: Path, stop: Callable[[float, int], bool] = lambda *_: False) -> Outcome:
    """Runs the command until its end, or until `stop(seconds, files written so far)`, and then kills it and its children."""
    seen: set[str] = set()
    begin = time.perf_counter()
    with log.open("ab") as file:
        process = subprocess.Popen([*command, "--out", str(out), "--resume"], stdout=file, stderr=file, start_new_session=True)
        while process.poll() is None:
            seen |= temporaries(out)
            if stop(time.perf_counter() - begin, len(seen)):
                os.killpg(process.pid, signal.SIGKILL)
                break
            time.sleep(POLL)
        status = process.wait()
    return Outcome(time.perf_counter() - begin, status, len(seen))


def broken(folder: Path) -> list[str]:
    """The files under their own names that are not whole."""
    found = []
    for path in sorted(folder.rglob("*")) if folder.exists() else ():
        if path.is_file() and not TEMPORARY.fullmatch(path.name):
            try:
                READERS.get(path.suffix, lambda path: path.read_bytes().decode())(path)
            except Exception as error:
                found.append(f"{path.relative_to(folder)} ({type(error).__name__})")
    return found


def read_npz(path: Path) -> None:
    with np.load(path, allow_pickle=False) as archive:
        for name in archive.files:
            archive[name]


def read_png(path: Path) -> None:
    with Image.open(path) as image:
        image.load()


def read_lines(path: Path) -> None:
    text = path.read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    if rows and not text.endswith("\n"):
        raise ValueError("the last line is cut")


READERS: dict[str, Callable[[Path], object]] = {
    ".npz": read_npz,
    ".png": read_png,
    ".json": lambda path: json.loads(path.read_text()),
    ".jsonl": read_lines,
    ".safetensors": load_file,
}


def iterates(folder: Path) -> str:
    """How many the saved state holds."""
    try:
        with np.load(folder / "state.npz") as state:
            return str(len(str(state["history"]).splitlines()))
    except FileNotFoundError:
        return "none"
    except Exception:
        return "damaged"


def differing(one: Path, other: Path) -> list[str]:
    """Those of the files to be compared that are not the same bytes."""
    names = [path.relative_to(one) for pattern in COMPARED for path in sorted(one.glob(pattern))]
    return [str(name) for name in names if not ((other / name).exists() and same(one / name, other / name))]


def same(one: Path, other: Path) -> bool:
    return one.read_bytes() == other.read_bytes()


def killed(command: Sequence[str], moment: Moment, expected: float, out: Path, log: Path) -> float | None:
    """Kills a run at its moment; the seconds after its start, or None where it always ended before."""
    write = moment.write
    for _ in range(TRIALS):
        shutil.rmtree(out, ignore_errors=True)
        at = expected * moment.share
        outcome = run(command, out, log, lambda seconds, writes: seconds >= at if write is None else writes >= write)  # noqa: B023, called before they change
        if outcome.status == -signal.SIGKILL:
            return outcome.seconds
        expected, write = outcome.seconds, write and max(1, min(write, outcome.writes) * 3 // 4)
    return None


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0], usage="kill.py [--moments N] [--seed SEED] -- COMMAND ...")
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("command", nargs="+")
    options = parser.parse_args(argv)
    if options.moments < 1:
        parser.error("give one moment or more, and after -- the command to kill")
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="kill") as work:
        failures, rows, seconds = compared(options.command, options.moments, options.seed, Path(work))
    print(table(("moment", "killed after", "iterates saved", "half-written files left", "all others whole", "same end as the unbroken run"), rows))
    spent = f"{(time.perf_counter() - begin) / 60:.1f} min in all, {seconds:.1f} s for the unbroken run"
    print(f"{len(rows) - failures} of {len(rows)} kills left whole files and the same end ({', '.join(COMPARED)}, where there are); {spent}.")
    return int(failures > 0)


def compared(command: Sequence[str], count: int, seed: int, work: Path) -> tuple[int, list[tuple], float]:
    """The number of failures, the rows of the table, and the seconds of the unbroken run."""
    unbroken, log = work / "unbroken", work / "log"
    outcome = run(command, unbroken, log)
    if outcome.status or not any(path for pattern in COMPARED for path in unbroken.glob(pattern)):
        raise SystemExit(f"The unbroken run ended with status {outcome.status}: {log.read_text()[-2000:]}")
    failures, rows = 0, []
    for number, moment in enumerate(moments(count, outcome.writes, seed)):
        out = work / str(number)
        after = killed(command, moment, outcome.seconds, out, log)
        saved, half, bad = iterates(out), sorted(temporaries(out)), broken(out)
        status = run(command, out, log).status
        wrong = [f"status {status}"] if status else differing(unbroken, out)
        failed = after is None or bool(bad or wrong or temporaries(out))
        failures += failed
        said = f"{moment.share:.3f} of the time" if moment.write is None else f"write {moment.write} of {outcome.writes}"
        killed_after = "it ended before" if after is None else f"{after:.2f} s"
        rows.append((said, killed_after, saved, ", ".join(half) or "none", ", ".join(bad) or "yes", ", ".join(wrong) or "yes"))
        print(f"{number + 1} of {count}: {'FAILED' if failed else 'the same'}, killed after {killed_after}", file=sys.stderr, flush=True)
        shutil.rmtree(out, ignore_errors=True)
    return failures, rows, outcome.seconds


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
