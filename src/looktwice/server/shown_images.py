"""The pictures of a request: those it holds, and where it is allowed those of the web and of one folder."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from PIL import Image

from looktwice.errors import ImageError
from looktwice.processing.addresses import data_url, source_of
from looktwice.processing.images import image_size, open_image
from looktwice.server.network import fetch
from looktwice.server.refusal import Refusal

WEB = ("http://", "https://")
FILE = "file://"


@dataclass(frozen=True, kw_only=True)
class ImageRules:
    """Where pictures may come from, and how large they may be: bytes of a file, pixels before decoding."""

    max_bytes: int
    max_pixels: int
    allow_http: bool = False
    folder: Path | None = None
    take: Callable[[int], None] = lambda pixels: None
    """Called with the pixels of each picture before it is decoded; raises Refusal where there is no room for it."""


class Pixels:
    """Decoded pixels that are in memory for all requests, which keep their pictures until they are over: 6 bytes each.

    A request may have those of 4 of the largest pictures, all together those of 16.
    """

    def __init__(self, largest: int) -> None:
        self.most_of_request, self.most = 4 * largest, 16 * largest
        self.held = 0
        self._lock = threading.Lock()

    def take(self, count: int, *, of_request: int) -> None:
        """Have room for a picture of a request that has so many already. Raises Refusal."""
        if of_request + count > self.most_of_request:
            raise Refusal(
                f"the pictures have more than {self.most_of_request:,} pixels together; make them smaller",
                param="messages",
                code="images_too_large",
            )
        with self._lock:
            if self.held + count > self.most:
                raise Refusal(
                    "too many pictures are shown at a time; try again", status=429, headers={"Retry-After": "5"}
                )
            self.held += count

    def give_back(self, count: int) -> None:
        with self._lock:
            self.held -= count


def shown_image(url: str, rules: ImageRules) -> Image.Image:
    """The picture that a request names, decoded. Raises Refusal where it may not be had or is none."""
    address = held_address(url, rules)
    try:
        size = image_size(address)
        if size.width * size.height > rules.max_pixels:
            raise Refusal(
                f"a picture has {size.width}x{size.height} pixels, more than {rules.max_pixels:,}; make it smaller",
                param="messages",
                code="image_too_large",
            )
        rules.take(size.width * size.height)
        return open_image(address)
    except ImageError as error:
        raise Refusal(f"a picture cannot be used: {error}", param="messages", code="invalid_image") from error


def is_web(url: str) -> bool:
    """Whether a picture is named by an address of the web."""
    return url[:8].lower().startswith(WEB)


def held_address(url: str, rules: ImageRules) -> str:
    """The address that holds the picture itself. Raises Refusal where it may not be had."""
    lowered = url[:8].lower()
    if lowered.startswith("data:"):
        try:
            held = source_of(url)
        except ImageError as error:
            raise Refusal(str(error), param="messages", code="invalid_image") from error
        assert isinstance(held, str)
        return held
    if is_web(url):
        if not rules.allow_http:
            mend = "send the picture as a data: URL, or start the server with --allow_http"
            raise Refusal(f"pictures are not fetched from the web here; {mend}", param="messages", code="no_http")
        return data_url(fetch(url, max_bytes=rules.max_bytes))
    if rules.folder is None:
        mend = "send the picture as a data: URL, or start the server with --image_folder"
        raise Refusal(f"a picture's address is no data: URL; {mend}", param="messages", code="no_files")
    path = unquote(url.removeprefix(FILE)) if url.startswith(FILE) else url
    return data_url(file_below(rules.folder, path, max_bytes=rules.max_bytes))


def file_below(folder: Path, name: str, *, max_bytes: int) -> bytes:
    """What a file below a folder holds. One that is not there, lies elsewhere once links are followed, or is no plain
    file is refused in the same words, so that nobody learns what lies outside."""
    path = path_below(folder, name)
    refusal = Refusal("no such picture file in the served folder", param="messages", code="no_such_file")
    if path is None:
        raise refusal
    try:
        # what is opened is what was looked at: a link put there since is not followed, a pipe does not block
        number = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(number, "rb") as file:
            is_same = path_below(folder, name) == path and os.path.samestat(os.fstat(number), os.lstat(path))
            if not is_same or not stat.S_ISREG(os.fstat(number).st_mode):
                raise refusal
            raw = file.read(max_bytes + 1)
    except OSError as error:
        raise refusal from error
    if len(raw) > max_bytes:
        raise Refusal(f"a picture file is larger than {max_bytes:,} bytes", param="messages", code="image_too_large")
    return raw


def path_below(folder: Path, name: str) -> Path | None:
    """The real path of what a name stands for below a folder; None where it lies elsewhere or is not there."""
    try:
        root = folder.resolve(strict=True)
        path = (root / name).resolve(strict=True)
    except (OSError, ValueError, RuntimeError):
        return None
    return path if path.is_relative_to(root) and path != root else None
