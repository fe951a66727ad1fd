"""How a picture is named in a row or by a user: a path, a file: address, or a text that holds the picture itself."""

from __future__ import annotations

import os
import re
from base64 import b64decode, b64encode
from pathlib import Path
from urllib.parse import unquote, unquote_to_bytes

from looktwice.errors import ImageError, short
from looktwice.processing.file_kinds import URL_SAFE, image_kind, is_base64_image

DATA_URL = "data:"
"""What the address of a picture begins with that holds the picture itself; see RFC 2397."""
LONGEST_PATH = 4096
"""Letters that a path may have (PATH_MAX of Linux); a longer text is not looked for as one, which takes its time."""

_OWN = re.compile(r"data:image/[\w.+-]+;base64,[A-Za-z0-9+/]+=*", re.ASCII)
"""How such an address is written here."""
_HOLDING = re.compile(r"\s*(?:data:([^,]*),|base64(?:://|,))(.*)", re.DOTALL | re.IGNORECASE)
_FILE = re.compile(r"\s*(?:file://(?:localhost(?=/))?|file:(?=/))(.*)", re.DOTALL | re.IGNORECASE)
_WEB = re.compile(r"\s*(?:[a-z][a-z0-9+.-]+)://", re.IGNORECASE)
_QUOTED = re.compile(r"""b?(['"])(.*)\1""", re.DOTALL)
_QUOTE = re.compile(r"""\Ab?['"]""")


def source_of(written: str, folder: Path = Path()) -> str | Path:
    """The picture that a text names: its path, taken from `folder`, or the `data:` address that holds it.

    base64 is read with or without `data:…,`, `base64://` or `base64,` before it, in lines, in either alphabet,
    percent-encoded or without its padding; a file of that name comes first. Raises ImageError with the reason
    `web_address` or `data_url`.
    """
    if _OWN.fullmatch(written) and (len(written) - written.index(",") - 1) % 4 == 0:
        return written
    if holding := _HOLDING.match(written):
        if raw := _held(holding[1], holding[2]):
            return data_url(raw)
        seen = f"a data: URL without a base64 picture ({short(written)})"
        raise ImageError(f"{seen}; write data:image/png;base64,...", "data_url")
    if file := _FILE.fullmatch(written):
        return folder / unquote(file[1])
    if _WEB.match(written):
        raise ImageError(f"{short(written)} is a web address; download the picture and write its path", "web_address")
    if (
        is_base64_image(_unquoted(written[:128]))
        and (len(written) > LONGEST_PATH or not os.path.exists(folder / written))
        and (raw := _decoded(written))
    ):
        return data_url(raw)
    return folder / written


def written_path(path: Path) -> str:
    """A path as a text that `source_of` reads as that path."""
    text = path.as_posix()
    return f"./{text}" if _HOLDING.match(text) or _FILE.match(text) or _WEB.match(text) else text


def data_url(raw: bytes) -> str:
    """The address that holds a picture's file, its kind read from its first bytes; of no known picture: unknown."""
    return f"{DATA_URL}image/{image_kind(raw) or 'unknown'};base64,{b64encode(raw).decode()}"


def is_held(source: object) -> bool:
    """Whether a picture is named by an address that holds it."""
    return isinstance(source, str) and source.startswith(DATA_URL)


def held_bytes(address: str) -> bytes:
    """The file that an address of `data_url` holds."""
    return b64decode(address.partition(",")[2])


def _held(kind: str | None, content: str) -> bytes | None:
    """The file in an address; of one that does not say base64, only where it is a picture."""
    raw = _decoded(content)
    if kind is None or "base64" in kind.lower():
        return raw
    return next((one for one in (raw, unquote_to_bytes(content)) if one and image_kind(one)), None)


def _decoded(text: str) -> bytes | None:
    """The bytes of a base64 text; None where it is none."""
    text = _unquoted(text).replace("\\n", "")
    letters = "".join(text.split()).translate(URL_SAFE).rstrip("=")
    try:
        return b64decode(letters + "=" * (-len(letters) % 4), validate=True) or None
    except ValueError:
        return None


def _unquoted(text: str) -> str:
    text = unquote(text) if "%" in text else text
    quoted = _QUOTED.fullmatch(text.strip())
    return quoted[2] if quoted else _QUOTE.sub("", text.strip())
