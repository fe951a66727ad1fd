"""Ovis' official format and ShareGPT / LLaVA: `conversations` of `from` and `value`, with `<image>` in the text.

One row of each, wrapped here:

    {"id": "7", "image": "x.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                                    {"from": "gpt", "value": "A cup."}]}

Each `<image>` stands for the next picture of `image`, a path or a list of them; one newline before and after it belongs
to it, because the template puts pictures on lines of their own. The word itself is written `&lt;image>`. A turn from
`ignored_gpt` (Ovis) is not trained. In ShareGPT pictures without any `<image>` stand before the first question,
pictures may be named `images`, and a system turn may be the row's field `system`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from looktwice.data.escaping import Mark
from looktwice.data.fields import GOLD_FIELDS, Fields, Reading, call_problems, finish
from looktwice.data.files import kind_of
from looktwice.data.sample import Part, Sample, glue_of
from looktwice.data.writing import Writing
from looktwice.errors import nearest
from looktwice.messages import ImagePart, Message, Role, TextPart, system

IMAGE_PLACE, VIDEO_PLACE = "<image>", "<video>"
ROLES: dict[str, tuple[Role, bool]] = {
    "system": ("system", True),
    "human": ("user", True),
    "gpt": ("assistant", True),
    "ignored_gpt": ("assistant", False),
}
"""Role, and whether the turn is trained, of each `from`."""
_VIDEO_FIELDS = ("video", "videos", "video_frames")
KNOWN = ("image", "images", *_VIDEO_FIELDS, "conversations", "system", *GOLD_FIELDS)
_EXAMPLE = '{"from": "human", "value": …}'

_PLACE_MARK = Mark("<", "lt;", "(?:image|video)>")


def fits(values: Mapping[str, object]) -> bool:
    return values.get("conversations") is not None


def is_sharegpt(values: Mapping[str, object]) -> bool:
    """Whether the row has what only ShareGPT has."""
    return fits(values) and any(values.get(name) is not None for name in ("images", "system"))


def read_ovis(row: Fields, reading: Reading) -> list[Sample]:
    return _read(row, reading, is_place_needed=True)


def read_sharegpt(row: Fields, reading: Reading) -> list[Sample]:
    return _read(row, reading, is_place_needed=False)


def _read(row: Fields, reading: Reading, *, is_place_needed: bool) -> list[Sample]:
    row.known = KNOWN
    pictures = list(_pictures(row, reading.image_base_path))
    for name in _VIDEO_FIELDS:
        if row.values.get(name):
            row.note(name, "video", "a video cannot be trained on here; remove the row")
    turns = [
        turn
        for index, values in enumerate(row.objects("conversations", _EXAMPLE))
        if values is not None
        and (turn := _turn(row.inside(values, known=("from", "value"), path=f"conversations[{index}]."), reading))
    ]
    num_places = sum(value.count(IMAGE_PLACE) for _, value in turns)
    first_question = next((number for number, (message, _) in enumerate(turns) if message.role == "user"), None)
    if pictures and num_places == 0 and not is_place_needed and first_question is not None:
        message, value = turns[first_question]
        turns[first_question] = message, f"{IMAGE_PLACE}\n" * len(pictures) + value
    elif row.is_good and num_places != len(pictures):
        row.note(
            "conversations",
            "placeholder_count",
            f"{num_places} {IMAGE_PLACE} for {len(pictures)} pictures; write one where each belongs, and "
            f"{_PLACE_MARK.escape(IMAGE_PLACE)} for the word",
        )
    upcoming = iter(pictures)
    messages = [_with_pictures(message, value, upcoming) for message, value in turns] if row.is_good else []
    if row.values.get("system") and (text := row.text("system")) is not None:
        messages.insert(0, system(text))
    last = max(0, len(turns) - 1)
    sample = finish(row, messages, reading, answer_field=f"conversations[{last}].value")
    return [sample] if sample else []


def _pictures(row: Fields, image_base_path: Path) -> Iterator[str | Path]:
    name = "images" if row.is_given("images") else "image"
    written = row.values.get(name)
    if written is None or written == []:
        return
    if row.is_given("image") and row.is_given("images"):
        row.note("images", "pictures_twice", 'beside "image"; write all pictures in one of them')
    for index, path in enumerate(written if isinstance(written, list) else [written]):
        place = f"{name}[{index}]" if isinstance(written, list) else name
        if not isinstance(path, str) or not path.strip():
            seen = kind_of(path) if path else "nothing"
            row.note(place, "wrong_type", f"{seen} where a path belongs; write it in quotes")
        elif (picture := row.picture_at(place, path, image_base_path)) is not None:
            yield picture


def _turn(fields: Fields, reading: Reading) -> tuple[Message, str] | None:
    """A turn without its parts, and its text as written."""
    role, value = fields.text("from"), fields.text("value")
    for name in fields.extra():
        reading.ignored.add(f'"{name}" of a turn', fields.where)
    if role is None or value is None:
        return None
    if role not in ROLES:
        known = ", ".join(ROLES)
        fields.note("from", "unknown_role", f'"{role}" is no role; write one of {known}.{nearest(role, ROLES)}')
        return None
    if VIDEO_PLACE in value:
        fields.note(
            "value",
            "video",
            f"{VIDEO_PLACE} for a video; write {_PLACE_MARK.escape(VIDEO_PLACE)} for the word, or remove the row",
        )
    name, is_trained = ROLES[role]
    if name == "assistant":
        for reason, problem in call_problems(value):
            fields.note("value", reason, problem)
    return Message(role=name, parts=(), is_trained=is_trained), value


def _with_pictures(message: Message, value: str, pictures: Iterator[str | Path]) -> Message:
    """The turn with its text cut at the places of its pictures."""
    pieces = value.split(IMAGE_PLACE)
    last = len(pieces) - 1
    parts: list[Part] = []
    for number, piece in enumerate(pieces):
        if number:
            parts.append(ImagePart(source=next(pictures)))
        if message.role != "assistant" and last:
            if piece == "" or (piece == "\n" and 0 < number < last):
                continue
            piece = piece.removeprefix("\n") if number else piece
            piece = piece.removesuffix("\n") if number < last else piece
        parts.append(TextPart(text=_PLACE_MARK.unescape(piece)))
    return replace(message, parts=tuple(parts))


def write_ovis(samples: Sequence[Sample], writing: Writing) -> list[dict[str, object]]:
    return [_row(sample, writing) for sample in samples]


def write_sharegpt(samples: Sequence[Sample], writing: Writing) -> list[dict[str, object]]:
    for sample in samples:
        if not all(message.is_trained for message in sample.conversation.messages):
            writing.lose(sample, "that an assistant turn is not trained")
    rows = [_row(sample, writing) for sample in samples]
    for row in rows:
        for turn in row["conversations"]:  # type: ignore[attr-defined]
            turn["from"] = "gpt" if turn["from"] == "ignored_gpt" else turn["from"]
    return rows


def _row(sample: Sample, writing: Writing) -> dict[str, object]:
    pictures = [writing.picture(source) for source in sample.image_paths]
    shown = {"image": pictures[0] if len(pictures) == 1 else pictures} if pictures else {}
    turns = [{"from": _from(message), "value": _value(message)} for message in sample.conversation.messages]
    return writing.with_extra({**shown, "conversations": turns, **writing.gold(sample)}, sample, KNOWN)


def _from(message: Message) -> str:
    return next(name for name, meaning in ROLES.items() if meaning == (message.role, message.is_trained))


def _value(message: Message) -> str:
    texts = [_PLACE_MARK.escape(part.text) if isinstance(part, TextPart) else IMAGE_PLACE for part in message.parts]
    return glue_of(message).join(texts)
