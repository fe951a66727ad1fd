"""The file of an evaluation: its recipe, and a line for each answer with its crops and its verdict.

Three kinds of lines of JSON. A start has `recipe` and `start`, and stands first. An answer has `bench`, `id`,
`condition` and `sample`, which name it, what was asked, what was answered, and the verdict. A judgement has the same
four and `judged`, the verdict of a judge, which takes the place of that of the rules.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from looktwice.asking.line_file import LineFile
from looktwice.benches.files import BenchFiles
from looktwice.benches.item import Item, Verdict
from looktwice.errors import ConfigError, DataError
from looktwice.evaluation.conditions import Begun
from looktwice.messages import ImageSource

Line = dict[str, Any]


class Key(NamedTuple):
    """Which answer a line is."""

    bench: str
    id: str
    condition: str
    sample: int

    def names(self) -> dict[str, Any]:
        return self._asdict()


def key_of(line: Mapping[str, Any]) -> Key:
    return Key(line["bench"], line["id"], line["condition"], line["sample"])


class Result:
    """What stands in result files: the recipes of their starts, and the last whole answer to each question.

    Answers that failed are in `failed`, by key, and may be asked again.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        """Read files, of which some need not be there. Raises ConfigError for one that is no result."""
        self.starts: list[Line] = []
        self.answers: dict[Key, Line] = {}
        self.failed: dict[Key, Line] = {}
        judged: dict[Key, Line] = {}
        for path in paths:
            for line in lines_of(path):
                if "recipe" in line:
                    self.starts.append(line)
                elif "judged" in line:
                    judged[key_of(line)] = line["judged"]
                elif line["error"] is None:
                    self.answers[key_of(line)] = line
                    self.failed.pop(key_of(line), None)
                elif key_of(line) not in self.answers:
                    self.failed[key_of(line)] = line
        for key, verdict in judged.items():
            if key in self.answers:
                self.answers[key] = with_judgement(self.answers[key], verdict)

    @property
    def recipe(self) -> Line:
        """The recipe, with the benchmarks of all starts. Raises DataError where there is none."""
        if not self.starts:
            raise DataError("no result: the file has no recipe")
        benches: Line = {}
        for start in self.starts:
            benches |= start["recipe"]["benches"]
        return {**self.starts[-1]["recipe"], "benches": benches}

    def of(self, bench: str, condition: str) -> list[Line]:
        """The answers of a benchmark under a condition, in the order of its rows."""
        found = [line for key, line in self.answers.items() if (key.bench, key.condition) == (bench, condition)]
        return sorted(found, key=lambda line: (*map(int, line["id"].split(".")), line["sample"]))

    def lines(self) -> Iterator[Line]:
        """All that is worth keeping: starts, answers, judgements."""
        yield from self.starts
        for key, line in self.answers.items():
            yield without_judgement(line)
            if "judged" in line:
                yield {**key.names(), "judged": line["judged"]}


def with_judgement(line: Line, verdict: Line) -> Line:
    """The line of an answer with a judge's verdict; `ruled` is that of the rules."""
    ruled = line.get("ruled") or {"score": line["score"], "by": line["by"]}
    return {**line, "score": verdict["score"], "by": verdict["by"], "judged": verdict, "ruled": ruled}


def without_judgement(line: Line) -> Line:
    """The line as the rules left it."""
    plain = {name: value for name, value in line.items() if name not in ("judged", "ruled")}
    return plain | line.get("ruled", {})


class Items:
    """The items behind the lines of a result, read again from the files that it names: their pictures, for pages."""

    def __init__(self, result: Result) -> None:
        self.places: dict[str, tuple[list[Path], list[Path]]] = {}
        for start in (one["start"] for one in result.starts):
            for name, files in start["places"].items():
                self.places[name] = [*map(Path, files)], [*map(Path, start["folders"][name])]
        self.files: dict[str, BenchFiles] = {}

    def of(self, line: Mapping[str, Any]) -> Item:
        """The item of a line. Raises DataError where its file has gone or changed, so that it is another one now."""
        name = line["bench"]
        if name not in self.files:
            self.files[name] = BenchFiles(name, *self.places[name])
        found = {item.id: item for item in self.files[name].items(line["row"])}
        if line["id"] not in found or found[line["id"]].about != line["about"]:
            raise DataError(f"{line['where']}: another question than when it was asked; put the file back")
        return found[line["id"]]


def read_result(path: Path) -> Result:
    """A result file. Raises DataError where there is no file or no answer in it."""
    if not path.is_file():
        raise DataError(f"{path}: no such result; name the file that `looktwice eval --out` wrote")
    result = Result([path])
    if not result.answers:
        raise DataError(f"{path}: no question was answered; finish the evaluation first")
    return result


def lines_of(path: Path) -> Iterator[Line]:
    """The whole lines of a result. Raises ConfigError for one that is none."""
    for number, text in LineFile(path).texts():
        try:
            line = json.loads(text)
            if "recipe" not in line:
                key_of(line), line.get("judged", line.get("error", line["bench"]))
            yield line
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}:{number}: no line of an evaluation; name another --out") from error


def answer_line(key: Key, row: int, item: Item, begun: Begun, verdict: Verdict, folder: Path) -> Line:
    """The line of an answer. Pictures with a file are named by it, from `folder` where they lie there; of others, which
    the row itself holds, `path` is None."""
    answer = begun.asked.answer
    assert answer is not None
    return {
        **key.names(),
        **item_facts(row, item, folder),
        "sizes": [list(size) for size in begun.image_sizes],
        "seen": [list(size) for size in begun.seen_sizes],
        **verdict_facts(verdict),
        "crops": answer["crops"],
        "response": answer.response,
        "stop_reason": answer.stop_reason,
        "error": answer.error,
        "tokens": answer["tokens"],
        "num_overview_tokens": begun.num_overview_tokens,
        "seconds": answer["seconds"],
        "copied_from": None,
    }


def failed_line(key: Key, row: int, error: str) -> Line:
    return {**key.names(), "row": row, "error": error}


def item_facts(row: int, item: Item, folder: Path) -> Line:
    """What of an item stands in its lines."""
    return {
        "row": row,
        "where": item.where,
        "images": [{"path": _named(source, folder)} for source in item.images],
        "question": item.question,
        "about": item.about,
        "options": list(item.options),
        "gold": list(item.gold),
        "gold_boxes": [list(box) for box in item.gold_boxes],
        "category": item.category,
        "group": item.group,
        "facts": dict(item.facts),
    }


def verdict_facts(verdict: Verdict) -> Line:
    return {
        "score": verdict.score,
        "prediction": verdict.prediction,
        "by": verdict.by,
        "measures": dict(verdict.measures),
    }


def _named(source: ImageSource, folder: Path) -> str | None:
    if not isinstance(source, Path):
        return None
    path, root = source.absolute(), folder.absolute()
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
