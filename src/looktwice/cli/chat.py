"""`looktwice chat`: a conversation with a model, line by line, at a terminal or from a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from looktwice.cli.arguments import argument, read_command, write_json
from looktwice.cli.ask import THINKING, load, show_answer, shown_with
from looktwice.config import InferenceConfig
from looktwice.errors import ConfigError, LooktwiceError, nearest
from looktwice.model.location import locate
from looktwice.paths import check_output_file, check_shown_file, expanded, place
from looktwice.processing.addresses import source_of

if TYPE_CHECKING:
    from looktwice.asking.answer import Answer
    from looktwice.inference import OvisInference

COMMANDS = {
    "/image": "/image PATH shows one more picture with the next question",
    "/reset": "/reset forgets the conversation and its pictures",
    "/save": "/save FILE.json writes the conversation",
    "/help": "/help says this",
    "/quit": "/quit ends; so does Ctrl-D",
}


def run(words: Sequence[str]) -> int:
    """Talk with a model: looktwice chat outputs/grpo/final_model photo.jpg."""
    given, config = read_command(
        run,
        "chat",
        "[MODEL] [PICTURE...]",
        words,
        InferenceConfig,
        argument("model", nargs="?", help="model folder or hub name; `tiny` is the built-in small model"),
        argument("images", nargs="*", metavar="picture", help="pictures to begin with, or one video"),
        THINKING,
    )
    if given["model"]:
        if "model_path" in config.model_fields_set:
            raise ConfigError("the model is given twice, with --model_path and without; leave one out")
        config = InferenceConfig(**{**config.model_dump(exclude_unset=True), "model_path": given["model"]})
    sources = [_source(image) for image in given["images"]]
    locate(config.model_path)
    shown_with(sources, config.num_frames)
    if sys.stdin.isatty() and sys.stdout.isatty():
        from looktwice.report.live_answer import ask_terminal

        ask_terminal()
    return Talk(load(config), sources).go_through(_lines())


def _source(written: str) -> str | Path:
    """A picture or video that a user names. Raises ImageError when there is no such file."""
    source = source_of(expanded(written))
    if isinstance(source, Path):
        check_shown_file(source)
    return source


def _lines() -> Iterator[str]:
    """What is typed, or piped in, line by line."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    with suppress(ImportError):
        import readline  # noqa: F401, the line can then be edited, and earlier ones be had again
    print(*COMMANDS.values(), sep="\n")
    with suppress(EOFError):
        while True:
            yield input("> ")
    print()


class Talk:
    """One conversation: its answers so far, and what waits to be shown with the next question."""

    def __init__(self, inference: OvisInference, sources: Sequence[str | Path]) -> None:
        self.inference = inference
        self.waiting = [*sources]
        self.answers: list[Answer] = []
        self.num_errors = 0

    def go_through(self, lines: Iterator[str]) -> int:
        """Answer line by line; a line that fails is told and passed over. 1 if one did that nobody typed."""
        from looktwice.console import say

        for line in map(str.strip, lines):
            if line == "/quit":
                break
            try:
                self._obey(line)
            except LooktwiceError as error:
                self.num_errors += 1
                say(f"looktwice: {error}", stderr=True)
        return 1 if self.num_errors and not sys.stdin.isatty() else 0

    def _obey(self, line: str) -> None:
        command, _, rest = line.partition(" ")
        if not line:
            return
        if not line.startswith("/"):
            self._ask(line)
        elif command == "/image":
            source = _source(rest.strip())
            shown_with([source], self.inference.config.num_frames)
            self.waiting.append(source)
        elif command == "/reset":
            self.waiting, self.answers = [], []
        elif command == "/save":
            self._save(rest.strip())
        elif command == "/help":
            print(*COMMANDS.values(), sep="\n")
        else:
            hint = nearest(command, COMMANDS) or f" There are {', '.join(COMMANDS)}."
            raise ConfigError(f"no such command {command}.{hint}")

    def _ask(self, question: str) -> None:
        shown = shown_with(self.waiting, self.inference.config.num_frames)
        history = self.answers[-1].history if self.answers else None
        try:
            show_answer(self.inference, self._keep, question=question, history=history, **shown)
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            print("\n(stopped; the question is forgotten)")

    def _keep(self, answer: Answer) -> None:
        self.answers.append(answer)
        self.waiting = []

    def _save(self, name: str) -> None:
        if not name:
            raise ConfigError("/save needs the name of a file: /save talk.json")
        path = place(name)
        check_output_file(path, "/save")
        turns: list[dict[str, Any]] = []
        for answer in self.answers:
            turns.append({"question": _question_of(answer), **answer})
        images = [str(source) for source in self.answers[-1].history.images] if self.answers else []
        write_json(path, {"model_path": self.inference.config.model_path, "images": images, "turns": turns})
        print(f"{path}: {len(turns)} answers", file=sys.stderr)


def _question_of(answer: Answer) -> str:
    """The text of the question that was answered: the last but one message."""
    return "".join(getattr(part, "text", "") for part in answer.history.messages[-2].parts)
