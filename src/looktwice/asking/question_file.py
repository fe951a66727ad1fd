"""A file of questions and the file of their answers: in order, resumable, a bad row told and passed over."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from looktwice.asking.asked import Asked
from looktwice.asking.line_file import Add, LineFile
from looktwice.asking.progress import Watched
from looktwice.errors import ConfigError, DataError, LooktwiceError, counted, one_line
from looktwice.formats.files import RowFile, kind_of
from looktwice.messages import Conversation, Message, VideoPart, check_question, system, user
from looktwice.paths import expanded
from looktwice.processing.addresses import source_of
from looktwice.processing.shown import parts_shown

if TYPE_CHECKING:
    from looktwice.inference import OvisInference

IMAGE_FIELDS = ("image_path", "image", "images")


class QuestionFile:
    """Rows with `question` and, where something is shown, `image_path` (one or a list) or `video`, perhaps `system`.

    A line of the answers has `row` (from 1), `asked` (the row as it is), `model_path` and the keys of an Answer, or
    `error` where the row could not be asked. Each line is written at once and whole. Rows that are answered there are
    not asked again; those that failed are.
    """

    def __init__(self, path: Path, out: Path, *, image_base_path: Path, model_path: str) -> None:
        """Read what is answered already. Raises DataError when the questions cannot be read, ConfigError when the
        answers are another model's or those to other questions."""
        self.rows = RowFile(path)
        self.out = out
        self.file = LineFile(out)
        self.image_base_path = image_base_path
        self.model_path = model_path
        self.kept = {int(line["row"]) for line in self._answered()}
        self.num_failed = 0

    @property
    def num_left(self) -> int:
        return len(self.rows) - len(self.kept)

    @property
    def summary(self) -> str:
        """What stands in the file of answers now."""
        return f"{self.out}: {len(self.kept):,} of {counted(len(self.rows), 'row')} answered"

    def answer_all(self, inference: OvisInference) -> None:
        """Ask what is not answered yet. Raises KeyboardInterrupt, with what is done, when it is interrupted."""
        rows: deque[int] = deque()
        failed: deque[tuple[int, str]] = deque()
        with (
            self.file.writing(self._answered) as add,
            Watched("row", self.num_left, lambda: self.num_failed) as watched,
        ):
            try:
                for asked in inference.finish(self._begun(inference, rows, failed)):
                    number = rows.popleft()
                    while failed and failed[0][0] < number:
                        self._fail(add, *failed.popleft())
                    assert asked.answer is not None
                    if asked.answer.error is not None:
                        self.num_failed += 1
                    self._write(add, number, asked.answer)
                    watched.tell()
                while failed:
                    self._fail(add, *failed.popleft())
                    watched.tell()
            except KeyboardInterrupt as interrupt:
                raise KeyboardInterrupt(*interrupt.args, f"{self.summary}; the same command goes on") from None

    def _begun(self, inference: OvisInference, rows: deque[int], failed: deque[tuple[int, str]]) -> Iterator[Asked]:
        """The rows that can be asked; `rows` gets their numbers, `failed` those of the others and why."""
        for number in range(1, len(self.rows) + 1):
            if number in self.kept:
                continue
            try:
                asked = inference.ask(self._conversation(number))
            except LooktwiceError as error:
                failed.append((number, str(error)))
            except Exception as error:  # such as a picture that takes more memory than there is
                failed.append((number, one_line(f"{type(error).__name__}: {error}")))
            else:
                rows.append(number)
                yield asked

    def _conversation(self, number: int) -> Conversation:
        where, values = self.rows[number - 1]
        if len(given := [name for name in (*IMAGE_FIELDS, "video") if values.get(name) is not None]) > 1:
            raise DataError(f"{where}: {' and '.join(given)} are given; leave one out")
        shown = values[given[0]] if given else None
        written = shown if isinstance(shown, list) else [] if shown is None else [shown]
        if not all(isinstance(one, str) for one in written) or (given == ["video"] and isinstance(shown, list)):
            raise DataError(f"{where}: {given[0]} is {kind_of(shown)}; give a path")
        sources = [source_of(expanded(one), self.image_base_path) for one in written]
        if "question" not in values:
            raise DataError(f"{where}: there is no question; give one as `question`")
        try:
            check_question(values["question"])
            parts = parts_shown(VideoPart(source=sources[0]) if given == ["video"] else sources or None)
        except LooktwiceError as error:
            raise DataError(f"{where}: {error}") from error
        said = values.get("system")
        if said is not None and not isinstance(said, str):
            raise DataError(f"{where}: system is {kind_of(said)}; give a text")
        before: tuple[Message, ...] = (system(said),) if said else ()
        return Conversation(messages=(*before, user(values["question"], *parts)))

    def _values(self, number: int) -> dict[str, Any] | None:
        """A row as it is, None of one that cannot be read."""
        try:
            return self.rows[number - 1].values
        except DataError:
            return None

    def _lines(self) -> Iterator[dict[str, Any]]:
        """The whole lines that are there. Raises ConfigError for one that is no answer to these questions."""
        mend = "name another --out"
        for count, text in self.file.texts():
            try:
                line = json.loads(text)
                number, asked, model_path = int(line["row"]), line["asked"], line["model_path"]
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(f"{self.out}:{count}: not a line of answers to --batch; {mend}") from error
            if model_path != self.model_path:
                raise ConfigError(f"{self.out}:{count}: an answer of {model_path}; {mend}")
            if not 1 <= number <= len(self.rows) or self._values(number) != asked:
                raise ConfigError(f"{self.out}:{count}: row {number} of {self.rows.path} is another one now; {mend}")
            yield line

    def _answered(self) -> Iterator[dict[str, Any]]:
        return (line for line in self._lines() if line.get("error") is None)

    def _fail(self, add: Add, number: int, error: str) -> None:
        self.num_failed += 1
        self._write(add, number, {"error": error})

    def _write(self, add: Add, number: int, said: dict[str, Any]) -> None:
        line = {"row": number, "asked": self._values(number), "model_path": self.model_path, **said}
        add(line)
        if said["error"] is None:
            self.kept.add(number)
