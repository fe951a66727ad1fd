"""Frames of a video, given as a list or read from a file. The only file that imports PyAV (the extra `video`)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from looktwice.errors import ConfigError, ImageError, short_path
from looktwice.messages import VideoSource
from looktwice.neighbours import nearby
from looktwice.processing.file_kinds import FRAMES, LOOKED_AT, other_kind
from looktwice.processing.images import open_image

if TYPE_CHECKING:
    from av.container import InputContainer

NUM_FRAMES = 8
MICROSECONDS = 1_000_000
"""Unit of a container's duration, in parts of a second."""
VIDEO_SUFFIXES = frozenset(
    (".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".ts", ".webm", ".wmv")
)


def is_video_file(path: str | Path) -> bool:
    """Whether the name is one of a video file."""
    return Path(path).suffix.lower() in VIDEO_SUFFIXES


def open_video(source: VideoSource, num_frames: int = NUM_FRAMES) -> list[Image.Image]:
    """Upright RGB frames: all that a list gives, `num_frames` of a file.

    Raises ImageError for an empty list and as `open_image` and `read_frames` do.
    """
    if isinstance(source, (str, Path)):
        return read_frames(source, num_frames)
    if not source:
        raise ImageError("the video is an empty list; give one frame or more")
    return [open_image(frame) for frame in source]


def read_frames(path: str | Path, num_frames: int = NUM_FRAMES) -> list[Image.Image]:
    """Frames int(i * total / num_frames) of a video file as upright RGB pictures; a shorter video repeats its own.

    The file is decoded forwards and only these frames are kept. `total` is frame rate times duration as the container
    promises them; where it promises nothing, or more than it holds, the frames are counted and the file is read again.
    Raises ImageError for a file that is missing, damaged or holds no video, ConfigError when PyAV is not installed.
    Source of the rule: the model card of Ovis2.5.
    """
    if num_frames < 1:
        raise ConfigError(f"num_frames is {num_frames}; it must be 1 or more")
    with _open(path) as container:
        frames, num_decoded = _pick(container, _places(_promised_length(container), num_frames))
    if num_decoded == 0:
        raise ImageError(f"{path}: the video has no frames; replace the file")
    if len(frames) < num_frames:
        with _open(path) as container:
            frames, _ = _pick(container, _places(num_decoded, num_frames))
    return frames


def _places(total: int, num_frames: int) -> list[int]:
    """Numbers of the wanted frames among `total`; none where the total is not known."""
    return [i * total // num_frames for i in range(num_frames)] if total else []


def _pick(container: InputContainer, places: list[int]) -> tuple[list[Image.Image], int]:
    """The frames at `places`, and how many were decoded for them: all there are when one is missing or none asked."""
    frames: list[Image.Image] = []
    num_decoded = 0
    for frame in container.decode(video=0):
        # a video with fewer frames than wanted shows one several times
        if repeats := places.count(num_decoded):
            # `rotation` is the turn that makes it upright, counter-clockwise like Pillow's
            frames += [frame.to_image().rotate(frame.rotation, expand=True)] * repeats
        num_decoded += 1
        if places and len(frames) == len(places):
            break
    return frames, num_decoded


def _promised_length(container: InputContainer) -> int:
    """Frames of the first video stream by frame rate and duration, 0 where the container does not say."""
    stream = container.streams.video[0]
    rate = stream.average_rate
    if rate is None:
        return 0
    if stream.duration is not None and stream.time_base is not None:
        return int(rate * stream.duration * stream.time_base)
    return int(rate * container.duration / MICROSECONDS) if container.duration is not None else 0


@contextmanager
def _open(path: str | Path) -> Iterator[InputContainer]:
    """The open file, with what PyAV raises inside the block turned into ImageError."""
    try:
        import av
    except ImportError as error:
        raise ConfigError(f"{path}: reading a video file needs PyAV: pip install looktwice[video]") from error
    if not os.path.isfile(path):
        raise ImageError(f"{short_path(path)}: no such video; {nearby(path) or 'check the path'}", "missing")
    try:
        # with its protocol named, a path that holds a colon is no address to fetch
        with av.open(f"file:{path}", metadata_errors="replace") as container:
            if not container.streams.video:
                raise ImageError(f"{path}: holds no video stream; give a video file")
            container.streams.video[0].thread_type = "AUTO"
            yield container
    except av.FFmpegError as error:
        with open(path, "rb") as file:
            other = other_kind(file.read(LOOKED_AT))
        what = other.what if other and other.mend != FRAMES else error.strerror
        raise ImageError(f"{path}: not a readable video ({what}); replace or remove it") from error
