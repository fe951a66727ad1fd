"""The order in which training goes through its samples: a function of seed and step."""

from __future__ import annotations

import math
from functools import lru_cache, partial

import torch
from torch import Tensor

from looktwice.data.mixture import Mixture


class BatchOrder:
    """Which samples make up each optimizer step: a function of seed and step alone, so a run can go on anywhere.

    Each epoch is a fresh permutation cut into steps; its last step may be short. The number of the step is all the
    state there is: to go on at step k costs the one permutation of k's epoch, as to start does. `samples_per_step` are
    those of all processes together, so the steps stay the same on any number of them; see `share`.
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
        self._of_epoch = lru_cache(maxsize=1)(draw)

    def __getitem__(self, step: int) -> list[int]:
        """Sample numbers of the step, counted from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        return self._of_epoch(epoch)[place * self.samples_per_step : (place + 1) * self.samples_per_step].tolist()

    def batches(self, step: int, batch_size: int) -> list[list[int]]:
        """The samples of the step in batches, of which only the last may be short."""
        samples = self[step]
        return [samples[first : first + batch_size] for first in range(0, len(samples), batch_size)]

    def share(self, step: int, *, rank: int, world_size: int) -> list[int]:
        """The samples of the step that fall to one of `world_size` processes.

        All ranks together have each sample of the step once, and none has two more than another; in a short step a
        rank may have none.
        """
        return self[step][rank::world_size]

    def epoch(self, step: int) -> float:
        """Passes over the data after `step` steps."""
        return step / self.steps_per_epoch


def _permutation(num_samples: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(num_samples, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
