"""What a caller shows with a question, as the parts of a message: pictures and videos from files or from memory."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from looktwice.errors import ConfigError, short_path
from looktwice.messages import ImageSource, VideoPart
from looktwice.paths import check_shown_file, expanded
from looktwice.processing.addresses import data_url, source_of
from looktwice.processing.video import is_video_file

Shown = ImageSource | bytes | np.ndarray
"""A picture: a path, a PIL picture, the bytes of a file, or uint8 pixels [height, width(, channels)], red first."""
ARRAYS = "uint8 [height, width] or [height, width, 3]"
CHANNELS = ((), (3,), (4,))
"""What may follow height and width in the shape of a picture: nothing of a grey one, RGB, RGBA."""


def parts_shown(shown: Any) -> list[ImageSource | VideoPart]:
    """The parts of a message for a picture, a list of them, a video, or None. Raises ConfigError for anything else."""
    if shown is None:
        return []
    if isinstance(shown, VideoPart):
        source = shown.source
        if isinstance(source, (str, PathLike)):
            return [VideoPart(source=expanded(source))]
        if not isinstance(source, (list, tuple)) and not (isinstance(source, np.ndarray) and source.ndim == 4):
            raise ConfigError(f"the video is of type {type(source).__name__}; give a path, or a list of pictures")
        return [VideoPart(source=[image_source(frame) for frame in source])]
    if not isinstance(shown, (list, tuple)):
        return [image_source(shown)]
    if not shown:
        raise ConfigError("the list of pictures is empty; leave it out to ask without a picture")
    return [image_source(one) for one in shown]


def image_source(shown: Any) -> ImageSource:
    """A picture as `open_image` takes it. Raises ConfigError for what is none, ImageError for a lost file."""
    if isinstance(shown, (str, PathLike)):
        source = source_of(expanded(shown))
        if isinstance(source, Path) and is_video_file(source):
            raise ConfigError(f"{short_path(source)}: a video; give it as `video`")
        if isinstance(source, Path):
            check_shown_file(source)
        return source
    if isinstance(shown, Image.Image):
        if not all(shown.size):
            raise ConfigError(f"the picture has {shown.width}x{shown.height} pixels; give one that has some")
        return shown
    if isinstance(shown, (bytes, bytearray)):
        return data_url(bytes(shown))
    if not isinstance(shown, np.ndarray):
        mend = f"give a path, a PIL picture, a file's bytes, or an array of {ARRAYS}"
        raise ConfigError(f"the picture is of type {type(shown).__name__}; {mend}")
    if shown.dtype != np.uint8 or shown.size == 0 or shown.ndim not in (2, 3) or shown.shape[2:] not in CHANNELS:
        raise ConfigError(f"the picture is an array of {shown.dtype} {list(shown.shape)}; give {ARRAYS}")
    return Image.fromarray(shown)
