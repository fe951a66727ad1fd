"""Text on its way to a client: blanks at its ends and stop texts left out, and the logprobs of its tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from looktwice.asking.events import UNFINISHED


class Trimmer:
    """Text as it comes, without blanks at its beginning and end, and without the stop text that ends it.

    What may become one of these is held back.
    """

    def __init__(self, stop_texts: tuple[str, ...] = ()) -> None:
        self.stop_texts = stop_texts
        self.held = ""
        self.has_begun = self.is_over = False

    def add(self, text: str) -> str:
        """What is certain now."""
        if self.is_over:
            return ""
        self.held += text
        places = [place for stop in self.stop_texts if (place := self.held.find(stop)) >= 0]
        if places:
            self.held, self.is_over = self.held[: min(places)], True
            return self._begun(self.held.rstrip())
        kept = len(self.held.rstrip())
        for stop in self.stop_texts:
            begun = (place for place in range(len(self.held)) if stop.startswith(self.held[place:]))
            kept = min(kept, next(begun, kept))
        told, rest = self.held[:kept], self.held[kept:]
        # blanks before what is held back are held back too
        bare = told.rstrip()
        self.held = told[len(bare) :] + rest
        return self._begun(bare)

    def end(self) -> str:
        """What was held back and is no blank, now that nothing follows."""
        told, self.held = "" if self.is_over else self.held.rstrip(), ""
        self.is_over = True
        return self._begun(told)

    def _begun(self, text: str) -> str:
        if not self.has_begun:
            text = text.lstrip()
            self.has_begun = bool(text)
        return text


def logprobs_of(tokens: Sequence[tuple[int, float]], decode: Callable[[list[int]], str]) -> dict[str, Any]:
    """Logprobs as chat completions write them. Of a token that is part of a letter `bytes` are not known, nor is the
    logprob where vLLM leaves ids out of the distribution: both are None."""
    content = []
    for token, logprob in tokens:
        text = decode([token])
        whole = None if UNFINISHED in text else [*text.encode()]
        known = None if math.isnan(logprob) else logprob
        content.append({"token": text, "logprob": known, "bytes": whole, "top_logprobs": []})
    return {"content": content, "refusal": None}
