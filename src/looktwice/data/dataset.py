"""Samples to examples: what SFT trains on, what a rollout starts from, and the order samples come in."""

from __future__ import annotations

import math

import torch

from looktwice.calls import TOOL_CALL_CLOSE, split_calls
from looktwice.data.records import Sample
from looktwice.errors import DataError, ImageError
from looktwice.messages import Conversation, ImagePart, Message, TextPart, user
from looktwice.processing.images import open_image
from looktwice.processing.processor import Example, Ovis2_5Processor
from looktwice.rollout.crop_tool import CropTool


def encode_sample(sample: Sample, processor: Ovis2_5Processor, *, max_length: int) -> Example:
    """The sample as SFT trains it: each call is followed by its crop, cut by the tool that rollouts use.

    Raises DataError for a call that cannot be run and for a sample longer than `max_length` tokens.
    """
    try:
        image = open_image(sample.image_path)
    except ImageError as error:
        raise ImageError(f"{sample.where}: image_path: {error}") from error
    look = CropTool(processor).look
    parts: list[TextPart | ImagePart] = []
    images = [processor.patch_image(image)]
    for segment in split_calls(sample.response):
        parts.append(TextPart(text=segment))
        if segment.endswith(TOOL_CALL_CLOSE):
            observation = look(segment, image)
            if observation.image is None:
                raise DataError(f"{sample.where}: {sample.field}: crop call refused: {observation.text}; mend its box")
            parts.append(ImagePart(source=image))
            images.append(observation.image)
    answer = Message(role="assistant", parts=tuple(part for part in parts if part != TextPart(text="")))
    conversation = Conversation(messages=(user(sample.question, image), answer))
    example = processor.assemble(processor.template.spans(conversation, purpose="train"), images)
    if len(example) > max_length:
        raise DataError(
            f"{sample.where}: {len(example)} tokens, more than max_length {max_length}; raise it or lower --max_pixels"
        )
    return example


class BatchOrder:
    """Which samples make up each optimizer step: a function of seed and step alone, so a run can go on anywhere.

    Each epoch is a fresh permutation cut into steps; its last step may be short.
    """

    def __init__(
        self, num_samples: int, *, samples_per_step: int, num_epochs: float, max_steps: int | None, seed: int
    ) -> None:
        self.num_samples = num_samples
        self.samples_per_step = samples_per_step
        self.seed = seed
        self.steps_per_epoch = math.ceil(num_samples / samples_per_step)
        self.total_steps = math.ceil(num_epochs * self.steps_per_epoch)
        if max_steps is not None:
            self.total_steps = max_steps

    def __getitem__(self, step: int) -> list[int]:
        """Sample numbers of the step, counted from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(self.num_samples, generator=generator).tolist()
        return order[place * self.samples_per_step : (place + 1) * self.samples_per_step]

    def epoch(self, step: int) -> float:
        """Passes over the data after `step` steps."""
        return step / self.steps_per_epoch
