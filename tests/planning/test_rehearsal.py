"""What is counted without memory, against what the allocator gives out when the same steps are real."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from torch.profiler import ProfilerActivity, profile

from looktwice.config import GRPOConfig, ModelConfig, SFTConfig
from looktwice.planning.plan import config_of
from looktwice.planning.rehearsal import Load, Where, grpo, sft

LOAD = Load(tokens=256, image_tokens=64, rollouts=3, rollout_tokens=128, siblings=2)
STEPS = {
    "SFT of all weights, layers recomputed": (sft, SFTConfig(gradient_checkpointing="all")),
    "R-GRPO of LoRA": (grpo, GRPOConfig(use_lora=True, lora_r=8, beta=0.1)),
}


def allocator_peak(step: Callable[[], object]) -> int:
    """The most bytes that torch's CPU allocator had given out at once since the step began, those of kernels too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return int(np.cumsum([event.nbytes() for event in sorted(events, key=lambda each: each.start_ns())]).max())


@pytest.mark.parametrize("name", STEPS)
def test_a_step_without_memory_counts_what_a_real_one_takes(name: str) -> None:
    step, stage = STEPS[name]
    config, _ = config_of("tiny")

    def taken(on: Where) -> Any:
        return step(config, ModelConfig(), stage, LOAD, on)  # type: ignore[operator]

    counted = max(moments.live.sum(1).max() for moments in taken("cpu") if moments.operations)
    assert counted == pytest.approx(allocator_peak(lambda: taken("real")), rel=0.01)
