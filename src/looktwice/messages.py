"""A conversation as people write it: roles, texts, pictures or a video. No tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from looktwice.errors import ConfigError

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"
"""The tags around reasoning and around the short answer, as the model writes them."""

Role = Literal["system", "user", "assistant"]
Purpose = Literal["train", "prompt"]
"""What a conversation is written for: to be trained on, or for the model to go on from."""
ImageSource = str | Path | Image.Image
VideoSource = str | Path | Sequence[ImageSource]


@dataclass(frozen=True, kw_only=True)
class TextPart:
    """Text as written. In an assistant message it may hold crop calls; each crop follows its call by itself."""

    text: str


@dataclass(frozen=True, kw_only=True)
class ImagePart:
    """A picture: a path, or one already decoded."""

    source: ImageSource


@dataclass(frozen=True)
class CropPart:
    """The place of the crop that follows a call; what it shows is cut from a picture before it."""


@dataclass(frozen=True, kw_only=True)
class VideoPart:
    """A video: a path, or its frames in order."""

    source: VideoSource


Part = TextPart | ImagePart | CropPart | VideoPart


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn. An assistant's is trained on unless `is_trained` is false; the others never are."""

    role: Role
    parts: tuple[Part, ...]
    is_trained: bool = True


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Messages in order. A crop call refers to the picture that it names, counted from 1, else to the first.

    Raises ConfigError for a video beside pictures or beside another one: the model has not learned to read that.
    """

    messages: tuple[Message, ...]

    def __post_init__(self) -> None:
        if self.videos and len(self.videos) + len(self.images) > 1:
            raise ConfigError(
                f"the conversation shows {len(self.videos)} videos and {len(self.images)} pictures; "
                "give pictures, or one video alone"
            )

    @property
    def images(self) -> list[ImageSource]:
        return [part.source for message in self.messages for part in message.parts if isinstance(part, ImagePart)]

    @property
    def videos(self) -> list[VideoSource]:
        """The video, if there is one."""
        return [part.source for message in self.messages for part in message.parts if isinstance(part, VideoPart)]


def user(text: str, *shown: ImageSource | VideoPart) -> Message:
    """A user message in the recommended form: pictures or the video first, then the text."""
    parts = (part if isinstance(part, VideoPart) else ImagePart(source=part) for part in shown)
    return Message(role="user", parts=(*parts, TextPart(text=text)))


def check_question(text: Any) -> None:
    """Raise ConfigError unless a model can read it: a text of whole letters, not only of blanks."""
    if text is not None and not isinstance(text, str):
        raise ConfigError(f"the question is of type {type(text).__name__}; give a text")
    if not text or not text.strip():
        raise ConfigError("there is no question; give one as `question`")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        letter = text[error.start]
        raise ConfigError(f"the question holds {letter!a}, which is no letter of UTF-8; write it anew") from error


def question_about(text: str, *shown: ImageSource | VideoPart) -> Conversation:
    """The conversation that asks one question about pictures, a video, or nothing to look at."""
    return Conversation(messages=(user(text, *shown),))


def assistant(text: str) -> Message:
    return Message(role="assistant", parts=(TextPart(text=text),))


def system(text: str) -> Message:
    return Message(role="system", parts=(TextPart(text=text),))
