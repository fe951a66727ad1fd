"""What a judge says of answers that the rules leave open; where it says nothing they are undecided, never wrong."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from looktwice.answers import extract_answer
from looktwice.benches.catalogue import CATALOGUE
from looktwice.benches.extraction import spoken
from looktwice.benches.item import LETTERS
from looktwice.errors import one_line
from looktwice.judging.verdict import is_decided
from looktwice.messages import ANSWER_CLOSE, ANSWER_OPEN
from looktwice.rewarding.judge import Judge
from looktwice.rewards import Played
from looktwice.rollout.trajectory import Trajectory

AT_ONCE = 64


def is_open(line: Mapping[str, Any]) -> bool:
    """Whether a judge may decide an answer: its benchmark allows one, something was said, and no rule found an option,
    or none is sure that the gold answer means something else."""
    if not CATALOGUE[line["bench"]].is_judged or line["score"] == 1.0 or not spoken(line["response"]):
        return False
    if line.get("judged"):
        return line["judged"]["score"] is None
    return line["by"] == "none" or (not line["options"] and not all(map(is_decided, line["gold"])))


def judgements(judge: Judge, lines: Iterable[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Each open line and the verdict on it, some at a time."""
    coming = filter(is_open, lines)
    while some := list(islice(coming, AT_ONCE)):
        yield from zip(some, verdicts(judge, some))


def verdicts(judge: Judge, lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What a judge says of each line: its score with `by` judge, or None with `by` undecided and the reason."""
    found = judge([_played(line) for line in lines])
    return [
        {"score": None, "by": "undecided", "why": one_line(str(one))}
        if isinstance(one, Exception)
        else {"score": float(one), "by": "judge"}
        for one in found
    ]


def _played(line: Mapping[str, Any]) -> Played:
    said = line["prediction"] or extract_answer(line["response"]) or ""
    options = dict(zip(LETTERS, line["options"]))
    # a judge knows an option by its letter and by its text
    golds = [text for gold in line["gold"] for text in (gold, options.get(gold)) if text]
    written = Trajectory(prompt_ids=[], text=f"{ANSWER_OPEN}{said}{ANSWER_CLOSE}")
    question = "\n".join([line["about"], *(f"({letter}) {text}" for letter, text in options.items())])
    return Played(trajectory=written, solution=tuple(golds), question=question)
