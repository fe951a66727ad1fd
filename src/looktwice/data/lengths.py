"""How many tokens a sample has, from its texts and the headers of its pictures; nothing is decoded.

The closed formula: ids of the template, plus tokens of each text, plus for each picture and each crop its two marks and
one token for each factor x factor pixels of the size it is resized to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from looktwice.calls import parse_call
from looktwice.config import LengthPolicy, Stage
from looktwice.data.problems import Problem, raise_if_any
from looktwice.data.sample import Sample
from looktwice.errors import BoxError, DataError
from looktwice.geometry import (
    PixelPolicy,
    Size,
    crop_size,
    num_visual_tokens,
)
from looktwice.messages import ImageSource, Purpose
from looktwice.processing.images import image_size
from looktwice.processing.processor import Ovis2_5Processor
from looktwice.rollout.conversation import in_model_frame, with_crops
from looktwice.rollout.crop_tool import rectangle_of

SizeOf = Callable[[ImageSource], Size]

CHUNK = 1024
"""Samples whose texts are tokenised at once."""
NUM_MARKS = 2
"""Tokens around a picture: its start and its end."""


class Cut(NamedTuple):
    """What the tool cuts, enlarged but not yet resized: in whole pixels of a picture of size `original`.

    `image_number` counts the pictures of the conversation from 1.
    """

    rectangle: tuple[int, int, int, int]
    original: Size
    image_number: int


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What makes up the sequence of a sample: `num_ids` written by the template, texts, and sizes before resizing.

    `trained` are those of the ids and texts that are trained.
    """

    num_ids: int
    texts: tuple[str, ...]
    trained: tuple[int | str, ...]
    image_sizes: tuple[Size, ...]
    crops: tuple[Cut, ...]

    def num_image_tokens(self, policy: PixelPolicy, factor: int) -> int:
        """Tokens of all pictures and crops under a policy, their marks included."""
        sizes = [policy.overview_size(size, factor=factor) for size in self.image_sizes]
        sizes += [crop_size(cut, original=size, factor=factor, policy=policy) for cut, size, _ in self.crops]
        return sum(num_visual_tokens(size, factor=factor) + NUM_MARKS for size in sizes)


def sequence_lengths(
    samples: Sequence[Sample],
    processor: Ovis2_5Processor,
    size_of: SizeOf = image_size,
    purpose: Purpose = "train",
) -> list[int]:
    """Tokens of each sample as `encode_sample` trains it, exactly, or of the prompt its rollouts start from.

    `size_of` gives the upright size of a picture. Raises DataError for a call that cannot be run.
    """
    layouts = [layout(sample, processor, size_of, purpose) for sample in samples]
    num_tokens = token_counts(processor, (text for one in layouts for text in one.texts))
    return [
        one.num_ids
        + sum(num_tokens[text] for text in one.texts)
        + one.num_image_tokens(sample.policy or processor.policy, processor.factor)
        for one, sample in zip(layouts, samples)
    ]


def layout(
    sample: Sample, processor: Ovis2_5Processor, size_of: SizeOf = image_size, purpose: Purpose = "train"
) -> Layout:
    """The parts of a sample's sequence. Raises DataError for a call that cannot be run."""
    conversation = sample.conversation if purpose == "train" else sample.prompt
    conversation = in_model_frame(conversation, sample.box_frame, processor, size_of)
    image_sizes = tuple(map(size_of, conversation.images))
    cuts: list[Cut] = []

    def cut(text: str, _: str, num_shown: int) -> None:
        try:
            cuts.append(cut_of(text, processor, image_sizes[:num_shown]))
        except BoxError as error:
            raise DataError(f"{sample.where}: {sample.field}: crop call refused: {error}; mend its box") from error

    drafts = processor.template.drafts(with_crops(conversation, cut), purpose=purpose)
    pieces = [piece for draft in drafts for piece in draft.pieces]
    texts = tuple(piece for piece in pieces if isinstance(piece, str))
    return Layout(
        num_ids=len(pieces) - len(texts),
        texts=texts,
        trained=tuple(piece for draft in drafts if draft.is_trained for piece in draft.pieces),
        image_sizes=image_sizes,
        crops=tuple(cuts),
    )


def cut_of(text: str, processor: Ovis2_5Processor, image_sizes: Sequence[Size]) -> Cut:
    """What the tool cuts for the call that ends a text, of pictures of these upright sizes that stand before it.

    Raises BoxError for a call that cannot be run.
    """
    call = parse_call(text)
    original = call.pick(image_sizes)
    return Cut(rectangle_of(call.box, processor, original), original, call.image_number)


def token_counts(processor: Ovis2_5Processor, texts: Iterator[str]) -> dict[str, int]:
    """Tokens of each distinct text, tokenised as the template does it."""
    distinct = list(dict.fromkeys(texts))
    if not distinct:
        return {}
    return dict(zip(distinct, processor.template.count(distinct)))


def shrunk_policy(
    sample: Sample,
    processor: Ovis2_5Processor,
    max_length: int,
    size_of: SizeOf = image_size,
    purpose: Purpose = "train",
) -> PixelPolicy | None:
    """The largest pixel bounds at which the sample fits, pictures and crops shrunk in the same proportion.

    Where boxes are pixels of the picture as the model sees it (resized_px), only crops are shrunk, because a smaller
    picture would change what the boxes mean. None when the sample does not fit at one token a picture.
    """
    whole = layout(sample, processor, size_of, purpose)
    num_tokens = token_counts(processor, iter(whole.texts))
    room = max_length - whole.num_ids - sum(num_tokens[text] for text in whole.texts)
    are_images_fixed = "resized_px" in (sample.box_frame, processor.box_frame)
    policy, area = processor.policy, processor.factor**2
    steps = max(policy.image_max_pixels, policy.crop_max_pixels) // area
    for step in range(steps, 0, -1):
        image_max_pixels = None if are_images_fixed else max(area, policy.image_max_pixels * step // steps)
        crop_max_pixels = max(area, policy.crop_max_pixels * step // steps)
        smaller = policy.override(image_max_pixels=image_max_pixels, crop_max_pixels=crop_max_pixels)
        if whole.num_image_tokens(smaller, processor.factor) <= room:
            return smaller
    return None


@dataclass(frozen=True, kw_only=True)
class Refit:
    """A sample that was too long, and what became of it: `policy` are the bounds it has now, None: it was left out."""

    sample: Sample
    num_tokens: int
    policy: PixelPolicy | None

    @property
    def outcome(self) -> str:
        if self.policy is None:
            return "left out"
        images, crops = self.policy.image_max_pixels, self.policy.crop_max_pixels
        return f"pictures shrunk to at most {images} pixels, crops to {crops}"

    def as_json(self) -> dict[str, object]:
        sample = self.sample
        return {
            "where": sample.where,
            "field": sample.field,
            "reason": "too_long",
            "tokens": self.num_tokens,
            "outcome": self.outcome,
        }


def fit_lengths(
    samples: Sequence[Sample],
    processor: Ovis2_5Processor,
    *,
    max_length: int,
    length_policy: LengthPolicy,
    purpose: Purpose = "train",
) -> tuple[list[Sample], list[Refit]]:
    """The samples of at most `max_length` tokens, and what was done with the others. Nothing is cut out of a sequence.

    Raises DataError, counting all and naming the first 20, for samples that are too long under the policy `error`, and
    under `shrink_images` for those that are too long however small their pictures.
    """
    kept: list[Sample] = []
    refits: list[Refit] = []
    problems: list[Problem] = []
    for start in range(0, len(samples), CHUNK):
        chunk = samples[start : start + CHUNK]
        for sample, length in zip(chunk, sequence_lengths(chunk, processor, purpose=purpose)):
            if length <= max_length:
                kept.append(sample)
                continue
            policy = None
            if length_policy == "shrink_images":
                policy = shrunk_policy(sample, processor, max_length, purpose=purpose)
            if length_policy == "error" or (length_policy == "shrink_images" and policy is None):
                what, mend = over_limit(length, max_length, purpose), ""
                if length_policy == "shrink_images":
                    what += " however small its pictures"
                    mend = "raise --max_length, or give --length_policy drop"
                problems.append(
                    Problem(reason="too_long", where=sample.where, field=sample.field, what=what, own_mend=mend)
                )
                continue
            refits.append(Refit(sample=sample, num_tokens=length, policy=policy))
            kept += [replace(sample, policy=policy)] if policy else []
    raise_if_any(problems, "lengths")
    return kept, refits


def purposes_of(stage: Stage) -> tuple[Purpose, ...]:
    """What the samples of a stage are written for."""
    by_stage: dict[Stage, tuple[Purpose, ...]] = {"sft": ("train",), "grpo": ("prompt",), "both": ("train", "prompt")}
    return by_stage[stage]


def over_limit(length: int, max_length: int, purpose: Purpose) -> str:
    """How long a sequence is that is too long, in words."""
    return f"{length} tokens{' of the prompt' * (purpose == 'prompt')}, more than max_length {max_length}"
