"""Formats with `<image>` in their texts: Ovis' own, ShareGPT / LLaVA, and the one of ms-swift, LLaMA-Factory and TRL.

One row of each kind, wrapped here:

    {"id": "7", "image": "x.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                                    {"from": "gpt", "value": "A cup."}]}
    {"images": ["x.jpg"], "messages": [{"role": "user", "content": "<image>What is it?"},
                                       {"role": "assistant", "content": "A cup."}]}

Each `<image>` stands for the next picture of `image` or `images`, a path or a list of them; one newline before and
after it belongs to it, because the template puts pictures on lines of their own. The word itself is written
`&lt;image>`. Pictures without any `<image>` stand before the first question, in Ovis' format they are an error. A turn
from `ignored_gpt` (Ovis) or with `"loss": false` (ms-swift) is not trained. A system turn may be the row's field
`system`. A content may be a list of parts (TRL), whose texts are plain and whose `{"type": "image"}` are places.

Source of the third: modelscope/ms-swift, "Custom dataset"; hiyouga/LLaMA-Factory, data/README.md; huggingface/trl,
"Dataset formats".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from looktwice.data.sample import Part, Sample, glue_of
from looktwice.errors import counted, nearest, short
from looktwice.formats.escaping import Mark
from looktwice.formats.other_training import note_other_training
from looktwice.formats.reading import GOLD_FIELDS, Fields, Reading, call_syntax_faults, finish
from looktwice.formats.tool_calls import Beside, answers, are_trained, around, beside
from looktwice.formats.writing import Writing
from looktwice.messages import ImagePart, Message, Role, TextPart, system, user

IMAGE_PLACE, VIDEO_PLACE = "<image>", "<video>"
IMAGE_FIELDS = ("image", "images")
_OTHER_MEDIA = ("video", "videos", "video_frames", "audio", "audios")
MEDIA_FIELDS = (*IMAGE_FIELDS, *_OTHER_MEDIA)
"""Fields of a row for what stands in its turns."""
_PLACE_MARK = Mark("<", "lt;", "(?:image|video)>")


Turn = tuple[Message, str | None]
"""A turn without its parts, and its text; None for one that could not be read."""


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """How a format writes its turns.

    `turns` is the field that lists them; `role`, `text` and `marks` (false: not trained; the first is written) are
    fields of a turn. Pictures are written into the field `images`; read they may be in any. `roles` gives the meaning
    of each role and whether it is trained; of two with one meaning the first is written. `refused` are fields of a row
    that cannot be read. `is_place_needed`: pictures without any `<image>` are an error.
    """

    turns: str
    role: str
    text: str
    images: str
    roles: Mapping[str, tuple[Role, bool]]
    marks: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    is_place_needed: bool = False

    @property
    def known(self) -> tuple[str, ...]:
        """The fields of a row that have a meaning."""
        return (*MEDIA_FIELDS, self.turns, "system", *self.refused, *GOLD_FIELDS)


SHAREGPT = Dialect(
    turns="conversations",
    role="from",
    text="value",
    images="images",
    roles={
        "system": ("system", True),
        "human": ("user", True),
        "user": ("user", True),
        "gpt": ("assistant", True),
        "assistant": ("assistant", True),
        "ignored_gpt": ("assistant", False),
    },
)
OVIS = replace(SHAREGPT, images="image", is_place_needed=True)
SWIFT = Dialect(
    turns="messages",
    role="role",
    text="content",
    images="images",
    roles={"system": ("system", True), "user": ("user", True), "assistant": ("assistant", True)},
    marks=("loss", "train", "weight"),
    refused=("objects",),
)


def fits(values: Mapping[str, object]) -> bool:
    return values.get(OVIS.turns) is not None


def is_sharegpt(values: Mapping[str, object]) -> bool:
    """Whether the row has what only ShareGPT has."""
    return fits(values) and any(values.get(name) is not None for name in ("images", "system"))


def is_swift(values: Mapping[str, object]) -> bool:
    """Whether there are messages and beside them what they show."""
    return values.get(SWIFT.turns) is not None and any(values.get(name) is not None for name in MEDIA_FIELDS)


def read_ovis(row: Fields, reading: Reading) -> list[Sample]:
    return _read(row, reading, OVIS)


def read_sharegpt(row: Fields, reading: Reading) -> list[Sample]:
    return _read(row, reading, SHAREGPT)


def read_swift(row: Fields, reading: Reading) -> list[Sample]:
    note_objects(row)
    return _read(row, reading, SWIFT)


def note_objects(row: Fields) -> None:
    """Note ms-swift's boxes beside the messages."""
    objects = row.values.get("objects")
    if any(objects.values()) if isinstance(objects, dict) else objects:
        row.note(
            "objects", "unknown_part", "boxes beside the messages are not read; write them into the texts as they are"
        )


def _read(row: Fields, reading: Reading, dialect: Dialect) -> list[Sample]:
    row.known = dialect.known
    note_other_training(row)
    dialect = _spoken(row, dialect)
    example = f'{{"{dialect.role}": …, "{dialect.text}": …}}'
    turns = [
        None if values is None else row.inside(values, known=(dialect.text,), path=f"{dialect.turns}[{index}].")
        for index, values in enumerate(row.objects(dialect.turns, example))
    ]
    return read_turns(row, turns, reading, dialect)


def read_turns(row: Fields, turns: Sequence[Fields | None], reading: Reading, dialect: Dialect) -> list[Sample]:
    """The sample of a row with pictures beside its turns, each an object that knows the field of its text.

    None stands for what is no object, whose problem is noted by then.
    """
    images = _images(row, reading.image_base_path)
    for name in _OTHER_MEDIA:
        if row.values.get(name):
            row.note(name, "video", "videos and sounds cannot be trained on here; remove the row")
    read = [_message(answer, reading, dialect) for answer in answers(filter(None, turns))]
    messages = _placed(row, read, images, dialect, is_whole=None not in turns)
    if row.values.get("system") and (text := row.text("system")) is not None:
        messages.insert(0, system(text))
    last = turns[-1] if turns else None
    place = f"{last.path}{last.known[0]}" if last else f"{dialect.turns}[{max(0, len(turns) - 1)}].{dialect.text}"
    sample = finish(row, messages, reading, answer_field=place.removeprefix(row.path))
    return [sample] if sample else []


def _placed(
    row: Fields, turns: Sequence[Turn], images: Sequence[str | Path | None], dialect: Dialect, *, is_whole: bool
) -> list[Message]:
    """The turns with their pictures in their places; where these are not known, all pictures stand before them."""
    read = [(message, value) for message, value in turns if value is not None]
    num_places = sum(value.count(IMAGE_PLACE) for _, value in read)
    first_question = next((number for number, (message, _) in enumerate(read) if message.role == "user"), None)
    if images and num_places == 0 and not dialect.is_place_needed and first_question is not None:
        message, value = read[first_question]
        read[first_question] = message, f"{IMAGE_PLACE}\n" * len(images) + value
    elif num_places != len(images) and is_whole and len(read) == len(turns):
        row.note(
            dialect.turns,
            "placeholder_count",
            f"{num_places} {IMAGE_PLACE} for {counted(len(images), 'picture')}; write one where each belongs, and "
            f"{_PLACE_MARK.escape(IMAGE_PLACE)} for the word",
        )
    upcoming = iter(images)
    messages = [_with_images(message, value, upcoming) for message, value in read]
    unplaced = [image for image in upcoming if image is not None]
    return [user("", *unplaced), *messages] if unplaced else messages


def _spoken(row: Fields, dialect: Dialect) -> Dialect:
    """The dialect, or where the first turn has `role` and not `from`, the dialect with the names of OpenAI."""
    turns = row.values.get(dialect.turns)
    first = turns[0] if isinstance(turns, list) and turns else None
    if isinstance(first, dict) and SWIFT.role in first and dialect.role not in first:
        return replace(dialect, role=SWIFT.role, text=SWIFT.text)
    return dialect


def _images(row: Fields, image_base_path: Path) -> list[str | Path | None]:
    """The pictures of the row, None for one that could not be read."""
    name = "images" if row.is_given("images") else "image"
    written = row.values.get(name)
    if written is None or written == []:
        return []
    if row.is_given("image") and row.is_given("images"):
        row.note("images", "pictures_twice", 'beside "image"; write all pictures in one of them')
    places = {f"{name}[{index}]": one for index, one in enumerate(written)} if isinstance(written, list) else {}
    inside = row.inside(places or {name: written}, known=(), path="")
    return [inside.image(place, image_base_path) for place in inside.values]


def _message(turns: Sequence[Fields], reading: Reading, dialect: Dialect) -> Turn:
    """One turn, or the turns of an answer around those of its tools as one."""
    read = [_turn(fields, reading, replace(dialect, text=fields.known[0])) for fields in turns]
    is_trained = are_trained(turns, [message.is_trained for message, _, _ in read])
    message = replace(read[0][0], is_trained=is_trained)
    texts = [value for _, value, _ in read if value is not None]
    if len(texts) < len(read):
        return message, None
    pieces = zip(around([told for _, _, told in read]), texts)
    return message, "".join(_PLACE_MARK.escape(before) + text + after for (before, after), text in pieces)


def _turn(fields: Fields, reading: Reading, dialect: Dialect) -> tuple[Message, str | None, Beside]:
    """A turn without its parts, its text as written, and what stands beside it."""
    fields.known = (dialect.text, dialect.role, *dialect.marks)
    role = fields.text(dialect.role)
    if role is not None and role not in dialect.roles:
        known = ", ".join(dialect.roles)
        hint = nearest(role, dialect.roles)
        fields.note(dialect.role, "unknown_role", f'"{short(role)}" is no role; write one of {known}.{hint}')
    name, is_trained = dialect.roles.get(role or "", ("user", True))
    told = beside(fields, reading) if name == "assistant" else Beside()
    is_call = bool(told.calls) and not fields.values.get(dialect.text)
    value = "" if is_call else _text(fields, reading, dialect, name)
    is_kept = all([fields.flag(mark) for mark in dialect.marks])
    for unknown in fields.extra():
        reading.ignored.add(f'"{unknown}" of a turn', fields.where)
    message = Message(role=name, parts=(), is_trained=is_trained and is_kept)
    if role not in dialect.roles or value is None:
        return message, value, told
    if VIDEO_PLACE in value:
        fields.note(
            dialect.text,
            "video",
            f"{VIDEO_PLACE} for a video; write {_PLACE_MARK.escape(VIDEO_PLACE)} for the word, or remove the row",
        )
    if name == "assistant":
        for reason, problem in call_syntax_faults(value):
            fields.note(dialect.text, reason, problem)
    return message, value, told


def _text(fields: Fields, reading: Reading, dialect: Dialect, role: Role) -> str | None:
    """The text of a turn; of a list of parts the text that says the same."""
    if dialect.text != SWIFT.text or not isinstance(fields.values.get(dialect.text), list):
        return fields.text(dialect.text)
    pieces: list[str] = []
    for index, values in enumerate(fields.objects(dialect.text, '{"type": "text", "text": …}')):
        if values is None:
            continue
        part = fields.inside(values, known=("type", "text"), path=f"{dialect.text}[{index}].")
        kind = part.text("type")
        if kind == "text" and (text := part.any_text("text")) is not None:
            pieces.append(_PLACE_MARK.escape(text))
            for name in part.extra():
                reading.ignored.add(f'"{name}" of a part of type text', fields.where)
        elif kind == "image" and not part.extra():
            pieces.append(IMAGE_PLACE)
        elif kind == "image":
            part.note("type", "pictures_twice", 'the row names its pictures in "images"; write {"type": "image"} alone')
        elif kind is not None and kind != "text":
            part.note("type", "unknown_part", f'"{short(kind)}" cannot stand here; write one of text, image')
    if fields.is_good and not any(piece.strip() for piece in pieces):
        fields.note(dialect.text, "empty_text", "the message is empty; fill it in or remove it")
    return glue_of(Message(role=role, parts=())).join(pieces) if fields.is_good else None


def _with_images(message: Message, value: str, images: Iterator[str | Path | None]) -> Message:
    """The turn with its text cut at the places of its pictures."""
    pieces = value.split(IMAGE_PLACE)
    last = len(pieces) - 1
    parts: list[Part] = []
    for number, piece in enumerate(pieces):
        if number and (image := next(images, None)) is not None:
            parts.append(ImagePart(source=image))
        if message.role != "assistant" and last:
            if piece == "" or (piece == "\n" and 0 < number < last):
                continue
            piece = piece.removeprefix("\n") if number else piece
            piece = piece.removesuffix("\n") if number < last else piece
        parts.append(TextPart(text=_PLACE_MARK.unescape(piece)))
    return replace(message, parts=tuple(parts))


def write_ovis(samples: Sequence[Sample], writing: Writing) -> list[dict[str, object]]:
    return [_row(sample, writing, OVIS) for sample in samples]


def write_sharegpt(samples: Sequence[Sample], writing: Writing) -> list[dict[str, object]]:
    rows = []
    for sample in samples:
        messages = sample.conversation.messages
        if not all(message.is_trained for message in messages):
            writing.lose(sample, "that an assistant turn is not trained")
            trained = tuple(replace(message, is_trained=True) for message in messages)
            sample = replace(sample, conversation=replace(sample.conversation, messages=trained))
        rows.append(_row(sample, writing, SHAREGPT))
    return rows


def write_swift(samples: Sequence[Sample], writing: Writing) -> list[dict[str, object]]:
    return [_row(sample, writing, SWIFT) for sample in samples]


def _row(sample: Sample, writing: Writing, dialect: Dialect) -> dict[str, object]:
    images = [writing.image(source) for source in sample.image_paths]
    # a list also of one, since a table needs one type for a field, and of none where the format is known by it
    shown = {dialect.images: images} if images or dialect.images == "images" else {}
    turns = [_written_turn(message, dialect) for message in sample.conversation.messages]
    return writing.with_extra({**shown, dialect.turns: turns, **writing.gold(sample)}, sample, dialect.known)


def _written_turn(message: Message, dialect: Dialect) -> dict[str, object]:
    meaning = (message.role, message.is_trained or bool(dialect.marks))
    role = next(name for name, known in dialect.roles.items() if known == meaning)
    mark = {} if message.is_trained else dict.fromkeys(dialect.marks[:1], False)
    texts = [_PLACE_MARK.escape(part.text) if isinstance(part, TextPart) else IMAGE_PLACE for part in message.parts]
    return {dialect.role: role, dialect.text: glue_of(message).join(texts), **mark}
