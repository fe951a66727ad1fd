"""The formats of data files: how each is known, read and written."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from looktwice.calls import WRITTEN_CALL
from looktwice.config import DataFormat
from looktwice.data.sample import Sample
from looktwice.errors import DataError, short
from looktwice.formats import chat, conversations, documented, spellings, vlm_r3
from looktwice.formats.reading import Fields, Reading
from looktwice.formats.writing import Writing

ROWS_LOOKED_AT = 100
MAY_LACK_THE_SIGN = (("swift", "messages"), ("openai", "messages"), ("sharegpt", "ovis"))
"""Stricter and looser: a row of the first may lack its sign and look like the second, a file of both is of it."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """One way of writing samples into rows.

    `fits` tells whether a row may be of this format; `read` notes problems instead of raising; `write` is given the
    samples of one row. `num_samples` counts the samples of a row; None where it is always one. `commands` are the calls
    in a text as the format writes them.
    """

    name: DataFormat
    description: str
    fits: Callable[[Mapping[str, object]], bool]
    read: Callable[[Fields, Reading], list[Sample]]
    write: Callable[[Sequence[Sample], Writing], list[dict[str, object]]]
    num_samples: Callable[[Mapping[str, object]], int] | None = None
    commands: re.Pattern[str] = WRITTEN_CALL


_ALL = (
    Format(
        name="swift",
        description="messages, or question and answer, with images beside them",
        fits=spellings.fits,
        read=spellings.read,
        write=conversations.write_swift,
    ),
    Format(
        name="openai",
        description="messages with image_url",
        fits=chat.is_openai,
        read=chat.read,
        write=chat.write_openai,
    ),
    Format(
        name="messages",
        description="messages with typed parts",
        fits=chat.fits,
        read=chat.read,
        write=chat.write_messages,
    ),
    Format(
        name="sharegpt",
        description="conversations with images",
        fits=conversations.is_sharegpt,
        read=conversations.read_sharegpt,
        write=conversations.write_sharegpt,
    ),
    Format(
        name="ovis",
        description="conversations with <image>",
        fits=conversations.fits,
        read=conversations.read_ovis,
        write=conversations.write_ovis,
    ),
    Format(
        name="vlm_r3",
        description="image_path and question, with response_list or answer",
        fits=vlm_r3.fits,
        read=vlm_r3.read,
        write=vlm_r3.write,
        commands=vlm_r3.COMMANDS,
    ),
    Format(
        name="documented",
        description="image_path and QnA",
        fits=documented.fits,
        read=documented.read,
        write=documented.write,
        num_samples=documented.num_samples,
        commands=documented.COMMANDS,
    ),
)
FORMATS: dict[str, Format] = {format.name: format for format in _ALL}
"""By name, in the order in which they are tried on a row: of two that fit, the stricter sign comes first."""


def detect(rows: Iterable[Mapping[str, object]], path: object) -> Format:
    """The format of a file by its first rows.

    Raises DataError when the rows fit no format, or several.
    """
    seen: Counter[str] = Counter()
    names: Counter[str] = Counter()
    inner = ""
    for values in rows:
        seen.update([next((name for name, format in FORMATS.items() if format.fits(values)), "")])
        names.update(values.keys())
        inner = inner or next((name for name, value in values.items() if _are_rows(value)), "")
    found = [name for name in FORMATS if seen[name]]
    if tuple(found) in MAY_LACK_THE_SIGN:
        found = found[:1]
    if len(found) == 1:
        return FORMATS[found[0]]
    if not seen:  # no row can be read, whatever the format
        return FORMATS["documented"]
    if found:
        counts = ", ".join(f"{seen[name]} {name}" for name in found)
        raise DataError(f"{path}: rows of several formats ({counts}); split the file, or name one with --from")
    given = ", ".join(f'"{short(name)}"' for name, _ in names.most_common(8)) or "nothing"
    known = "; ".join(f"{format.name}: {format.description}" for format in FORMATS.values())
    hint = f' If the rows are the list under "{short(inner)}", write it alone into a file.' if inner else ""
    raise DataError(f"{path}: no format fits, the rows have {given}; known are {known}.{hint}")


def _are_rows(value: object) -> bool:
    first = next(iter(value), None) if isinstance(value, list) else None
    return isinstance(first, dict) and any(format.fits(first) for format in FORMATS.values())
