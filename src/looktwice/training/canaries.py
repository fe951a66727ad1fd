"""Canaries: what must hold before a policy learns from its rollouts, looked at in one of them.

The model sees its pictures, its adapter is at work, and the engine samples from what the trainer computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from peft import PeftModel
from torch import Tensor

from looktwice.errors import TrainingError, counted
from looktwice.model.adapters import is_fresh
from looktwice.model.quantization import quantization_of
from looktwice.processing.images import PatchedImage
from looktwice.processing.packing import pack
from looktwice.processing.processor import Example
from looktwice.rollout.trajectory import Trajectory
from looktwice.training.learner import Learner

SMALLEST_CHANGE = 1e-6
"""Nats on average. A forward repeated moves no logprob at all; real changes were 0.06 (picture), 0.008 (adapter)."""
LARGEST_GAP, LARGEST_ROUGH_GAP = 1e-3, 0.1
"""Nats on average. Both compute a sequence in other shapes, so they round otherwise: measured are 4e-7 in float32, and
0.001 to 0.005 in bfloat16, which keeps 8 bits of a number; deep models and layers of 4 or 8 bits have more of that."""


class Finished(Protocol):
    """A rollout that is over, rewarded or not."""

    example: Example
    trajectory: Trajectory


def check_rollouts(learner: Learner, rollouts: Sequence[Finished], *, temperature: float) -> dict[str, float]:
    """What `check_rollout` sees in the first rollout that can be judged, one with a picture if there is any.

    Without any sampled token there is none: says so, and gives an empty dict.
    """
    sampled = [rollout for rollout in rollouts if any(rollout.example.loss_mask)]
    if not sampled:
        print(f"none of {counted(len(rollouts), 'rollout')} holds a sampled token; the canaries wait for the next step")
        return {}
    judged = next((rollout for rollout in sampled if rollout.example.images), sampled[0])
    return check_rollout(learner, judged, temperature=temperature)


def check_rollout(learner: Learner, rollout: Finished, *, temperature: float) -> dict[str, float]:
    """The metrics `canary/...` of a finished rollout: means over its sampled tokens, nats.

    `gap`: trainer against engine. `picture`: how far other pictures move the logprobs, if it shows any. `adapter`: how
    far switching the adapter off does, if there is one that has learnt something.
    Costs three forwards of one sequence, without gradients, and draws no random number.

    Raises TrainingError when one is not as it must be.
    """
    learner.model.eval()
    example, trajectory = rollout.example, rollout.trajectory
    logprobs = _logprobs(learner, example, temperature)
    recorded = torch.tensor(trajectory.of_sampled(trajectory.sampling_logprobs))
    seen = {"canary/gap": _mean_change(logprobs, recorded)}
    _check_gap(learner, seen["canary/gap"], num_tokens=len(logprobs))
    if example.images:
        other = replace(example, images=[_repainted(image) for image in example.images])
        seen["canary/picture"] = _mean_change(logprobs, _logprobs(learner, other, temperature))
        if not seen["canary/picture"] > SMALLEST_CHANGE:
            raise TrainingError(
                f"another picture moves the logprobs of an answer by {seen['canary/picture']:.2g} nats: the model does "
                "not see its pictures, and would learn nothing about them; start from one that answers differently "
                "about two pictures (looktwice ask shows it)"
            )
    if isinstance(learner.model, PeftModel) and not is_fresh(learner.model):
        with learner.model.disable_adapter():
            seen["canary/adapter"] = _mean_change(logprobs, _logprobs(learner, example, temperature))
        if not seen["canary/adapter"] > SMALLEST_CHANGE:
            raise TrainingError(
                f"switching the adapter off moves the logprobs of an answer by {seen['canary/adapter']:.2g} nats: it "
                "has weights, and they do nothing; look at lora_alpha and target_modules in its adapter_config.json"
            )
    return seen


def _check_gap(learner: Learner, gap: float, *, num_tokens: int) -> None:
    is_rough = learner.config.bf16 or quantization_of(learner.base) != "none"
    limit = 0.0 if learner.is_exact else LARGEST_ROUGH_GAP if is_rough else LARGEST_GAP
    if not gap <= limit:  # refuses NaN too
        precision = "exact mode" if learner.is_exact else "bfloat16 or over a quantised base" if is_rough else "float32"
        raise TrainingError(
            f"engine and trainer disagree: the logprobs of {counted(num_tokens, 'sampled token')} differ by {gap:.3g} "
            f"nats on average, and rounding in {precision} gives at most {limit}; updates would be of another policy "
            "than the one that sampled. Try --attn_implementation sdpa, and report it"
        )


def _logprobs(learner: Learner, example: Example, temperature: float) -> Tensor:
    """Logprobs of the sampled tokens as training computes them: [N] float32, on the CPU."""
    with torch.no_grad():
        return learner.score(pack([example]), temperature=temperature).logprobs.float().cpu()


def _mean_change(first: Tensor, second: Tensor) -> float:
    return float((first - second).abs().mean())


def _repainted(image: PatchedImage) -> PatchedImage:
    """Another picture of the same grid: every byte moves by half the range, so that a blank one changes too."""
    return replace(image, pixel_values=image.pixel_values + 128)
