"""The order in which training goes through its samples: a function of seed and step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor

from looktwice.data.mixture import Mixture


class BatchOrder:
    """Which samples make up each optimizer step: a function of seed and step alone, so a run can go on anywhere.

    Each epoch is a fresh permutation cut into steps; its last step may be short. The number of the step is all the
    state there is: to go on at step k costs the one permutation of k's epoch, as to start does. `samples_per_step` are
    those of all processes together, so the steps stay the same on any number of them; see `balanced`.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        samples_per_step: int,
        num_epochs: float,
        max_steps: int | None,
        seed: int,
        mixture: Mixture | None = None,
    ) -> None:
        """`mixture` draws the epochs where files have weights; `num_samples` are then those of one of its epochs."""
        self.num_samples = num_samples
        self.samples_per_step = samples_per_step
        self.seed = seed
        self.steps_per_epoch = math.ceil(num_samples / samples_per_step)
        self.total_steps = math.ceil(num_epochs * self.steps_per_epoch)
        if max_steps is not None:
            self.total_steps = max_steps
        draw = mixture.epoch if mixture else partial(_permutation, num_samples, seed)
        self._of_epoch = lru_cache(maxsize=2)(draw)

    def __getitem__(self, step: int) -> list[int]:
        """Sample numbers of the step, counted from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        return self._of_epoch(epoch)[place * self.samples_per_step : (place + 1) * self.samples_per_step].tolist()

    def epoch(self, step: int) -> float:
        """Passes over the data after `step` steps."""
        return step / self.steps_per_epoch


def balanced(costs: Sequence[float], num_shares: int) -> list[list[int]]:
    """Places of the costs in shares of about the same sum, in order: the largest first, to the share with the least.

    The largest sum is at most 4/3 of the best there is (Graham 1969). With fewer costs than shares some are empty.
    Example: balanced([5, 3, 4, 2], 2) == [[0, 3], [1, 2]]
    """
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    sums = [0.0] * num_shares
    for place in sorted(range(len(costs)), key=lambda place: -costs[place]):
        least = min(range(num_shares), key=lambda share: (sums[share], len(shares[share])))
        shares[least].append(place)
        sums[least] += costs[place]
    return [sorted(share) for share in shares]


def _permutation(num_samples: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(num_samples, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
