"""Losses and gradients that are no numbers: told with the samples they came from, or left out and counted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

from looktwice.errors import TrainingError, counted

MOST_NAMED = 8


class Origin(NamedTuple):
    """A row, by the samples it was packed from, and the process that trained it where there are several."""

    where: tuple[str, ...]
    rank: int | None = None


class NonfiniteGuard:
    """Stops before an update that would make weights no numbers; up to `most_in_a_row` of them are left out instead.

    `num_skipped` counts all that were left out.
    """

    def __init__(self, most_in_a_row: int) -> None:
        self.most_in_a_row = most_in_a_row
        self.in_a_row = self.num_skipped = 0

    def skips(self, step: int, losses: Sequence[float], grad_norm: float, rows: Sequence[Origin]) -> bool:
        """Whether the update of these rows' losses is to be left out. Raises TrainingError where none may be any more.

        `step` counts from 1.
        """
        if all(map(math.isfinite, (*losses, sum(losses), grad_norm))):
            self.in_a_row = 0
            return False
        self.in_a_row += 1
        what = f"loss {sum(losses)}, gradient norm {grad_norm}"
        if self.in_a_row > self.most_in_a_row:
            after = f" after {self.most_in_a_row} that were left out" if self.most_in_a_row else ""
            raise TrainingError(
                f"step {step:,}: {what}{after}; in {blamed(losses, rows)}; lower --learning_rate, check these samples, "
                f"or leave {'more ' if after else ''}such updates out: --skip_nonfinite N; --resume goes on from the "
                "last checkpoint"
            )
        self.num_skipped += 1
        print(f"step {step:,} is left out: {what}, in {blamed(losses, rows)}")
        return True


def blamed(losses: Sequence[float], rows: Sequence[Origin]) -> str:
    """The samples of the rows whose loss is no number, or of all where each loss is one and the gradient is none."""
    bad = [row for loss, row in zip(losses, rows) if not math.isfinite(loss)] or rows
    places = list(dict.fromkeys(filter(None, chain.from_iterable(row.where for row in bad))))
    ranks = sorted({row.rank for row in bad if row.rank is not None})
    told = counted(len(bad), "row") + (f" on rank {', '.join(map(str, ranks[:MOST_NAMED]))}" if ranks else "")
    if not places:
        return told
    more = f" and {len(places) - MOST_NAMED} more" if len(places) > MOST_NAMED else ""
    return f"{told} of {', '.join(places[:MOST_NAMED])}{more}"
