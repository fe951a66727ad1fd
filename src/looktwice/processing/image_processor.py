"""Pictures for Hugging Face callers: the transformers image processor of Ovis2.5, and preprocessor_config.json.

Legend: P patches, I pictures.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_transforms import to_pil_image
from transformers.image_utils import load_image
from transformers.utils import cached_file

from looktwice.errors import CheckpointError, ImageError
from looktwice.geometry import BOX_FRAMES, BoxFrame, PixelPolicy, Size
from looktwice.model.configuration import Ovis2_5Config
from looktwice.processing.images import PatchedImage, normalise, open_image, patchify, resize

PREPROCESSOR_FILE = "preprocessor_config.json"
OWN_SETTINGS = "looktwice"
RELEASED_PREPROCESSOR = {
    "do_convert_rgb": None,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "SiglipImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "SiglipProcessor",
    "resample": 2,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 512, "width": 512},
}
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
"""What says where files come from, among the arguments of a `from_pretrained`."""

ImageInput = str | Path | Image.Image | np.ndarray | Tensor
Images = ImageInput | list["Images"] | tuple["Images", ...] | None


class Ovis2_5ImageProcessor(BaseImageProcessor):
    """Pictures to patches at a policy's size, bit for bit as the tower reads them. Needs no torchvision."""

    model_input_names = ["pixel_values", "image_grid_thw"]

    def __init__(
        self, patch_size: int = 16, merge_size: int = 2, policy: PixelPolicy | None = None, **kwargs: Any
    ) -> None:
        """`merge_size` patches on a side become one visual token; the defaults are those of the released models."""
        super().__init__(**kwargs)
        self.patch_size = patch_size
        self.merge_size = merge_size
        self.policy = policy or PixelPolicy()

    @property
    def factor(self) -> int:
        """Side in pixels of the square that becomes one visual token."""
        return self.patch_size * self.merge_size

    def overview_size(self, original: Size) -> Size:
        """The size at which the model sees a whole picture of this upright size."""
        return self.policy.overview_size(original, factor=self.factor)

    def patch_image(self, image: Image.Image) -> PatchedImage:
        """A whole picture (upright RGB) at the policy's size."""
        return self.patch(resize(image, self.overview_size(Size(*image.size))))

    def patch(self, image: Image.Image) -> PatchedImage:
        """A picture whose size is already right."""
        return patchify(image, patch_size=self.patch_size, stride=self.merge_size)

    def preprocess(self, images: Images, return_tensors: str | None = None) -> BatchFeature:  # type: ignore[override]
        """`pixel_values` [P, C * p * p] float32 in [-1, 1] and `image_grid_thw` [I, 3] of all pictures, in order.

        Takes paths, addresses, PIL pictures, arrays and tensors, one or lists and lists of lists of them. Without
        `return_tensors` they are torch tensors. Raises ImageError when there is no picture or one fails.
        """
        patched = [self.patch_image(_open(image)) for image in flatten(images)]
        if not patched:
            raise ImageError("no picture to process; leave `images` out for text alone")
        data = {
            "pixel_values": normalise(torch.cat([image.pixel_values for image in patched])),
            "image_grid_thw": torch.tensor([image.grid_thw for image in patched]),
        }
        return BatchFeature(data, tensor_type=return_tensors)

    def __call__(self, images: Images, return_tensors: str | None = None) -> BatchFeature:  # type: ignore[override]
        return self.preprocess(images, return_tensors)

    @classmethod
    def get_image_processor_dict(  # type: ignore[override]
        cls, path: str | PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Patch sizes of the model beside it, if there is one; pixel bounds from preprocessor_config.json."""
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        settings, rest = super().get_image_processor_dict(path, **kwargs)
        if cached_file(path, "config.json", _raise_exceptions_for_missing_entries=False, **hub) is not None:
            tower = Ovis2_5Config.from_pretrained(path, **hub).vit_config
            settings |= {"patch_size": tower.patch_size, "merge_size": tower.hidden_stride}
        return {**settings, "policy": read_settings(path, **hub)[0]}, rest

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        names = ("patch_size", "merge_size", "policy")
        given = {name: value for name, value in {**image_processor_dict, **kwargs}.items() if name in names}
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        return {
            "image_processor_type": type(self).__name__,
            "patch_size": self.patch_size,
            "merge_size": self.merge_size,
            OWN_SETTINGS: {"pixels": asdict(self.policy)},
        }


def flatten(images: Images) -> list[ImageInput]:
    """The pictures of any nesting in order, those of a batch array apart, None left out."""
    if isinstance(images, (list, tuple)) or (isinstance(images, (np.ndarray, Tensor)) and images.ndim == 4):
        return [image for nested in images for image in flatten(nested)]
    return [] if images is None else [images]


def _open(image: ImageInput) -> Image.Image:
    """Upright RGB."""
    if isinstance(image, (np.ndarray, Tensor)):
        return open_image(to_pil_image(image))
    if isinstance(image, str) and image.startswith(("http://", "https://")):
        return load_image(image)
    if isinstance(image, (str, Path, Image.Image)):
        return open_image(image)
    raise ImageError(f"a picture is a {type(image).__name__}; give a path, a PIL picture, an array or a tensor")


def write_settings(path: str | PathLike[str], policy: PixelPolicy, box_frame: BoxFrame) -> None:
    """Our settings beside the released image settings, as preprocessor_config.json of a folder."""
    settings = {"pixels": asdict(policy), "box_frame": box_frame}
    text = json.dumps({**RELEASED_PREPROCESSOR, OWN_SETTINGS: settings}, indent=2)
    (Path(path) / PREPROCESSOR_FILE).write_text(text + "\n", encoding="utf-8")


def read_settings(path: str | PathLike[str], **hub: Any) -> tuple[PixelPolicy, BoxFrame]:
    """Our settings in a folder's (or a hub name's) preprocessor_config.json, or the defaults where there are none."""
    settings = own_settings(path, **hub)
    try:
        policy, box_frame = PixelPolicy(**settings.get("pixels", {})), settings.get("box_frame", "original_px")
    except (TypeError, AttributeError) as error:
        raise _unreadable(path, error) from error
    if box_frame not in BOX_FRAMES:
        raise CheckpointError(f"{path}/{PREPROCESSOR_FILE}: box_frame is {box_frame!r}; it must be one of {BOX_FRAMES}")
    return policy, box_frame


def own_settings(path: str | PathLike[str], **hub: Any) -> dict[str, Any]:
    """What `write_settings` left in a folder's (or a hub name's) preprocessor_config.json; empty where it did not."""
    file = cached_file(path, PREPROCESSOR_FILE, _raise_exceptions_for_missing_entries=False, **hub)
    if file is None:
        return {}
    try:
        return json.loads(Path(file).read_text(encoding="utf-8")).get(OWN_SETTINGS, {})
    except (OSError, ValueError, AttributeError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str | PathLike[str], error: Exception) -> CheckpointError:
    return CheckpointError(f"{path}/{PREPROCESSOR_FILE}: not readable as image settings ({error}); restore the file")
