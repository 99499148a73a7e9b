"""Guards: what a row is, what twins share, and that batches do not depend on ranks, workers or micro-batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recipes.data.datamodule import BatchPlan, MicroBatches, TextDataModule, plan_batches
from recipes.data.rows import IGNORE, RowLayout, Samples, make_row, twin_targets
from recipes.data.shards import open_split
from sinkmodel.errors import UserError
from tests import tiny

TEXT = np.arange(100, 109)  # x0 … x8, so T = 8


def test_rows_of_twins_start_at_the_same_text():
    inputs, targets = make_row(TEXT, [])
    assert inputs.tolist() == [100, 101, 102, 103, 104, 105, 106, 107]
    assert targets.tolist() == [101, 102, 103, 104, 105, 106, 107, 108]
    inputs, targets = make_row(TEXT, [999])
    assert inputs.tolist() == [999, 100, 101, 102, 103, 104, 105, 106]
    assert targets.tolist() == [100, 101, 102, 103, 104, 105, 106, 107]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_sink_is_in_front_and_never_a_target(count):
    sinks = [999 - i for i in range(count)]
    inputs, targets = make_row(TEXT, sinks)
    assert len(inputs) == len(targets) == 8
    assert inputs[:count].tolist() == sinks
    assert not set(sinks) & set(targets.tolist())
    assert targets[: count - 1].tolist() == [IGNORE] * (count - 1)
    for place in range(count - 1, 7):
        assert targets[place] == inputs[place + 1], "each place predicts the next input"


def test_twin_targets_are_the_same_text():
    vanilla, sink = (make_row(TEXT, ids)[1][twin_targets(8, len(ids))] for ids in ([], [999]))
    assert vanilla.tolist() == sink.tolist() == [101, 102, 103, 104, 105, 106, 107]


def test_rows_tile_the_text(tmp_path):
    split = open_split(tiny.prepared(tmp_path / "data"), "train")
    layout = RowLayout(split, 64)
    assert layout.rows == (split.tokens - 1) // 64 > 100
    read = np.concatenate([layout.read(row)[:-1] for row in range(layout.rows)])
    assert np.array_equal(read, split.read(0, layout.rows * 64))
    assert layout.read(0)[-1] == layout.read(1)[0], "the last target is the next row's first token"


@pytest.mark.parametrize(("rows", "ranks"), [(8, 1), (7, 1), (3, 1), (7, 2), (9, 2), (1, 3), (12, 3), (10_000, 2)])
def test_every_validation_row_counts_once_and_all_ranks_get_as_many_batches(tmp_path, rows, ranks):
    """Guards the mean over ranks when rows run out: a partial micro-batch, and one that is there for the others."""
    split = open_split(tiny.prepared(tmp_path / "data"), "validation")
    held_out = RowLayout(split, 64)
    module = TextDataModule(split, split, [310], 64, BatchPlan(4 * ranks, 4, ranks), 6, 1, True, rows, 0)
    own = [module.validation_batches(rank) for rank in range(ranks)]
    assert module.validation_rows == sum(sum(counts) for _, counts in own) == min(rows, held_out.rows)
    assert len({len(counts) for _, counts in own}) == 1
    read = []
    for loader, counts in own:
        batches = [inputs for inputs, _ in loader]
        assert len(batches) == len(counts)
        assert all(0 < len(inputs) <= 4 for inputs in batches), "no rank skips a forward"
        assert all(count in (0, len(inputs)) for inputs, count in zip(batches, counts))
        read += [inputs for inputs, count in zip(batches, counts) if count]
    found = sorted(row[1:].tolist() for row in torch.cat(read))
    assert found == sorted(held_out.read(row)[:63].tolist() for row in range(module.validation_rows))


def samples_of_run(plan: BatchPlan, steps: int) -> list[list[int]]:
    """Sample numbers of each step, gathered over the ranks."""
    ranks = [list(MicroBatches(plan, steps, rank)) for rank in range(plan.ranks)]
    return [
        sorted(n for rank in ranks for k in range(plan.accumulation) for n in rank[step * plan.accumulation + k])
        for step in range(steps)
    ]


@pytest.mark.parametrize("micro_rows", [1, 2, 6, 12])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_reads_the_same_samples_however_it_is_cut(micro_rows, ranks):
    plan = plan_batches(12 * 64, 64, micro_rows, ranks) if 12 % (micro_rows * ranks) == 0 else None
    if plan is None:
        with pytest.raises(UserError, match="does not divide"):
            plan_batches(12 * 64, 64, micro_rows, ranks)
        return
    assert samples_of_run(plan, 5) == [list(range(12 * step, 12 * step + 12)) for step in range(5)]


def test_a_resumed_sampler_goes_on_where_training_stopped():
    plan = BatchPlan(rows=12, micro_rows=2, ranks=3)
    for rank in range(3):
        whole = list(MicroBatches(plan, 9, rank))
        rest = MicroBatches(plan, 9, rank, consumed=4 * 12)
        assert list(rest) == whole[4 * plan.accumulation :]
        assert len(rest) == len(whole) == 18, "Lightning counts on from its last batch: the length is the whole run's"


def test_workers_do_not_change_the_batches(tmp_path):
    split = open_split(tiny.prepared(tmp_path / "data"), "train")

    def batches(workers: int) -> list[torch.Tensor]:
        module = TextDataModule(split, None, [310], 64, BatchPlan(8, 4, 1), 6, 1, True, 8, workers)
        loader = module._loader(module.samples, MicroBatches(module.plan, 6, 0))
        return [inputs for inputs, _ in loader]

    one, two = batches(0), batches(2)
    assert len(one) == 12
    assert all(torch.equal(a, b) for a, b in zip(one, two))
    assert not torch.equal(one[0], one[1])


def test_epochs_differ_and_each_row_comes_once(tmp_path):
    split = open_split(tiny.prepared(tmp_path / "data", train_words=300), "train")
    samples = Samples(RowLayout(split, 64), [], seed=1, shuffle=True)
    rows = samples.layout.rows
    assert rows > 10
    epochs = [[tuple(samples[epoch * rows + n][0].tolist()) for n in range(rows)] for epoch in range(2)]
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1])


@pytest.mark.parametrize(
    ("batch_tokens", "micro_rows", "ranks", "message"),
    [
        (1000, 4, 1, "not a multiple of data.sequence = 64; 1024 would do"),
        (64 * 12, 5, 1, "training.micro_rows = 4 would do"),
        (64 * 3, 1, 2, "does not divide"),
        (64, 1, 2, r"training.batch_tokens = 128 \(2 rows\) would do"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused_with_one_that_does(batch_tokens, micro_rows, ranks, message):
    with pytest.raises(UserError, match=message):
        plan_batches(batch_tokens, 64, micro_rows, ranks)
