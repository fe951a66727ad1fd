"""Answers that tests of stage 2 let the model have written, and the groups they make."""

from __future__ import annotations

from pathlib import Path

from looktwice.data.sample import Sample
from looktwice.messages import question_about
from looktwice.rewards import Reward
from looktwice.rollout.episode import Episode
from looktwice.training.rollouts import Rollout

CALL = "<tool_call>[0, 0, 48, 48]</tool_call>"
RIGHT = f"<think>\n{CALL} red.\n</think>\n\n<answer>7</answer><|im_end|>"
WRONG = "<think>\nno.\n</think>\n\n<answer>8</answer><|im_end|>"
OTHER = "I see a cup, <answer>9</answer><|im_end|>"
CUT = "<think>\nand on and on and on and on and on"
SAMPLE = Sample(conversation=question_about("What?", Path("x.png")), solution="7", where="a:1", field="A")

Group = list[tuple[str, float]]
"""Script and accuracy of each rollout; NaN is a reward that failed."""


def rollout_of(episode: Episode, reward: Reward, *, sample: Sample = SAMPLE, seed: int = 0) -> Rollout:
    """A finished episode with its reward."""
    return Rollout(example=episode.example, trajectory=episode.trajectory, sample=sample, reward=reward, seed=seed)


def paid(total: float) -> Reward:
    return Reward(total=total, error="ValueError: no" if total != total else None)
