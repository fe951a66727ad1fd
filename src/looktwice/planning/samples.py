"""What rows of a rehearsal hold: samples of a given number of tokens with pictures, half of the text trained."""

from __future__ import annotations

import math

import torch

from looktwice.geometry import Size
from looktwice.model.configuration import Ovis2_5Config
from looktwice.processing.images import PatchedImage
from looktwice.processing.processor import Example

IMAGE_SHARE = 0.75
"""Of a row that is pictures at the most: whole ones, and the rest is text."""


def image_of(config: Ovis2_5Config, num_tokens: int) -> PatchedImage:
    """A grey picture, as near to a square as the number of its visual tokens allows it to be."""
    vit = config.vit_config
    rows = next(rows for rows in range(math.isqrt(num_tokens), 0, -1) if num_tokens % rows == 0)
    height, width = (vit.hidden_stride * each for each in (rows, num_tokens // rows))
    pixels = torch.zeros(height * width, vit.num_channels * vit.patch_size**2, dtype=torch.uint8)
    size = Size(width * vit.patch_size, height * vit.patch_size)
    return PatchedImage(pixel_values=pixels, grid_thw=(1, height, width), size=size, num_tokens=num_tokens)


def sample_of(config: Ovis2_5Config, num_tokens: int, image_tokens: int) -> Example:
    """One sequence: as many pictures of so many visual tokens as go into three quarters of it, then text."""
    image = image_of(config, image_tokens)
    shown = [config.image_start_token_id, *[config.image_token_id] * image_tokens, config.image_end_token_id]
    count = int(num_tokens * IMAGE_SHARE) // len(shown)
    example = Example(images=[image] * count)
    for _ in range(count):
        example.append(shown, is_trained=False)
    num_words = num_tokens - len(example)
    example.append([0] * (num_words - num_words // 2), is_trained=False)
    example.append([0] * (num_words // 2), is_trained=True)
    return example


def group_of(config: Ovis2_5Config, num_tokens: int, image_tokens: int, siblings: int) -> list[Example]:
    """Siblings that fill a row of so many tokens with the prompt they share, which is half of it; there the last id of
    the prompt stands in each sibling."""
    prompt = sample_of(config, num_tokens // 2, image_tokens)
    prompt.loss_mask = [False] * len(prompt)
    group = [prompt.sibling() for _ in range(siblings)]
    for one in group:
        one.append([0] * ((num_tokens - len(prompt) + 1) // siblings - 1), is_trained=True)
    return group
