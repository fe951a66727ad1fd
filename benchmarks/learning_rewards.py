"""Rewards of the ablations in `learning.py`: `robust` but for one thing, as rewards of a user's own."""

from __future__ import annotations

from dataclasses import replace

from looktwice.answers import Solution
from looktwice.rewards import ROBUST, score
from looktwice.rollout.trajectory import Trajectory


def region_ungated(trajectory: Trajectory, solution: Solution, question: str) -> dict[str, float]:
    """A crop is paid whether the answer is right or not."""
    reward = score(trajectory, solution, question=question)
    return {**reward.parts, "region": min(ROBUST.region_cap, ROBUST.region_per_crop * reward.raw["region"])}


def no_region(trajectory: Trajectory, solution: Solution, question: str) -> dict[str, float]:
    """Crops are not paid at all."""
    return {**score(trajectory, solution, question=question).parts, "region": 0.0}


def shaping_ungated(trajectory: Trajectory, solution: Solution, question: str) -> dict[str, float]:
    """Format and length are paid whether the answer is right or not."""
    return {**score(trajectory, solution, replace(ROBUST, is_shaping_gated=False), question=question).parts}


def boxes_as_text(trajectory: Trajectory, solution: Solution, question: str) -> dict[str, float]:
    """A box that is written is paid, whether it was cut or not, as VLM-R3's released code does."""
    written = score(trajectory, solution, replace(ROBUST, measure="written_text")).parts
    return {**score(trajectory, solution, question=question).parts, "region": written["region"]}
