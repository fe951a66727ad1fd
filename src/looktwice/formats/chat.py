"""The canonical format and OpenAI's: `messages` of `role` and `content`, a text or a list of typed parts.

One row of each, wrapped here:

    {"messages": [{"role": "user", "content": [{"type": "image", "image": "x.jpg"}, {"type": "text", "text": "What?"}]},
                  {"role": "assistant", "content": [{"type": "text", "text": "Look: "},
                                                    {"type": "crop", "box": [1, 2, 3, 4], "frame": "original_px"}]}]}
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x.jpg"}},
                                               {"type": "text", "text": "What?"}]},
                  {"role": "assistant", "content": "A cup."}]}

A crop part stands for the call and the crop that follows it; calls may also be written in the text. Its `image_number`,
counted from 1, says which picture is cut where that is not the first. An assistant turn with `"train": false`, in
OpenAI's format `"weight": 0`, is not trained. Text is text: nothing in it needs escaping.
What we write has lists of parts only, because tables (Parquet, Arrow) need one type for a field.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from looktwice.calls import TOOL_CALL_CLOSE, TOOL_CALL_OPEN, format_call, parse_call, split_calls
from looktwice.data.reasons import BOX_REASONS
from looktwice.data.sample import Part, Sample, text_of
from looktwice.errors import BoxError, nearest, short
from looktwice.formats.conversations import MEDIA_FIELDS
from looktwice.formats.other_training import note_other_training
from looktwice.formats.reading import GOLD_FIELDS, Fields, Reading, call_syntax_faults, finish
from looktwice.formats.tool_calls import Beside, answers, are_trained, around, beside
from looktwice.formats.writing import Writing
from looktwice.geometry import BoxFrame, check_box
from looktwice.messages import ImagePart, Message, Role, TextPart

ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
KNOWN = ("messages", *MEDIA_FIELDS, *GOLD_FIELDS)
PART_FIELDS = {
    "text": ("text",),
    "image": ("image",),
    "image_url": ("image_url",),
    "crop": ("box", "frame", "image_number"),
}
"""Fields of each type of part."""
_EXAMPLE = '{"role": "user", "content": …}'


def fits(values: Mapping[str, object]) -> bool:
    return values.get("messages") is not None


def is_openai(values: Mapping[str, object]) -> bool:
    """Whether a picture of the row is written as OpenAI writes it."""
    messages = values.get("messages")
    turns = messages if isinstance(messages, list) else []
    contents = [message.get("content") for message in turns if isinstance(message, dict)]
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
    return any(part.get("type") == "image_url" for part in parts)


def read(row: Fields, reading: Reading) -> list[Sample]:
    row.known = KNOWN
    note_other_training(row)
    return read_lists(row, reading, ["messages"])


def read_lists(row: Fields, reading: Reading, lists: Sequence[str]) -> list[Sample]:
    """The sample of a row whose messages are listed in these fields, one after the other."""
    for name in MEDIA_FIELDS:  # of another format, see `conversations.SWIFT`
        if row.values.get(name):
            what = "beside the messages, as in the format swift; give --from swift, or name each picture in its message"
            row.note(name, "pictures_twice", what)
    frames: set[BoxFrame] = set()
    listed = [
        (f"{name}[{index}].", values) for name in lists for index, values in enumerate(row.objects(name, _EXAMPLE))
    ]
    turns = [row.inside(values, known=("role", "content"), path=path) for path, values in listed if values is not None]
    messages = [_message(answer, reading, frames) for answer in answers(turns)]
    last = listed[-1][0] if listed else f"{lists[-1]}[0]."
    sample = finish(row, messages, reading, answer_field=f"{last}content", frames=frames)
    return [sample] if sample else []


def _message(turns: Sequence[Fields], reading: Reading, frames: set[BoxFrame]) -> Message:
    """One message, or the turns of an answer around those of its tools as one."""
    read = [_turn(fields, reading, frames) for fields in turns]
    parts: list[Part] = []
    for (message, _), (before, after) in zip(read, around([told for _, told in read])):
        parts += [TextPart(text=before)] if before else []
        parts += message.parts  # type: ignore[arg-type]
        parts += [TextPart(text=after)] if after else []
    is_trained = are_trained(turns, [message.is_trained for message, _ in read])
    return replace(read[0][0], parts=tuple(parts), is_trained=is_trained)


def _turn(fields: Fields, reading: Reading, frames: set[BoxFrame]) -> tuple[Message, Beside]:
    role = fields.text("role")
    if role is not None and role not in ROLES:
        what = f'"{short(role)}" is no role; write one of {", ".join(ROLES)}.{nearest(role, ROLES)}'
        fields.note("role", "unknown_role", what)
    told = beside(fields, reading) if role == "assistant" else Beside()
    parts = list(_parts(fields, reading, frames, is_assistant=role == "assistant"))
    if (
        fields.is_good
        and not told.calls
        and not any(isinstance(part, ImagePart) or part.text.strip() for part in parts)
    ):
        fields.note("content", "empty_text", "the message is empty; fill it in or remove it")
    message = Message(role=ROLES.get(role or "", "user"), parts=tuple(parts))
    if fields.is_good and role == "assistant":
        for reason, problem in call_syntax_faults(text_of(message)):
            fields.note("content", reason, problem)
    fields.known = (*fields.known, "train", "weight")
    is_trained = fields.flag("train") & fields.flag("weight")
    for name in fields.extra():
        reading.ignored.add(f'"{name}" of a message', fields.where)
    return replace(message, is_trained=is_trained), told


def _parts(fields: Fields, reading: Reading, frames: set[BoxFrame], *, is_assistant: bool) -> Iterator[Part]:
    content = fields.values.get("content")
    if is_assistant and not content and fields.values.get("tool_calls"):
        return
    if not isinstance(content, list):
        text = fields.text("content")
        if text is not None:
            yield TextPart(text=text)
        return
    for index, values in enumerate(fields.objects("content", '{"type": "text", "text": …}')):
        if values is None:
            continue
        part = fields.inside(values, known=("type",), path=f"content[{index}].")
        name = part.text("type")
        if name is None:
            continue
        if name not in PART_FIELDS or (name == "crop" and not is_assistant):
            allowed = [known for known in PART_FIELDS if known != "crop" or is_assistant]
            part.note(
                "type",
                "unknown_part",
                f'"{short(name)}" cannot stand here; write one of {", ".join(allowed)}.{nearest(name, allowed)}',
            )
            continue
        part.known = ("type", *PART_FIELDS[name])
        for unknown in part.extra():
            reading.ignored.add(f'"{unknown}" of a part of type {name}', fields.where)
        read_part = _crop(part, frames) if name == "crop" else _text_or_image(part, name, reading)
        if read_part is not None:
            yield read_part


def _text_or_image(part: Fields, name: str, reading: Reading) -> Part | None:
    if name == "text":
        text = part.any_text("text")
        return None if text is None else TextPart(text=text)
    if name == "image_url" and isinstance(values := part.values.get("image_url"), dict):
        part, name = part.inside(values, known=("url", "detail"), path="image_url."), "url"
        for unknown in part.extra():
            reading.ignored.add(f'"{unknown}" of an image_url', part.where)
    source = part.image(name, reading.image_base_path)
    return None if source is None else ImagePart(source=source)


def _crop(part: Fields, frames: set[BoxFrame]) -> TextPart | None:
    if (frame := part.frame("frame")) is not None:
        frames.add(frame)
    if not part.has("box"):
        return None
    box = part.values["box"]
    try:
        check_box(box)
    except BoxError as error:
        part.note("box", BOX_REASONS[error.reason], f"{error}; write [x1, y1, x2, y2]")
        return None
    number = part.values.get("image_number")
    if number is not None and (not isinstance(number, int) or number < 1):
        what = f"{short(repr(number))}; count the pictures before the call from 1"
        part.note("image_number", "no_such_picture", what)
        return None
    return TextPart(text=format_call(box, number or 1))  # type: ignore[arg-type]


def write_messages(samples: Sequence[Sample], writing: Writing) -> list[dict[str, object]]:
    return [_canonical_row(sample, writing) for sample in samples]


def _canonical_row(sample: Sample, writing: Writing) -> dict[str, object]:
    def part(written: Part) -> list[dict[str, object]]:
        if isinstance(written, ImagePart):
            return [{"type": "image", "image": writing.image(written.source)}]
        return [{"type": "text", "text": written.text}]

    def answer_part(written: Part) -> list[dict[str, object]]:
        if isinstance(written, ImagePart):
            return part(written)
        return [piece for segment in split_calls(written.text) for piece in _with_crop(segment, sample.box_frame)]

    messages: list[dict[str, Any]] = []
    for message in sample.conversation.messages:
        write_part = answer_part if message.role == "assistant" else part
        content = [piece for written in message.parts for piece in write_part(written)]  # type: ignore[arg-type]
        messages.append({"role": message.role, "content": content, **({} if message.is_trained else {"train": False})})
    gold = writing.gold(sample)
    if any(piece.get("type") == "crop" for message in messages for piece in message["content"]):
        gold.pop("box_frame", None)  # each crop says it
    return writing.with_extra({"messages": messages, **gold}, sample, KNOWN)


def _with_crop(segment: str, frame: BoxFrame | None) -> list[dict[str, object]]:
    """The text before a call, and the call as a crop part where its text follows from the numbers."""
    words, opening, call = segment.rpartition(TOOL_CALL_OPEN)
    if segment.endswith(TOOL_CALL_CLOSE) and opening:
        read, number = parse_call(segment)
        box = [int(side) if side.is_integer() else side for side in read]
        if number > 0 and format_call(box, number) == opening + call:
            crop: dict[str, object] = {"type": "crop", "box": box, **({"frame": frame} if frame else {})}
            crop |= {"image_number": number} if number != 1 else {}
            return [{"type": "text", "text": words}, crop] if words else [crop]
    return [{"type": "text", "text": segment}] if segment else []


def write_openai(samples: Sequence[Sample], writing: Writing) -> list[dict[str, object]]:
    return [row for sample in samples if (row := _openai_row(sample, writing))]


def _openai_row(sample: Sample, writing: Writing) -> dict[str, object] | None:
    messages = []
    for message in sample.conversation.messages:
        is_text = all(isinstance(part, TextPart) for part in message.parts)
        if message.role != "user" and not is_text:
            writing.leave_out(sample, f"a picture in {_article(message.role)} turn")
            return None
        content: list[dict[str, object]] = [
            {"type": "text", "text": part.text}
            if isinstance(part, TextPart)
            else {"type": "image_url", "image_url": {"url": writing.image(part.source)}}  # type: ignore[union-attr]
            for part in message.parts
        ]
        messages.append({"role": message.role, "content": content, **({} if message.is_trained else {"weight": 0})})
    return writing.with_extra({"messages": messages, **writing.gold(sample)}, sample, KNOWN)


def _article(role: str) -> str:
    return f"an {role}" if role == "assistant" else f"a {role}"
