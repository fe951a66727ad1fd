"""The image processor of Hugging Face callers: the same patches as ours, whatever the pictures come as."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from looktwice.errors import CheckpointError, ImageError
from looktwice.geometry import PixelPolicy
from looktwice.processing.image_processor import Ovis2_5ImageProcessor, flatten
from looktwice.processing.images import open_image
from looktwice.processing.processor import Ovis2_5Processor

POLICY = PixelPolicy(image_min_pixels=64 * 64, image_max_pixels=96 * 96)


@pytest.fixture
def pixels() -> Ovis2_5ImageProcessor:
    return Ovis2_5ImageProcessor(8, 2, POLICY)


def as_array(image: Image.Image) -> np.ndarray:
    return np.array(image)


def test_patches_are_those_of_our_own_processor_normalised(
    pixels: Ovis2_5ImageProcessor, processor: Ovis2_5Processor, image: Image.Image
) -> None:
    ours = Ovis2_5Processor(processor.tokenizer, processor.config, POLICY).patch_image(image)
    out = pixels(image, return_tensors="pt")
    assert torch.equal(out["pixel_values"], ours.pixel_values / 127.5 - 1)
    assert out["image_grid_thw"].tolist() == [list(ours.grid_thw)]


@pytest.mark.parametrize(
    "form",
    [
        as_array,
        lambda image: as_array(image).transpose(2, 0, 1),
        lambda image: torch.from_numpy(as_array(image)),
        lambda image: torch.from_numpy(as_array(image)).permute(2, 0, 1) / 255,
        lambda image: as_array(image)[None],
        lambda image: [[image]],
        lambda image: [None, (image,), []],
    ],
    ids=["array", "channels first", "tensor", "floats", "batch", "nested", "with gaps"],
)
def test_an_image_is_the_same_in_every_form(pixels: Ovis2_5ImageProcessor, image: Image.Image, form: Any) -> None:
    wanted, out = pixels(image), pixels(form(image))
    torch.testing.assert_close(out["pixel_values"], wanted["pixel_values"], atol=0.008, rtol=0)  # one step of 8 bits
    assert torch.equal(out["image_grid_thw"], wanted["image_grid_thw"])


def test_a_file_is_opened_upright_on_white(pixels: Ovis2_5ImageProcessor, tmp_path: Path) -> None:
    path = tmp_path / "clear.png"
    Image.new("RGBA", (80, 64), (0, 0, 0, 0)).save(path)
    for source in (path, str(path)):
        assert torch.equal(pixels(source)["pixel_values"], pixels(open_image(path))["pixel_values"])
    assert pixels(path)["pixel_values"].min() == 1.0


def test_an_image_written_into_an_address_is_read(pixels: Ovis2_5ImageProcessor, image: Image.Image) -> None:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    address = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    assert torch.equal(pixels(address)["pixel_values"], pixels(image)["pixel_values"])


def test_images_of_different_sizes_are_one_matrix(pixels: Ovis2_5ImageProcessor) -> None:
    out = pixels([Image.new("RGB", (64, 64)), [Image.new("RGB", (96, 64), "white")]], return_tensors="np")
    assert isinstance(out["pixel_values"], np.ndarray)
    assert out["image_grid_thw"].tolist() == [[1, 8, 8], [1, 8, 12]]
    assert out["pixel_values"][:64].max() == -1.0
    assert out["pixel_values"][64:].min() == 1.0


def test_nesting_is_undone_in_order() -> None:
    assert flatten([["a", None], "b", [("c",), []]]) == ["a", "b", "c"]
    assert flatten(None) == []


@pytest.mark.parametrize("images", [None, [], [[], None]])
def test_no_image_is_refused(pixels: Ovis2_5ImageProcessor, images: Any) -> None:
    with pytest.raises(ImageError, match="no picture"):
        pixels(images)


def test_what_is_no_image_is_refused_by_its_type(pixels: Ovis2_5ImageProcessor) -> None:
    with pytest.raises(ImageError, match="a picture is a dict"):
        pixels([{"path": "x.png"}])


# -- folders


def test_an_image_processor_saved_alone_comes_back(pixels: Ovis2_5ImageProcessor, tmp_path: Path) -> None:
    pixels.save_pretrained(tmp_path)
    again = Ovis2_5ImageProcessor.from_pretrained(tmp_path)
    assert (again.patch_size, again.merge_size, again.policy) == (8, 2, POLICY)


def test_a_model_folder_has_the_patches_of_its_tower_and_its_own_bounds(
    processor: Ovis2_5Processor, tmp_path: Path
) -> None:
    processor.save_pretrained(tmp_path)
    processor.config.save_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings["looktwice"]["pixels"]["image_max_pixels"] = 12345
    file.write_text(json.dumps(settings), encoding="utf-8")
    again = Ovis2_5ImageProcessor.from_pretrained(tmp_path)
    assert (again.patch_size, again.policy.image_max_pixels) == (processor.patch_size, 12345)


def test_a_released_folder_has_the_released_patches_and_our_bounds(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "SiglipImageProcessor"}')
    again = Ovis2_5ImageProcessor.from_pretrained(tmp_path)
    assert (again.patch_size, again.merge_size, again.policy) == (16, 2, PixelPolicy())


def test_bounds_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text('{"looktwice": {"pixels": 3}}')
    with pytest.raises(CheckpointError, match="not readable as image settings"):
        Ovis2_5ImageProcessor.from_pretrained(tmp_path)
