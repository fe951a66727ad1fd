"""Examining rows of data files: all that can be said of them without the rest of the set, in whatever process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from looktwice.calls import TOOL_CALL_OPEN, parse_call
from looktwice.config import CheckConfig
from looktwice.data.image_files import ImageFacts, Source, decoded, fingerprint, inspect_all, inspected
from looktwice.data.lengths import over_limit, purposes_of, sequence_lengths, shrunk_policy
from looktwice.data.problems import (
    SLACK_PX,
    Partial,
    Problem,
    View,
    calls_of,
    overhang,
    partial_problems,
    problem_of,
    question_field,
    sample_problems,
)
from looktwice.data.sample import Sample, text_of
from looktwice.errors import BoxError
from looktwice.formats.reading import Reading
from looktwice.formats.sample_file import SampleFile
from looktwice.geometry import Size
from looktwice.processing.images import name_of
from looktwice.processing.processor import Ovis2_5Processor

LARGE_SIDE, MIN_TELLING_BOXES = 1500, 5
"""Boxes on pictures of at least this side tell pixels from thousandths, when there are this many."""


class Rows(NamedTuple):
    """Rows of a file, from `start` to before `stop`, counted from 0."""

    path: Path
    start: int
    stop: int

    def __str__(self) -> str:
        return f"{self.path}: rows {self.start + 1} to {self.stop}"


class Brief(NamedTuple):
    """What is kept of a sample to compare it with all others.

    `question` is a number that is the same for the same question about the same pictures; `images` are identities
    and names.
    """

    row: int
    where: str
    field: str
    question: int
    images: tuple[tuple[int, str], ...]


@dataclass(kw_only=True)
class Findings:
    """What examining some rows gave; `reading` holds the names of their fields."""

    problems: list[Problem]
    briefs: list[Brief]
    reading: Reading
    evidence: FrameEvidence


class Examiner:
    """Gives the Findings of rows. Remembers the pictures it has looked at, and the files that are open.

    May be sent to another process, which opens files and looks at pictures by itself. Without a processor lengths and
    the tokens of calls are not checked.
    """

    def __init__(self, config: CheckConfig, processor: Ovis2_5Processor | None = None) -> None:
        self.config = config
        self.processor = processor
        self.view = View.of(processor) if processor else View.by_default(config)
        self.files: dict[Path, SampleFile] = {}
        self.facts: dict[int, ImageFacts] = {}

    def __reduce__(self) -> tuple[type[Examiner], tuple[CheckConfig, Ovis2_5Processor | None]]:
        return Examiner, (self.config, self.processor)

    def __call__(self, rows: Rows) -> Findings:
        file = self.opened(rows.path)
        reading = file.new_reading()
        samples = [(row, sample) for row in range(rows.start, rows.stop) for sample in file.read_row(row, reading)]
        evidence = FrameEvidence()
        problems = [*reading.problems, *self.partial_problems(reading.partial)]
        problems += self.sample_problems([sample for _, sample in samples])
        for _, sample in samples:
            self.weigh_boxes(sample, evidence)
        reading.problems.clear()
        reading.partial.clear()
        briefs = [self.brief(row, sample) for row, sample in samples]
        return Findings(problems=problems, briefs=briefs, reading=reading, evidence=evidence)

    def opened(self, path: Path) -> SampleFile:
        """The file, opened once. Raises what `SampleFile.of` raises."""
        if path not in self.files:
            self.files[path] = SampleFile.of(path, self.config)
        return self.files[path]

    def sample_problems(self, samples: Sequence[Sample]) -> Iterator[Problem]:
        """What is wrong with samples, each by itself; their texts are tokenised together."""
        self.look_at(source for sample in samples for source in sample.image_paths)
        good: list[Sample] = []
        for sample in samples:
            found = [*sample_problems(sample, stage=self.config.stage, view=self.view, facts_of=self.facts_of)]
            if not any(problem.is_fatal for problem in found):
                good.append(sample)
            yield from found
        if self.processor:
            yield from self.token_problems(good, self.processor)

    def partial_problems(self, partial: Sequence[Partial]) -> Iterator[Problem]:
        """What else is wrong with samples of which something could not be read."""
        self.look_at(source for one in partial for source in one.sample.image_paths)
        for one in partial:
            yield from partial_problems(one, stage=self.config.stage, view=self.view, facts_of=self.facts_of)

    def look_at(self, sources: Iterable[Source]) -> None:
        """Read the headers of pictures not seen before."""
        new = {key: source for source in sources if (key := hash(str(source))) not in self.facts}
        inspect = decoded if self.config.decode else inspected
        self.facts.update(zip(new, inspect_all([*new.values()], inspect)))

    def facts_of(self, source: Source) -> ImageFacts:
        """What is known of a picture that was looked at."""
        return self.facts[hash(str(source))]

    def brief(self, row: int, sample: Sample) -> Brief:
        images = tuple((self.facts_of(source).identity, name_of(source)) for source in sample.image_paths)
        asked = [text_of(message) for message in sample.conversation.messages if message.role == "user"]
        question = fingerprint(*(identity for identity, _ in images), *asked)
        return Brief(row=row, where=sample.where, field=question_field(sample), question=question, images=images)

    def weigh_boxes(self, sample: Sample, evidence: FrameEvidence) -> None:
        """Add the calls of a sample, whose boxes are declared as pixels, to the evidence."""
        if (sample.box_frame or self.view.box_frame) != "original_px":
            return
        headers = [self.facts_of(source).header for source in sample.image_paths]
        for text, num_shown in calls_of(sample):
            with suppress(BoxError):
                call = parse_call(text)
                if header := call.pick(headers[:num_shown]):
                    is_telling = min(header.size) >= LARGE_SIDE or overhang(call.box, header.size) > SLACK_PX
                    place = (sample.where, sample.field) if is_telling else None
                    evidence.add(FrameEvidence(highest=max(call.box), num_telling=int(is_telling), place=place))

    def token_problems(self, samples: Sequence[Sample], processor: Ovis2_5Processor) -> Iterator[Problem]:
        """Samples that are too long, and calls that are no longer the same after tokenising."""
        limit = self.config.max_length

        def size_of(source: object) -> Size:
            header = self.facts_of(source).header  # type: ignore[arg-type]
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
        calls = [(sample, call.text) for sample in samples for call in calls_of(sample)]
        texts = [segment[segment.rindex(TOOL_CALL_OPEN) :] for _, segment in calls]
        for (sample, _), call, read in zip(calls, texts, processor.template.read_back(texts)):
            if read != call:
                yield problem_of(sample, "call_text_changes", f"{call!r} reads {read!r} after tokenising")


@dataclass(kw_only=True)
class FrameEvidence:
    """Boxes declared as pixels: whether all of them could be thousandths instead.

    They could if no number is above 1000 (nor all at most 100), and enough boxes tell the two apart: on large pictures,
    or because they reach over a small one. `place` is where and in which field the first of these stands.
    """

    highest: float = 0.0
    num_telling: int = 0
    place: tuple[str, str] | None = None

    def add(self, other: FrameEvidence) -> None:
        self.highest = max(self.highest, other.highest)
        self.num_telling += other.num_telling
        self.place = self.place or other.place

    def problems(self) -> Iterator[Problem]:
        if self.place and 100 < self.highest <= 1000 and self.num_telling >= MIN_TELLING_BOXES:
            where, field = self.place
            what = f"{self.num_telling} boxes on large pictures or beyond small ones, no number above 1000"
            yield Problem(reason="box_looks_norm1000", where=where, field=field, what=what)
