"""The only file that opens pictures: decoding, orientation, modes, limits, resizing, patches, crops.

Pictures are upright RGB after `open_image`; its size is the only "original" size anywhere.
"""

from __future__ import annotations

import os
import stat
import struct
import warnings
from base64 import b64decode, b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO
from zlib import crc32

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile
from torch import Tensor

from looktwice.errors import ImageError
from looktwice.geometry import Size
from looktwice.messages import ImageSource

MAX_SOURCE_PIXELS = 178_956_970
# Pillow warns from half of that on, which is allowed here
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
EXIF_ORIENTATION = 0x0112
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
EXIF_ROTATED = (5, 6, 7, 8)
DATA_URL = "data:"
"""What the address of a picture begins with that holds the picture itself; see RFC 2397."""
END_MARKS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"\x00\x00\x00\x00IEND\xaeB`\x82", "GIF": b"\x3b"}
"""How whole files end."""
UNREADABLE = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    RuntimeError,
    struct.error,
    Image.DecompressionBombError,
)
"""What Pillow's readers raise for a damaged or oversized file: nearly anything but MemoryError."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PatchedImage:
    """A resized picture or video as the tower reads it: `pixel_values` [P, C * p * p] uint8, `grid_thw` in patches.

    A video has t frames of one `size`; `num_tokens` counts the atoms of all of them. The tower normalises the pixels.
    """

    pixel_values: Tensor
    grid_thw: tuple[int, int, int]
    size: Size
    num_tokens: int
    is_video: bool = False


@dataclass(frozen=True, kw_only=True)
class ImageHeader:
    """Upright size, size before EXIF rotation, and whether there are frames or pages behind the first."""

    size: Size
    stored: Size
    has_frames: bool


def image_size(source: ImageSource) -> Size:
    """Upright width and height, from the header alone. Raises ImageError as `open_image` does."""
    with _open(source) as image:
        return _upright_size(source, image)


def read_header(source: ImageSource, *, is_doubted: bool = True) -> ImageHeader:
    """What a picture says of itself before it is decoded. Raises ImageError as `open_image` does.

    If doubted, a file that does not end as a whole file of its format ends is decoded to be sure, and so is one of a
    format whose end cannot be told, such as BMP and TIFF.
    """
    with _open(source) as image:
        size, stored, kind = _upright_size(source, image), Size(*image.size), image.format or ""
        try:
            # an MPO file is a photo with a preview behind it
            has_frames = kind != "MPO" and bool(getattr(image, "is_animated", False))
        except UNREADABLE as error:
            raise ImageError(f"{name_of(source)}: the picture is damaged ({error}); replace the file") from error
    if is_doubted and not isinstance(source, Image.Image) and not _seems_whole(source, kind):
        open_image(source)
    return ImageHeader(size=size, stored=stored, has_frames=has_frames)


def open_image(source: ImageSource) -> Image.Image:
    """An upright RGB picture: EXIF rotation applied, alpha on white, 16 bits scaled to 8, first frame of an animation.

    Raises ImageError when the picture is missing, unreadable or has more than 178,956,970 pixels.
    """
    with _open(source) as image:
        try:
            # a picture in memory may be of this class and have no file
            if image is not source and isinstance(image, PngImageFile) and image.fp is not None:
                _check_checksums(image.fp)
            image.load()
            upright = ImageOps.exif_transpose(image)
        except UNREADABLE as error:
            raise ImageError(f"{name_of(source)}: the picture is damaged ({error}); replace the file") from error
        return to_rgb(upright)


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB without the losses of a plain convert: hidden colours under alpha and clipped 16-bit values."""
    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.uint32)
        grey = np.where(values == image.info.get("transparency", -1), 255, values >> 8)
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        return Image.fromarray(_to_8_bits(np.asarray(image))).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    """Grey values [height, width], int32 or float32, as uint8, by the range that they seem to have.

    Floats up to 2 are fractions, with what overshoots 1 cut. Other values are of 8 bits where none is above 255,
    integers above that of 16 bits; what is larger still is scaled by the largest. What is below 0 or no number becomes
    black.
    """
    is_integer = np.issubdtype(values.dtype, np.integer)
    values = np.where(np.isfinite(values), values, 0).astype(np.float64)
    highest = float(values.max())
    top = max(highest, 65535.0 if is_integer and highest > 255 else 255.0)
    if not is_integer and highest <= 2:
        top = 1.0
    return (values.clip(0, top) * (255.0 / top)).astype(np.uint8)


def resize(image: Image.Image, size: Size, rectangle: tuple[int, int, int, int] | None = None) -> Image.Image:
    """The picture, or one rectangle of it (left, top, right, bottom), at `size`, by PIL's bilinear filter.

    The filter is pinned: other libraries' bilinear filters give other pixels.
    """
    source = image if rectangle is None else image.crop(rectangle)
    return source if source.size == tuple(size) else source.resize(size, Image.Resampling.BILINEAR)


def patchify(*frames: Image.Image, patch_size: int, stride: int, is_video: bool = False) -> PatchedImage:
    """Patches of a picture, or of a video's frames one after the other, in blocks of stride x stride.

    All frames have one size, whose sides must be multiples of patch_size * stride.
    """
    p, s = patch_size, stride
    size = Size(*frames[0].size)
    rows, columns = size.height // p, size.width // p
    # a strip is one line of one colour of a patch: moving strips costs a quarter of moving pixels
    strips = np.empty((len(frames), rows // s, columns // s, s, s, 3, p), dtype=f"V{p}")
    for place, frame in enumerate(frames):
        for channel, colour in enumerate("RGB"):
            lines = np.frombuffer(frame.tobytes("raw", colour), dtype=strips.dtype)
            lines = lines.reshape(rows // s, s, p, columns // s, s)
            strips[place, ..., channel, :] = lines.transpose(0, 3, 1, 4, 2)
    pixels = strips.view(np.uint8).reshape(-1, 3 * p * p)
    return PatchedImage(
        pixel_values=torch.from_numpy(pixels),
        grid_thw=(len(frames), rows, columns),
        size=size,
        num_tokens=len(pixels) // s**2,
        is_video=is_video,
    )


def normalise(pixels: Tensor) -> Tensor:
    """uint8 of any shape -> float32 in [-1, 1], v / 127.5 - 1."""
    # CUDA multiplies by the reciprocal of a divisor that is not on the device, which gives other last bits
    half = pixels.new_full((), 127.5, dtype=torch.float32)
    return pixels.float().div_(half).sub_(1.0)


def name_of(source: ImageSource) -> str:
    """What messages call a picture: its path, or of what has none something short."""
    if isinstance(source, Image.Image):
        return "picture"
    return f"{str(source)[:40]}..." if str(source).startswith(DATA_URL) else str(source)


@contextmanager
def _open(source: ImageSource) -> Iterator[Image.Image]:
    """The picture of a path, closed afterwards, or the caller's own, left open."""
    if isinstance(source, Image.Image):
        yield source
        return
    name = name_of(source)
    if not str(source).startswith(DATA_URL):
        _check_file(source, name)
    try:
        image = Image.open(_file_of(source))
    except UnidentifiedImageError as error:
        raise ImageError(f"{name}: not a readable picture (of no known format); replace or remove it") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: {error}; shrink it", "huge") from error
    except UNREADABLE as error:
        raise ImageError(f"{name}: not a readable picture ({error}); replace or remove it") from error
    with image:
        if image.width * image.height > MAX_SOURCE_PIXELS:
            size = f"{image.width}x{image.height}"
            raise ImageError(f"{name}: {size} pixels, more than {MAX_SOURCE_PIXELS}; shrink it", "huge")
        yield image


def _check_file(path: str | Path, name: str) -> None:
    """Raise ImageError for a path at which there is no file to open; opening some of these would wait for ever."""
    try:
        status = os.stat(path)
    except FileNotFoundError as error:
        raise ImageError(f"{name}: no such picture; check the path", "missing") from error
    except (OSError, ValueError) as error:
        raise ImageError(f"{name}: not a readable picture ({error}); replace or remove it") from error
    if not stat.S_ISREG(status.st_mode):
        raise ImageError(f"{name}: not a readable picture (not a file); replace or remove it")
    if status.st_size == 0:
        raise ImageError(f"{name}: not a readable picture (0 bytes); replace or remove it", "empty")


def _upright_size(source: ImageSource, image: Image.Image) -> Size:
    width, height = image.size
    # Pillow's TIFF reader turns the size itself
    is_turned = image.format != "TIFF" and _orientation(source, image) in EXIF_ROTATED
    return Size(height, width) if is_turned else Size(width, height)


def _orientation(source: ImageSource, image: Image.Image) -> int | None:
    try:
        # Pillow decodes a whole PNG that has no EXIF in front, to look for some behind the pixels
        exif = Image.Image.getexif(image) if image is not source and _is_header_enough(image) else image.getexif()
    except UNREADABLE as error:
        raise ImageError(f"{name_of(source)}: the picture is damaged ({error}); replace the file") from error
    return exif.get(EXIF_ORIENTATION)


def _check_checksums(file: IO[bytes]) -> None:
    """Raise ValueError for pixels of a PNG that have changed. Leaves the file where it was.

    Pillow does not look at them, and of a stream that cannot be unpacked may leave the rest black without a word.
    """
    place = file.tell()
    file.seek(len(PNG_SIGNATURE))
    try:
        while len(head := file.read(8)) == 8 and head[4:] != b"IEND":
            content, checksum = file.read(int.from_bytes(head[:4], "big")), file.read(4)
            if (
                head[4:] == b"IDAT"
                and len(checksum) == 4
                and crc32(content, crc32(b"IDAT")) != int.from_bytes(checksum, "big")
            ):
                raise ValueError("a wrong checksum of pixels")
    finally:
        file.seek(place)


def _is_header_enough(image: Image.Image) -> bool:
    return isinstance(image, PngImageFile) and image.fp is not None and not _has_late_exif(image.fp)


def _has_late_exif(file: IO[bytes]) -> bool:
    """Whether a PNG file holds EXIF or text chunks after its pixels. Leaves the file where it was."""
    place, after_pixels = file.tell(), False
    file.seek(len(PNG_SIGNATURE))
    try:
        while len(head := file.read(8)) == 8:
            if after_pixels and head[4:] in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
                return True
            after_pixels = after_pixels or head[4:] == b"IDAT"
            file.seek(int.from_bytes(head[:4], "big") + 4, 1)
    finally:
        file.seek(place)
    return False


def data_url(raw: bytes) -> str:
    """The address that holds a picture's file, its kind read from its first bytes; of no known picture: unknown."""
    try:
        with Image.open(BytesIO(raw)) as image:
            kind = (image.get_format_mimetype() or "image/unknown").removeprefix("image/")
    except UNREADABLE:
        kind = "unknown"
    return f"{DATA_URL}image/{kind};base64,{b64encode(raw).decode()}"


def _file_of(source: str | Path) -> str | Path | IO[bytes]:
    """What Pillow opens: the path, or the bytes of a data: URL."""
    return _data_of(source) if str(source).startswith(DATA_URL) else source


def _data_of(address: str | Path) -> IO[bytes]:
    """The bytes of a `data:image/png;base64,...` address. Raises ValueError when they cannot be decoded."""
    return BytesIO(b64decode(str(address).partition(",")[2]))


def _seems_whole(source: str | Path, kind: str) -> bool:
    """Whether the file of a picture ends as one of its kind ends; False where that cannot be told."""
    with _data_of(source) if str(source).startswith(DATA_URL) else open(source, "rb") as file:
        if kind == "WEBP":  # a RIFF file, which says its size
            said = int.from_bytes(file.read(8)[4:], "little") + 8
            return file.seek(0, os.SEEK_END) >= said
        mark = END_MARKS.get(kind, b"")
        file.seek(max(0, file.seek(0, os.SEEK_END) - len(mark)))
        return bool(mark) and file.read() == mark
