"""One question of a benchmark, what a model said to it, and the verdict on that."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from looktwice.geometry import Box, BoxFrame, Size
from looktwice.messages import Conversation, ImageSource, question_about

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True, kw_only=True)
class Item:
    """A question as it is asked, with its gold answer.

    `id` names it within its benchmark: its row, counted from 1, and its number there where a row holds several.
    `question` is all the text that is asked; `about` the bare question, for a judge and for people. `options` are the
    texts of a choice, A first; `gold` its letter, else the right answers. Items of one `group` are variants of one
    question (orders of its options, the two of a pair), which statistics take as one. `gold_boxes` are in original
    pixels of the first picture, and `gold_image` is the region itself where a set gives that. `conversation` is what is
    asked where that is more than one question about the pictures; boxes of calls in it are in `box_frame`, or in the
    model's own. `facts` are what the scorer of a benchmark needs besides.
    """

    id: str = ""
    where: str = ""
    images: tuple[ImageSource, ...]
    question: str
    about: str
    gold: tuple[str, ...]
    options: tuple[str, ...] = ()
    category: str = ""
    group: str = ""
    gold_boxes: tuple[Box, ...] = ()
    gold_image: ImageSource | None = None
    conversation: Conversation | None = None
    box_frame: BoxFrame | None = None
    facts: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def letters(self) -> str:
        """The letters of its options."""
        return LETTERS[: len(self.options)]

    @property
    def asked(self) -> Conversation:
        """The conversation that asks it."""
        return self.conversation or question_about(self.question, *self.images)


@dataclass(frozen=True, kw_only=True)
class Said:
    """What a model said: its whole `text`, and the valid crops of the first picture, in original pixels.

    `image_size` is the first picture's original size and `seen_size` that at which the model saw it; numbers of boxes
    that the text holds are in `box_frame` unless it says otherwise. Sizes are None where nothing was shown.
    """

    text: str
    crops: tuple[Box, ...] = ()
    image_size: Size | None = None
    seen_size: Size | None = None
    box_frame: BoxFrame = "original_px"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How good an answer is: `score` from 0 to 1, None where nobody decided.

    `prediction` is what was taken for the answer, None where none was found; `by` is the rule that found or judged it,
    `none` where no rule found one, and `judge` for a judge. `measures` are further figures by name.
    """

    score: float | None
    prediction: str | None
    by: str
    measures: Mapping[str, float] = dataclasses.field(default_factory=dict)
