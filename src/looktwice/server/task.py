"""What is to be done for a request, whichever endpoint it came by: a conversation, how to answer it, how often."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from looktwice.asking.answer import remembered
from looktwice.config import AnswerConfig, ServeConfig
from looktwice.errors import LooktwiceError
from looktwice.geometry import PixelPolicy
from looktwice.messages import Conversation, ImagePart, Message, Part, Role, TextPart
from looktwice.server.refusal import Refusal, refusal_of
from looktwice.server.schema import ChatMessage, Content, ImageContent, InputImage, InputMessage, Looking, TextContent
from looktwice.server.shown_images import ImageRules, held_address, is_web, shown_image

SEEDS = 2**32


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A picture of a turn, by its address."""

    url: str


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One message of a request: texts and pictures in order."""

    role: Role
    parts: tuple[str | Shown, ...]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A request, judged. `schema` is that of the JSON that is to be answered: None is any text, True any object."""

    turns: tuple[Turn, ...]
    generation: AnswerConfig
    model: str | None = None
    count: int = 1
    min_pixels: int | None = None
    max_pixels: int | None = None
    schema: dict[str, Any] | bool | None = None
    stop_texts: tuple[str, ...] = ()
    crop_images: bool = False
    with_ids: bool = False
    with_logprobs: bool = False
    is_streamed: bool = False
    with_usage: bool = False

    def policy(self, own: PixelPolicy) -> PixelPolicy:
        """The pixel bounds of this request. Raises Refusal where they contradict each other."""
        try:
            return own.override(image_min_pixels=self.min_pixels, image_max_pixels=self.max_pixels)
        except LooktwiceError as error:
            raise refusal_of(error, "max_pixels") from error

    @property
    def has_web_images(self) -> bool:
        """Whether a picture is to be fetched."""
        return any(isinstance(part, Shown) and is_web(part.url) for turn in self.turns for part in turn.parts)

    def fetched(self, rules: ImageRules) -> Task:
        """The same with the pictures of the web in place of their addresses. Raises Refusal as `conversation` does."""

        def held(part: str | Shown) -> str | Shown:
            is_there = isinstance(part, Shown) and is_web(part.url)
            return Shown(url=held_address(part.url, rules)) if is_there else part  # type: ignore[union-attr]

        turns = (replace(turn, parts=tuple(map(held, turn.parts))) for turn in self.turns)
        return replace(self, turns=tuple(turns))

    def conversation(self, rules: ImageRules) -> Conversation:
        """The conversation with its pictures decoded. Raises Refusal for one that may not be had or is none."""
        return Conversation(messages=tuple(_message(turn, rules) for turn in self.turns))


def turn_of(message: ChatMessage | InputMessage, place: str) -> Turn:
    """A message of either endpoint; `place` is what errors call it. Earlier answers are kept without their thinking
    and calls, as the model reads them."""
    role: Role = "system" if message.role == "developer" else message.role
    content = message.content if isinstance(message.content, list) else [message.content or ""]
    parts = tuple(_part(part) for part in content)
    if role != "user" and any(isinstance(part, Shown) for part in parts):
        raise Refusal(f"{place}: pictures stand in messages of the user; this one is of role {role}", param=place)
    if role == "assistant":
        parts = (remembered("".join(part for part in parts if isinstance(part, str))),)
    elif not any(part if isinstance(part, Shown) else part.strip() for part in parts):
        raise Refusal(f"{place}: a message of role {role} without content; write some, or leave it out", param=place)
    return Turn(role=role, parts=tuple(part for part in parts if part))


def check_turns(turns: Sequence[Turn], config: ServeConfig, place: str) -> None:
    """Raise Refusal for a conversation that nobody can answer, or that shows too much."""
    if turns[-1].role != "user":
        raise Refusal(f"{place}: the last message is of role {turns[-1].role}; end with one of the user", param=place)
    num_images = sum(isinstance(part, Shown) for turn in turns for part in turn.parts)
    if num_images > config.max_images:
        raise Refusal(
            f"{place}: {num_images} pictures, more than {config.max_images}; leave some out",
            param=place,
            code="too_many_images",
        )


def generation_of(request: Looking, config: ServeConfig, **given: Any) -> AnswerConfig:
    """How a request is answered: what it says, then what the server was started with. Raises Refusal."""
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_crops", "thinking_budget")
    settings = {name: getattr(request, name) for name in names} | given
    settings |= {"enable_thinking": request.thinking} if request.thinking is not None else {}
    if request.crops is False:
        if request.max_crops:
            raise Refusal("crops is false and max_crops is given; leave one out", param="crops")
        settings["max_crops"] = 0
    if request.seed is not None:
        settings["seed"] = request.seed % SEEDS
    asked = settings.get("max_new_tokens")
    if asked is not None and asked > config.max_answer_tokens:
        raise Refusal(
            f"{asked:,} tokens are asked for, and this server writes at most {config.max_answer_tokens:,}",
            param="max_tokens",
            code="too_many_tokens",
        )
    settings["max_new_tokens"] = asked or min(config.max_new_tokens, config.max_answer_tokens)
    settings["max_seconds"] = min(request.max_seconds or config.request_seconds, config.request_seconds)
    try:
        return config.answer(**{name: value for name, value in settings.items() if value is not None})
    except LooktwiceError as error:
        raise refusal_of(error) from error


def _part(part: str | Content) -> str | Shown:
    if isinstance(part, ImageContent):
        return Shown(url=part.image_url.url)
    if isinstance(part, InputImage):
        return Shown(url=part.image_url)
    return part.text if isinstance(part, TextContent) else part


def _message(turn: Turn, rules: ImageRules) -> Message:
    parts: list[Part] = []
    for part in turn.parts:
        if isinstance(part, Shown):
            parts.append(ImagePart(source=shown_image(part.url, rules)))
        else:
            parts.append(TextPart(text=part))
    return Message(role=turn.role, parts=tuple(parts))
