"""The documented format: one picture a row, and questions about it with answers that crop.

One row, wrapped here:

    {"image_path": "coco/x.jpg",
     "QnA": [{"Q": "…", "A3": "<think>… {Crop cup 1, cup 2 [x1, y1, x2, y2]} …</think>\\n\\n<answer>…</answer>"}]}

`A` is read where `A3` is absent, or the one field that the caller names. A command of the form `{Crop … [box]}` becomes
a call; text that only spells one is written `&#123;Crop … [box]}`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

from looktwice.calls import WRITTEN_CALL, format_call, parse_call
from looktwice.data.problems import Partial
from looktwice.data.reasons import BOX_REASONS
from looktwice.data.sample import Sample
from looktwice.errors import BoxError, short
from looktwice.formats.escaping import Mark
from looktwice.formats.reading import GOLD_FIELDS, Fields, Reading, call_syntax_faults, finish
from looktwice.formats.writing import Writing
from looktwice.messages import assistant, user

IMAGE_PLACE = "<image>"
ANSWER_FIELDS = ("A3", "A")

_IMAGE_PREFIX = re.compile(rf"\s*{IMAGE_PLACE}[ \t]*\r?\n?")
_CROP = re.compile(r"\{\s*crop(?![a-z])[^{}]*(\}?)", re.IGNORECASE)
_BRACKET = re.compile(r"\[[^\]]*\]")
_IMAGE_NAME = re.compile(r"(?:\{\s*crop\s+|\s*,\s*)(?:image|picture)[\s#_]*([0-9]+)\s*", re.IGNORECASE)
"""All words before a bracket, where they name a picture; `picture 2 on the wall` is an object in one."""
COMMANDS = re.compile(f"{WRITTEN_CALL.pattern}|{_CROP.pattern}", re.IGNORECASE | re.DOTALL)
"""Calls, and the commands that become calls."""
_CROP_MARK = Mark("{", "#123;", r"\s*crop(?![a-z])")


def fits(values: Mapping[str, object]) -> bool:
    return "QnA" in values or "image_path" in values


def num_samples(values: Mapping[str, object]) -> int:
    """Questions of a row; 1 where it is broken, so that its problem has a number."""
    questions = values.get("QnA")
    return max(1, len(questions)) if isinstance(questions, list) else 1


def read(row: Fields, reading: Reading) -> list[Sample]:
    """The samples of a row, one a question."""
    row.known = ("image_path", "QnA", *GOLD_FIELDS)
    image = row.image("image_path", reading.image_base_path)
    questions = row.objects("QnA", '{"Q": …, "A3": …}')
    if not questions and row.values.get("QnA") == []:
        row.note("QnA", "empty_text", "the list is empty; add a question or remove the row")
    gold = {name: row.values[name] for name in GOLD_FIELDS if row.is_given(name)}
    if len(questions) > 1:
        for name in gold.keys() - {"box_frame"}:
            reading.ignored.add(f'"{name}" of a row with several questions', row.where)
            del gold[name]
    samples = []
    for index, question in enumerate(questions):
        if question is not None:
            fields = row.inside({**gold, **question}, known=(), path=f"QnA[{index}].")
            sample = _read_question(fields, image, row.extra(), reading)
            if sample and image:
                samples.append(sample)
            elif sample:
                reading.partial.append(Partial(sample, has_all_turns=True))
    return samples


def _read_question(
    fields: Fields, image: str | Path | None, row_extra: Mapping[str, object], reading: Reading
) -> Sample | None:
    keys = (reading.answer_key,) if reading.answer_key else ANSWER_FIELDS
    answer_field = next((name for name in keys if fields.is_given(name)), keys[0])
    fields.known = ("Q", answer_field, *GOLD_FIELDS)
    question = _question(fields)
    answer = fields.text(answer_field)
    response, problems = ("", []) if answer is None else crops_to_calls(answer)
    for reason, problem in problems:
        fields.note(answer_field, reason, problem)
    if answer is not None and response != answer:
        reading.changed.add("crop commands are calls now, without their words", fields.where)
    for name in row_extra.keys() & fields.extra().keys():
        reading.ignored.add(f'"{name}" of the row, because its question has its own', fields.where)
    return finish(
        fields,
        (user(question, *([image] if image else [])), assistant(_CROP_MARK.unescape(response))),
        reading,
        answer_field=answer_field,
        extra={**row_extra, **fields.extra()},
    )


def _question(fields: Fields) -> str:
    text = fields.text("Q") or ""
    # the picture is placed in front of the question anyway; anywhere else the word is ordinary text
    prefix = _IMAGE_PREFIX.match(text)
    question = text[prefix.end() :] if prefix else text
    if text and not question.strip():
        fields.note("Q", "empty_text", f"nothing but {IMAGE_PLACE}; write the question after it")
    return question


def crops_to_calls(text: str) -> tuple[str, list[tuple[str, str]]]:
    """The text with its crop commands as calls, and what is wrong with them. Calls already written are kept.

    `{Crop a 1, b 2 [box]}` gives one call, `{Crop a [box], b [box]}` two; of their words nothing stays but the number
    of a picture, where they are no more than that: `{Crop image 2 [box]}`. Braces without `crop` or without a bracket
    stay text.
    """
    problems: list[tuple[str, str]] = []

    def call(command: re.Match[str]) -> str:
        written = command.group()
        if "[" not in written and "]" not in written:
            return written
        name = f'crop command "{short(written)}"'
        brackets = _BRACKET.findall(written)
        if not command[1]:
            problems.append(("crop_command", f"{name}: the brace is not closed; add the }}"))
        elif not brackets or set("[]") & set(_BRACKET.sub("", written)):
            problems.append(("crop_command", f"{name}: a bracket has no partner; write {{Crop name [x1, y1, x2, y2]}}"))
        else:
            faults = [error for bracket in brackets if (error := _box_fault(bracket))]
            problems.extend(
                (BOX_REASONS[one.reason], f"{name}: {one}; mend the box or remove the command") for one in faults
            )
            if not faults:
                named = (_IMAGE_NAME.fullmatch(words) for words in _BRACKET.split(written))
                numbers = (int(name[1]) if name else 1 for name in named)
                return "".join(
                    format_call((part.strip() for part in box[1:-1].split(",")), number)
                    for box, number in zip(brackets, numbers)
                )
        return written

    pieces = re.split(f"({WRITTEN_CALL.pattern})", text, flags=re.DOTALL)
    pieces[::2] = [_CROP.sub(call, piece) for piece in pieces[::2]]
    response = "".join(pieces)
    return response, problems + call_syntax_faults(response)


def _box_fault(bracket: str) -> BoxError | None:
    try:
        parse_call(bracket)
    except BoxError as error:
        return error
    return None


def write(samples: Sequence[Sample], writing: Writing) -> list[dict[str, object]]:
    """Rows of samples that came from one row: those about one picture stand together again."""
    rows: list[dict[str, object]] = []
    for paths, group in groupby(samples, key=lambda sample: sample.image_paths[:1]):
        questions = [question for sample in group if (question := _written_question(sample, writing))]
        if questions:
            rows.append({"image_path": writing.image(paths[0]), "QnA": questions})
    return rows


def _written_question(sample: Sample, writing: Writing) -> dict[str, object] | None:
    if not writing.is_one_question(sample, needs_answer=True):
        return None
    question: str = sample.question
    if not question.strip():
        writing.leave_out(sample, "a question without words")
        return None
    if _IMAGE_PREFIX.match(question):
        question = f"{IMAGE_PLACE}\n{question}"
    fields = {"Q": question, "A3": _written_answer(sample.response), **writing.gold(sample)}
    return writing.with_extra(fields, sample, ("Q", "A3", *GOLD_FIELDS))


def _written_answer(response: str) -> str:
    """The response with calls as they are; what only spells a command is escaped."""
    kept = _CROP_MARK.keep(response)
    return kept if crops_to_calls(kept) == (kept, []) else _CROP_MARK.escape(response)
