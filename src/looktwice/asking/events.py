"""What is told while an answer is written: its thinking and its text bit by bit, each crop, and the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from looktwice.asking.answer import Answer, Crop
from looktwice.calls import TOOL_CALL_CLOSE, TOOL_CALL_OPEN
from looktwice.messages import ANSWER_CLOSE, ANSWER_OPEN, THINK_CLOSE, THINK_OPEN


@dataclass(frozen=True)
class Thinking:
    """More of the thinking, without its tags and without calls."""

    text: str
    kind: Literal["thinking"] = "thinking"


@dataclass(frozen=True)
class Cropped:
    """A call was answered: `crop` has its box in original pixels and its picture, or why it was refused."""

    crop: Crop
    kind: Literal["crop"] = "crop"


@dataclass(frozen=True)
class Said:
    """More of what is said aloud, without calls and without the tags of the answer block.

    `tokens` are the ids sampled for it, with their logprobs; what closes thinking has none.
    """

    text: str
    kind: Literal["answer"] = "answer"
    tokens: tuple[tuple[int, float], ...] = field(default=(), repr=False, compare=False)


@dataclass(frozen=True)
class Done:
    """The answer is whole. It is the last event, also where a limit or an error ended the answer."""

    answer: Answer
    kind: Literal["done"] = "done"


Event = Thinking | Cropped | Said | Done
Tell = Callable[[Event], None]

TAGS = (THINK_OPEN, THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE, TOOL_CALL_OPEN, TOOL_CALL_CLOSE)
UNFINISHED = "\ufffd"
"""What the bytes of half a letter are decoded to."""
MOST_HELD = 8
"""Ids held back for half a letter; no letter has so many bytes."""


class Letters:
    """Ids to text one by one: what is half a letter yet waits for the rest of it."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self.decode = decode
        self.held: list[int] = []

    def add(self, token: int) -> str:
        """The whole letters that the next id completes."""
        self.held.append(token)
        text = self.decode(self.held)
        return "" if text.endswith(UNFINISHED) and len(self.held) < MOST_HELD else self.end()

    def end(self) -> str:
        """What is held back, as it is."""
        text = self.decode(self.held) if self.held else ""
        self.held = []
        return text


class Splitter:
    """Text as it comes, split into thinking and what is said; a beginning that may become a tag is held back.

    A `<think>` opens thinking wherever it stands, as `after_thinking` reads it. Text before a first `</think>` that
    nothing opened has been told as said by then, although the whole response counts it as thinking.
    """

    def __init__(self) -> None:
        self.held = ""
        self.is_thinking = self.is_call = False

    def add(self, text: str) -> Iterator[Thinking | Said]:
        """The events of more text."""
        self.held += text
        while True:
            place, tag = min(((self.held.find(tag), tag) for tag in TAGS if tag in self.held), default=(-1, ""))
            if not tag:
                break
            yield from self._told(self.held[:place])
            self.held = self.held[place + len(tag) :]
            self._pass(tag)
        kept = next(n for n in range(len(self.held) + 1) if any(tag.startswith(self.held[n:]) for tag in TAGS))
        yield from self._told(self.held[:kept])
        self.held = self.held[kept:]

    def end(self) -> Iterator[Thinking | Said]:
        """What was held back, which has become no tag."""
        yield from self._told(self.held)
        self.held = ""

    def _pass(self, tag: str) -> None:
        if tag in (THINK_OPEN, THINK_CLOSE):
            self.is_thinking = tag == THINK_OPEN
        elif tag in (TOOL_CALL_OPEN, TOOL_CALL_CLOSE):
            self.is_call = tag == TOOL_CALL_OPEN

    def _told(self, text: str) -> Iterator[Thinking | Said]:
        if text and not self.is_call:
            yield Thinking(text) if self.is_thinking else Said(text)
