"""Mutations dealt out by a seed: each way to damage in turn, on subjects in turn."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import configs, folders, sources, tensors  # noqa: F401  (they fill the table)
from .case import WEIGHED, Case
from .judge import Judge, Verdict


class Result(NamedTuple):
    """One mutation: its number, subject, way and words about it, and the verdict."""

    number: int
    subject: str
    way: str
    detail: str
    verdict: Verdict

    def __str__(self) -> str:
        return f"#{self.number} {self.subject}: {self.way} ({self.detail}) is {self.verdict.word}: {self.verdict.why[:400]}"


def remove(path: Path) -> None:
    for each in (path, path.with_name("elsewhere"), path.with_name("outside"), path.with_name("outside.safetensors")):
        if each.is_symlink() or not each.is_dir():
            with contextlib.suppress(FileNotFoundError):
                each.unlink()
        else:
            shutil.rmtree(each)


def one(judge: Judge, seed: int, number: int) -> Result:
    """The mutation of a seed with a number; the same every time."""
    ways = list(WEIGHED)
    np.random.default_rng(seed).shuffle(ways)  # type: ignore[arg-type]
    way, kinds = ways[number % len(ways)]
    rng = np.random.default_rng((seed, number))
    fitting = [subject for subject in judge.subjects if subject.kind in kinds]
    subject = fitting[(number // len(ways) + int(rng.integers(len(fitting)))) % len(fitting)]
    copy = judge.root / "copy" / "checkpoint"
    copy.parent.mkdir(exist_ok=True)
    shutil.copytree(subject.path, copy)
    try:
        case = Case(subject, copy, rng)
        detail = way(case) or ""
        return Result(number, subject.name, way.__name__, detail, judge.verdict(case))
    finally:
        remove(copy)
        if (copy.parent / "unpickled").exists():
            (copy.parent / "unpickled").rmdir()


def deal(judge: Judge, seed: int, number: int) -> Iterator[Result]:
    for i in range(number):
        yield one(judge, seed, i)
