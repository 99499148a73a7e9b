"""Guards: pooling, the group rules, what is forced and which slots are chosen, on exact values."""

from __future__ import annotations

import pytest
import torch

from sinkmodel.memories.selection import EMPTY, best, force, join_group, pool

INF = float("inf")


def row(*values) -> torch.Tensor:
    return torch.tensor([[values]], dtype=torch.float32)


@pytest.mark.parametrize(
    ("kernel", "pooling", "expected"),
    [
        (1, "max", (4.0, 0.0, 0.0, 6.0, 1.0)),
        (3, "max", (4.0, 4.0, 6.0, 6.0, 6.0)),
        (3, "avg", (4 / 3, 4 / 3, 2.0, 7 / 3, 7 / 3)),  # zeros beyond the ends count
        (5, "avg", (4 / 5, 2.0, 11 / 5, 7 / 5, 7 / 5)),
    ],
)
def test_pooling(kernel, pooling, expected):
    torch.testing.assert_close(pool(row(4, 0, 0, 6, 1), kernel, pooling), row(*expected))


@pytest.mark.parametrize(
    ("rule", "expected"), [("mean", [[2.0, 3.0], [5.0, 8.0]]), ("max", [[3.0, 4.0], [9.0, 9.0]]), ("sum", None)]
)
def test_group_rules_join_neighbouring_heads(rule, expected):
    heads = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [1.0, 7.0], [9.0, 9.0]]])
    expected = [[4.0, 6.0], [10.0, 16.0]] if expected is None else expected
    assert join_group(heads, 2, rule).tolist() == [expected]
    assert join_group(heads, 2, "as_published") is heads


def test_first_and_last_tokens_are_forced_and_empty_slots_are_last():
    positions = torch.tensor([[[EMPTY, EMPTY, 0, 1, 2, 3]], [[0, 1, 2, 3, 4, 5]]])
    scores = torch.full((2, 1, 6), 0.5)
    forced = force(scores, positions, 1, [2, 1], [4, 6])
    assert forced.tolist() == [[[-INF, -INF, INF, 0.5, INF, INF]], [[INF, 0.5, 0.5, 0.5, 0.5, INF]]]


def test_the_best_slots_come_in_the_order_of_the_text():
    slots, full = best(row(1, 9, 3, 7, 8), [3])
    assert (slots.tolist(), full.all().item()) == ([[[1, 3, 4]]], True)


def test_of_equal_scores_the_earlier_slot_is_kept():
    slots, _ = best(row(5, 2, 5, 5, 5), [3])
    assert slots.tolist() == [[[0, 2, 3]]]


def test_a_row_with_fewer_tokens_or_a_smaller_budget_has_empty_slots_in_front():
    scores = torch.tensor([[[-INF, -INF, 1.0, 2.0]], [[4.0, 3.0, 2.0, 1.0]]])
    slots, full = best(scores, [3, 2])
    assert full.tolist() == [[[False, True, True]], [[False, True, True]]]
    assert [of_row[0][1:] for of_row in slots.tolist()] == [[2, 3], [0, 1]]
