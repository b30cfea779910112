"""Damaged checkpoints: what the package makes of many more mutations than the suite judges.

    python benchmarks/fuzz.py --seed 2 --mutations 20000

Prints what was wrong, and for each way to damage a file how many were refused, read correctly all the same, or read as the damaged file says.
"""

import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import jax
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from fuzzing.judge import Judge
from fuzzing.run import deal, one

WORDS = ("refused", "correct", "undetectable", "wrong")


@dataclass(frozen=True)
class Config:
    seed: int = 2
    mutations: int = 10_000
    only: int | None = None
    """The number of one mutation, to be judged alone."""
    show: str = ""
    """A verdict, whose mutations are printed one by one."""


def main(config: Config) -> None:
    jax.config.update("jax_disable_most_optimizations", True)
    began = time.time()
    with tempfile.TemporaryDirectory() as folder:
        judge = Judge(Path(folder))
        results = deal(judge, config.seed, config.mutations) if config.only is None else [one(judge, config.seed, config.only)]
        counts: dict[str, Counter[str]] = {}
        for result in results:
            counts.setdefault(result.way, Counter())[result.verdict.word] += 1
            if result.verdict.word in ("wrong", config.show) or config.only is not None:
                print(result, flush=True)
    total = sum(counts.values(), Counter[str]())
    print(f"\n{'':40}{''.join(f'{word:>14}' for word in WORDS)}")
    for way, count in [*sorted(counts.items()), ("all", total)]:
        print(f"{way:40}{''.join(f'{count[word]:14}' for word in WORDS)}")
    print(f"{sum(total.values())} mutations of seed {config.seed} in {time.time() - began:.0f} s")


if __name__ == "__main__":
    main(tyro.cli(Config))
