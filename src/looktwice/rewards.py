"""Rewards: what a finished rollout is paid, in parts; the presets `paper`, `code`, `robust` and `accuracy`.

Sources: R-GRPO (VLM-R3, arXiv 2505.16192) as the paper states it and as its released code computes it; gating every
shaping term on accuracy is the remedy for groups that differ only in how they are wrong.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from looktwice.answers import Solution, answers_right, golds, split_thinking, strip_tool_text
from looktwice.calls import TOOL_CALL_CLOSE, TOOL_CALL_OPEN
from looktwice.geometry import Box
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

REPEATED_CHARS = 16
"""Reasoning that says so many characters again that stood there before, or in the question, says nothing new."""


@dataclass(frozen=True)
class Played:
    """A finished rollout, and what is known of its question.

    `group` is the same number for the siblings of one question, within one call of a reward. `gold_boxes` are in
    original pixels of the first picture. `source` says where the question stands in its file, for those who keep what
    a rollout was paid.
    """

    trajectory: Trajectory
    solution: Solution = ""
    question: str = ""
    gold_boxes: tuple[Box, ...] = ()
    group: int = 0
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class RewardPreset:
    """Weights, caps and gates of the four terms. The region term is always gated on accuracy.

    `measure` says what format, length and region look at: "rollout" takes the tag structure of thinking then answer,
    the length of the reasoning and the crops that were really cut; "written_text" repeats the released code, which
    reads all three from the text alone (length is that of the shortest piece between two boxes, and any box that
    parses counts, cut or not). Under "rollout" a crop of more than `largest_crop` of its picture's area does not count,
    and without `pays_repeats` neither does reasoning that repeats itself or the question.
    """

    accuracy: float = 1.0
    format: float = 1.0
    length_per_char: float = 0.001
    length_cap: float = 0.25
    region_per_crop: float = 0.5
    region_cap: float = 0.5
    largest_crop: float = 1.0
    pays_repeats: bool = True
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


ROBUST = RewardPreset(largest_crop=0.5, pays_repeats=False)
PAPER = RewardPreset(is_shaping_gated=False)
CODE = RewardPreset(format=0.5, length_per_char=0.01, length_cap=0.1, is_shaping_gated=False, measure="written_text")
ACCURACY = RewardPreset(format=0.0, length_cap=0.0, region_cap=0.0)
REWARD_PRESETS = {"robust": ROBUST, "paper": PAPER, "code": CODE, "accuracy": ACCURACY}


@dataclass(frozen=True, kw_only=True)
class Reward:
    """What one rollout earned. `parts` are the terms as paid, after weights, caps and gates, and add up to `total`;
    `raw` is what each measured before those.

    A failed reward has an `error` and a total of NaN: it stays outside the statistics of its group, never 0.

    Example: Reward(total=2.1, parts={"accuracy": 1.0, "format": 0.5, "length": 0.1, "region": 0.5})
    """

    total: float
    parts: Mapping[str, float] = field(default_factory=dict)
    raw: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None
    weights: Mapping[str, float] = field(default_factory=dict)
    """What a term counts where each is scaled by itself (`--scale_rewards per_term`); 1 for one that is not named."""

    @property
    def terms(self) -> Mapping[str, float]:
        """The parts, or the total as the only one, without a name."""
        return self.parts or {"": self.total}

    @property
    def accuracy(self) -> float:
        """What the group filter reads: the accuracy before any weight, or the total of a reward without one."""
        return self.raw.get("accuracy", self.parts.get("accuracy", self.total))


def failed(error: BaseException | None, place: str = "") -> Reward:
    """The reward of a rollout that got none, with the reason and where in a user's file it arose."""
    text = " ".join(str(error).split())
    said = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return Reward(total=math.nan, error=f"{said} ({place})" if place else said)


def score(
    trajectory: Trajectory,
    solution: Solution,
    preset: RewardPreset = ROBUST,
    *,
    question: str = "",
    is_right: bool | None = None,
) -> Reward:
    """The four terms of one rollout: accuracy by rules, format, length of reasoning, region use.

    `is_right` is the verdict where something else than the rules gives it.
    """
    text = trajectory.text
    if is_right is None:
        is_right = answers_right(text, solution)
    if preset.measure == "rollout":
        has_format = has_think_and_answer(text)
        reasoning = _reasoning(text)
        num_chars = len(reasoning) if preset.pays_repeats else num_new_chars(reasoning, question)
        num_crops = len(
            {
                (call.image_number, call.box)
                for call in trajectory.calls
                if call.is_valid and trajectory.share_of_image(call) <= preset.largest_crop
            }
        )
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
    raw = {"accuracy": is_right, "format": has_format, "length": num_chars, "region": num_crops}
    numbers = {name: float(value) for name, value in raw.items()}
    return Reward(total=sum(parts.values()), parts=parts, raw=numbers, weights=preset.largest)


RewardFunction = Callable[[Sequence[Played]], list[Reward]]
"""The rewards of rollouts, among which all siblings of a group are."""
Verdicts = Callable[[Sequence[Played]], Sequence[bool | Exception]]
"""Whether the answer of each rollout is right, or why that is not known."""


def by_rules(rollouts: Sequence[Played]) -> list[bool | Exception]:
    """The verdicts of `answers.py`."""
    return [answers_right(one.trajectory.text, one.solution) for one in rollouts]


@dataclass(frozen=True)
class PresetReward:
    """Pays each rollout by a preset; where no verdict is known, the reward is failed."""

    preset: RewardPreset = ROBUST
    verdicts: Verdicts = by_rules

    def __call__(self, rollouts: Sequence[Played]) -> list[Reward]:
        return [
            failed(verdict)
            if isinstance(verdict, Exception)
            else score(one.trajectory, one.solution, self.preset, question=one.question, is_right=verdict)
            for one, verdict in zip(rollouts, self.verdicts(rollouts))
        ]


def can_be_earned(solution: Solution) -> bool:
    """Whether any answer is right for this gold answer: one that says it, or one of several, as models do."""
    thinking = f"{THINK_OPEN}{THINK_CLOSE}\n\n"
    written = (f"{thinking}{ANSWER_OPEN}{answer}{ANSWER_CLOSE}" for answer in golds(solution))
    return any(score(Trajectory(prompt_ids=[], text=text), solution).accuracy for text in written)


def has_think_and_answer(text: str) -> bool:
    """Reasoning, `</think>`, one non-empty answer block, nothing else; the opening `<think>` may be in the prompt."""
    structure = _THINK_THEN_ANSWER.fullmatch(text.strip())
    return structure is not None and bool(structure[1].strip())


def _ends_in_answer(text: str) -> bool:
    """An answer block, anything before it, only whitespace after it: the released code's format."""
    head, closing_tag, tail = text.rpartition("</answer>")
    return bool(closing_tag) and not tail.strip() and "<answer>" in head


def _reasoning(text: str) -> str:
    """The thinking, whitespace collapsed; calls, tool responses and a forced stop are not reasoning."""
    thinking, _ = split_thinking(text.replace(EARLY_STOP, THINK_CLOSE))
    return " ".join(strip_tool_text(thinking).split())


def num_new_chars(text: str, known: str = "") -> int:
    """Characters of a text that say something for the first time, case passed over.

    Counted by the stretches of 16 characters (one begins at each character) that stand neither before in the text nor
    in what is `known`. A text without repeats has its length; 250 times "a" has 16, a sentence said ten times that of
    one and what joins them.
    """
    text, known = text.casefold(), " ".join(known.casefold().split())
    stretches = {text[start : start + REPEATED_CHARS] for start in range(max(1, len(text) - REPEATED_CHARS + 1))}
    num_new = sum(stretch not in known for stretch in stretches)
    return min(len(text), num_new + REPEATED_CHARS - 1) if num_new else 0


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
