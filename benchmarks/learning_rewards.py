"""Rewards of the ablations in `learning.py`: `robust` but for one thing, as rewards of a user's own."""

from __future__ import annotations

from dataclasses import replace

from looktwice.answers import Solution
from looktwice.rewards import ROBUST, score
from looktwice.rollout.trajectory import Trajectory


def region_ungated(trajectory: Trajectory, solution: Solution) -> dict[str, float]:
    """A crop is paid whether the answer is right or not."""
    crops = {(call.image_number, call.box) for call in trajectory.calls if call.is_valid}
    region = min(ROBUST.region_cap, ROBUST.region_per_crop * len(crops))
    return {**score(trajectory, solution).parts, "region": region}


def no_region(trajectory: Trajectory, solution: Solution) -> dict[str, float]:
    """Crops are not paid at all."""
    return {**score(trajectory, solution).parts, "region": 0.0}


def shaping_ungated(trajectory: Trajectory, solution: Solution) -> dict[str, float]:
    """Format and length are paid whether the answer is right or not."""
    return {**score(trajectory, solution, replace(ROBUST, is_shaping_gated=False)).parts}


def boxes_as_text(trajectory: Trajectory, solution: Solution) -> dict[str, float]:
    """A box that is written is paid, whether it was cut or not, as VLM-R3's released code does."""
    written = score(trajectory, solution, replace(ROBUST, measure="written_text")).parts
    return {**score(trajectory, solution).parts, "region": written["region"]}
