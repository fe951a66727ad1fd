"""The only file that opens pictures: decoding, orientation, modes, limits, resizing, patches, crops.

Pictures are upright RGB after `open_image`; its size is the only "original" size anywhere.
"""

from __future__ import annotations

import os
import stat
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from io import BytesIO
from pathlib import Path
from typing import IO
from zlib import crc32

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

from looktwice.errors import ImageError, short_path
from looktwice.geometry import Size
from looktwice.messages import ImageSource
from looktwice.neighbours import nearby
from looktwice.processing.addresses import held_bytes, is_held, source_of
from looktwice.processing.file_kinds import LOOKED_AT, image_kind, other_kind
from looktwice.processing.metadata import ORIENTATION, PNG_SIGNATURE, orientation_of, png_chunks, without_metadata

MAX_SOURCE_PIXELS = 178_956_970
# Pillow warns from half of that on, which is allowed here
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# and tells of every tag of a TIFF that it passes over
warnings.filterwarnings("ignore", module=r"PIL\.TiffImagePlugin")
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a picture upright, by the orientation in its EXIF; source: Exif 3.0, 4.6.5."""
SIDES_SWAP = (5, 6, 7, 8)
UNDECODED = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")
"""Formats that Pillow knows and leaves to other programs to decode."""
PREVIEW = 1
"""The bit of a TIFF's NewSubfileType that says so."""
END_MARKS = {"JPEG": b"\xff\xd9", "PNG": b"\x00\x00\x00\x00IEND\xaeB`\x82", "GIF": b"\x3b"}
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

    @cached_property
    def key(self) -> bytes:
        """The same for equal pixels and grids, and for them alone."""
        return blake2b(
            self.pixel_values.contiguous().numpy().data, key=repr(self.grid_thw).encode(), digest_size=16
        ).digest()


@dataclass(frozen=True, kw_only=True)
class ImageHeader:
    """Upright size, size before EXIF rotation, and whether there are frames or pages behind the first."""

    size: Size
    stored: Size
    has_frames: bool


def image_size(source: ImageSource) -> Size:
    """Upright width and height, from the header alone. Raises ImageError as `open_image` does."""
    with _open(source) as opened:
        return opened.size


def read_header(source: ImageSource, *, is_doubted: bool = True) -> ImageHeader:
    """What a picture says of itself before it is decoded. Raises ImageError as `open_image` does.

    If doubted, a file that does not end as a whole file of its format ends is decoded to be sure, and so is one of a
    format whose end cannot be told, such as BMP and TIFF.
    """
    with _open(source) as opened, _damage_named(source):
        stored, has_frames = Size(*opened.image.size), bool(getattr(opened.image, "is_animated", False))
        is_sure = not is_doubted or opened.file is None or _seems_whole(opened.file, opened.image.format or "")
    if not is_sure:
        open_image(source)
    return ImageHeader(size=opened.size, stored=stored, has_frames=has_frames)


def open_image(source: ImageSource) -> Image.Image:
    """An upright RGB picture: EXIF rotation applied, alpha on white, 16 bits scaled to 8, first frame of an animation.

    Raises ImageError when the picture is missing, unreadable or has more than 178,956,970 pixels.
    """
    with _open(source) as opened, _damage_named(source):
        if opened.file is not None:
            _check_checksums(opened.file)
        opened.image.load()
        turn = TURNS.get(opened.orientation)
        return to_rgb(opened.image.copy() if turn is None else opened.image.transpose(turn))


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
    return f"{str(source)[:40]}..." if is_held(source) else short_path(source)


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """A picture before it is decoded, and how it is to be turned; `file` is its own, None of a caller's picture."""

    image: Image.Image
    orientation: int
    file: IO[bytes] | None = None

    @property
    def size(self) -> Size:
        """Width and height upright."""
        width, height = self.image.size
        return Size(height, width) if self.orientation in SIDES_SWAP else Size(width, height)


@contextmanager
def _open(source: ImageSource) -> Iterator[_Opened]:
    """The picture of a path or an address, closed afterwards, or the caller's own, left open."""
    if isinstance(source, Image.Image):
        with _damage_named(source):
            orientation = _orientation_of_own(source)
        yield _Opened(image=source, orientation=orientation)
        return
    if isinstance(source, str):
        source = source_of(source)
    with _file_of(source) as file:
        shown, exif = without_metadata(file)
        with _identified(shown, source, file) as image:
            yield _Opened(image=image, orientation=_orientation_of(image, exif), file=file)


@contextmanager
def _damage_named(source: ImageSource) -> Iterator[None]:
    try:
        yield
    except UNREADABLE as error:
        raise ImageError(f"{name_of(source)}: the picture is damaged ({error}); replace the file") from error


@contextmanager
def _file_of(source: str | Path) -> Iterator[IO[bytes]]:
    """The file of a path, or the bytes that an address holds."""
    if is_held(source):
        yield BytesIO(held_bytes(str(source)))
        return
    _check_file(source)
    try:
        file = open(source, "rb")  # noqa: SIM115, errors of what is done with it are others
    except OSError as error:
        raise ImageError(f"{name_of(source)}: cannot be read ({error.strerror}); check the rights") from error
    with file:
        yield file


def _identified(shown: IO[bytes], source: str | Path, file: IO[bytes]) -> Image.Image:
    """The picture of a file, not yet decoded. Raises ImageError for what is none, and for one that is too large."""
    try:
        image = Image.open(shown)
        if image.format in UNDECODED:
            raise UnidentifiedImageError
        is_preview = isinstance(image, TiffImageFile) and _is_preview(image)
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name_of(source)}: {error}; shrink it", "huge") from error
    except UNREADABLE as error:
        raise _unidentified(name_of(source), file, error) from error
    if is_preview:
        words = "a camera's raw file, or another TIFF that begins with a preview"
        raise ImageError(f"{name_of(source)}: not a readable picture ({words}); develop it to PNG or JPEG", "other")
    if image.width * image.height > MAX_SOURCE_PIXELS:
        size = f"{image.width}x{image.height}"
        raise ImageError(f"{name_of(source)}: {size} pixels, more than {MAX_SOURCE_PIXELS}; shrink it", "huge")
    return image


def _unidentified(name: str, file: IO[bytes], error: Exception) -> ImageError:
    """What a file is that cannot be opened as a picture."""
    file.seek(0)
    head = file.read(LOOKED_AT)
    if not head:
        return ImageError(f"{name}: not a readable picture (0 bytes); replace or remove it", "empty")
    if other := other_kind(head):
        return ImageError(f"{name}: not a readable picture ({other.what}); {other.mend}", "other")
    if kind := image_kind(head):
        cause = "" if isinstance(error, UnidentifiedImageError) else f": {error}"
        words = f"it begins as {kind.upper()}, and is damaged or of a kind that is not read{cause}"
        return ImageError(f"{name}: not a readable picture ({words}); replace it, or convert it to PNG or JPEG")
    return ImageError(f"{name}: not a readable picture (of no known format); replace or remove it")


def _is_preview(image: TiffImageFile) -> bool:
    """Whether a TIFF's first picture is the preview of another one, as in the raw files of cameras."""
    kind = image.tag_v2.get(254, 0)
    return isinstance(kind, int) and bool(kind & PREVIEW)


def _orientation_of(image: Image.Image, exif: bytes) -> int:
    """How the picture of a file is to be turned after it is decoded."""
    if not isinstance(image, TiffImageFile):
        return orientation_of(exif or image.info.get("exif", b""))
    # Pillow turns a TIFF itself, and then reads all its tags, of which any may be wrong: it is shown the one
    own = Image.Exif()
    own[ORIENTATION] = image.tag_v2.get(ORIENTATION, 1)
    image.getexif = lambda: own  # type: ignore[method-assign]
    return 1


def _orientation_of_own(image: Image.Image) -> int:
    """How a caller's picture is to be turned, who may have changed its EXIF."""
    if isinstance(image, TiffImageFile):
        return 1
    try:
        return image.getexif().get(ORIENTATION, 1)
    except UNREADABLE:
        return orientation_of(image.info.get("exif", b""))


def _check_file(path: str | Path) -> None:
    """Raise ImageError for a path at which there is no file to open; opening some of these would wait for ever."""
    name = name_of(path)
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        mend = nearby(path) or "check the path"
        raise ImageError(f"{name}: no such picture; {mend}", "missing") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ImageError(f"{name}: not a readable picture ({reason}); replace or remove it") from error
    if not stat.S_ISREG(status.st_mode):
        raise ImageError(f"{name}: not a readable picture (not a file); replace or remove it")
    if status.st_size == 0:
        raise ImageError(f"{name}: not a readable picture (0 bytes); replace or remove it", "empty")


def _check_checksums(file: IO[bytes]) -> None:
    """Raise ValueError for pixels of a PNG that have changed. Leaves the file where it was.

    Pillow does not look at them, and of a stream that cannot be unpacked may leave the rest black without a word.
    """
    place = file.tell()
    file.seek(0)
    if file.read(len(PNG_SIGNATURE)) == PNG_SIGNATURE:
        for start, stop, kind in png_chunks(file):
            if kind == b"IDAT":
                content, checksum = file.read(stop - start - 12), file.read(4)
                if len(checksum) == 4 and crc32(content, crc32(kind)) != int.from_bytes(checksum, "big"):
                    raise ValueError("a wrong checksum of pixels")
    file.seek(place)


def _seems_whole(file: IO[bytes], kind: str) -> bool:
    """Whether the file of a picture ends as one of its kind ends; False where that cannot be told."""
    if kind == "WEBP":  # a RIFF file, which says its size
        file.seek(4)
        said = int.from_bytes(file.read(4), "little") + 8
        return file.seek(0, os.SEEK_END) >= said
    mark = END_MARKS.get(kind, b"")
    file.seek(max(0, file.seek(0, os.SEEK_END) - len(mark)))
    return bool(mark) and file.read() == mark
