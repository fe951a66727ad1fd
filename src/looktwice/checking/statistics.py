"""Measures of data files: tokens, pictures, crops and turns of each sample, what packing saves; from headers alone."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice

import numpy as np

from looktwice.calls import split_calls
from looktwice.data.examples import processor_for
from looktwice.data.lengths import CHUNK, Layout, layout, token_counts
from looktwice.data.order import BatchOrder
from looktwice.data.problems import Tally
from looktwice.data.sample import Sample, text_of
from looktwice.errors import DataError, ImageError
from looktwice.formats.sample_file import SampleFile
from looktwice.geometry import Size
from looktwice.processing.images import image_size
from looktwice.processing.packing import split_by_tokens
from looktwice.processing.processor import Ovis2_5Processor

IMAGES_REMEMBERED = 65_536
"""Pictures whose headers are not read again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measures:
    """One sample in numbers. Marks around pictures count as visual tokens, the template's own ids as text."""

    num_text_tokens: int
    num_visual_tokens: int
    num_trained_tokens: int
    num_turns: int
    crops_per_answer: tuple[int, ...]
    image_sizes: tuple[Size, ...]

    @property
    def num_tokens(self) -> int:
        return self.num_text_tokens + self.num_visual_tokens


@dataclass(kw_only=True)
class Statistics:
    """Measures of the samples of `num_rows` rows; `unmeasured` counts what could not be measured, with first places.

    All of `num_whole_rows` was measured.
    """

    num_rows: int = 0
    num_whole_rows: int = 0
    measures: list[Measures] = field(default_factory=list)
    unmeasured: Tally = field(default_factory=Tally)

    @property
    def lengths(self) -> list[int]:
        return [one.num_tokens for one in self.measures]

    @property
    def image_sizes(self) -> list[Size]:
        return [size for one in self.measures for size in one.image_sizes]

    @property
    def crops_per_answer(self) -> list[int]:
        return [count for one in self.measures for count in one.crops_per_answer]

    @property
    def num_unmeasured(self) -> int:
        return sum(self.unmeasured.counts.values())

    def read(self, file: SampleFile, rows: Iterable[int], processor: Ovis2_5Processor) -> None:
        """Add the samples of these rows. Broken rows, missing pictures and calls without a crop are counted."""
        size_of = lru_cache(IMAGES_REMEMBERED)(image_size)
        rows = iter(rows)
        while chunk := list(islice(rows, CHUNK)):
            self.num_rows += len(chunk)
            laid_out: list[tuple[Sample, Layout]] = []
            for row in chunk:
                num_before = self.num_unmeasured
                reading = file.new_reading()
                samples = file.read_row(row, reading)
                if reading.problems:
                    self.unmeasured.add("a row that cannot be read", file.rows.where(row))
                for sample in samples:
                    try:
                        laid_out.append((sample, layout(sample, processor_for(sample, processor), size_of)))
                    except ImageError:
                        self.unmeasured.add("a picture that cannot be opened", sample.where)
                    except DataError:
                        self.unmeasured.add("a call that cannot be run", sample.where)
                self.num_whole_rows += self.num_unmeasured == num_before
            num_tokens = token_counts(processor, (text for _, one in laid_out for text in one.texts))
            self.measures += [_measures(sample, one, num_tokens, processor) for sample, one in laid_out]


def _measures(sample: Sample, laid_out: Layout, num_tokens: dict[str, int], processor: Ovis2_5Processor) -> Measures:
    messages = sample.conversation.messages
    answers = [message for message in messages if message.role == "assistant"]
    return Measures(
        num_text_tokens=laid_out.num_ids + sum(num_tokens[text] for text in laid_out.texts),
        num_visual_tokens=laid_out.num_image_tokens(sample.policy or processor.policy, processor.factor),
        num_trained_tokens=sum(num_tokens[piece] if isinstance(piece, str) else 1 for piece in laid_out.trained),
        num_turns=len(messages),
        crops_per_answer=tuple(len(split_calls(text_of(answer))) - 1 for answer in answers),
        image_sizes=laid_out.image_sizes,
    )


@dataclass(frozen=True, kw_only=True)
class Packing:
    """The same samples as padded batches and as packed rows.

    `num_padded` are the tokens of all padded batches, each sample filled up to the longest of its batch; `num_tokens`
    of them are real. `num_packed_rows` is the number of packed forwards, which hold no padding.
    """

    num_tokens: int
    num_padded: int
    num_packed_rows: int

    @property
    def padding_share(self) -> float:
        """What packing saves: the share of padded batches that is padding."""
        return 1 - self.num_tokens / self.num_padded if self.num_padded else 0.0


def simulate_packing(lengths: Sequence[int], *, batch_size: int, max_tokens_per_row: int, seed: int) -> Packing:
    """One epoch in training's own order, once as padded batches and once as the learner packs them.

    Example: simulate_packing([2, 4], batch_size=2, max_tokens_per_row=6, seed=0) has 6 tokens, 8 padded, 1 packed row
    """
    order = BatchOrder(len(lengths), samples_per_step=batch_size, num_epochs=1, max_steps=None, seed=seed)
    num_padded = num_packed_rows = 0
    for step in range(order.total_steps):
        batch = [lengths[number] for number in order[step]]
        num_padded += len(batch) * max(batch)
        num_packed_rows += len(split_by_tokens(batch, max_tokens_per_row))
    return Packing(num_tokens=sum(lengths), num_padded=num_padded, num_packed_rows=num_packed_rows)


def rows_to_measure(num_rows: int, num_picked: int | None, seed: int) -> Sequence[int]:
    """All rows, or as many as asked for, picked at random, in their order."""
    rows = range(num_rows)
    if num_picked is None or num_picked >= num_rows:
        return rows
    return sorted(random.Random(seed).sample(rows, num_picked))


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of all values does not exceed; 0 without values.

    Example: percentile([1, 2, 3, 10], 0.5) == 2
    """
    return float(np.quantile(values, share, method="inverted_cdf")) if len(values) else 0.0
