"""Records of a data file: the documented JSONL becomes Samples, and every problem is named with file and line.

One line of the file, wrapped here:

    {"image_path": "coco/x.jpg",
     "QnA": [{"Q": "…", "A3": "<think>… {Crop cup 1, cup 2 [x1, y1, x2, y2]} …</think>\\n\\n<answer>…</answer>"}]}

`A` is read where `A3` is absent. Per question, `answer` gives the gold answer in short (else the last <answer> block is
it) and `box` the gold box in original pixels; null counts as absent. All other fields are ignored.
"""

from __future__ import annotations

import codecs
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from looktwice.answers import find_answer_block
from looktwice.calls import TOOL_CALL_CLOSE, TOOL_CALL_OPEN, format_call, parse_call, split_calls
from looktwice.errors import BoxError, DataError, ImageError, nearest
from looktwice.geometry import Box, BoxFrame, Size, check_box, crop_rectangle, iou, to_original
from looktwice.messages import ANSWER_OPEN
from looktwice.processing.images import open_image

MAX_PROBLEMS_SHOWN = 20
PICTURE_PLACE = "<image>"

_ROW_FIELDS = ("image_path", "QnA")
_ANSWER_FIELDS = ("A3", "A")
_OPTIONAL_FIELDS = ("answer", "box")
_QUESTION_FIELDS = ("Q", *_ANSWER_FIELDS, *_OPTIONAL_FIELDS)

_PICTURE_PREFIX = re.compile(rf"\s*{PICTURE_PLACE}[ \t]*\r?\n?")
_WRITTEN_CALL = re.compile(f"({TOOL_CALL_OPEN}.*?{TOOL_CALL_CLOSE})", re.DOTALL)
_CROP = re.compile(r"\{\s*crop(?![a-z])[^{}]*(\}?)", re.IGNORECASE)
_BRACKET = re.compile(r"\[[^\]]*\]")

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One question about one picture, with the answer to learn from.

    `response` is the answer with each crop command as `<tool_call>[x1, y1, x2, y2]</tool_call>`, its numbers as they
    were written, in the box frame of the model. `solution` is the gold answer, "" without one. `gold_box` is in
    original pixels. `where` is "file:line" and `field` the place of the answer in that line, such as "QnA[1].A3" (the
    second question).
    """

    image_path: Path
    question: str
    response: str
    solution: str
    gold_box: Box | None
    where: str
    field: str


def read_samples(path: str | Path, image_base_path: str | Path) -> list[Sample]:
    """All samples of a JSONL file, in order; `image_path` is taken from `image_base_path` unless it is absolute.

    Pictures are not opened; see `check_pictures`. Raises one DataError that counts all problems and lists the first 20.
    """
    path = Path(path)
    problems: list[str] = []
    names: Counter[str] = Counter()
    samples: list[Sample] = []
    for line, values in _read_objects(path, problems):
        row = _Fields(values, known=_ROW_FIELDS, where=f"{path}:{line}", path="", problems=problems)
        samples += _documented_row(row, Path(image_base_path), names)
    _raise_if_any(problems, str(path))
    if not samples:
        raise DataError(f"{path}: the file holds no records; write one JSON object a line")
    _warn_of_misspelt(path, names)
    return samples


def check_solutions(samples: Sequence[Sample]) -> None:
    """Make sure that every sample has a gold answer to judge by. Raises DataError as `check_pictures` does."""
    problems = [
        f'{sample.where}: {sample.field}: no <answer>…</answer> to judge by; add it, or the field "answer"'
        for sample in samples
        if not sample.solution
    ]
    _raise_if_any(problems, "answers")


def check_pictures(
    samples: Sequence[Sample],
    *,
    min_side: int,
    box_frame: BoxFrame = "original_px",
    overview_size: Callable[[Size], Size] | None = None,
) -> None:
    """Make sure, before anything long starts, that every picture can be opened and every box can be cut from it.

    Decodes each picture once, so that a file cut short is found too. Boxes of calls are in `box_frame`, gold
    boxes in original pixels; a box that lies partly outside is good. `min_side` is the smallest crop in pixels;
    `overview_size` (the size at which the model sees a picture) is needed for "resized_px".
    Raises one DataError that counts all problems and lists the first 20.
    """
    if box_frame == "resized_px" and overview_size is None:
        raise ValueError("box_frame resized_px needs overview_size")
    by_picture: dict[Path, list[Sample]] = {}
    for sample in samples:
        by_picture.setdefault(sample.image_path, []).append(sample)
    problems: list[str] = []
    with ThreadPoolExecutor() as pool:  # decoding releases the interpreter lock
        sizes = list(pool.map(_decoded_size, by_picture))
    for (picture, asked), original in zip(by_picture.items(), sizes):
        if isinstance(original, ImageError):
            others = f" ({len(asked) - 1} more use it)" if len(asked) > 1 else ""
            hint = "" if picture.exists() else " and --image_base_path"
            problems.append(f"{asked[0].where}: image_path: {original}{hint}{others}")
            continue
        resized = overview_size(original) if overview_size else original
        for sample in asked:
            problems += _box_problems(sample, original, resized, box_frame, min_side)
    _raise_if_any(problems, f"{len(by_picture)} picture{'s' if len(by_picture) != 1 else ''}")


def _decoded_size(picture: Path) -> Size | ImageError:
    """The upright size of a picture that decodes to its end, else what is wrong with it."""
    try:
        return Size(*open_image(picture).size)
    except ImageError as error:
        return error


class _Fields:
    """One JSON object of a line. `path` is its place there, such as "QnA[0]."; problems are noted, not raised."""

    def __init__(
        self, values: dict[str, object], *, known: Sequence[str], where: str, path: str, problems: list[str]
    ) -> None:
        self.values = values
        self.known = known
        self.where = where
        self.path = path
        self.problems = problems

    def note(self, name: str, problem: str) -> None:
        self.problems.append(f"{self.where}: {self.path}{name}: {problem}")

    def has(self, name: str) -> bool:
        """Whether the field is there; if not, the names close to it are noted."""
        if name in self.values:
            return True
        close = [f'"{other}"' for other in self.values if other not in self.known and nearest(other, [name])]
        if close:
            self.note(name, f"the field is missing, unknown: {', '.join(close)}.{nearest(name, [name])}")
        else:
            given = ", ".join(f'"{other}"' for other in list(self.values)[:8]) or "nothing"
            self.note(name, f"the field is missing, there is {given}; add it")
        return False

    def is_given(self, name: str) -> bool:
        return self.values.get(name) is not None

    def text(self, name: str) -> str | None:
        """A text that is not blank; None where there was a problem."""
        if not self.has(name):
            return None
        value = self.values[name]
        if not isinstance(value, str):
            self.note(name, f"{_kind(value)} where a text belongs; write it in quotes")
        elif not value.strip():
            self.note(name, "the text is empty; fill it in or remove the record")
        elif not _is_unicode(value):
            self.note(name, "half of a surrogate pair (\\ud800 to \\udfff) in the text; write the whole character")
        else:
            return value
        return None


def _documented_row(row: _Fields, image_base_path: Path, names: Counter[str]) -> list[Sample]:
    """The samples of a row in the documented form. Every field name of its questions is counted in `names`."""
    image_path = row.text("image_path")
    questions = row.values["QnA"] if row.has("QnA") else None
    if not isinstance(questions, list):
        if "QnA" in row.values:
            row.note("QnA", f'{_kind(questions)} where a list belongs; write [{{"Q": …, "A3": …}}]')
        return []
    if not questions:
        row.note("QnA", "the list is empty; add a question or remove the row")
    samples = []
    for index, question in enumerate(questions):
        if not isinstance(question, dict):
            row.note(f"QnA[{index}]", f'{_kind(question)} where an object belongs; write {{"Q": …, "A3": …}}')
            continue
        names.update(question.keys())
        fields = _Fields(
            question, known=_QUESTION_FIELDS, where=row.where, path=f"QnA[{index}].", problems=row.problems
        )
        # read also where the picture is missing, so that all problems of the row are named at once
        sample = _documented_question(fields, image_base_path / (image_path or ""))
        if sample and image_path:
            samples.append(sample)
    return samples


def _documented_question(fields: _Fields, image_path: Path) -> Sample | None:
    num_problems = len(fields.problems)
    question = _read_question(fields)
    answer_field = next((name for name in _ANSWER_FIELDS if name in fields.values), _ANSWER_FIELDS[0])
    response, solution = _read_answer(fields, answer_field)
    gold_box = _read_gold_box(fields) if fields.is_given("box") else None
    if len(fields.problems) > num_problems:
        return None
    assert question and response and solution is not None
    return Sample(
        image_path=image_path,
        question=question,
        response=response,
        solution=solution,
        gold_box=gold_box,
        where=fields.where,
        field=f"{fields.path}{answer_field}",
    )


def _read_answer(fields: _Fields, answer_field: str) -> tuple[str | None, str | None]:
    """Response and solution; what is None was noted."""
    written = fields.text(answer_field)
    solution = fields.text("answer") if fields.is_given("answer") else None
    if written is None:
        return None, solution
    response, problems = _with_calls(written)
    if not fields.is_given("answer"):
        solution = find_answer_block(written)
        if solution == "" or (solution is None and ANSWER_OPEN in written):
            problems.append("the <answer> block is empty or not closed; write <answer>…</answer> with text in it")
        solution = solution or ""
    for problem in problems:
        fields.note(answer_field, problem)
    return response, solution and solution.strip()


def _read_question(fields: _Fields) -> str | None:
    text = fields.text("Q")
    if text is None:
        return None
    # the picture is placed in front of the question anyway; anywhere else the word is ordinary text
    prefix = _PICTURE_PREFIX.match(text)
    question = text[prefix.end() :] if prefix else text
    if not question.strip():
        fields.note("Q", f"nothing but {PICTURE_PLACE}; write the question after it")
        return None
    return question


def _read_gold_box(fields: _Fields) -> Box | None:
    try:
        return check_box(fields.values["box"])
    except BoxError as error:
        fields.note("box", f"{error}; write [x1, y1, x2, y2] in original pixels or remove the field")
        return None


def _with_calls(text: str) -> tuple[str, list[str]]:
    """The text with its crop commands as calls, and what is wrong with them. Calls already written are kept.

    `{Crop a 1, b 2 [box]}` gives one call, `{Crop a [box], b [box]}` two; braces without `crop` or without a bracket
    stay text.
    """
    problems: list[str] = []

    def call(command: re.Match[str]) -> str:
        written = command.group()
        if "[" not in written and "]" not in written:
            return written
        name = f'crop command "{_short(written)}"'
        brackets = _BRACKET.findall(written)
        if not command[1]:
            problems.append(f"{name}: the brace is not closed; add the }}")
        elif not brackets or set("[]") & set(_BRACKET.sub("", written)):
            problems.append(f"{name}: a bracket has no partner; write {{Crop name [x1, y1, x2, y2]}}")
        else:
            try:
                for bracket in brackets:
                    parse_call(bracket)
            except BoxError as error:
                problems.append(f"{name}: {error}; mend the box or remove the command")
            else:
                return "".join(format_call(part.strip() for part in box[1:-1].split(",")) for box in brackets)
        return written

    pieces = _WRITTEN_CALL.split(text)
    pieces[::2] = [_CROP.sub(call, piece) for piece in pieces[::2]]
    response = "".join(pieces)
    *segments, rest = split_calls(response)
    for number, segment in enumerate(segments, 1):
        try:
            parse_call(segment)
        except BoxError as error:
            problems.append(f"call {number}: {error}; mend the call or remove it")
        else:
            if segment.count(TOOL_CALL_OPEN) > 1:
                problems.append(f"call {number}: an earlier {TOOL_CALL_OPEN} is not closed; add {TOOL_CALL_CLOSE}")
    if TOOL_CALL_OPEN in rest:
        problems.append(f"{TOOL_CALL_OPEN} is not closed; add {TOOL_CALL_CLOSE} or remove it")
    return response, problems


def _box_problems(sample: Sample, original: Size, resized: Size, box_frame: BoxFrame, min_side: int) -> Iterator[str]:
    for number, segment in enumerate(split_calls(sample.response)[:-1], 1):
        requested = parse_call(segment)
        box = to_original(requested, frame=box_frame, original=original, resized=resized)
        try:
            crop_rectangle(box, original=original, min_side=min_side)
        except BoxError as error:
            yield (
                f"{sample.where}: {sample.field}: call {number} {format_call(requested)} read as {box_frame}: {error} "
                f"({sample.image_path}); mend the box, or set box_frame to the frame the boxes are in"
            )
    if sample.gold_box and iou(sample.gold_box, Box(0, 0, *original)) == 0:
        yield (
            f"{sample.where}: {sample.field.rpartition('.')[0]}.box: {list(sample.gold_box)} lies outside the picture "
            f"of {original.width}x{original.height} ({sample.image_path}); write it in original pixels"
        )


def _read_objects(path: Path, problems: list[str]) -> Iterator[tuple[int, dict[str, object]]]:
    """Line number and JSON object of each line that is not blank; the other lines are noted in `problems`."""
    for line, raw in _read_lines(path):
        where = f"{path}:{line}"
        try:
            values = json.loads(raw.rstrip(b"\r\n").decode("utf-8"), object_pairs_hook=_unique)
        except UnicodeDecodeError as error:
            problems.append(f"{where}: byte {error.start + 1} of the line is not UTF-8; save the file as UTF-8")
        except json.JSONDecodeError as error:
            problems.append(f"{where}: broken JSON at column {error.colno} ({error.msg}); mend the line")
        except RecursionError:
            problems.append(f"{where}: JSON nested too deeply; mend the line")
        except ValueError as error:
            problems.append(f"{where}: {error}; mend the line")
        else:
            if isinstance(values, dict):
                yield line, values
            else:
                problems.append(f"{where}: {_kind(values)} where an object belongs; write one JSON object a line")


def _read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    # cut at line feeds only and before decoding: JSON texts may hold other line ends, and a bad byte has a line
    try:
        with path.open("rb") as file:
            for line, raw in enumerate(file, 1):
                raw = raw.removeprefix(codecs.BOM_UTF8) if line == 1 else raw
                if raw.strip():
                    yield line, raw
    except FileNotFoundError as error:
        siblings = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"{path}: no such data file; check the path.{nearest(path.name, siblings)}") from error
    except IsADirectoryError as error:
        raise DataError(f"{path}: a directory, not a data file; name a .jsonl file in it") from error
    except OSError as error:
        raise DataError(f"{path}: the data file cannot be read ({error.strerror}); check path and rights") from error


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    # plain JSON readers keep the last of two equal names and lose the first without a word
    values = dict(pairs)
    if len(values) < len(pairs):
        name = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f'the name "{name}" stands twice in one object')
    return values


def _warn_of_misspelt(path: Path, names: Counter[str]) -> None:
    """Say so when an ignored name is close to an optional field that no question has."""
    absent = [name for name in _OPTIONAL_FIELDS if name not in names]
    for name, count in names.items():
        if name not in _QUESTION_FIELDS and (hint := nearest(name, absent)):
            _logger.warning('%s: field "%s" of %d questions is ignored.%s', path, name, count, hint)


def _raise_if_any(problems: list[str], subject: str) -> None:
    if not problems:
        return
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''} in {subject}"
    shown = f", the first {MAX_PROBLEMS_SHOWN}" if len(problems) > MAX_PROBLEMS_SHOWN else ""
    raise DataError("\n  ".join([f"{count}{shown}:", *problems[:MAX_PROBLEMS_SHOWN]]))


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _kind(value: object) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "a text", list: "a list"}
    return names.get(type(value), "an object")


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 80 else f"{text[:60]}...{text[-17:]}"
