"""Which samples of a step fall to this process, by what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from looktwice.data.lengths import sequence_lengths
from looktwice.data.order import BatchOrder
from looktwice.data.sample import Sample
from looktwice.errors import LooktwiceError
from looktwice.processing.processor import Ovis2_5Processor
from looktwice.training.distributed import World

STEPS_KNOWN = 256
"""Steps whose shares are kept: those that are prepared ahead, and more."""


class Shares:
    """The batches of each step that this process trains: of several processes each has about as many tokens.

    A step is the same samples on any number of processes, and no batch of a process has more than `batch_size`.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        order: BatchOrder,
        processor: Ovis2_5Processor,
        world: World,
        *,
        batch_size: int,
    ) -> None:
        self.samples, self.order, self.processor, self.world = samples, order, processor, world
        self.batch_size = batch_size
        self.batches = lru_cache(STEPS_KNOWN)(self._batches)

    def _batches(self, step: int) -> list[list[int]]:
        """Sample numbers of the step in batches; of several processes one may have none."""
        numbers = self.order[step]
        if self.world.size > 1:
            costs = costs_of([self.samples[number] for number in numbers], self.processor)
            numbers = [numbers[place] for place in self.world.share(costs)]
        return [numbers[first : first + self.batch_size] for first in range(0, len(numbers), self.batch_size)]


def own_share(samples: Sequence[Sample], processor: Ovis2_5Processor, world: World) -> Sequence[Sample]:
    """Those of the samples that fall to this process."""
    if world.size == 1:
        return samples
    return [samples[place] for place in world.share(costs_of(samples, processor))]


def costs_of(samples: Sequence[Sample], processor: Ovis2_5Processor) -> Sequence[float]:
    """What each sample costs: its tokens, told by its texts and the headers of its pictures."""
    try:
        return sequence_lengths(samples, processor)
    except LooktwiceError:  # who gets the sample that cannot be read says so
        return [1] * len(samples)
