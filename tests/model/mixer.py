"""Random inputs for any config: text of any length around pictures and videos of any small size."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from looktwice.geometry import Size
from looktwice.model.configuration import Ovis2_5Config
from looktwice.processing.images import PatchedImage
from looktwice.processing.processor import Example


class Mixer:
    def __init__(self, config: Ovis2_5Config, seed: int) -> None:
        self.config = config
        self.rng = np.random.default_rng(seed)

    def example(self, num_images: int) -> Example:
        example = Example()
        self._append_text(example)
        for _ in range(num_images):
            self.append_image(example, self.image())
            self._append_text(example)
        example.loss_mask[0] = False
        return example

    def image(self, num_frames: int = 1) -> PatchedImage:
        vit = self.config.vit_config
        h, w = (int(n) for n in self.rng.integers(1, 5, 2) * vit.hidden_stride)
        pixels = self.rng.integers(0, 256, (num_frames * h * w, 3 * vit.patch_size**2), dtype=np.uint8)
        return PatchedImage(
            pixel_values=torch.from_numpy(pixels),
            grid_thw=(num_frames, h, w),
            size=Size(w * vit.patch_size, h * vit.patch_size),
            num_tokens=num_frames * h * w // vit.hidden_stride**2,
        )

    def append_image(self, example: Example, image: PatchedImage) -> None:
        config = self.config
        is_video = image.grid_thw[0] > 1
        start = config.video_start_token_id if is_video else config.image_start_token_id
        end = config.video_end_token_id if is_video else config.image_end_token_id
        example.append([start, *[config.image_token_id] * image.num_tokens, end], is_trained=False)
        example.images.append(image)

    def _append_text(self, example: Example) -> None:
        length = int(self.rng.integers(2, 9))
        highest = min(self.config.visual_token_ids) // 2
        example.append([int(token) for token in self.rng.integers(1, highest, length)], is_trained=False)
        example.loss_mask[-length:] = [bool(flag) for flag in self.rng.integers(0, 2, length)]


def image_inputs(examples: list[Example]) -> dict[str, Tensor]:
    """The pictures of all examples, none of them shared."""
    images = [image for example in examples for image in example.images]
    if not images:
        return {}
    return {
        "pixel_values": torch.cat([image.pixel_values for image in images]),
        "image_grid_thw": torch.tensor([image.grid_thw for image in images]),
    }


def padded_inputs(examples: list[Example], side: str) -> dict[str, Any]:
    longest = max(len(example) for example in examples)
    rows, masks = [], []
    for example in examples:
        num_pads = longest - len(example)
        pads, zeros, ones = [0] * num_pads, [0] * num_pads, [1] * len(example)
        rows.append(pads + example.input_ids if side == "left" else example.input_ids + pads)
        masks.append(zeros + ones if side == "left" else ones + zeros)
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks), **image_inputs(examples)}
