"""The samples of a run: training and validation sets, checked and fitted at the start or as their turn comes."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import accumulate, chain
from pathlib import Path
from typing import NamedTuple, overload

from looktwice.config import DataConfig, Stage, StageConfig
from looktwice.data.lengths import Refit, fit_lengths, purposes_of
from looktwice.data.order import BatchOrder
from looktwice.data.problems import View, refuse
from looktwice.data.sample import Sample
from looktwice.errors import DataError, counted
from looktwice.formats.sample_file import SampleFile
from looktwice.paths import append_line
from looktwice.processing.processor import Ovis2_5Processor
from looktwice.training.distributed import World
from looktwice.training.folder import LEFT_OUT
from looktwice.training.start import required

CHECKED_AT_START = 2000
"""Samples that are read, decoded and measured before the model is loaded; a larger set would keep it waiting."""


class ByPlace(Sequence[Sample]):
    """Samples, each of which is had by its place."""

    def at(self, place: int) -> Sample:
        raise NotImplementedError

    @overload
    def __getitem__(self, place: int) -> Sample: ...
    @overload
    def __getitem__(self, place: slice) -> list[Sample]: ...
    def __getitem__(self, place: int | slice) -> Sample | list[Sample]:
        if isinstance(place, slice):
            return [self.at(number) for number in range(*place.indices(len(self)))]
        return self.at(place)


class LargeSet(ByPlace):
    """The samples of a file that is too large to be checked before the start, each read when it is asked for."""

    def __init__(self, file: SampleFile) -> None:
        self.file = file

    def __len__(self) -> int:
        return self.file.num_samples

    def at(self, place: int) -> Sample:
        return self.file.sample(place)


class Joined(ByPlace):
    """The samples of several files, one file after the other."""

    def __init__(self, files: Sequence[Sequence[Sample]]) -> None:
        self.files = files
        self.ends = [*accumulate(map(len, files))]

    def __len__(self) -> int:
        return self.ends[-1]

    def at(self, place: int) -> Sample:
        file = bisect_right(self.ends, place)
        return self.files[file][place - (self.ends[file - 1] if file else 0)]


class Sets(NamedTuple):
    """Samples to train on, samples held out to validate, what became of those that were too long, and how many of those
    to train on each file has."""

    train: Sequence[Sample]
    held_out: Sequence[Sample]
    refits: list[Refit]
    sizes: list[int]


def load_sets(data: DataConfig, processor: Ovis2_5Processor, stage: Stage) -> Sets:
    """Training and validation samples: all checked and fitted to `max_length`, or of a large file the first ones.

    Raises DataError and ImageError for what training would stop at.
    """
    paths = required(data.train_data_path, "--train_data")
    loaded = [load_samples(path, data, processor, stage) for path in paths]
    held_out, refits = load_samples(data.val_data_path, data, processor, stage) if data.val_data_path else ([], [])
    files = [samples for samples, _ in loaded]
    if len(paths) > 1:
        for path, samples, weight in zip(paths, files, data.train_weights or (1,) * len(paths)):
            print(f"{path}: {counted(len(samples), 'sample')} x {weight:g} in an epoch")
    return Sets(
        train=files[0] if len(files) == 1 else Joined(files),
        held_out=held_out,
        refits=[*chain.from_iterable(of_file for _, of_file in loaded), *refits],
        sizes=[*map(len, files)],
    )


def load_samples(
    path: Path, data: DataConfig, processor: Ovis2_5Processor, stage: Stage
) -> tuple[Sequence[Sample], list[Refit]]:
    """The samples of a file and what became of those that were too long; of a large file that is seen later."""
    file = SampleFile.of(path, data)
    is_large = file.num_samples > CHECKED_AT_START
    samples, reading = file.read_noting(limit=CHECKED_AT_START)
    notes = refuse(
        samples,
        path,
        stage=stage,
        view=View.of(processor),
        decode=True,
        known=reading.problems,
        partial=reading.partial,
    )
    if notes:
        listed = ", ".join(f"{count} x {reason}" for reason, count in notes.most_common())
        print(f"{path}: to look at: {listed}; `looktwice data check` says where and what")
    [purpose] = purposes_of(stage)
    kept, refits = fit_lengths(
        samples, processor, max_length=data.max_length, length_policy=data.length_policy, purpose=purpose
    )
    if samples and not kept:
        which = f"each of the first {CHECKED_AT_START:,} samples" if is_large else "every sample"
        raise DataError(f"{path}: {which} is longer than max_length {data.max_length}; raise it")
    if is_large:
        print(
            f"{path}: {file.num_samples:,} samples; the first {CHECKED_AT_START:,} are checked now, the others when "
            "their turn comes; `looktwice data check` judges all"
        )
        return LargeSet(file), []
    return kept, refits


class LengthReport:
    """What `length_policy` left out or shrank, written into the run folder as it happens, each sample once.

    Of several processes each notes what it meets, and rank 0 writes it down when all `collect`.
    """

    def __init__(self, config: StageConfig, world: World | None = None) -> None:
        self.world = world or World()
        self.met: list[Refit] = []
        self.path = config.output_dir / LEFT_OUT
        self.seen: set[tuple[str, str]] = set()
        whole, _, cut = (self.path.read_text(encoding="utf-8") if self.path.exists() else "").rpartition("\n")
        for line in filter(None, whole.split("\n")):
            with suppress(ValueError, KeyError, TypeError):  # somebody's own note
                row = json.loads(line)
                self.seen.add((row["where"], row["field"]))
        if cut and self.world.is_main:  # the run was stopped while it wrote
            self.path.write_text(f"{whole}\n" if whole else "", encoding="utf-8")
        self.counts: Counter[str] = Counter()
        self.shown: Counter[str] = Counter()

    def note(self, refits: Iterable[Refit]) -> None:
        if self.world.size > 1:
            self.met += refits
        else:
            self._write(refits)

    def collect(self) -> None:
        """Write down what all processes have noted since the last time; every one of them calls this."""
        met = self.world.gather(self.met)
        self._write(met if self.world.is_main else [])
        self.met.clear()

    def _write(self, refits: Iterable[Refit]) -> None:
        for refit in refits:
            place = (refit.sample.where, refit.sample.field)
            if place not in self.seen:
                self.seen.add(place)
                self.counts["left out" if refit.policy is None else "with smaller pictures"] += 1
                append_line(self.path, json.dumps(refit.as_json(), ensure_ascii=False))

    @property
    def metrics(self) -> dict[str, float]:
        """How many samples are listed by now, where any is."""
        return {"data/too_long": float(len(self.seen))} if self.seen else {}

    def show(self) -> None:
        """Print the counts that are new since they were printed last."""
        for outcome, count in (self.counts - self.shown).items():
            print(f"longer than max_length: {count} sample{'s' * (count > 1)} {outcome}; see {self.path}")
        self.shown = self.counts.copy()


def begin_report(config: StageConfig, world: World, refits: Iterable[Refit]) -> LengthReport:
    """The report of a run, with what was met before its first step written down and told."""
    lengths = LengthReport(config, world)
    lengths.note(refits if world.is_main else [])
    lengths.collect()
    lengths.show()
    return lengths


def fitted(
    samples: Sequence[Sample], processor: Ovis2_5Processor, data: DataConfig, lengths: LengthReport
) -> list[Sample]:
    """Samples that can be rolled out, with prompts of at most `max_length` tokens.

    Checked again at every step, because samples of a large set were not seen at the start.
    Raises DataError as `refuse` and `fit_lengths` do.
    """
    refuse(samples, "the data", stage="grpo", view=View.of(processor))
    prompts, refits = fit_lengths(
        samples, processor, max_length=data.max_length, length_policy=data.length_policy, purpose="prompt"
    )
    lengths.note(refits if lengths.world.is_main else [])  # all processes meet the same ones
    return prompts


FURTHER_EPOCHS = 2**20
"""The epoch of the order in which further prompts begin."""


class Prompts:
    """The prompts of each step of stage 2."""

    def __init__(
        self,
        samples: Sequence[Sample],
        order: BatchOrder,
        processor: Ovis2_5Processor,
        data: DataConfig,
        lengths: LengthReport,
    ) -> None:
        self.samples, self.order = samples, order
        self.processor, self.data, self.lengths = processor, data, lengths
        self.of = lru_cache(2)(self._of)
        """Those of a step, counted from 0; asked for again where they are looked at before their turn."""

    def further(self, step: int, batch: int, *, per_step: int, count: int) -> list[Sample]:
        """So many prompts of one of the `per_step` batches that a step may be refilled with: of epochs that no run
        reaches, so that they too follow from seed and step, however long the run is."""
        first = FURTHER_EPOCHS * self.order.steps_per_epoch
        return self._of(first + step * per_step + batch)[:count]

    def _of(self, place: int) -> list[Sample]:
        return fitted([self.samples[number] for number in self.order[place]], self.processor, self.data, self.lengths)
