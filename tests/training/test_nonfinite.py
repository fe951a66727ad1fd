"""Which samples are blamed for a loss that is no number, and how many may be left out."""

from __future__ import annotations

import math

import pytest

from looktwice.errors import TrainingError
from looktwice.training.nonfinite import NonfiniteGuard, Origin, blamed

ROWS = [Origin(("a:1", "a:2")), Origin(("a:3", "a:3"))]


@pytest.mark.parametrize(
    ("losses", "named"),
    [
        ([math.nan, 1.0], "1 row of a:1, a:2"),
        ([1.0, math.inf], "1 row of a:3"),
        ([1.0, 2.0], "2 rows of a:1, a:2, a:3"),
    ],
)
def test_the_rows_whose_loss_is_no_number_are_blamed_or_all(losses, named) -> None:
    assert blamed(losses, ROWS) == named


def test_many_samples_are_counted() -> None:
    row = Origin(tuple(f"a:{number}" for number in range(11)))
    assert blamed([1.0], [row]).endswith("a:6, a:7 and 3 more")


def test_losses_that_are_numbers_and_whose_sum_is_none_are_told() -> None:
    with pytest.raises(TrainingError, match="^step 7: loss inf, gradient norm 1.0; in 2 rows of a:1"):
        NonfiniteGuard(0).skips(7, [1.7e308, 1.7e308], 1.0, ROWS)


def test_a_good_update_ends_the_row_of_bad_ones() -> None:
    guard = NonfiniteGuard(1)
    outcomes = [guard.skips(step, [loss, 0.0], 1.0, ROWS) for step, loss in enumerate([math.nan, 1.0, math.nan], 1)]
    assert (outcomes, guard.num_skipped) == ([True, False, True], 2)
    with pytest.raises(TrainingError, match="step 4: loss nan, gradient norm 1.0 after 1 that were left out; in 1 row"):
        guard.skips(4, [math.nan, 0.0], 1.0, ROWS)


def test_of_several_processes_the_one_with_the_row_is_named() -> None:
    assert blamed([1.0, math.nan], [Origin(("a:1",), 0), Origin(("a:2",), 1)]) == "1 row on rank 1 of a:2"
