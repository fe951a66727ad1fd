"""Fields of a benchmark's row, whatever container they came in."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from looktwice.benches.item import LETTERS
from looktwice.errors import BoxError, DataError, short
from looktwice.geometry import Box, check_box
from looktwice.messages import ImageSource
from looktwice.processing.addresses import data_url, source_of

DIRECT = "Answer with the option's letter from the given choices directly."
BRIEF = "Answer the question using a single word or phrase."

_OPTION = re.compile(r"^\s*\(?([A-Za-z])[).:]\s*(.*)$")


class Fields:
    """The fields of one row of a file; `folders` are where relative paths of pictures are looked for, in order."""

    def __init__(self, values: Mapping[str, Any], where: str, file: Path, folders: Sequence[Path] = ()) -> None:
        self.values, self.where, self.file, self.folders = values, where, file, folders

    def given(self, **values: Any) -> Fields:
        """The same row with these fields."""
        return Fields({**self.values, **values}, self.where, self.file, self.folders)

    def has(self, name: str) -> bool:
        return self.values.get(name) not in (None, "")

    def text(self, *names: str, default: str | None = None) -> str:
        """The first field of these names that is there, as a text. Raises DataError where none is."""
        for name in names:
            value = self.values.get(name)
            if value is not None and not isinstance(value, (list, dict)):
                return str(value)
        if default is None:
            raise DataError(f"{self.where}: there is no {' or '.join(names)}; it is no row of this benchmark")
        return default

    def texts(self, *names: str) -> tuple[str, ...]:
        """A list of texts, also where a table has it as a text of JSON or Python, or one a line.

        Raises DataError where there is none.
        """
        for name in names:
            value = self.values.get(name)
            listed = _listed(value)
            if listed is None and isinstance(value, str):
                listed = [line for line in value.splitlines() if line.strip()]
            if listed is not None:
                return tuple(str(one) for one in listed)
        raise DataError(f"{self.where}: {' or '.join(names)} is no list; it is no row of this benchmark")

    def image(self, *names: str) -> ImageSource:
        """The picture of the first of these fields that is there: a path, base64, bytes, or an object with either.

        Raises DataError where there is none, ImageError for a web address.
        """
        for name in names:
            if self.has(name):
                return self._image(self.values[name])
        raise DataError(f"{self.where}: there is no picture as {' or '.join(names)}; it is no row of this benchmark")

    def _image(self, value: Any) -> ImageSource:
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, (bytes, bytearray)):
            return data_url(bytes(value))
        if not isinstance(value, str):
            raise DataError(f"{self.where}: the picture is of type {type(value).__name__}; give a path or base64")
        for folder in self.folders:
            source = source_of(value, folder)
            if isinstance(source, str) or source.is_file():
                return source
        return source_of(value, self.folders[0])

    def boxes(self, name: str, *, has_sides: bool = False) -> tuple[Box, ...]:
        """Boxes in pixels, x1, y1, x2, y2, or x, y, width, height with `has_sides`; one or a list of them.

        None where the field is not there. Raises DataError for what is no box.
        """
        value = _listed(self.values.get(name))
        if not value:
            return ()
        try:
            several = value if isinstance(value[0], (list, tuple)) else [value]
            return tuple(
                check_box([x, y, x + third, y + fourth] if has_sides else [x, y, third, fourth])
                for x, y, third, fourth in ([float(number) for number in one] for one in several)
            )
        except (BoxError, TypeError, ValueError) as error:
            raise DataError(f"{self.where}: {name} holds no box ({short(str(error))})") from error


def _listed(value: Any) -> list[Any] | None:
    """A list, also one that a table holds as text."""
    if isinstance(value, str) and value.strip()[:1] == "[":
        try:
            value = json.loads(value)
        except ValueError:
            try:
                value = ast.literal_eval(value)
            except (ValueError, SyntaxError, RecursionError):
                return None
    return list(value) if isinstance(value, (list, tuple)) else None


def lettered(options: Sequence[str]) -> str:
    """The options a line each, as `(A) …`."""
    return "\n".join(f"({letter}) {option}" for letter, option in zip(LETTERS, options))


def choice_question(question: str, options: Sequence[str], instruction: str = DIRECT) -> str:
    return f"{question.strip()}\n{lettered(options)}\n{instruction}"


def without_letters(options: Sequence[str]) -> tuple[str, ...]:
    """The texts of options that are written with their letters, in the order of these.

    Where a letter stands twice the first keeps it, and a letter that is missing has an empty text.
    """
    texts: dict[str, str] = {}
    for place, option in enumerate(options):
        match = _OPTION.match(option)
        texts.setdefault(match[1].upper() if match else LETTERS[place], match[2].strip() if match else option.strip())
    last = max((LETTERS.index(letter) for letter in texts), default=-1)
    return tuple(texts.get(letter, "") for letter in LETTERS[: last + 1])


def split_options(text: str) -> tuple[str, tuple[str, ...]]:
    """A question with its options in lines below it, parted: the lines before them, and their texts."""
    lines = text.splitlines()
    first = next((place for place, line in enumerate(lines) if re.match(r"\s*\(?A[).:]", line)), len(lines))
    options: list[str] = []
    for line in lines[first:]:
        match = _OPTION.match(line)
        if match is None or match[1].upper() != LETTERS[len(options)]:
            break
        options.append(match[2].strip())
    return "\n".join(lines[:first]).strip(), tuple(options)


def gold_letter(written: str, where: str) -> str:
    """The letter of a gold answer, as `B`, `(B)` or `(b)`. Raises DataError for anything else."""
    letter = written.strip().strip("()[].").upper()
    if len(letter) != 1 or letter not in LETTERS:
        raise DataError(f'{where}: the gold answer is "{short(written)}", no letter of an option')
    return letter
