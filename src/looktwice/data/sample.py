"""One sample: a conversation to learn from or to start rollouts from, whatever form its file has."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from looktwice.answers import Solution
from looktwice.geometry import Box, BoxFrame, PixelPolicy
from looktwice.messages import Conversation, ImagePart, Message, TextPart

Part = TextPart | ImagePart


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A conversation with what is known of its last answer.

    Assistant texts hold their crop calls as `<tool_call>[x1, y1, x2, y2]</tool_call>`, the numbers as they were
    written, in `box_frame`; None means that nothing was said: the frame of the model. A call refers to the picture
    that it names, else to the first. A picture is a path, or a `data:` URL that holds the picture itself. `solution`
    is the short gold answer, "" without one, or several of which each is right; `gold_box` is in original pixels of
    the first picture, as are `more_gold_boxes` where there are several. `where` is "file:line" and `field` the place
    of the last answer in that row, such as "QnA[1].A3". `policy` are pixel bounds of its own, where those of all would
    make it too long. `image_folder` is where relative paths of pictures were taken from. `extra` are the fields of the
    row that mean nothing here; they go along when a file is converted.
    """

    conversation: Conversation
    box_frame: BoxFrame | None = None
    solution: Solution = ""
    gold_box: Box | None = None
    more_gold_boxes: tuple[Box, ...] = ()
    where: str
    field: str
    policy: PixelPolicy | None = None
    image_folder: Path | None = dataclasses.field(default=None, compare=False)
    extra: Mapping[str, object] = dataclasses.field(default_factory=dict)

    @property
    def gold_boxes(self) -> tuple[Box, ...]:
        """All of them, in order; none where nothing was labelled."""
        return (*filter(None, (self.gold_box,)), *self.more_gold_boxes)

    @property
    def prompt(self) -> Conversation:
        """What stands before the last answer."""
        messages = self.conversation.messages
        return Conversation(messages=messages[:-1]) if messages[-1].role == "assistant" else self.conversation

    @property
    def response(self) -> str:
        """The text of the last answer, "" where the conversation ends in a question."""
        return response_of(self.conversation)

    @property
    def question(self) -> str:
        """The text of the last user message."""
        asked = [message for message in self.conversation.messages if message.role == "user"]
        return text_of(asked[-1]) if asked else ""

    @property
    def image_paths(self) -> list[str | Path]:
        """The pictures in order of appearance, crops not counted; a `data:` URL where a picture has no file."""
        return [source for source in self.conversation.images if isinstance(source, (str, Path))]


def response_of(conversation: Conversation) -> str:
    """The text of the last message if an assistant writes it, else ""."""
    last = conversation.messages[-1:]
    return text_of(last[0]) if last and last[0].role == "assistant" else ""


def text_of(message: Message) -> str:
    """The texts of a message as the template joins them, its pictures left out."""
    return glue_of(message).join(part.text for part in message.parts if isinstance(part, TextPart))


def glue_of(message: Message) -> str:
    """What the template writes between the parts of a message."""
    return "" if message.role == "assistant" else "\n"


def joined(message: Message) -> Message:
    """The same message in one way of writing: neighbouring texts are one, an assistant's empty texts are gone.

    `is_trained` stays true for the others, whom nothing trains anyway.
    """
    parts: list[Part] = []
    for is_text, run in groupby(message.parts, key=lambda part: isinstance(part, TextPart)):
        if not is_text:
            parts += run  # type: ignore[arg-type]
            continue
        text = glue_of(message).join(part.text for part in run if isinstance(part, TextPart))
        if text or message.role != "assistant":
            parts.append(TextPart(text=text))
    is_trained = message.is_trained or message.role != "assistant"
    return Message(role=message.role, parts=tuple(parts), is_trained=is_trained)
