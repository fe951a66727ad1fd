"""The page of a step's rollouts."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from tests.training.scripted import CALL, CUT, OTHER, RIGHT, SAMPLE, WRONG, rollout_of

from looktwice.geometry import Box
from looktwice.messages import question_about
from looktwice.report.figures import Figure
from looktwice.report.rollout_page import chosen_groups, group_of, write_rollout_page
from looktwice.rewards import Reward
from looktwice.training.rollouts import Rollout

REFUSED = "<tool_call>there</tool_call>"


@pytest.fixture
def played(play_scripts, image: Image.Image, tmp_path: Path):
    """Rollouts of scripts about a picture in a file, each paid its number."""
    path = tmp_path / "x.png"
    image.save(path)
    sample = replace(SAMPLE, conversation=question_about("What is it?", path), gold_box=Box(0, 0, 40, 40))

    def make(*scripts: tuple[str, float]) -> list[Rollout]:
        made = []
        for script, total in scripts:
            limit = 20 if script is CUT else 200
            [episode], _ = play_scripts(script, shown=path, max_new_tokens=limit)
            error = "ValueError: no" if total != total else None
            reward = Reward(total=total, parts={} if error else {"accuracy": total}, error=error)
            made.append(rollout_of(episode, reward, sample=sample))
        return made

    return make


def test_siblings_stand_side_by_side_with_what_they_were_paid(played, processor, tmp_path) -> None:
    group = played((RIGHT, 1.0), (f"{REFUSED}{CALL}{OTHER}", 0.0), (CUT, float("nan")))
    group[0].advantage = 0.7071
    write_rollout_page(tmp_path / "page.html", 3, [group], processor)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    text = " ".join(re.sub(r"<style>.*?</style>|<[^>]*>", " ", page, flags=re.DOTALL).split())
    for words in (
        "Rollouts of step 3",
        "worst, mean reward 0.500",
        "What is it? Gold answer: 7",
        "rollout 1",
        "crop 1.1: [0, 0, 48, 48], 48 x 48",
        "7 is right total 1.000 accuracy 1.000 advantage +0.707 end answered",
        "asks for there No box found. Write four numbers in square brackets.",
        "crop 2.1: [0, 0, 48, 48]",
        "9 is wrong total 0.000",
        "refused call no box",
        "no answer total failed advantage +0.000 end max tokens",
    ):
        assert words in text, words
    assert "gold box" in page and not re.search(r'(src|href)="(?!data:|#)', page)


def test_the_gold_box_of_all_siblings_has_no_number(played, processor) -> None:
    [(whole, _)] = group_of("", played((RIGHT, 1.0), (RIGHT, 1.0)), 1, processor).row.images
    assert [(mark.is_gold, mark.label) for mark in whole.marks] == [(True, ""), (False, "1.1, 2.1")]


def test_a_refused_call_takes_no_crop_of_another(played, processor) -> None:
    shown = group_of("", played((f"{REFUSED}{CALL}{REFUSED}{OTHER}", 0.0)), 1, processor)
    kinds = [part.kind if not isinstance(part, Figure) else "crop" for part in shown.siblings[0].parts]
    assert kinds == ["call", "tool", "crop", "call", "tool", "text", "answer"]


def test_what_the_policy_wrote_is_marked_apart_from_what_the_tool_put_in(played, processor) -> None:
    [sibling] = group_of("", played((f"{REFUSED}{OTHER}", 0.0)), 1, processor).siblings
    marks = {piece.text: piece.is_trained for piece in sibling.turn.parts}
    assert marks["<tool_response>"] is False and marks["</tool_call>"] is True


def test_the_worst_the_best_and_another_group_are_chosen(played) -> None:
    low, middle, high = (played((WRONG, total)) for total in (0.0, 1.0, 2.0))
    failed = played((WRONG, float("nan")))
    chosen = chosen_groups([middle, high, low], seed=0)
    assert list(chosen.items()) == [
        ("worst, mean reward 0.000", low),
        ("best, mean reward 2.000", high),
        ("at random, mean reward 1.000", middle),
    ]
    assert chosen_groups([low, high, failed], seed=0)["at random"] is failed
    assert list(chosen_groups([low], seed=0).values()) == [low]
    assert chosen_groups([failed], seed=0) == {"failed": failed}
    assert chosen_groups([], seed=0) == {}
