"""VLM-R3's released records, of its SFT stage and of its RL stage.

One record of each, wrapped here:

    {"image_path": "x.jpg", "question": "What is it?",
     "response_list": ["<think>Closer: {\\"bbox_2d\\": [1, 2, 30, 40]}\\n", "A cup.</think><answer>cup</answer>"],
     "img_crop_list": ["crops/1.jpg"]}
    {"image_path": "x.jpg", "question": "What is it?", "answer": "cup", "source": "gqa"}

The released loader shows the picture before the question, and the picture number i of `img_crop_list` right after
segment number i of `response_list`. Here each box is a call, and its crop is cut from the picture, as rollouts cut it:
the file of a crop is only carried along. A picture after a segment without a box stays a picture of its own. The loader
ends every segment with a newline; here none is added where a crop separates two segments anyway. Text that spells a box
command has its braces written as `&#123;`. The records do not say in which frame their boxes are; VLM-R3's agent reads
boxes as pixels of the picture as Qwen2.5-VL resizes it.

Source: github.com/0001Henry/VLM-R3, qwen_vl_finetune/qwenvl/data/data_qwen.py and src/r1-v/src/open_r1/rgrpo.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from looktwice.calls import TOOL_CALL_CLOSE, WRITTEN_CALL, format_call, parse_call
from looktwice.data.reasons import BOX_REASONS
from looktwice.data.sample import Part, Sample, text_of
from looktwice.errors import BoxError, short
from looktwice.formats.escaping import Mark
from looktwice.formats.files import kind_of
from looktwice.formats.reading import GOLD_FIELDS, Fields, Reading, call_syntax_faults, finish
from looktwice.formats.writing import Writing
from looktwice.messages import ImagePart, Message, TextPart, user

KNOWN = ("image_path", "question", "response_list", *GOLD_FIELDS)
CROP_FILES = "img_crop_list"

_BOX_COMMAND = re.compile(r"\{\s*\"bbox_2d\"\s*:\s*(\[[^\[\]{}]*\])\s*\}")
_ANY_BOX_COMMAND = re.compile(r"\{[^{}]*\"bbox_2d\"[^{}]*\}?")
COMMANDS = re.compile(f"{WRITTEN_CALL.pattern}|{_ANY_BOX_COMMAND.pattern}", re.DOTALL)
"""Calls, and the commands that become calls."""
_CALL_END = re.compile(r"(?<=</tool_call>)(?!\n)|(?<=</tool_call>\n)")
_PLAIN_CALL = re.compile(r"<tool_call>(\[[^\[\]]*\])</tool_call>")
_BRACE_MARK = Mark("{", "#123;")


def fits(values: Mapping[str, object]) -> bool:
    if "QnA" in values:
        return False
    is_given = [values.get(name) is not None for name in ("image_path", "question", "answer")]
    return values.get("response_list") is not None or all(is_given)


def read(row: Fields, reading: Reading) -> list[Sample]:
    row.known = KNOWN
    image = row.image("image_path", reading.image_base_path)
    question = row.text("question")
    messages = [user(question or "", *([image] if image else []))]
    answer_field = "question"
    if row.is_given("response_list"):
        answer_field = "response_list"
        messages.append(Message(role="assistant", parts=tuple(_answer(row, reading))))
    elif not row.is_given("answer"):
        row.has("response_list")
    extra = row.extra()
    if not any(TOOL_CALL_CLOSE in text_of(message) for message in messages[1:]):
        extra.pop(CROP_FILES, None)  # none of them is the crop of a call
    sample = finish(row, messages, reading, answer_field=answer_field, extra=extra)
    return [sample] if sample else []


def _answer(row: Fields, reading: Reading) -> Iterator[Part]:
    segments, crops = _texts(row, "response_list"), _texts(row, CROP_FILES) if row.is_given(CROP_FILES) else []
    if len(crops) > len(segments):
        row.note(
            CROP_FILES, "placeholder_count", f"{len(crops)} pictures for {len(segments)} segments; leave out the others"
        )
    if segments and not any(segment.strip() for segment in segments):
        row.note("response_list", "empty_text", "the text is empty; fill it in or remove the record")
    for index, segment in enumerate(segments):
        text, problems = boxes_to_calls(segment)
        for reason, problem in problems + call_syntax_faults(text):
            row.note(f"response_list[{index}]", reason, problem)
        text = _BRACE_MARK.unescape(text)
        has_call, is_last = TOOL_CALL_CLOSE in text, index == len(segments) - 1
        has_crop = index < len(crops)
        is_separated = is_last or has_crop or text.rstrip().endswith(TOOL_CALL_CLOSE) or text.endswith("\n")
        yield TextPart(text=text if is_separated else f"{text}\n")
        if has_crop and not has_call:
            place = f"{CROP_FILES}[{index}]"
            inside = row.inside({place: crops[index]}, known=(), path="")
            image = inside.image(place, reading.image_base_path)
            if image is not None:
                yield ImagePart(source=image)


def _texts(row: Fields, name: str) -> list[str]:
    values = row.values[name]
    if not isinstance(values, list):
        row.note(name, "wrong_type", f"{kind_of(values)} where a list belongs; write a list of texts")
        return []
    if not values and name == "response_list":
        row.note(name, "empty_text", "the list is empty; add the answer or remove the record")
    items = {f"{name}[{index}]": value for index, value in enumerate(values)}
    inside = row.inside(items, known=(), path="")
    texts = [inside.any_text(place) for place in items]
    return [text for text in texts if text is not None]


def boxes_to_calls(text: str) -> tuple[str, list[tuple[str, str]]]:
    """The text with `{"bbox_2d": [x1, y1, x2, y2]}` as calls, and what is wrong with other braces that name one."""
    problems: list[tuple[str, str]] = []

    def call(command: re.Match[str]) -> str:
        written = command.group()
        box = _BOX_COMMAND.fullmatch(written)
        try:
            if box is None:
                raise BoxError("no_box", 'not of the form {"bbox_2d": [x1, y1, x2, y2]}')
            parse_call(box[1])
        except BoxError as error:
            problems.append((BOX_REASONS[error.reason], f'"{short(written)}": {error}; mend the box or remove it'))
            return written
        return format_call(part.strip() for part in box[1][1:-1].split(","))

    return _ANY_BOX_COMMAND.sub(call, text), problems


def write(samples: Sequence[Sample], writing: Writing) -> list[dict[str, object]]:
    return [row for sample in samples if (row := _row(sample, writing))]


def _row(sample: Sample, writing: Writing) -> dict[str, object] | None:
    if not writing.is_one_question(sample, needs_answer=False, may_answer_show=True):
        return None
    row: dict[str, object] = {"image_path": writing.image(sample.image_paths[0]), "question": sample.question}
    if not sample.question.strip():
        writing.leave_out(sample, "a question without words")
        return None
    if not sample.solution and sample.conversation.messages[-1].role != "assistant":
        writing.leave_out(sample, "a question without an answer")
        return None
    if sample.conversation.messages[-1].role == "assistant":
        segments = _segments(sample.conversation.messages[-1], writing)
        files = _crop_files(segments, sample.extra.get(CROP_FILES))
        if any(image for _, image in segments[len(files) :]):
            writing.leave_out(sample, "a picture in the answer after a crop that has no file")
            return None
        if any(TOOL_CALL_CLOSE in text for text, _ in segments[len(files) :]):
            writing.lose(sample, "the crops, which need files of their own here")
        row["response_list"] = [_written_segment(text) for text, _ in segments]
        row |= {CROP_FILES: files} if files else {}
    extra = replace(sample, extra={name: value for name, value in sample.extra.items() if name != CROP_FILES})
    return writing.with_extra({**row, **writing.gold(sample)}, extra, KNOWN)


def _segments(answer: Message, writing: Writing) -> list[tuple[str, str | None]]:
    """The answer cut after each call and each picture: a text, and the path of the picture that is not a crop."""
    segments: list[tuple[str, str | None]] = []
    for part in answer.parts:
        if isinstance(part, TextPart):
            segments += [(text, None) for text in _CALL_END.split(part.text) if text]
        elif isinstance(part, ImagePart):
            is_free = segments and segments[-1][1] is None and TOOL_CALL_CLOSE not in segments[-1][0]
            text = segments.pop()[0] if is_free else ""
            segments.append((text, writing.image(part.source)))
    return segments


def _crop_files(segments: Sequence[tuple[str, str | None]], known: object) -> list[str]:
    """The pictures after the first segments, up to the first segment that has none; `known` are files of crops."""
    files: list[str] = []
    for index, (text, image) in enumerate(segments):
        file = image
        if TOOL_CALL_CLOSE in text and isinstance(known, list) and index < len(known):
            file = known[index]
        if file is None:
            break
        files.append(file)
    return files


def _written_segment(text: str) -> str:
    words, *call = re.split(r"(<tool_call>.*)", text, maxsplit=1, flags=re.DOTALL)
    words = _BRACE_MARK.escape(words) if '"bbox_2d"' in words else _BRACE_MARK.keep(words)
    return words + _PLAIN_CALL.sub(_written_call, "".join(call))


def _written_call(call: re.Match[str]) -> str:
    """A call as a box command where its text follows from the numbers; else as it is."""
    try:
        json.loads(call[1])
    except ValueError:
        return call[0]
    is_plain = format_call(part.strip() for part in call[1][1:-1].split(",")) == call[0]
    return f'{{"bbox_2d": {call[1]}}}' if is_plain else call[0]
