"""Damaged files are refused in one sentence, or mean what they say: a fixed selection of `tests/fuzzing`. Many more: `benchmarks/fuzz.py`."""

from collections import Counter

import pytest
from fuzzing.judge import Judge
from fuzzing.run import deal

SEED, MUTATIONS = 1, 312


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    judge = Judge(tmp_path_factory.mktemp("fuzz"))
    yield list(deal(judge, SEED, MUTATIONS))
    judge.close()


def test_none_is_silently_wrong(results):
    wrong = [str(result) for result in results if result.verdict.word == "wrong"]
    assert not wrong, "\n".join(wrong)


def test_the_selection_reaches_everything(results):
    words = Counter(result.verdict.word for result in results)
    assert words["refused"] > MUTATIONS // 2
    assert words["correct"] > MUTATIONS // 20
    assert len({result.subject for result in results}) == 16
    assert len({result.way for result in results}) == 52
