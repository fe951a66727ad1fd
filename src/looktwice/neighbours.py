"""Files that are not there, found under a neighbouring spelling: what a message says beside "no such picture"."""

from __future__ import annotations

import html
import os
import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path
from urllib.parse import unquote

from looktwice.errors import short_path

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
MOST_NAMES = 50_000
"""Files of a folder among which a neighbour is looked for."""
MOST_LETTERS = 4096
"""Letters of a path; source: PATH_MAX of Linux."""
_ENDS = " \t\r\n\"'"
_HOST = re.compile(r"(?:^|/)www\.[\w.-]+/", re.IGNORECASE)


def nearby(path: str | Path, folder: Path | None = None) -> str:
    """The mend for a file that is not there, where one is under a neighbouring spelling; "" where none is.

    Other separators, blanks, escapes, capitals, accents, suffixes, a folder too many or too few are tried; `folder` is
    where relative paths are taken from. The second miss in a folder costs a look into what is known of it.
    """
    written, here = str(path), Path.cwd()
    if len(written) > MOST_LETTERS:
        return f"no path has {len(written):,} letters, and no picture begins so in base64; write either"
    if "\0" in written:
        return ""
    if os.path.islink(written):
        return f"it is a link to {short_path(os.readlink(written))}, which is not there; copy the file itself"
    for how, spelling in _spellings(written):
        parent, name = os.path.split(os.path.abspath(spelling))
        for place, near in _folders_near(parent, str(here / (folder or ""))):
            if found := _named_alike(name, near):
                seen = found.relative_to(here) if found.is_relative_to(here) else found
                differences = [one for one in (how, place) if one] or ["in another spelling"]
                return f"write {_seen(seen)}, which is there ({', '.join(differences)})"
    if _HOST.search(written):
        return "it looks like a web address; download the picture and write its path"
    return ""


def _spellings(written: str) -> Iterator[tuple[str, str]]:
    """Other ways to write a path, each with how it differs from the one before, which stays changed."""
    yield "", written
    for how, change in (
        ("without blanks or quotes at the ends", lambda text: "/".join(part.strip(_ENDS) for part in text.split("/"))),
        ("with / for \\", lambda text: text.replace("\\", "/")),
        ("without escapes", lambda text: html.unescape(unquote(text))),
        ("without what stands behind ? or #", lambda text: re.split("[?#]", text)[0]),
    ):
        if (changed := change(written)) != written:
            written = changed
            yield how, written


MOST_FOLDERS = 40
"""A path of more folders is not searched for: that would take long, and nobody wrote it."""


@lru_cache(maxsize=1024)
def _folders_near(folder: str, base: str) -> tuple[tuple[str, Path], ...]:
    """Folders that are there and may have been meant by one, which is absolute, each with how it differs."""
    parts = Path(folder).parts
    if len(parts) > MOST_FOLDERS:
        return ()
    near = [("", Path(folder))]
    for size in range(1, len(parts) // 2 + 1):
        for start in range(len(parts) - 2 * size + 1):
            if parts[start : start + size] == parts[start + size : start + 2 * size]:
                near.append(("with a folder named once", Path(*parts[: start + size], *parts[start + 2 * size :])))
    for root in dict.fromkeys((base, os.getcwd())):
        for start in range(1, len(parts) + 1):
            near.append((f"taken from {short_path(root)}", Path(root, *parts[start:])))
    found = ((how, _folder_alike(one)) for how, one in near)
    return tuple({there: (how, there) for how, there in reversed([*found]) if there}.values())[::-1]


def _folder_alike(folder: Path) -> Path | None:
    """The folder at an absolute path, or at one that differs in capitals, accents or blanks alone."""
    here = Path(folder.anchor)
    for part in folder.parts[1:]:
        if not (here / part).is_dir():
            real = _names_in(here).get(_folded(part))
            if real is None or not (here / real).is_dir():
                return None
            part = real
        here /= part
    return here


def _named_alike(name: str, folder: Path) -> Path | None:
    """The file of a folder whose name differs in capitals, accents, blanks or the suffix of a picture alone."""
    known = _names_in(folder)
    stem, suffix = os.path.splitext(name)
    others = IMAGE_SUFFIXES if not suffix or suffix.lower() in IMAGE_SUFFIXES else ()
    folded = map(_folded, (name, *(stem + other for other in others)))
    found = next((known[one] for one in folded if one in known), None)
    return folder / found if found and (folder / found).is_file() else None


def _names_in(folder: Path) -> dict[str, str]:
    try:
        return _names_at(str(folder), int(os.stat(folder).st_mtime))  # a folder that fills is listed once a second
    except OSError:
        return {}


@lru_cache(maxsize=32)
def _names_at(folder: str, _changed: int) -> dict[str, str]:
    """The names in a folder as it was at a time, by their folded form."""
    with os.scandir(folder) as entries:
        return {_folded(entry.name): entry.name for entry in islice(entries, MOST_NAMES)}


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold().strip()


def _seen(path: Path) -> str:
    """A path in which what cannot be seen is spelt out: marks apart from their letters, blanks at the ends."""
    text = short_path(path)
    is_plain = unicodedata.is_normalized("NFC", text) and all(part == part.strip() for part in path.parts)
    return text if is_plain else ascii(text)
