"""Judging data files before anything is trained: each row, each picture's header, each box, and the set as a whole."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from looktwice.calls import TOOL_CALL_OPEN, parse_call
from looktwice.config import CheckConfig
from looktwice.data.faults import (
    SLACK_PX,
    Picture,
    Source,
    View,
    calls_of,
    decoded,
    inspect_all,
    inspected,
    overhang,
    problem_of,
    sample_problems,
)
from looktwice.data.lengths import over_limit, purposes_of, sequence_lengths, shrunk_policy
from looktwice.data.problems import Problem
from looktwice.data.records import SampleFile, unused_names
from looktwice.data.sample import Sample, text_of
from looktwice.data.verdict import Verdict
from looktwice.errors import BoxError, DataError
from looktwice.geometry import Size
from looktwice.processing.images import name_of
from looktwice.processing.processor import Ovis2_5Processor

CHUNK = 256
"""Rows that are judged at a time: their texts are tokenised together."""
LARGE_SIDE, MIN_TELLING_BOXES = 1500, 5
"""Boxes on pictures of at least this side tell pixels from thousandths, when there are this many."""


def judge(paths: Sequence[Path], config: CheckConfig, processor: Ovis2_5Processor | None = None) -> Verdict:
    """Judge training files, and the validation file of the settings against them.

    Holds about 200 bytes for each sample and each picture, never the rows. Without a processor lengths and the tokens
    of calls are not checked.
    """
    return Judge(config, processor).judge(paths)


class Judge:
    """One pass over data files; see `judge`."""

    def __init__(self, config: CheckConfig, processor: Ovis2_5Processor | None = None) -> None:
        self.config = config
        self.processor = processor
        self.verdict = Verdict()
        self.view = View.of(processor) if processor else View.by_default(config)
        self.questions: dict[int, tuple[int, int]] = {}
        self.files: list[SampleFile] = []
        self.num_training_files = 0
        self.pictures: dict[int, Picture] = {}
        self.training_pictures: frozenset[int] = frozenset()
        self.seen_in_validation: set[int] = set()
        self.told: set[int] = set()
        self.frame_evidence = FrameEvidence()
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
            self.training_pictures = frozenset(picture.identity for picture in self.pictures.values())
            yield from self.of_file(self.config.val_data_path)
        yield from self.frame_evidence.problems()
        self.verdict.num_pictures = len(self.pictures)

    def of_file(self, path: Path) -> Iterator[Problem]:
        try:
            file = SampleFile.of(path, self.config)
        except DataError as error:
            words = str(error).removeprefix(f"{path}: ").removeprefix(f"{path}:")
            yield Problem.told(words, reason="unusable_file", where=str(path), field="")
            return
        self.files.append(file)
        self.verdict.formats[str(path)] = file.format.name
        self.verdict.num_rows += len(file)
        reading = file.new_reading()
        num_samples, num_too_long = 0, self.verdict.counts["over_length"]
        for start in range(0, len(file), CHUNK):
            reading.problems.clear()
            rows = range(start, min(start + CHUNK, len(file)))
            samples = [(sample, row) for row in rows for sample in file.read_row(row, reading)]
            num_samples += len(samples)
            yield from reading.problems
            yield from filter(self.is_new, self.sample_problems([sample for sample, _ in samples]))
            for sample, row in samples:
                yield from self.repeats(sample, row)
                self.frame_evidence.see(sample, self.view, self.picture_of)
        self.verdict.num_samples += num_samples
        num_too_long = self.verdict.counts["over_length"] - num_too_long
        if self.config.length_policy == "drop" and 0 < num_samples <= num_too_long:
            what = f"every sample is longer than max_length {self.config.max_length}"
            yield Problem(reason="too_long", where=str(path), field="", what=what)
        for warning in unused_names(reading):
            yield Problem(reason="ignored_field", where=str(path), field="", what=warning)

    def sample_problems(self, samples: Sequence[Sample]) -> Iterator[Problem]:
        """What is wrong with samples each by itself, whatever was judged before."""
        self.look_at(source for sample in samples for source in sample.image_paths)
        good: list[Sample] = []
        for sample in samples:
            found = [*sample_problems(sample, stage=self.config.stage, view=self.view, picture_of=self.picture_of)]
            if not any(problem.is_fatal for problem in found):
                good.append(sample)
            yield from found
        if self.processor:
            yield from self.token_problems(good, self.processor)

    def look_at(self, sources: Iterable[Source]) -> None:
        """Read the headers of pictures not seen before."""
        new = {key: source for source in sources if (key := picture_key(source)) not in self.pictures}
        self.pictures.update(zip(new, inspect_all([*new.values()], decoded if self.config.decode else inspected)))

    def picture_of(self, source: Source) -> Picture:
        """What is known of a picture that was looked at."""
        return self.pictures[picture_key(source)]

    def is_new(self, problem: Problem) -> bool:
        """Whether the same was not told before: of a picture once a row, or once at all where it is no error."""
        if problem.field != "picture":
            return True
        key = hash((problem.reason, problem.what, problem.where if problem.is_fatal else ""))
        is_new = key not in self.told
        self.told.add(key)
        return is_new

    def repeats(self, sample: Sample, row: int) -> Iterator[Problem]:
        """The same question about the same pictures, in the training files or across to the validation file."""
        shown = [self.picture_of(source).identity for source in sample.image_paths]
        asked = [text_of(message) for message in sample.conversation.messages if message.role == "user"]
        key = hash((*shown, *asked))
        number = len(self.files) - 1
        file, earlier = self.questions.setdefault(key, (number, row))
        is_validation = bool(self.num_training_files) and number >= self.num_training_files
        if (file, earlier) != (number, row):
            is_leak = is_validation and file < self.num_training_files
            what = f"also at {self.files[file].rows.where(earlier)}"
            yield problem_of(sample, "leaked_question" if is_leak else "duplicate", what)
        for picture, source in zip(shown, sample.image_paths) if is_validation else ():
            if picture in self.training_pictures and picture not in self.seen_in_validation:
                self.seen_in_validation.add(picture)
                yield problem_of(sample, "leaked_picture", name_of(source))

    def token_problems(self, samples: Sequence[Sample], processor: Ovis2_5Processor) -> Iterator[Problem]:
        """Samples that are too long, and calls that are no longer the same after tokenising."""
        limit = self.config.max_length

        def size_of(source: object) -> Size:
            header = self.picture_of(source).header  # type: ignore[arg-type]
            assert header is not None
            return header.size

        for purpose in purposes_of(self.config.stage):
            lengths = sequence_lengths(samples, processor, size_of, purpose)
            for sample, length in zip(samples, lengths):
                if length > limit:
                    can_be_kept = self.config.length_policy == "drop" or (
                        self.config.length_policy == "shrink_images"
                        and shrunk_policy(sample, processor, limit, size_of, purpose)
                    )
                    reason = "over_length" if can_be_kept else "too_long"
                    yield problem_of(sample, reason, over_limit(length, limit, purpose))
        calls = [(sample, segment) for sample in samples for segment in calls_of(sample)]
        texts = [segment[segment.rindex(TOOL_CALL_OPEN) :] for _, segment in calls]
        for (sample, _), call, read in zip(calls, texts, processor.template.read_back(texts)):
            if read != call:
                yield problem_of(sample, "call_text_changes", f"{call!r} reads {read!r} after tokenising")


class FrameEvidence:
    """Boxes declared as pixels: whether all of them could be thousandths instead.

    They could if no number is above 1000 (nor all at most 100), and enough boxes tell the two apart: on large pictures,
    or because they reach over a small one.
    """

    def __init__(self) -> None:
        self.highest = 0.0
        self.num_telling = 0
        self.first: Sample | None = None

    def see(self, sample: Sample, view: View, picture_of: Callable[[Source], Picture]) -> None:
        header = picture_of(sample.image_paths[0]).header if sample.image_paths else None
        if header is None or (sample.box_frame or view.box_frame) != "original_px":
            return
        for call in calls_of(sample):
            with suppress(BoxError):
                box = parse_call(call)
                self.highest = max(self.highest, *box)
                if min(header.size) >= LARGE_SIDE or overhang(box, header.size) > SLACK_PX:
                    self.num_telling += 1
                    self.first = self.first or sample

    def problems(self) -> Iterator[Problem]:
        if self.first and 100 < self.highest <= 1000 and self.num_telling >= MIN_TELLING_BOXES:
            what = f"{self.num_telling} boxes on large pictures or beyond small ones, no number above 1000"
            yield problem_of(self.first, "box_looks_norm1000", what)


def picture_key(source: Source) -> int:
    """A few bytes that stand for a picture's path or data: URL."""
    return hash(str(source))
