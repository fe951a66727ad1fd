"""An answer cut into passages for people to read: its tags become kinds, its calls passages of their own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

from looktwice.calls import TOOL_CALL_CLOSE, TOOL_CALL_OPEN, split_calls
from looktwice.messages import THINK_CLOSE, THINK_OPEN

Kind = Literal["thinking", "call", "tool", "text", "answer"]

_TAG = re.compile(r"(</?(?:think|answer|tool_response)>)", re.IGNORECASE)
_OPENS: dict[str, Kind] = {"<think>": "thinking", "<answer>": "answer", "<tool_response>": "tool"}


class Passage(NamedTuple):
    """Some text without its tags. That of a call is what was written between them, such as `[1, 2, 30, 40]`."""

    kind: Kind
    text: str


def passages_of(text: str) -> Iterator[Passage]:
    """The passages of what an assistant wrote, in order; empty ones are left out, but a call never is.

    What stands before a `</think>` is thinking though the tag that opens it is in the prompt. A tag that is never
    closed, as in an answer that was cut off, holds up to the end.
    """
    before_close, closing_tag, _ = text.partition(THINK_CLOSE)
    kind: Kind = "thinking" if closing_tag and THINK_OPEN not in before_close else "text"
    around = kind
    for segment in split_calls(text):
        said, call = segment.removesuffix(TOOL_CALL_CLOSE), ""
        if is_call := segment.endswith(TOOL_CALL_CLOSE):
            head, opening, tail = said.rpartition(TOOL_CALL_OPEN)
            said, call = (head, tail) if opening else (tail, "")
        for piece in _TAG.split(said):
            if piece.lower() in _OPENS:
                around, kind = kind, _OPENS[piece.lower()]
            elif _TAG.fullmatch(piece):
                kind = around if kind == "tool" else "text"  # thinking goes on after the words of the tool
            elif piece.strip():
                yield Passage(kind, piece.strip())
        if is_call:
            yield Passage("call", call.strip())
