"""Guards: every row once an epoch, an order that depends on seed and epoch alone, and no memory of size rows."""

from __future__ import annotations

import itertools

import pytest

from recipes.data.order import permuted, row_at


@pytest.mark.parametrize("rows", [1, 2, 3, 17, 64, 1000])
def test_every_row_comes_once_an_epoch(rows):
    for epoch in range(3):
        assert sorted(row_at(epoch * rows + n, rows, seed=7) for n in range(rows)) == list(range(rows))


def test_epochs_and_seeds_have_orders_of_their_own():
    def order(seed, epoch):
        return [permuted(n, 1000, seed, epoch) for n in range(1000)]

    orders = [order(1, 0), order(1, 1), order(2, 0)]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            same = sum(x == y for x, y in zip(a, b))
            assert same < 10, "two independent orders agree in about one place of 1,000"


def test_order_is_not_nearly_sorted():
    order = [permuted(n, 4096, 3, 0) for n in range(4096)]
    rises = sum(b > a for a, b in itertools.pairwise(order))
    assert 1900 < rises < 2200, "a random order rises in half of its places"
    assert sum(abs(a - n) for n, a in enumerate(order)) / 4096 == pytest.approx(4096 / 3, rel=0.1)


def test_order_stays_what_it_was():
    """A resumed run of an older version must continue in the same order: these numbers may never change."""
    assert [row_at(n, 1000, seed=1234) for n in (0, 1, 2, 999, 1000, 123_456_789)] == PINNED


PINNED = [721, 455, 86, 171, 727, 299]


def test_unshuffled_rows_come_in_turn():
    assert [row_at(n, 5, seed=1, shuffle=False) for n in range(7)] == [0, 1, 2, 3, 4, 0, 1]


def test_a_row_of_a_trillion_needs_no_table():
    assert 0 <= row_at(10**12 - 1, 10**12, seed=1) < 10**12
