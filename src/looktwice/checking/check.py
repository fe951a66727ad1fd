"""Judging data files before anything is trained: rows by an Examiner, and here what only the set as a whole shows."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path

from looktwice.checking.rows import Brief, Examiner, Findings, FrameEvidence, Rows
from looktwice.config import CheckConfig
from looktwice.data.loader import prepare_batches
from looktwice.data.problems import Problem
from looktwice.data.reasons import REASONS
from looktwice.errors import DataError, counted
from looktwice.formats.sample_file import SampleFile, unused_names
from looktwice.processing.processor import Ovis2_5Processor

CHUNK = 256
"""Rows that are examined at a time."""
ROWS_FOR_WORKERS, MOST_WORKERS = 50_000, 16
"""Rows of a file from which on workers are worth their start, and how many there are by default at the most."""

PLACES_KEPT = 100


@dataclass(kw_only=True)
class Verdict:
    """What was found, counted by reason, with the first places of each, a picture once.

    `rows_with` counts the rows of each picture that cannot be used; `unchecked`: by flag, what was not checked without
    it.
    """

    num_rows: int = 0
    num_samples: int = 0
    num_images: int = 0
    formats: dict[str, str] = field(default_factory=dict)
    unchecked: dict[str, str] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    first: defaultdict[str, list[Problem]] = field(default_factory=lambda: defaultdict(list))
    rows_with: Counter[tuple[str, ...]] = field(default_factory=Counter)
    bad_rows: set[int] = field(default_factory=set)

    def add(self, problem: Problem) -> None:
        self.counts[problem.reason] += 1
        if problem.field == "picture":
            self.rows_with[problem.cause] += 1
        if self.rows_with[problem.cause] < 2 and len(self.first[problem.reason]) < PLACES_KEPT:
            self.first[problem.reason].append(problem)
        if problem.is_fatal:
            self.bad_rows.add(hash(problem.where))

    @property
    def would_train(self) -> bool:
        return not self.bad_rows

    @property
    def reasons(self) -> list[str]:
        """The reasons found, fatal ones first, then by count."""
        return sorted(self.counts, key=lambda reason: (not REASONS[reason].is_fatal, -self.counts[reason], reason))

    def __str__(self) -> str:
        """Whether training would run, in words."""
        rows = counted(self.num_rows, "row")
        if self.bad_rows:
            places, samples = counted(len(self.bad_rows), "place"), counted(self.num_samples, "readable sample")
            return f"training would stop: {places} to mend or leave out, in {rows} with {samples}"
        num_notes = sum(self.counts.values())
        notes = f", with {counted(num_notes, 'note')} to look at" if num_notes else ", and nothing was found"
        return f"training would run: {counted(self.num_samples, 'sample')} in {rows}{notes}"

    def as_json(self) -> dict[str, object]:
        """All that is known, for machines: each reason with its first 100 places."""
        return {
            "would_train": self.would_train,
            "rows": self.num_rows,
            "samples": self.num_samples,
            "pictures": self.num_images,
            "formats": self.formats,
            "unchecked": self.unchecked,
            "reasons": {
                reason: {
                    "count": self.counts[reason],
                    "is_fatal": REASONS[reason].is_fatal,
                    "meaning": REASONS[reason].meaning,
                    "mend": REASONS[reason].mend,
                    "first": [
                        {
                            "where": one.where,
                            "field": one.field,
                            "what": one.what,
                            "mend": one.mend,
                            "rows": self.rows_with.get(one.cause, 1),
                        }
                        for one in self.first[reason]
                    ],
                }
                for reason in self.reasons
            },
        }


def judge(paths: Sequence[Path], config: CheckConfig, processor: Ovis2_5Processor | None = None) -> Verdict:
    """Judge training files, and the validation file of the settings against them.

    Holds some 300 bytes for each sample and each picture, never the rows. Without a processor lengths and the tokens
    of calls are not checked.
    """
    return Judge(config, processor).judge(paths)


class Judge:
    """One pass over data files; see `judge`."""

    def __init__(self, config: CheckConfig, processor: Ovis2_5Processor | None = None) -> None:
        self.config = config
        self.examiner = Examiner(config, processor)
        self.verdict = Verdict()
        self.questions: dict[int, tuple[int, int]] = {}
        self.files: list[SampleFile] = []
        self.num_training_files = 0
        self.images: set[int] = set()
        self.training_images: frozenset[int] = frozenset()
        self.leaked: set[int] = set()
        self.told: set[int] = set()
        self.evidence = FrameEvidence()
        if processor is None:
            unchecked = "token lengths, calls under tokenising, the sizes that this model sees"
            self.verdict.unchecked["--model_name"] = unchecked
        if not config.decode:
            self.verdict.unchecked["--decode"] = "damage inside pictures, pictures that are equal under other names"

    def judge(self, paths: Sequence[Path], fatal: defaultdict[str, list[Problem]] | None = None) -> Verdict:
        """What was found. What is fatal is also added to `fatal`, where that is given, under the place of its row."""
        for problem in self.problems(paths):
            self.verdict.add(problem)
            if fatal is not None and problem.is_fatal:
                fatal[problem.where].append(problem)
        return self.verdict

    def problems(self, paths: Sequence[Path]) -> Iterator[Problem]:
        """All problems, file by file."""
        for path in paths:
            yield from self.of_file(path)
        self.num_training_files = len(self.files)
        if self.config.val_data_path:
            self.training_images = frozenset(self.images)
            yield from self.of_file(self.config.val_data_path)
        yield from self.evidence.problems()
        self.verdict.num_images = len(self.images)

    def of_file(self, path: Path) -> Iterator[Problem]:
        try:
            file = self.examiner.opened(path)
        except DataError as error:
            words = str(error).removeprefix(f"{path}: ").removeprefix(f"{path}:")
            yield Problem.told(words, reason="unusable_file", where=str(path), field="")
            return
        self.files.append(file)
        self.verdict.num_rows += len(file)
        num_samples, num_too_long = 0, 0
        reading = file.new_reading()
        for findings in self.findings(file):
            yield from filter(self.is_new, findings.problems)
            for brief in findings.briefs:
                yield from self.repeats(brief)
            num_samples += len(findings.briefs)
            # a sample may be too long as a sequence and as a prompt
            too_long = {(one.where, one.field) for one in findings.problems if one.reason == "over_length"}
            num_too_long += len(too_long)
            reading.misspelt.update(findings.reading.misspelt)
            reading.ignored.update(findings.reading.ignored)
            reading.unused.update(findings.reading.unused)
            self.evidence.add(findings.evidence)
        self.verdict.num_samples += num_samples
        if num_samples:
            self.verdict.formats[str(path)] = file.format.name
        if self.config.length_policy == "drop" and 0 < num_samples <= num_too_long:
            what = f"every sample is longer than max_length {self.config.max_length}"
            yield Problem(reason="too_long", where=str(path), field="", what=what)
        for warning in unused_names(reading):
            yield Problem(reason="ignored_field", where=str(path), field="", what=warning)

    def findings(self, file: SampleFile) -> Iterator[Findings]:
        """What examining the rows of a file gives, in their order, in worker processes where there are many."""
        num_workers = self.config.num_workers
        if num_workers is None:  # each would unpack a compressed file for itself
            is_worth_it = len(file) >= ROWS_FOR_WORKERS and not file.rows.is_packed
            num_workers = min(os.cpu_count() or 1, MOST_WORKERS) if is_worth_it else 0
        starts = range(0, len(file), CHUNK)
        chunks = ([Rows(file.path, start, min(start + CHUNK, len(file)))] for start in starts)
        with closing(prepare_batches(self.examiner, chunks, join=itemgetter(0), num_workers=num_workers)) as findings:
            yield from findings

    def is_new(self, problem: Problem) -> bool:
        """Whether the same was not told before: of a picture once a row, or once at all where it is no error."""
        if problem.field != "picture":
            return True
        key = hash((problem.reason, problem.what, problem.where if problem.is_fatal else ""))
        is_new = key not in self.told
        self.told.add(key)
        return is_new

    def repeats(self, brief: Brief) -> Iterator[Problem]:
        """The same question about the same pictures, in the training files or across to the validation file."""
        number = len(self.files) - 1
        file, earlier = self.questions.setdefault(brief.question, (number, brief.row))
        is_validation = bool(self.num_training_files) and number >= self.num_training_files
        if (file, earlier) != (number, brief.row):
            is_leak = is_validation and file < self.num_training_files
            what = f"also at {self.files[file].rows.where(earlier)}"
            reason = "leaked_question" if is_leak else "duplicate"
            yield Problem(reason=reason, where=brief.where, field=brief.field, what=what)
        for identity, name in brief.images:
            if identity in self.training_images and identity not in self.leaked:
                self.leaked.add(identity)
                yield Problem(reason="leaked_picture", where=brief.where, field=brief.field, what=name)
            self.images.add(identity)
