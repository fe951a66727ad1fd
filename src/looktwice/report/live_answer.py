"""An answer in the terminal: as plain text when it is whole, or on a screen while it is written."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from PIL import Image
from rich.console import Console, RenderableType

from looktwice.asking.answer import Answer
from looktwice.asking.events import Cropped, Done, Event, Said, Thinking
from looktwice.errors import counted

THINKING_STYLE, CROP_STYLE, ANSWER_STYLE, NOTE_STYLE = "dim", "bold magenta", "bold", "yellow"
CROP_COLUMNS = 24
"""Width of a crop's picture on the screen."""
CUT = {
    "max_turns": "cut by --max_turns",
    "max_tokens": "cut by --max_new_tokens",
    "max_turn_tokens": "cut by --max_turn_tokens",
    "max_visual_tokens": "cut by --max_visual_tokens",
    "max_seconds": "cut by --max_seconds",
    "no_room": "cut: there is no memory for a longer cache; set --max_new_tokens or --max_pixels lower",
}


class LiveAnswer:
    """Writes the events of one answer to a terminal as they come."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.num_crops = 0
        self.kind = ""
        self.is_at_start = True

    def follow(self, events: Iterable[Event]) -> Answer:
        """Show all events; the answer that the last one brings."""
        for event in events:
            self.show(event)
        assert isinstance(event, Done)
        return event.answer

    def show(self, event: Event) -> None:
        if isinstance(event, (Thinking, Said)):
            self._write(event)
        elif isinstance(event, Cropped):
            self.num_crops += 1
            self._end_line()
            self.console.out(crop_line(self.num_crops, event.crop.plain()), style=CROP_STYLE)
            if event.crop.image is not None and (shown := terminal_image(event.crop.image)) is not None:
                self.console.print(shown)
        elif isinstance(event, Done):
            self._end_line()
            for line in end_lines(event.answer):
                self.console.out(line, style=NOTE_STYLE)
            self.console.out(cost_line(event.answer), style=THINKING_STYLE)

    def _write(self, event: Thinking | Said) -> None:
        text = event.text
        if event.kind != self.kind:
            text = text.lstrip()
            if not text:
                return
            self._end_line()
            self.console.out("thinking: " if event.kind == "thinking" else "answer: ", end="", style=NOTE_STYLE)
            self.kind = event.kind
        elif self.is_at_start:
            text = text.lstrip("\n")
        if text:
            style = THINKING_STYLE if event.kind == "thinking" else ANSWER_STYLE
            self.console.out(text, end="", style=style)
            self.is_at_start = text.endswith("\n")

    def _end_line(self) -> None:
        if not self.is_at_start:
            self.console.out("")
        self.is_at_start = True


def plain_lines(answer: Answer) -> Iterator[str]:
    """A whole answer as lines of text."""
    if line := size_line(answer.seen):
        yield line
    if thinking := answer.parsed.think_content:
        yield f"thinking: {thinking}\n"
    yield from (crop_line(number, crop.plain()) for number, crop in enumerate(answer.crops, 1))
    yield f"answer: {answer.parsed.answer_content or answer.said}"
    yield from end_lines(answer)


def crop_line(number: int, crop: Mapping[str, Any]) -> str:
    """A crop's number, its box in pixels, and its picture where that is not the first."""
    if crop["error"] is not None:
        return f"crop {number}: refused, {crop['error']}"
    where = "" if crop["image"] == 1 else f" of picture {crop['image']}"
    return f"crop {number}: {crop['box']}{where}"


def end_lines(answer: Answer) -> Iterator[str]:
    """Why an answer was not ended by the model, if so."""
    if cut := CUT.get(answer.stop_reason):
        yield f"({cut})"
    elif answer.error:
        yield f"(ended by an error: {answer.error})"


def cost_line(answer: Answer) -> str:
    """What an answer took, and at which size the picture was seen."""
    facts = [size_line(answer.seen), counted(answer.tokens.written, "token")]
    if answer.seconds is not None:
        facts.append(f"{answer.seconds.total:.1f} s")
    return "  ".join(filter(None, facts))


def size_line(shown: Mapping[str, Any] | None) -> str:
    """At which size the model saw the picture or video, where that is not the original one."""
    if shown is None or shown["original"] == shown["seen"]:
        return ""
    (width, height), (seen_width, seen_height) = shown["original"], shown["seen"]
    what = f"video: {shown['frames']} frames of" if "frames" in shown else "picture:"
    return f"{what} {width}x{height}, seen as {seen_width}x{seen_height}"


def ask_terminal() -> None:
    """Have the terminal say now what it can show: later its reply, and what a person types meanwhile, would mix."""
    if (shown := terminal_image(Image.new("RGB", (1, 1)))) is not None:
        Console(file=io.StringIO()).print(shown)


def terminal_image(image: Image.Image) -> RenderableType | None:
    """A picture as the terminal can show it, None where the extra `pictures` is not installed."""
    if image.width * image.height == 0:
        return None
    try:
        from textual_image.renderable import Image as Shown
    except ImportError:
        return None
    logging.getLogger("textual_image").setLevel(logging.ERROR)  # it tells of terminals that do not say their size
    return Shown(image, width=CROP_COLUMNS, height="auto")
