"""The HTML page of a step's rollouts: the worst group, the best and one at random, siblings side by side."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean as mean

from looktwice.answers import answers_match, extract_answer
from looktwice.data.examples import processor_for
from looktwice.errors import short
from looktwice.processing.processor import Ovis2_5Processor
from looktwice.report.data_page import Part, Row, row_of
from looktwice.report.html import write_html
from looktwice.report.sample_view import SampleView, TurnView, turns_of
from looktwice.training.rollouts import Rollout

MOST_SIBLINGS = 8
"""Rollouts of a group that are shown."""
FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class Sibling:
    """One rollout as people read it. `turn` has its tokens, `paid` is a line a term."""

    name: str
    parts: tuple[Part, ...]
    turn: TurnView
    verdict: str
    is_right: bool
    paid: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Group:
    """A question with its pictures, on which the boxes of all siblings stand, and the siblings."""

    title: str
    row: Row
    question: tuple[tuple[TurnView, tuple[Part, ...]], ...]
    siblings: tuple[Sibling, ...]
    solution: str


def write_rollout_page(path: Path, step: int, groups: Sequence[Sequence[Rollout]], processor: Ovis2_5Processor) -> None:
    """Write the page of a step. Boxes and crops are named by sibling and crop, as in `2.1`."""
    chosen = chosen_groups(groups, seed=step)
    lead = (
        f"{len(groups)} questions with {sum(map(len, groups))} rollouts; shown are those with the lowest and the "
        "highest mean reward, and another at random. Right and wrong are judged by the rules, whatever was paid."
    )
    shown = [group_of(title, group, number, processor) for number, (title, group) in enumerate(chosen.items(), 1)]
    write_html(path, "rollouts.html.jinja", title=f"Rollouts of step {step}", lead=lead, groups=shown)


def chosen_groups(groups: Sequence[Sequence[Rollout]], *, seed: int) -> dict[str, Sequence[Rollout]]:
    """The worst, the best and a random one of the groups that have a reward, each once."""
    means = {
        place: mean(paid)
        for place, group in enumerate(groups)
        if (paid := [one.reward.total for one in group if one.reward.error is None])
    }
    if not means:
        return {FAILED: groups[0]} if groups else {}
    places = {"worst": min(means, key=means.__getitem__), "best": max(means, key=means.__getitem__)}
    others = sorted({*range(len(groups))} - {*places.values()})
    if others:
        places["at random"] = random.Random(seed).choice(others)
    if places["worst"] == places["best"]:
        del places["best"]
    return {
        f"{name}, mean reward {means[place]:.3f}" if place in means else name: groups[place]
        for name, place in places.items()
    }


def group_of(title: str, group: Sequence[Rollout], number: int, processor: Ovis2_5Processor) -> Group:
    """A group as the page shows it, the page's `number`-th."""
    shown = group[:MOST_SIBLINGS]
    row = unlabelled_gold(row_of([view_of(one, processor) for one in shown], number))
    return Group(
        title=title,
        row=row,
        question=row.questions[0].turns[:-1],
        siblings=tuple(
            _sibling(f"rollout {place}", one, *question.turns[-1])
            for place, (one, question) in enumerate(zip(shown, row.questions), 1)
        ),
        solution=row.questions[0].view.solution,
    )


def unlabelled_gold(row: Row) -> Row:
    """The row with a gold box that is everybody's, and so nobody's by number."""
    images = []
    for whole, seen in row.images:
        marks = (replace(mark, label="") if mark.is_gold else mark for mark in whole.marks)
        images.append((replace(whole, marks=tuple(marks)), seen))
    return replace(row, images=tuple(images))


def view_of(one: Rollout, processor: Ovis2_5Processor) -> SampleView:
    """The whole sequence of a rollout, trained where the policy wrote it."""
    sample = one.sample
    return SampleView(
        where=sample.where,
        place=sample.field,
        turns=turns_of(one.example, sample, processor_for(sample, processor)),
        gold_boxes=sample.gold_boxes,
        solution=sample.solution if isinstance(sample.solution, str) else " or ".join(sample.solution),
    )


def _sibling(name: str, one: Rollout, turn: TurnView, parts: tuple[Part, ...]) -> Sibling:
    trajectory, reward = one.trajectory, one.reward
    answer = extract_answer(trajectory.text)
    is_right = answers_match(answer, one.sample.solution)
    verdict = f"{short(answer)} is {'right' if is_right else 'wrong'}" if answer else "no answer"
    paid = [("total", FAILED if reward.error else f"{reward.total:.3f}")]
    paid += [(part, f"{value:.3f}") for part, value in reward.parts.items()]
    paid += [("advantage", f"{one.advantage:+.3f}"), ("end", trajectory.stop_reason.replace("_", " "))]
    paid += [("refused call", call.error.replace("_", " ")) for call in trajectory.calls if call.error]
    return Sibling(name=name, parts=parts, turn=turn, verdict=verdict, is_right=is_right, paid=tuple(paid))
