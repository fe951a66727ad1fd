"""Boxes and their frames, picture sizes, visual token counts. Pure integers and floats, no tensors, no pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple, get_args

from looktwice.errors import BoxError, ConfigError, short

BoxFrame = Literal["original_px", "resized_px", "unit", "norm1000"]
BOX_FRAMES: tuple[str, ...] = get_args(BoxFrame)

PIXEL_KINDS = ("image", "crop", "video")
MAX_RESIZE_ASPECT = 200
MAX_CROP_ASPECT = 100


class Size(NamedTuple):
    """Width and height of a picture in pixels."""

    width: int
    height: int


class Box(NamedTuple):
    """Top-left and bottom-right corner. Original pixels after EXIF rotation unless a name says otherwise."""

    x1: float
    y1: float
    x2: float
    y2: float

    @property
    def area(self) -> float:
        return max(0.0, self.x2 - self.x1) * max(0.0, self.y2 - self.y1)


@dataclass(frozen=True, kw_only=True)
class PixelPolicy:
    """How many pixels a picture, a crop and a frame of a video may have after resizing.

    Saved in the checkpoint, used everywhere. A frame never gets more pixels than a picture would: see `frame_bounds`.
    """

    image_min_pixels: int = 448 * 448
    image_max_pixels: int = 896 * 896
    crop_min_pixels: int = 56 * 56
    crop_max_pixels: int = 448 * 448
    video_min_pixels: int = 448 * 448
    video_max_pixels: int = 896 * 896

    def __post_init__(self) -> None:
        for kind in PIXEL_KINDS:
            low, high = getattr(self, f"{kind}_min_pixels"), getattr(self, f"{kind}_max_pixels")
            if not 0 <= low <= high or high == 0:
                raise ConfigError(
                    f"{kind}_min_pixels is {low} and {kind}_max_pixels is {high}; give 0 <= min <= max and max > 0"
                )

    def override(self, **given: int | None) -> PixelPolicy:
        """The policy with the bounds that are given; a minimum left out never stands above its maximum."""
        values = asdict(self) | {name: value for name, value in given.items() if value is not None}
        for kind in PIXEL_KINDS:
            if given.get(f"{kind}_min_pixels") is None:
                values[f"{kind}_min_pixels"] = min(values[f"{kind}_min_pixels"], values[f"{kind}_max_pixels"])
        return PixelPolicy(**values)

    def overview_size(self, original: Size, *, factor: int) -> Size:
        """The size at which a model of this factor sees a whole picture of this upright size."""
        low, high = self.image_min_pixels, self.image_max_pixels
        return smart_resize(original, factor=factor, min_pixels=low, max_pixels=high)

    @property
    def frame_bounds(self) -> tuple[int, int]:
        """Fewest and most pixels of a video's frame: its own bounds, each lowered to the picture's where that is less.

        A policy written without video bounds, or lowered for pictures alone, so keeps frames within what it allows.
        """
        return (
            min(self.video_min_pixels, self.image_min_pixels),
            min(self.video_max_pixels, self.image_max_pixels),
        )


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes of one frame; 0 when the union is empty."""
    width = min(a.x2, b.x2) - max(a.x1, b.x1)
    height = min(a.y2, b.y2) - max(a.y1, b.y1)
    inter = max(0.0, width) * max(0.0, height)
    union = a.area + b.area - inter
    return inter / union if union > 0 else 0.0


def hull(boxes: Sequence[Box]) -> Box | None:
    """The smallest box that holds all of them; None where there are none."""
    if not boxes:
        return None
    lefts, tops, rights, bottoms = zip(*boxes)
    return Box(min(lefts), min(tops), max(rights), max(bottoms))


def smart_resize(size: Size, *, factor: int, min_pixels: int, max_pixels: int) -> Size:
    """The size Ovis2.5 resizes a picture to: both sides multiples of `factor`, pixel count near the bounds.

    Follows the released rule step by step (rounding half to even, no second check after step 4) with one mend. Where
    the released code gives a side of 0 for an extreme shape, that side is `factor` and the other is cut to what
    `max_pixels` leaves, so a shape however extreme takes no more pixels than that (one visual token at the least).
    Source: AIDC-AI/Ovis, modeling_siglip2_navit.py and the hub's preprocess_inputs.

    Example: smart_resize(Size(640, 480), factor=32, min_pixels=448**2, max_pixels=448**2) == Size(512, 384)
    """
    width, height = float(size.width), float(size.height)
    if height < factor or width < factor:
        if height < width:
            height, width = float(factor), float(round(factor / height * width))
        else:
            height, width = float(round(factor / width * height)), float(factor)
    elif max(height, width) / min(height, width) > MAX_RESIZE_ASPECT:
        if height > width:
            height = MAX_RESIZE_ASPECT * width
        else:
            width = MAX_RESIZE_ASPECT * height
    h, w = round(height / factor) * factor, round(width / factor) * factor
    if h * w > max_pixels:
        beta = math.sqrt(height * width / max_pixels)
        h, w = math.floor(height / beta / factor) * factor, math.floor(width / beta / factor) * factor
        if min(h, w) == 0:
            longest = max(1, max_pixels // factor**2) * factor
            h, w = (min(max(side, factor), longest) for side in (h, w))
    elif h * w < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        h, w = math.ceil(height * beta / factor) * factor, math.ceil(width * beta / factor) * factor
    return Size(w, h)


def num_visual_tokens(size: Size, *, factor: int) -> int:
    """Visual atoms of a resized picture, start and end indicators not counted."""
    return (size.width // factor) * (size.height // factor)


def zoom_scale(area_ratio: float) -> float:
    """How much a crop is enlarged: 2 below an eighth of the picture, 1 from a half on, linear between (VLM-R3)."""
    if area_ratio < 0.125:
        return 2.0
    if area_ratio >= 0.5:
        return 1.0
    return 2.0 - (area_ratio - 0.125) / 0.375


def to_original(box: Box, *, frame: BoxFrame, original: Size, resized: Size) -> Box:
    """The same box in original pixels, as floats. `resized` is what the model sees of the whole picture."""
    if frame == "original_px":
        return box
    scale_x, scale_y = {
        "resized_px": (original.width / resized.width, original.height / resized.height),
        "unit": (original.width, original.height),
        "norm1000": (original.width / 1000, original.height / 1000),
    }[frame]
    return Box(box.x1 * scale_x, box.y1 * scale_y, box.x2 * scale_x, box.y2 * scale_y)


def from_original(box: Box, *, frame: BoxFrame, original: Size, resized: Size) -> Box:
    """Inverse of `to_original`."""
    unit = to_original(Box(1, 1, 1, 1), frame=frame, original=original, resized=resized)
    return Box(box.x1 / unit.x1, box.y1 / unit.y1, box.x2 / unit.x2, box.y2 / unit.y2)


def check_box(values: object) -> Box:
    """Four finite numbers with x1 < x2 and y1 < y2, in whatever frame.

    Raises BoxError with reason `wrong_length`, `not_a_number` or `reversed`.
    """
    if not isinstance(values, (list, tuple)) or len(values) != 4:
        raise BoxError("wrong_length", f"a box has 4 numbers [x1, y1, x2, y2], got {short(repr(values))}")
    for value in values:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        # the float limit first: math.isfinite raises OverflowError on an integer of a few hundred digits
        if not is_number or not abs(value) < 1e300 or not math.isfinite(value):
            raise BoxError("not_a_number", f"a box holds finite numbers, got {short(repr(values))}")
    box = Box(*(float(value) for value in values))
    if box.x1 >= box.x2 or box.y1 >= box.y2:
        raise BoxError("reversed", f"a box runs from top-left to bottom-right, got {short(repr(values))}")
    return box


def crop_rectangle(box: Box, *, original: Size, min_side: int) -> tuple[int, int, int, int]:
    """The whole pixels to cut (left, top, right, bottom; right and bottom exclusive) for a box in original pixels.

    Clamped to the picture, rounded outwards, then sides below `min_side` are enlarged about the centre and shifted
    inside; a picture smaller than `min_side` gives all it has.
    Raises BoxError with reason `outside` or `too_thin` (longer than 100 times its width).
    """
    left, top = max(0.0, box.x1), max(0.0, box.y1)
    right, bottom = min(float(original.width), box.x2), min(float(original.height), box.y2)
    if left >= right or top >= bottom:
        raise BoxError("outside", f"the box lies outside the picture of {original.width}x{original.height}")
    x1, x2 = _enlarge(math.floor(left), math.ceil(right), min_side, original.width)
    y1, y2 = _enlarge(math.floor(top), math.ceil(bottom), min_side, original.height)
    if max(x2 - x1, y2 - y1) > MAX_CROP_ASPECT * min(x2 - x1, y2 - y1):
        raise BoxError("too_thin", f"the box is more than {MAX_CROP_ASPECT} times longer than wide")
    return x1, y1, x2, y2


def crop_size(rectangle: tuple[int, int, int, int], *, original: Size, factor: int, policy: PixelPolicy) -> Size:
    """The size a cut rectangle is resized to: enlarged by `zoom_scale`, then `smart_resize` at the crop bounds."""
    width, height = rectangle[2] - rectangle[0], rectangle[3] - rectangle[1]
    scale = zoom_scale(width * height / (original.width * original.height))
    return smart_resize(
        Size(max(1, int(scale * width)), max(1, int(scale * height))),
        factor=factor,
        min_pixels=policy.crop_min_pixels,
        max_pixels=policy.crop_max_pixels,
    )


def _enlarge(low: int, high: int, min_side: int, limit: int) -> tuple[int, int]:
    missing = min(min_side, limit) - (high - low)
    if missing <= 0:
        return low, high
    low = min(max(0, low - missing // 2), limit - min(min_side, limit))
    return low, low + min(min_side, limit)
