"""How often the samples of several files come in one epoch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor


class Mixture:
    """An epoch that passes over each file as often as its weight says: twice with 2, over half of it with 0.5.

    Part of a pass goes on in the next epoch, so that no sample comes a second time before all others of its file have
    come once. Samples are numbered through all files; `sizes` [files] are how many each has. All is a function of seed
    and epoch.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], *, seed: int) -> None:
        self.sizes, self.seed = sizes, seed
        self.starts = [0, *accumulate(sizes)][:-1]
        self.counts = [max(1, round(size * weight)) for size, weight in zip(sizes, weights, strict=True)]

    @property
    def num_samples(self) -> int:
        """Samples of an epoch."""
        return sum(self.counts)

    def epoch(self, epoch: int) -> Tensor:
        """Sample numbers of an epoch, counted from 0 [num_samples], in random order."""
        numbers = torch.cat([self._of_file(file, epoch) for file in range(len(self.sizes))])
        return numbers[torch.randperm(len(numbers), generator=_generator(self.seed, epoch, len(self.sizes)))]

    def _of_file(self, file: int, epoch: int) -> Tensor:
        size, count = self.sizes[file], self.counts[file]
        first, end = epoch * count, (epoch + 1) * count
        passes = range(first // size, (end - 1) // size + 1)
        drawn = torch.cat([torch.randperm(size, generator=_generator(self.seed, one, file)) for one in passes])
        return self.starts[file] + drawn[first - passes[0] * size : end - passes[0] * size]


def _generator(seed: int, turn: int, place: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + turn) * 1_009 + place)
