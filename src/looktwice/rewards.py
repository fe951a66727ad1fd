"""Rewards: what a finished rollout is paid, in parts; the presets `paper`, `code`, `robust`.

Sources: R-GRPO (VLM-R3, arXiv 2505.16192) as the paper states it and as its released code computes it; gating every
shaping term on accuracy is the remedy for groups that differ only in how they are wrong.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from looktwice.answers import Solution, answers_match, extract_answer, golds, split_thinking, strip_tool_text
from looktwice.calls import TOOL_CALL_CLOSE, TOOL_CALL_OPEN
from looktwice.messages import ANSWER_CLOSE, ANSWER_OPEN, THINK_CLOSE, THINK_OPEN
from looktwice.processing.chat_template import EARLY_STOP
from looktwice.rollout.trajectory import Trajectory

_THINK_THEN_ANSWER = re.compile(
    r"(?:<think>)?(?:(?!</?think>|</?answer>).)*</think>\s*<answer>((?:(?!</?think>|</?answer>).)*)</answer>", re.DOTALL
)
_JSON_GROUP = re.compile(r"\{.*?\}", re.DOTALL)
_CALL_CONTENT = rf"(?:(?!{TOOL_CALL_OPEN}).)*?"
_CALL = re.compile(f"{TOOL_CALL_OPEN}({_CALL_CONTENT}){TOOL_CALL_CLOSE}", re.DOTALL)
_WRITTEN_BOX = re.compile(rf'\{{"bbox_2d":\s*\[[^\]]*\]\}}|{TOOL_CALL_OPEN}{_CALL_CONTENT}{TOOL_CALL_CLOSE}', re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class RewardPreset:
    """Weights, caps and gates of the four terms. The region term is always gated on accuracy.

    `measure` says what format, length and region look at: "rollout" takes the tag structure of thinking then answer,
    the length of the reasoning and the crops that were really cut; "written_text" repeats the released code, which
    reads all three from the text alone (length is that of the shortest piece between two boxes, and any box that
    parses counts, cut or not).
    """

    accuracy: float = 1.0
    format: float = 1.0
    length_per_char: float = 0.001
    length_cap: float = 0.25
    region_per_crop: float = 0.5
    region_cap: float = 0.5
    is_shaping_gated: bool = True
    measure: Literal["rollout", "written_text"] = "rollout"

    @property
    def largest(self) -> dict[str, float]:
        """The most that each term can pay."""
        return {
            "accuracy": self.accuracy,
            "format": self.format,
            "length": self.length_cap,
            "region": self.region_cap,
        }


ROBUST = RewardPreset()
PAPER = RewardPreset(is_shaping_gated=False)
CODE = RewardPreset(format=0.5, length_per_char=0.01, length_cap=0.1, is_shaping_gated=False, measure="written_text")
REWARD_PRESETS = {"robust": ROBUST, "paper": PAPER, "code": CODE}


@dataclass(frozen=True, kw_only=True)
class Reward:
    """What one rollout earned. `parts` are the terms as paid, after gates, and add up to `total`.

    A failed reward has an `error` and a total of NaN: it stays outside the statistics of its group, never 0.

    Example: Reward(total=2.1, parts={"accuracy": 1.0, "format": 0.5, "length": 0.1, "region": 0.5})
    """

    total: float
    parts: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None
    weights: Mapping[str, float] = field(default_factory=dict)
    """What a term counts where each is scaled by itself (`--scale_rewards per_term`); 1 for one that is not named."""

    @property
    def accuracy(self) -> float:
        """What the group filter reads: the accuracy part, or the total of a reward without one."""
        return self.parts.get("accuracy", self.total)


def score(trajectory: Trajectory, solution: Solution, preset: RewardPreset = ROBUST) -> Reward:
    """The four terms of one rollout: accuracy by rules, format, length of reasoning, region use."""
    text = trajectory.text
    is_right = answers_match(extract_answer(text), solution)
    if preset.measure == "rollout":
        has_format = _has_think_and_answer(text)
        num_chars = _reasoning_chars(text)
        num_crops = len({(call.image_number, call.box) for call in trajectory.calls if call.is_valid})
    else:
        has_format = _ends_in_answer(text)
        num_chars = _shortest_piece_chars(text)
        num_crops = _num_written_boxes(text)
    pays_shaping = is_right or not preset.is_shaping_gated
    parts = {
        "accuracy": preset.accuracy * is_right,
        "format": preset.format * (has_format and pays_shaping),
        "length": min(preset.length_cap, preset.length_per_char * num_chars) * pays_shaping,
        "region": min(preset.region_cap, preset.region_per_crop * num_crops) * is_right,
    }
    return Reward(total=sum(parts.values()), parts=parts, weights=preset.largest)


RewardFunction = Callable[[Sequence[tuple[Trajectory, Solution]]], list[Reward]]
"""The rewards of rollouts with their gold answers."""


@dataclass(frozen=True)
class PresetReward:
    """Pays each rollout by a preset."""

    preset: RewardPreset = ROBUST

    def __call__(self, rollouts: Sequence[tuple[Trajectory, Solution]]) -> list[Reward]:
        return [score(trajectory, solution, self.preset) for trajectory, solution in rollouts]


def can_be_earned(solution: Solution) -> bool:
    """Whether any answer is right for this gold answer: one that says it, or one of several, as models do."""
    thinking = f"{THINK_OPEN}{THINK_CLOSE}\n\n"
    written = (f"{thinking}{ANSWER_OPEN}{answer}{ANSWER_CLOSE}" for answer in golds(solution))
    return any(score(Trajectory(prompt_ids=[], text=text), solution).accuracy for text in written)


def _has_think_and_answer(text: str) -> bool:
    """Reasoning, `</think>`, one non-empty answer block, nothing else; the opening `<think>` may be in the prompt."""
    structure = _THINK_THEN_ANSWER.fullmatch(text.strip())
    return structure is not None and bool(structure[1].strip())


def _ends_in_answer(text: str) -> bool:
    """An answer block, anything before it, only whitespace after it: the released code's format."""
    head, closing_tag, tail = text.rpartition("</answer>")
    return bool(closing_tag) and not tail.strip() and "<answer>" in head


def _reasoning_chars(text: str) -> int:
    """Characters of thinking, whitespace collapsed; calls, tool responses and a forced stop are not reasoning."""
    thinking, _ = split_thinking(text.replace(EARLY_STOP, THINK_CLOSE))
    return len(" ".join(strip_tool_text(thinking).split()))


def _shortest_piece_chars(text: str) -> int:
    """Characters of the shortest piece between two written boxes before the answer, as the released code counts.

    Empty pieces count only at the start and at the end.
    """
    thinking = text.split("<answer>")[0].replace("<think>", "").replace("</think>", "")
    pieces = [" ".join(piece.split()) for piece in _WRITTEN_BOX.split(thinking)]
    return min(len(piece) for i, piece in enumerate(pieces) if piece or i in (0, len(pieces) - 1))


def _num_written_boxes(text: str) -> int:
    """Distinct boxes that parse, as the released code counts: no check of their numbers, no check of a crop.

    Read from JSON groups that name "bbox" and from our crop calls. One that does not parse makes the count 0.
    """
    boxes = set()
    try:
        # cut at the last closing brace: behind it every "{" would search to the end in vain
        for group in _JSON_GROUP.findall(text[: text.rfind("}") + 1]):
            if "bbox" in group:
                boxes.add(json.dumps(json.loads(group)["bbox_2d"]))
        for call in _CALL.findall(text):
            boxes.add(json.dumps(json.loads(call[call.index("[") : call.rindex("]") + 1])))
    except (ValueError, KeyError, RecursionError):
        return 0
    return len(boxes)
