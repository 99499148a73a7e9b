"""Guards a cell's numbers: the floor, paired intervals that cover, means over contexts, and equal samples for all."""

from __future__ import annotations

import dataclasses
import random
from statistics import fmean

import numpy as np
import pytest

from eval.measures.longcontext import measure as module
from eval.measures.longcontext.answers import Answer, Reader
from eval.measures.longcontext.measure import Ability, Measured, Side, counts, measure, measure_cell, paired, row_of
from sinkmodel.tasks.cells import Cell
from sinkmodel.tasks.samples import CONTAINED, Question, Sample
from sinkmodel.tasks.tokens import in_tokens
from tests.eval.longcontext.standins import Everything, Forgetful


class Prepared:
    """A reader that gives prepared answers, and notes what every memory was given to read."""

    def __init__(self, answers, alone=3.0):
        self.answers, self.alone, self.seen = answers, alone, {}

    def ask(self, memory, reading, place, metric):
        seen = self.seen.setdefault(memory, [])
        found = self.answers[memory][len(seen)]
        seen.append((reading, place))
        return found, 100 + len(seen), 50

    def nll_alone(self, asked):
        return self.alone


def cell(loaded, contexts=2, questions=2) -> Cell:
    samples = [
        Sample("", f"text {n} and so on", tuple(Question(f"\n{q}?", ("x",), "x", ("y",)) for q in range(questions)))
        for n in range(contexts)
    ]
    return Cell("made", 99, CONTAINED, [in_tokens(loaded, sample, 4) for sample in samples])


def answers(*contexts):
    return [[Answer("", score, score == 1, nll, rank) for score, nll, rank in of_context] for of_context in contexts]


DENSE = answers([(1, 1.0, 1), (0, 2.0, 2)], [(1, 0.5, 1), (1, 0.5, 1)])
OTHER = answers([(0, 2.0, 3), (0, 2.0, 2)], [(1, 0.5, 1), (0, 1.5, 2)])


def rows_of(loaded, alone, dense=DENSE, other=OTHER):
    reader = Prepared({"dense": dense, "other": other}, alone)
    sides = [Side("snapkv", 8, "other")]
    rows = list(measure_cell(reader, cell(loaded), Side("dense", None, "dense"), sides, "outside", 0, ""))
    return rows, reader


# ----------------------------------------------------------------------------------------------------------- the floor


@pytest.mark.parametrize(
    ("score", "gain", "expected"),
    [(0.5, -3, True), (0.49, 0.99, False), (0, 1.0, True), (1, 0, True), (0.49, 1.0, True)],
)
def test_a_cell_counts_if_dense_can_do_it(score, gain, expected):
    assert counts(score, gain) == expected


def test_at_the_floor_the_others_are_not_run(loaded):
    low = answers([(0, 2.5, 1), (0, 2.5, 1)], [(1, 2.5, 1), (0, 2.5, 1)])
    rows, reader = rows_of(loaded, 3.4, dense=low)
    assert [row.floor for row in rows] == [True, True]
    assert "other" not in reader.seen
    assert rows[0].score == 0.25
    for name in ("score", "nll", "rank", "score_difference", "score_low", "bytes_held", "seconds"):
        assert getattr(rows[1], name) is None
    assert rows[0].gain == rows[1].gain == pytest.approx(0.9)


def test_the_gain_is_per_token_and_over_the_question_alone(loaded):
    """Risk: a cell counts, or not, by the wrong number."""
    low = answers([(0, 2.0, 1), (0, 4.0, 1)], [(0, 1.0, 1), (0, 1.0, 1)])
    for alone, floor in ((2.99, True), (3.0, False)):
        rows, reader = rows_of(loaded, alone, dense=low)
        assert rows[0].gain == pytest.approx(alone - 2)
        assert rows[0].nll_alone == alone
        assert rows[0].floor == floor
        assert ("other" in reader.seen) != floor


# --------------------------------------------------------------------------------------------------------------- rows


def test_numbers_are_means_over_contexts_and_differences_are_paired(loaded):
    rows, _ = rows_of(loaded, 3.0)
    dense, other = rows
    assert (dense.label, other.label) == ("dense", "snapkv 8")
    assert (dense.budget, other.budget) == (None, 8)
    assert (dense.score, dense.nll, dense.rank) == (0.75, 1.0, 1.25)
    assert dense.by_context == {"score": [0.5, 1], "exact": [0.5, 1], "nll": [1.5, 0.5], "rank": [1.5, 1]}
    assert (dense.exact, other.exact, other.exact_difference) == (0.75, 0.25, -0.5)
    assert (other.score, other.nll, other.rank) == (0.25, 1.5, 2.0)
    assert (other.score_difference, other.nll_difference, other.rank_difference) == (-0.5, 0.5, 0.75)
    assert dense.score_difference is None
    assert dense.score_stderr == pytest.approx(np.std([0.5, 1], ddof=1) / 2**0.5)
    assert other.score_low is None, "two contexts have no interval"
    assert (other.contexts, other.questions, other.question) == (2, 4, "outside")
    assert (other.bytes_held, other.bytes_kept) == (101.5, 50)
    assert other.metric == "contained"
    assert dense.prompt_tokens > dense.context_tokens > 2


def test_all_memories_read_the_same_samples(loaded):
    _, reader = rows_of(loaded, 9.0)
    assert reader.seen["dense"] == reader.seen["other"]
    assert len(reader.seen["dense"]) == 2


def test_a_cell_without_distractors_has_no_rank(loaded):
    none = [[dataclasses.replace(answer, rank=None) for answer in of_context] for of_context in DENSE]
    rows, _ = rows_of(loaded, 9.0, none, none)
    assert rows[1].rank is None
    assert rows[1].rank_difference is None
    assert rows[1].by_context["rank"] is None


def test_a_real_cell_gives_the_numbers_of_its_answers(loaded):
    made, reader = cell(loaded, 6), Reader(loaded)
    found = measure(reader, made, Forgetful(6), "outside", "")
    for place, reading in enumerate(made.readings):
        expected, held, kept = reader.ask(Forgetful(6), reading, "outside", CONTAINED)
        assert found.nll[place] == pytest.approx(fmean(answer.nll for answer in expected))
        assert found.rank[place] == fmean(answer.rank for answer in expected)
    assert found.bytes_held == held == kept
    assert measure(reader, made, Everything(), "outside", "").bytes_held > held
    assert found.seconds > 0


def test_rows_have_intervals_of_their_own_numbers():
    score = [0.0, 1, 0, 1, 0, 0]
    found = Measured(score, score, [2.0, 3, 1, 2, 3, 4], [1.0] * 6, 1, 1, 1)
    dense = Measured([1.0] * 6, [1.0] * 6, [1.0] * 6, [1.0] * 6, 1, 1, 1)
    row = row_of(
        Cell("t", 9, CONTAINED, [_reading()]), Side("x", 3, None), "inside", found, dense, Ability(2.0, 1.0, False), 0
    )
    assert row.score_difference == pytest.approx(-2 / 3)
    assert row.nll_difference == pytest.approx(1.5)
    for name in ("score", "nll"):
        low, difference, high = (getattr(row, f"{name}_{part}") for part in ("low", "difference", "high"))
        assert low < difference < high
    assert (row.exact_low, row.exact_high) == (row.score_low, row.score_high), "both are between 0 and 1"
    assert (row.rank_low, row.rank_difference, row.rank_high) == (0, 0, 0)


def _reading():
    from sinkmodel.tasks.tokens import Asked, Reading

    question = Question("?", ("x",), "x")
    return Reading([1, 2], (Asked(question, [3], [[4]], [3], 1),))


# ---------------------------------------------------------------------------------------------------------- intervals


@pytest.mark.parametrize("contexts", [12, 50])
@pytest.mark.parametrize(("right", "lost"), [(1.0, 0.0), (0.95, 0.05), (0.9, 0.3)])
def test_the_interval_of_a_score_covers_the_truth(monkeypatch, contexts, right, lost):
    """A nominal 95 %, with few contexts, and if nearly all agree: there a plain bootstrap covers half as often."""
    monkeypatch.setattr(module, "LEVEL", 0.95)
    hits, times = 0, 300
    for seed in range(times):
        rng = random.Random(seed)
        dense = [float(rng.random() < right) for _ in range(contexts)]
        other = [value * (rng.random() >= lost) for value in dense]
        _, low, high = paired(other, dense, seed, bounded=True)
        hits += low <= -right * lost <= high
    assert hits / times >= 0.93


def test_an_interval_of_contexts_that_all_agree_has_a_width():
    """Risk: ten contexts without a difference pass for proof that there is none."""
    difference, low, high = paired([1.0] * 10, [1.0] * 10, 0, bounded=True)
    assert difference == 0
    assert low < -0.15
    assert high > 0.15
    wide = [paired([1.0] * n, [1.0] * n, 0, bounded=True)[2] for n in (5, 10, 40, 200)]
    assert wide == sorted(wide, reverse=True)
    assert wide[-1] < 0.02


def test_a_score_cannot_differ_by_more_than_one():
    difference, low, high = paired([0.0] * 6, [1.0] * 6, 0, bounded=True)
    assert (difference, low) == (-1, -1)
    assert high > -1


def test_nats_have_the_interval_of_verify():
    rng = np.random.default_rng(0)
    dense = rng.normal(size=30)
    other = dense + 0.5 + 0.1 * rng.normal(size=30)
    difference, low, high = paired(other, dense, 0, bounded=False)
    assert low < 0.5 < high
    assert difference == pytest.approx((other - dense).mean())
    assert high - low == pytest.approx(2 * 2.045 * (other - dense).std(ddof=1) / 30**0.5, rel=0.06)


@pytest.mark.parametrize("bounded", [True, False])
def test_fewer_than_five_contexts_have_no_interval(bounded):
    assert paired([1.0] * 4, [0.0] * 4, 0, bounded) == (1, None, None)
    assert paired([1.0] * 5, [0.0] * 5, 0, bounded)[1] is not None
