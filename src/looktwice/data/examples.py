"""Samples to examples: what SFT trains on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from looktwice.config import LengthPolicy
from looktwice.data.lengths import Refit, fit_lengths
from looktwice.data.problems import View, refuse
from looktwice.data.reasons import REASONS
from looktwice.data.sample import Sample
from looktwice.errors import DataError, ImageError
from looktwice.processing.packing import PackedBatch, pack_rows
from looktwice.processing.processor import Example, Ovis2_5Processor
from looktwice.rollout.conversation import encode_conversation, in_model_frame, open_images


def encode_sample(sample: Sample, processor: Ovis2_5Processor, *, max_length: int) -> Example:
    """The sample as SFT trains it: every assistant turn unless it says otherwise, each call followed by its crop.

    Raises ImageError for a picture that cannot be opened; DataError for a sample without a turn to train on, for a
    call that cannot be run, and for a sample longer than `max_length` tokens.
    """
    try:
        conversation = open_images(sample.conversation)
    except ImageError as error:
        raise ImageError(f"{sample.where}: picture: {error}") from error
    try:
        conversation = in_model_frame(conversation, sample.box_frame, processor)
        example = encode_conversation(conversation, processor_for(sample, processor), purpose="train")
    except DataError as error:
        raise DataError(f"{sample.where}: {sample.field}: {error}") from error
    example.where = sample.where
    if not any(example.loss_mask):
        raise DataError(f"{sample.where}: {sample.field}: no assistant turn to train on; add the answer")
    if len(example) > max_length:
        raise DataError(
            f"{sample.where}: {sample.field}: {len(example)} tokens, more than max_length {max_length}; "
            f"{REASONS['too_long'].mend}"
        )
    return example


class Encoded(NamedTuple):
    """A sample ready for training, None when it was left out, and what its length led to, if anything."""

    example: Example | None
    refit: Refit | None


class PackedSamples(NamedTuple):
    """A batch of samples as packed rows, and what the length of some led to."""

    rows: list[PackedBatch]
    refits: list[Refit]

    def pin_memory(self) -> PackedSamples:
        """The same with its rows in page-locked memory."""
        return self._replace(rows=[row.pin_memory() for row in self.rows])


@dataclass(frozen=True, kw_only=True)
class Packer:
    """Encoded samples of one batch to packed rows: what a worker does last."""

    max_tokens_per_row: int

    def __call__(self, samples: Sequence[Encoded]) -> PackedSamples:
        examples = [sample.example for sample in samples if sample.example]
        refits = [sample.refit for sample in samples if sample.refit]
        rows = pack_rows(examples, self.max_tokens_per_row)
        # what a row was packed from stays here: it would double what is sent
        return PackedSamples([replace(row, examples=()) for row in rows], refits)


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """`encode_sample` under a length policy: what a worker does with each sample."""

    processor: Ovis2_5Processor
    max_length: int
    length_policy: LengthPolicy

    def __call__(self, sample: Sample) -> Encoded:
        """Raises what `refuse`, `fit_lengths` and `encode_sample` raise."""
        refuse([sample], "the data", stage="sft", view=View.of(self.processor))
        kept, refits = [sample], list[Refit]()
        if self.length_policy != "error":
            kept, refits = fit_lengths(
                kept, self.processor, max_length=self.max_length, length_policy=self.length_policy
            )
        example = encode_sample(kept[0], self.processor, max_length=self.max_length) if kept else None
        return Encoded(example, refits[0] if refits else None)


def processor_for(sample: Sample, processor: Ovis2_5Processor) -> Ovis2_5Processor:
    """The processor under the pixel bounds of the sample, where it has its own."""
    return processor if sample.policy is None else processor.at(sample.policy)
