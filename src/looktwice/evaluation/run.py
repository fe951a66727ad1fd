"""Asking a model the questions of benchmarks under every condition, and writing each answer down as it is there."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from looktwice.asking.asked import Asked
from looktwice.asking.line_file import Add, LineFile
from looktwice.asking.progress import Watched
from looktwice.benches.files import BenchFiles
from looktwice.benches.item import Item, Said
from looktwice.config import AnswerConfig, EvalConfig
from looktwice.engine.sampling import mixed_seed
from looktwice.errors import LooktwiceError, counted, one_line
from looktwice.evaluation.conditions import (
    CROPS,
    FOLLOWS_CROPS,
    SHARING,
    Begun,
    Setting,
    begin_item,
    copies,
    is_possible,
)
from looktwice.evaluation.judged import judgements
from looktwice.evaluation.presets import wording_of
from looktwice.evaluation.recipe import check_same, recipe_of, start_of
from looktwice.evaluation.result import (
    Key,
    Line,
    Result,
    answer_line,
    failed_line,
    key_of,
    with_judgement,
    without_judgement,
)
from looktwice.geometry import Box
from looktwice.inference import OvisInference
from looktwice.rewarding.judge import Judge

BLOCK = 4
"""Rows that a limit keeps together."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """The part of the questions that this process asks: number `index` (from 0) of `count`."""

    index: int = 0
    count: int = 1

    def path(self, out: Path) -> Path:
        """Where this process writes: `out` itself, or beside it a file of its own."""
        return out if self.count == 1 else out.with_name(f"{out.stem}.{self.index + 1}-of-{self.count}{out.suffix}")


def parts_of(out: Path) -> list[Path]:
    """The files that the processes of an evaluation have written beside `out`."""
    return sorted(out.parent.glob(f"{out.stem}.*-of-*{out.suffix}"))


def rows_of(num_rows: int, limit: int | None) -> list[int]:
    """The rows that are asked: all, or so many in blocks spread evenly over them. Variants of one question, which most
    sets have beside each other, so stay together."""
    if limit is None or limit >= num_rows:
        return list(range(num_rows))
    num_blocks, of_all = math.ceil(limit / BLOCK), math.ceil(num_rows / BLOCK)
    starts = [place * of_all // num_blocks * BLOCK for place in range(num_blocks)]
    rows = [row for start in starts for row in range(start, min(start + BLOCK, num_rows))]
    return rows[:limit]


class Evaluation:
    """One evaluation that writes into `out`; what is answered there, or in the parts beside it, is not asked again."""

    def __init__(
        self,
        config: EvalConfig,
        inference: OvisInference,
        benches: Mapping[str, BenchFiles],
        out: Path,
        share: Share = Share(),
    ) -> None:
        """Raises ConfigError when the file is no result, or was made by another recipe."""
        self.config, self.inference, self.benches = config, inference, benches
        self.share, self.out = share, out
        self.file = LineFile(share.path(out))
        self.parts = parts_of(out) if share.count == 1 else []
        others = [out] if share.count > 1 else self.parts
        self.recipe = recipe_of(config, inference, benches)
        self.result = Result([*others, self.file.path])
        for start in self.result.starts:
            check_same(self.recipe, start["recipe"], str(self.file.path))
        self.start = {"recipe": self.recipe, "start": start_of(inference, benches, config.data)}
        self.num_failed = 0

    @property
    def conditions(self) -> tuple[str, ...]:
        return (CROPS, *self.config.controls)

    def rows(self, bench: str) -> list[int]:
        """The rows of a benchmark that this process asks."""
        return rows_of(len(self.benches[bench]), self.config.limit)[self.share.index :: self.share.count]

    @property
    def num_answers(self) -> int:
        """Answers that this process is to have, as far as rows hold one item each."""
        num_rows = sum(len(self.rows(bench)) for bench in self.benches)
        return num_rows * len(self.conditions) * self.config.samples

    def run(self) -> None:
        """Ask all that is not answered yet. Raises KeyboardInterrupt, with what is done, when it is interrupted."""
        for path in self.parts:
            LineFile(path).check_free()
        total = max(0, self.num_answers - len(self.result.answers))
        with self.file.writing(self._kept) as add, Watched("question", total, lambda: self.num_failed) as watched:
            add(self.start)
            self.result.starts.append(self.start)
            try:
                for bench in self.benches:
                    for condition in self.conditions:
                        self._ask(bench, condition, add, watched)
                self._judge(add)
            except KeyboardInterrupt as interrupt:
                told = f"{self.file.path}: {counted(len(self.result.answers), 'answer')}"
                raise KeyboardInterrupt(*interrupt.args, f"{told}; the same command goes on") from None
        for path in self.parts:
            path.unlink()

    def _kept(self) -> Iterator[Line]:
        return self.result.lines()

    def _ask(self, bench: str, condition: str, add: Add, watched: Watched) -> None:
        asking = _Asking(self, bench, condition, add, watched)
        for asked in self.inference.finish(asking.begun()):
            asking.answered(asked)

    def _judge(self, add: Add) -> None:
        if self.config.judge is None:
            return
        judge = Judge(url=self.config.judge, model=str(self.config.judge_model), asked="always")
        for line, verdict in judgements(judge, list(self.result.answers.values())):
            key = key_of(line)
            self.result.answers[key] = with_judgement(line, verdict)
            add({**key.names(), "judged": verdict})

    def generation(self, bench: str) -> AnswerConfig:
        thinking, _ = wording_of(self.config, bench)
        return self.config.answer(seed=self.config.seed, enable_thinking=thinking)


class _Asking:
    """The questions of one benchmark under one condition on their way."""

    def __init__(self, of: Evaluation, bench: str, condition: str, add: Add, watched: Watched) -> None:
        self.of, self.bench, self.condition, self.add, self.watched = of, bench, condition, add, watched
        self.files, self.generation = of.benches[bench], of.generation(bench)
        _, self.suffix = wording_of(of.config, bench)
        self.waiting: deque[tuple[Key, int, Item, Begun]] = deque()

    def begun(self) -> Iterator[Asked]:
        """Each question that has to be asked, begun; the others are written down at once."""
        for row in self.of.rows(self.bench):
            if self._is_answered(row):
                continue
            try:
                items = self.files.items(row)
            except LooktwiceError as error:
                self._fail(Key(self.bench, f"{row + 1}", self.condition, 0), row, error)
                continue
            for item in items:
                for key, begun in self._begin_all(row, item):
                    self.waiting.append((key, row, item, begun))
                    yield begun.asked

    def _is_answered(self, row: int) -> bool:
        """Whether a row of one item is, so that it need not even be read."""
        return not self._missing(f"{row + 1}")

    def _missing(self, id: str) -> list[Key]:
        keys = [Key(self.bench, id, self.condition, sample) for sample in range(self.of.config.samples)]
        return [key for key in keys if key not in self.of.result.answers]

    def _begin_all(self, row: int, item: Item) -> list[tuple[Key, Begun]]:
        """The samples of an item that are to be asked, begun; not those that cannot be asked, or are known unasked.

        Siblings are begun all together, also those that were answered before: the number of one decides what is drawn.
        """
        missing = [key for key in self._missing(item.id) if self._is_to_ask(key, item)]
        if not missing:
            return []
        if self.condition not in SHARING:
            return [(key, begun) for key in missing for begun in self._begin(key, row, item, 1)]
        keys = [missing[0]._replace(sample=sample) for sample in range(self.of.config.samples)]
        return list(zip(keys, self._begin(missing[0], row, item, len(keys))))

    def _is_to_ask(self, key: Key, item: Item) -> bool:
        """Whether an item can be asked, and its answer is not known; one that is known is written down."""
        answered = self.of.result.answers.get(key._replace(condition=CROPS))
        if not is_possible(item, self.condition):
            return False
        if self.condition != CROPS and answered and copies(self.condition, answered, self.generation):
            self._write({**without_judgement(answered), **key.names(), "copied_from": CROPS})
            return False
        # where it failed with crops it is told of there
        return self.condition not in FOLLOWS_CROPS or answered is not None

    def _begin(self, key: Key, row: int, item: Item, count: int) -> list[Begun]:
        """An item begun so many times; nothing, and a note of it, where it cannot be."""
        seed = self.of.config.seed
        if self.condition not in SHARING and key.sample:
            seed = mixed_seed(seed, key.sample)
        setting = Setting(generation=self.generation, suffix=self.suffix, seed=seed)
        answered = self.of.result.answers.get(key._replace(condition=CROPS))
        try:
            return begin_item(self.of.inference, item, self.condition, setting, answered, count=count)
        except LooktwiceError as error:
            self._fail(key, row, error)
        except Exception as error:  # such as a picture that takes more memory than there is
            self._fail(key, row, f"{type(error).__name__}: {error}")
        return []

    def answered(self, asked: Asked) -> None:
        """The question that was begun first is answered: judge it by the rules and write it down."""
        key, row, item, begun = self.waiting.popleft()
        assert asked is begun.asked and asked.answer is not None
        if key in self.of.result.answers:
            return
        verdict = self.files.bench.score(item, said_of(begun, self.of.inference.processor.box_frame))
        line = answer_line(key, row, item, begun, verdict, self.of.config.data)
        if line["error"] is not None:
            self._fail(key, row, line["error"])
        else:
            self._write(line)

    def _fail(self, key: Key, row: int, error: object) -> None:
        self.of.num_failed += 1
        line = failed_line(key, row, one_line(str(error)))
        self.of.result.failed[key] = line
        self.add(line)
        self.watched.tell()

    def _write(self, line: Line) -> None:
        key = Key(self.bench, line["id"], self.condition, line["sample"])
        self.of.result.answers[key] = line
        self.of.result.failed.pop(key, None)
        self.add(line)
        self.watched.tell()


def said_of(begun: Begun, box_frame: Any) -> Said:
    """What was said, with the sizes of the first picture and the crops that were cut from it."""
    answer = begun.asked.answer
    assert answer is not None
    crops = [crop.box for crop in answer.crops if crop.box is not None and crop.image_number == 1]
    return Said(
        text=answer.response,
        crops=tuple(Box(*box) for box in crops),
        image_size=begun.image_sizes[0] if begun.image_sizes else None,
        seen_size=begun.seen_sizes[0] if begun.seen_sizes else None,
        box_frame=box_frame,
    )
