"""A conversation as people write it: roles, texts, pictures. No tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"
"""The tags around reasoning and around the short answer, as the model writes them."""

Role = Literal["system", "user", "assistant"]
ImageSource = str | Path | Image.Image


@dataclass(frozen=True, kw_only=True)
class TextPart:
    """Text as written. In an assistant message it may hold crop calls; each crop follows its call by itself."""

    text: str


@dataclass(frozen=True, kw_only=True)
class ImagePart:
    """A picture: a path, or one already decoded."""

    source: ImageSource


@dataclass(frozen=True, kw_only=True)
class Message:
    role: Role
    parts: tuple[TextPart | ImagePart, ...]


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Messages in order. Crop boxes refer to the first picture of the conversation."""

    messages: tuple[Message, ...]

    @property
    def images(self) -> list[ImageSource]:
        return [part.source for message in self.messages for part in message.parts if isinstance(part, ImagePart)]


def user(text: str, *images: ImageSource) -> Message:
    """A user message in the recommended form: pictures first, then the text."""
    return Message(role="user", parts=(*(ImagePart(source=image) for image in images), TextPart(text=text)))


def assistant(text: str) -> Message:
    return Message(role="assistant", parts=(TextPart(text=text),))


def system(text: str) -> Message:
    return Message(role="system", parts=(TextPart(text=text),))
