"""The files of a benchmark as its items, row by row, so that no more pictures are in memory than are asked about."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from looktwice.benches.catalogue import CATALOGUE
from looktwice.benches.item import Item
from looktwice.benches.reading import Fields
from looktwice.data.sample import Sample
from looktwice.errors import DataError, counted
from looktwice.formats.files import Row, RowFile
from looktwice.formats.sample_file import SampleFile

LONGEST_REFERENCE = 64
"""A cell for a picture that is no longer names the row that holds it. Source: VLMEvalKit, `ImageBaseDataset`."""


def find_files(name: str, data: Path) -> tuple[Path, ...]:
    """The files of a benchmark in a folder, in its subfolder of the benchmark's name where there is one; a file stands
    for itself. Raises DataError where there is none, or several for one's own set."""
    if data.is_file():
        return (data,)
    if not data.is_dir():
        raise DataError(f"--data {data}: no such folder or file")
    root = data / name if (data / name).is_dir() else data
    bench = CATALOGUE[name]
    for pattern in bench.files:
        found = tuple(sorted(root.glob(pattern)) or sorted(root.rglob(pattern)))
        if bench.read is None and len(found) > 1:
            raise DataError(f"{root}: {counted(len(found), 'file')}; name one: --bench {name}:{found[0].name}")
        if found:
            return found
    raise DataError(
        f"{root}: no file of {bench.title} ({', '.join(bench.files)}); download {bench.source}, or name the file: "
        f"--bench {name}:FILE"
    )


class BenchFiles:
    """The items of a benchmark, by row. `len` counts rows."""

    def __init__(self, name: str, paths: Sequence[Path], folders: Sequence[Path]) -> None:
        """`folders` are where relative paths of pictures are looked for, in order.

        Raises DataError for a file that cannot be read, or holds no row.
        """
        self.name, self.paths, self.folders, self.bench = name, paths, folders, CATALOGUE[name]
        self._samples = None
        if self.bench.read is None:
            self._samples = SampleFile(paths[0], self.folders[0])
            self._ends = [self._samples.num_samples]
        else:
            self._files = [_OneFile(path) for path in paths]
            self._ends = list(accumulate(map(len, self._files)))
        if not self._ends[-1]:
            raise DataError(f"{paths[0]}: the file holds no rows")

    def __len__(self) -> int:
        return self._ends[-1]

    def items(self, row: int) -> list[Item]:
        """The items of a row counted from 0; most have one, and one that is not asked has none. Raises DataError for a
        row that is broken or no row of this benchmark, ImageError for a picture that cannot be named."""
        if self._samples is not None:
            return [replace(item_of(self._samples.sample(row)), id=f"{row + 1}", group=f"{row + 1}")]
        number = bisect_right(self._ends, row)
        file, place = self._files[number], row - (self._ends[number - 1] if number else 0)
        where, values = file.row(place)
        assert self.bench.read is not None
        items = self.bench.read(Fields(values, where, self.paths[number], self.folders))
        ids = [f"{row + 1}"] if len(items) == 1 else [f"{row + 1}.{count}" for count in range(1, len(items) + 1)]
        return [replace(item, id=name, where=where, group=item.group or name) for item, name in zip(items, ids)]


def image_folders(path: Path, data: Path) -> list[Path]:
    """Where the pictures of a file are looked for: in its folder, and in those above it up to `data`."""
    if data != path and data in path.parents:
        return [folder for folder in path.parents if folder == data or data in folder.parents]
    return [path.parent]


class _OneFile:
    """The rows of one file, a list under `data` of a single object unpacked, pictures named by another row put in."""

    def __init__(self, path: Path) -> None:
        self.rows = RowFile(path)
        self.inner: list[dict[str, Any]] | None = None
        if len(self.rows) == 1 and isinstance(listed := self.rows[0].values.get("data"), list):
            self.inner = listed
        self._by_index: dict[str, int] | None = None

    def __len__(self) -> int:
        return len(self.rows) if self.inner is None else len(self.inner)

    def row(self, place: int) -> Row:
        if self.inner is not None:
            return Row(f"{self.rows.path}:data[{place}]", self.inner[place])
        where, values = self.rows[place]
        image = values.get("image")
        if isinstance(image, str) and image.isdigit() and len(image) <= LONGEST_REFERENCE:
            return Row(where, {**values, "image": self._held(image, where)})
        return Row(where, values)

    def _held(self, index: str, where: str) -> Any:
        if self._by_index is None:
            rows = (self.rows[place].values for place in range(len(self.rows)))
            self._by_index = {str(values.get("index")): place for place, values in enumerate(rows)}
        if index not in self._by_index:
            raise DataError(f"{where}: the picture is that of row {index}, which is not there")
        return self.rows[self._by_index[index]].values.get("image")


def item_of(sample: Sample) -> Item:
    """A sample of one's own set as an item: what stands before its last answer, and the gold answer.

    Raises DataError for one without a gold answer.
    """
    solution = (sample.solution,) if isinstance(sample.solution, str) else sample.solution
    if not any(solution):
        raise DataError(f"{sample.where}: {sample.field} has no gold answer; write one, see docs/data.md")
    return Item(
        where=sample.where,
        images=tuple(sample.prompt.images),
        question=sample.question,
        about=sample.question,
        gold=solution,
        category=str(sample.extra.get("category", "")),
        gold_boxes=sample.gold_boxes,
        conversation=sample.prompt,
        box_frame=sample.box_frame,
    )
