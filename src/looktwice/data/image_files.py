"""What is known of an image file without decoding it, or why it cannot be used."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

from looktwice.errors import ImageError
from looktwice.processing.addresses import is_held
from looktwice.processing.images import ImageHeader, name_of, open_image, read_header

NUM_PROBED = 16
"""Headers that are read one by one."""
SLOW_S = 0.001
"""Seconds a header from which on the others are read by threads."""
NUM_THREADS = 16

Source = str | Path


class ImageFacts(NamedTuple):
    """What is known of a picture: its header, or the reason why it cannot be used, in words and with its mend.

    `identity` is the same for the same file under any path, or where it was decoded, for the same bytes.
    """

    header: ImageHeader | None
    identity: int
    reason: str = ""
    what: str = ""
    mend: str = ""


def inspect_all(sources: Sequence[Source], inspect: Callable[[Source], ImageFacts]) -> list[ImageFacts]:
    """What is known of each picture by `measured`, `inspected` or `decoded`."""
    if inspect is decoded:
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding releases the interpreter lock
            return list(pool.map(inspect, sources))
    first, others = sources[:NUM_PROBED], sources[NUM_PROBED:]
    started = time.perf_counter()
    facts = [inspect(source) for source in first]
    if time.perf_counter() - started < SLOW_S * len(first):
        return facts + [inspect(source) for source in others]
    # on a network every header is waited for; with files at hand threads would only be in each other's way
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return facts + list(pool.map(inspect, others))


def measured(source: Source) -> ImageFacts:
    """A picture by its header alone, or what is wrong with that."""
    return inspected(source, is_doubted=False)


def inspected(source: Source, *, is_doubted: bool = True) -> ImageFacts:
    """A picture by its header and, if doubted, its end, or what is wrong with it."""
    try:
        return ImageFacts(read_header(source, is_doubted=is_doubted), _identity(source))
    except ImageError as error:
        return _refused(source, error)


def decoded(source: Source) -> ImageFacts:
    """A picture decoded to its end, or what is wrong with it."""
    facts = measured(source)
    if facts.header is None:
        return facts
    try:
        open_image(source)
    except ImageError as error:
        return _refused(source, error)
    return facts if is_held(source) else facts._replace(identity=fingerprint(Path(source).read_bytes()))


def _refused(source: Source, error: ImageError) -> ImageFacts:
    what, _, mend = str(error).removeprefix(f"{name_of(source)}: ").rpartition("; ")
    return ImageFacts(None, fingerprint(source), f"picture_{error.reason}", what, mend)


def _identity(source: Source) -> int:
    if is_held(source):
        return fingerprint(source)
    status = os.stat(source)
    return fingerprint(status.st_dev, status.st_ino)


def fingerprint(*parts: object) -> int:
    """64 bits that stand for bytes and texts, the same in every process, as Python's own hash is not."""
    digest = blake2b(digest_size=8)
    for part in parts:
        raw = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass")
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return int.from_bytes(digest.digest(), "little")
