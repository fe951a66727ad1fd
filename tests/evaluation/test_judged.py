"""A judge decides what the rules leave open, and where it fails nobody does."""

from __future__ import annotations

from collections.abc import Sequence

from tests.evaluation.lines import line

from looktwice.evaluation.judged import is_open, judgements
from looktwice.rewarding.judge import JudgeError
from looktwice.rewards import Played


def test_open_is_what_no_rule_found_an_option_in_or_a_free_answer_that_words_cannot_settle() -> None:
    found_none = {"by": "none", "prediction": None}
    assert is_open(line("1", "crops", 0.0, **found_none))
    assert not is_open(line("1", "crops", 0.0)) and not is_open(line("1", "crops", 1.0, **found_none))
    assert not is_open(line("1", "crops", 0.0, **found_none, response="<think>cut"))
    free = {"bench": "jsonl", "options": [], "by": "rules"}
    assert is_open(line("1", "crops", 0.0, **free, gold=["a small dog"]))
    assert not is_open(line("1", "crops", 0.0, **free, gold=["7"]))
    assert not is_open(line("1", "crops", 0.0, bench="docvqa", by="none"))
    judged = {"score": None, "by": "undecided"}
    assert is_open(line("1", "crops", None, judged=judged))
    assert not is_open(line("1", "crops", 0.0, **found_none, judged={"score": 0.0, "by": "judge"}))


def test_the_verdicts_of_a_judge_and_its_failures_which_are_undecided() -> None:
    asked: list[Played] = []

    def judge(rollouts: Sequence[Played]) -> list[bool | Exception]:
        asked.extend(rollouts)
        return [True, False, JudgeError("no reply")][: len(rollouts)]

    lines = [line(f"{n}", "crops", 0.0, by="none", prediction=None, response="the first colour") for n in (1, 2, 3)]
    found = [verdict for _, verdict in judgements(judge, [*lines, line("4", "crops", 1.0)])]  # type: ignore[arg-type]
    assert found == [
        {"score": 1.0, "by": "judge"},
        {"score": 0.0, "by": "judge"},
        {"score": None, "by": "undecided", "why": "no reply"},
    ]
    assert asked[0].solution == ("A", "red") and asked[0].question == "Question 1\n(A) red\n(B) blue"
    assert asked[0].trajectory.text == "<answer>the first colour</answer>"
