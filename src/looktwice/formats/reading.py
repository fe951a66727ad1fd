"""One object of a data file while it is read: typed access that notes problems, and what is common to all formats."""

from __future__ import annotations

import math
import re
import struct
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import lru_cache
from pathlib import Path

from looktwice.answers import Solution, after_thinking, find_answer_block, unwrapped
from looktwice.calls import TOOL_CALL_CLOSE, TOOL_CALL_OPEN, parse_call, split_calls
from looktwice.data.problems import Partial, Problem, Tally
from looktwice.data.reasons import BOX_REASONS
from looktwice.data.sample import Sample, joined, response_of
from looktwice.errors import BoxError, ImageError, nearest, short
from looktwice.formats.files import kind_of
from looktwice.geometry import BOX_FRAMES, Box, BoxFrame, check_box
from looktwice.messages import ANSWER_OPEN, Conversation, Message
from looktwice.processing.addresses import data_url, source_of

GROUND_TRUTH = "reward_model.ground_truth"
ANSWER_FIELDS = ("answer", "solution", GROUND_TRUTH)
"""Where the short gold answer stands: our name for it, that of ms-swift and TRL, and verl's place of it."""
GOLD_FIELDS = (*ANSWER_FIELDS, "box", "box_frame")
"""Optional in every format: the short gold answer, the gold box in original pixels, the frame of the boxes in calls."""

_RECORD_NAME = re.compile(
    r"(?:.*_)?(?:ids?|idx|index|key|uid|uuid|source|dataset|split)|url|path|file|file_?name|image_size|width|height"
    r"|category|type|kind|task|topic|domain|tags?|difficulty|level|score|language|lang|license|ability"
    r"|author|annotator|date|created|version|comments?|notes?|meta|metadata|extra_info|info|img_crop_list",
    re.IGNORECASE,
)
"""Names by which people keep account of their rows; nobody expects them to be trained on."""

FLOAT32_DIGITS, FLOAT32_LIMIT = 15, 3e38
"""Digits from which on a float32 is taken for a number that a table has rounded, and the end of its range."""
PLAIN_DIGITS = 16
"""Digits before or after the point up to which a number is written without exponent."""
_BESIDE_TURNS = frozenset(
    {*BOX_REASONS.values(), "crop_command", "call_not_closed", "web_address", "data_url", "placeholder_count"}
    | {"pictures_twice", "unknown_frame", "mixed_frames"}
)
"""What may be wrong with a row all of whose turns were read."""


@dataclass(kw_only=True)
class Reading:
    """What the caller says about a file, and what was found on the way.

    `answer_key` is the field of a documented question that holds its answer; `box_frame` the frame of boxes whose row
    does not say. `misspelt` counts names close to an optional
    field that their row lacks, `ignored` are names below the row that have no meaning, `unused` those of rows, which
    go along when a file is converted; `changed` is what is read otherwise than it is written. `partial` are the samples
    with problems, as far as they could be read.
    """

    image_base_path: Path
    answer_key: str | None = None
    box_frame: BoxFrame | None = None
    problems: list[Problem] = field(default_factory=list)
    misspelt: Counter[tuple[str, str]] = field(default_factory=Counter)
    ignored: Tally = field(default_factory=Tally)
    unused: Tally = field(default_factory=Tally)
    changed: Tally = field(default_factory=Tally)
    partial: list[Partial] = field(default_factory=list)


class Fields:
    """One JSON object. `path` is its place in the row, such as "QnA[0]."; problems are noted, not raised.

    Null counts as absent, because Parquet fills up every row to the same fields; NaN is null by now.
    """

    def __init__(
        self, values: Mapping[str, object], *, known: Sequence[str], where: str, path: str, problems: list[Problem]
    ) -> None:
        self.values = values
        self.known = known
        self.where = where
        self.path = path
        self.problems = problems
        self._num_before = len(problems)

    @property
    def noted(self) -> list[Problem]:
        """The problems noted of this object."""
        return [problem for problem in self.problems[self._num_before :] if problem.field.startswith(self.path)]

    @property
    def is_good(self) -> bool:
        return not self.noted

    def inside(self, values: Mapping[str, object], *, known: Sequence[str], path: str) -> Fields:
        """An object inside this one, such as `messages[2].`."""
        return Fields(values, known=known, where=self.where, path=f"{self.path}{path}", problems=self.problems)

    def note(self, name: str, reason: str, words: str) -> None:
        """Note what is wrong with a field, and after a semicolon its mend, under a code of REASONS."""
        self.problems.append(Problem.told(words, reason=reason, where=self.where, field=f"{self.path}{name}"))

    def has(self, name: str) -> bool:
        """Whether the field is there; if not, the names close to it are noted."""
        if name in self.values:
            return True
        close = [f'"{short(other)}"' for other in self.values if other not in self.known and nearest(other, [name])]
        if close:
            self.note(
                name, "missing_field", f"the field is missing, unknown: {', '.join(close)}.{nearest(name, [name])}"
            )
        else:
            given = ", ".join(f'"{short(other)}"' for other in list(self.values)[:8]) or "nothing"
            self.note(name, "missing_field", f"the field is missing, there is {given}; add it")
        return False

    def is_given(self, name: str) -> bool:
        return self.values.get(name) is not None

    def text(self, name: str) -> str | None:
        """A text that is not blank; None where there was a problem."""
        value = self.any_text(name)
        if value is not None and not value.strip():
            self.note(name, "empty_text", "the text is empty; fill it in or remove the record")
            return None
        return value

    def any_text(self, name: str) -> str | None:
        """A text, perhaps empty; None where there was a problem."""
        if not self.has(name):
            return None
        value = self.values[name]
        if not isinstance(value, str):
            mend = "write it in quotes" if isinstance(value, (int, float)) else "give one text"
            self.note(name, "wrong_type", f"{kind_of(value)} where a text belongs; {mend}")
        elif not is_unicode(value):
            self.note(
                name,
                "broken_unicode",
                "half of a surrogate pair (\\ud800 to \\udfff) in the text; write the whole character",
            )
        else:
            return value
        return None

    def objects(self, name: str, example: str) -> list[Mapping[str, object] | None]:
        """A list of objects, None for each item that is something else; empty where there was a problem."""
        values = self.values[name] if self.has(name) else None
        if not isinstance(values, list):
            if name in self.values:
                self.note(name, "wrong_type", f"{kind_of(values)} where a list belongs; write [{example}]")
            return []
        for index, value in enumerate(values):
            if not isinstance(value, dict):
                self.note(
                    f"{name}[{index}]", "wrong_type", f"{kind_of(value)} where an object belongs; write {example}"
                )
        return [value if isinstance(value, dict) else None for value in values]

    def flag(self, name: str) -> bool:
        """False only where the field says so; anything but true, false, 1 and 0 is noted."""
        value = self.values.get(name)
        if value not in (None, False, True):  # 0 and 1 are equal to them
            self.note(name, "wrong_type", f"{short(repr(value))}; write false or true")
        return value is None or bool(value)

    def image(self, name: str, image_base_path: Path) -> str | Path | None:
        """The picture a field names; None where there was a problem.

        What `addresses.source_of` reads, bytes (of a Parquet file), or what Hugging Face's `datasets` stores for a
        picture: an object of `bytes`, `path` or both.
        """
        value = self.values.get(name)
        if isinstance(value, bytes) and value:
            return data_url(value)
        if isinstance(value, dict) and value.keys() <= {"bytes", "path"}:
            kind = "bytes" if value.get("bytes") else "path"
            return self.inside(value, known=("bytes", "path"), path=f"{name}.").image(kind, image_base_path)
        written = self.text(name)
        try:
            return None if written is None else source_of(written, image_base_path)
        except ImageError as error:
            self.note(name, error.reason, str(error))
        return None

    def gold_boxes(self) -> tuple[Box, ...]:
        """The gold boxes: the one that `box` is, or those that it lists."""
        written = self.values.get("box")
        if written is None or (isinstance(written, list) and written and all(side is None for side in written)):
            return ()
        are_several = isinstance(written, list) and written and all(isinstance(box, list) for box in written)
        boxes: list[object] = written if are_several else [written]  # type: ignore[assignment]
        try:
            return tuple(map(check_box, boxes))
        except BoxError as error:
            self.note(
                "box",
                BOX_REASONS[error.reason],
                f"{error}; write [x1, y1, x2, y2] in original pixels or remove the field",
            )
            return ()

    def frame(self, name: str = "box_frame") -> BoxFrame | None:
        """The frame of the boxes in calls, if it is said."""
        value = self.values.get(name)
        if value is None or value in BOX_FRAMES:
            return value  # type: ignore[return-value]
        hint = nearest(str(value), BOX_FRAMES)
        self.note(
            name, "unknown_frame", f"{short(repr(value))} is no frame; write one of {', '.join(BOX_FRAMES)}.{hint}"
        )
        return None

    def extra(self) -> dict[str, object]:
        """The fields that have no meaning here, null left out."""
        return {name: value for name, value in self.values.items() if name not in self.known and value is not None}


def finish(
    row: Fields,
    messages: Iterable[Message],
    reading: Reading,
    *,
    answer_field: str,
    frames: Iterable[BoxFrame] = (),
    extra: Mapping[str, object] | None = None,
) -> Sample | None:
    """The sample of a row whose messages were read, with its gold fields; a partial one where a problem was noted.

    `frames` were found beside single boxes; `answer_field` is the place of the last answer in the object of `row`.
    """
    extra = row.extra() if extra is None else extra
    boxes = row.gold_boxes()
    said = {frame for frame in (*frames, row.frame()) if frame}
    if len(said) > 1:
        row.note(
            "box_frame", "mixed_frames", f"boxes in {len(said)} frames ({', '.join(sorted(said))}); write all in one"
        )
    conversation = _conversation(row, messages, answer_field)
    sample = Sample(
        conversation=conversation,
        box_frame=min(said, default=reading.box_frame),
        solution=_solution(row, reading, conversation, answer_field),
        gold_box=next(iter(boxes), None),
        more_gold_boxes=boxes[1:],
        image_folder=reading.image_base_path,
        where=row.where,
        field=f"{row.path}{answer_field}",
        extra=extra,
    )
    absent = tuple(name for name in GOLD_FIELDS if name not in {*row.values, *ANSWER_FIELDS[1:]})
    reading.misspelt.update((name, hint) for name in {**row.values, **extra} if (hint := _hint(name, absent)))
    for name in extra if row.is_good else ():
        if not _RECORD_NAME.fullmatch(name) and not _hint(name, absent):
            reading.unused.add(f'"{short(name)}"', ": ".join(filter(None, (row.where, row.path.rstrip(".")))))
    if row.is_good:
        return sample
    has_all_turns = all(problem.reason in _BESIDE_TURNS for problem in row.noted)
    reading.partial.append(Partial(sample, has_all_turns))
    return None


@lru_cache(maxsize=1024)
def _hint(name: str, absent: tuple[str, ...]) -> str:
    """Which optional field of those that a row lacks may have been meant; "" where none is close."""
    return "" if name in GOLD_FIELDS else nearest(name, absent)


def _conversation(row: Fields, messages: Iterable[Message], answer_field: str) -> Conversation:
    conversation = Conversation(messages=tuple(joined(message) for message in messages))
    if row.is_good and not any(message.role == "user" for message in conversation.messages):
        row.note(answer_field, "no_user_turn", "there is no user turn; add the question")
    return conversation


def _solution(row: Fields, reading: Reading, conversation: Conversation, answer_field: str) -> Solution:
    """The gold answer, or several: their own field, else the last answer block."""
    given = [name for name in ANSWER_FIELDS if _is_answer(row.values.get(name))]
    for name in given[1:]:
        if row.values[name] != row.values[given[0]]:
            reading.ignored.add(f'"{name}", because there is "{given[0]}"', row.where)
    if given:
        return _gold_answers(row, given[0])
    response = response_of(conversation)
    solution = find_answer_block(response)
    if (solution is not None and not unwrapped(solution)) or (
        solution is None and ANSWER_OPEN in after_thinking(response)
    ):
        row.note(
            answer_field,
            "answer_block",
            "the <answer> block is empty or not closed; write <answer>…</answer> with text in it",
        )
    return solution or ""


def _is_answer(value: object) -> bool:
    """Whether a value says anything: not null, and not infinite, as tables write a division by zero."""
    return value is not None and not (isinstance(value, (float, Decimal)) and not math.isfinite(value))


def _gold_answers(row: Fields, name: str) -> Solution:
    """The field of the gold answer: one, or in a list several; "" where a problem was noted."""
    value = row.values[name]
    if not isinstance(value, list) or not value:
        return _gold_answer(row, name)
    each = row.inside(dict(zip(map(str, range(len(value))), value)), known=(), path=f"{name}.")
    answers = tuple(dict.fromkeys(_gold_answer(each, place) for place in each.values))
    if not each.is_good:
        return ""
    return answers if len(answers) > 1 else answers[0]


def _gold_answer(row: Fields, name: str) -> str:
    """One gold answer as a text, "" where a problem was noted."""
    value = row.values[name]
    if isinstance(value, (int, float, Decimal)) and not isinstance(value, bool):
        return number_text(value)
    if value is None or isinstance(value, (bool, list, dict)):
        mend = (
            'write "yes" or "no"' if isinstance(value, bool) else 'write one text, or ["cup", "mug"] for either of two'
        )
        row.note(name, "wrong_type", f"{kind_of(value)} where a text belongs; {mend}")
        return ""
    answer = (row.text(name) or "").strip()
    if answer and not unwrapped(answer):
        row.note(name, "empty_text", f"nothing in {short(answer)}; write the answer or remove the field")
    return answer


def number_text(value: float | Decimal) -> str:
    """A number as people write it: without exponent, `.0`, and the digits that storing it as a float32 has added.

    Example: [number_text(number) for number in (2.0, 1e-05, 0.10000000149011612)] == ["2", "0.00001", "0.1"]
    """
    if isinstance(value, int):
        return str(value)
    number = Decimal(repr(value)) if isinstance(value, float) else value
    if isinstance(value, float) and len(number.as_tuple().digits) >= FLOAT32_DIGITS and _as_float32(value) == value:
        shorter = (f"{value:.{digits}g}" for digits in range(1, 10))
        number = Decimal(next(text for text in shorter if _as_float32(float(text)) == value))
    text = f"{number:f}" if abs(number.adjusted()) < PLAIN_DIGITS else str(number)
    return text.rstrip("0").rstrip(".") if "." in text else text


def _as_float32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0] if abs(value) < FLOAT32_LIMIT else math.inf


def call_syntax_faults(text: str) -> list[tuple[str, str]]:
    """What is wrong with the crop calls of an assistant's text: code and words of each problem."""
    problems = []
    *segments, rest = split_calls(text)
    for number, segment in enumerate(segments, 1):
        try:
            parse_call(segment)
        except BoxError as error:
            problems.append((BOX_REASONS[error.reason], f"call {number}: {error}; mend the call or remove it"))
        else:
            if segment.count(TOOL_CALL_OPEN) > 1:
                what = f"call {number}: an earlier {TOOL_CALL_OPEN} is not closed; add {TOOL_CALL_CLOSE}"
                problems.append(("call_not_closed", what))
    if TOOL_CALL_OPEN in rest:
        problems.append(("call_not_closed", f"{TOOL_CALL_OPEN} is not closed; add {TOOL_CALL_CLOSE} or remove it"))
    return problems


def is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
