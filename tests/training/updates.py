"""An update of stage 1, and what it leaves in the weights."""

from __future__ import annotations

from collections.abc import Callable

import torch

from looktwice.processing.processor import Example
from looktwice.training.learner import Learner
from looktwice.training.record import Record

RECORD = Record(stage="sft", order={}, settings={})
LoadLearner = Callable[..., Learner]


def update(learner: Learner, examples: list[Example]) -> float:
    """One update on the mean loss per token; gives the loss."""
    rows = learner.rows(examples)
    num_tokens = sum(row.num_loss_tokens for row in rows)
    return learner.update(rows, lambda scores, row: -scores.logprobs.sum() / num_tokens).loss


def gradients(learner: Learner) -> list[torch.Tensor]:
    """Of all trained weights, which are not nothing; the tower's last norm is stored in checkpoints and not used, so it
    has none."""
    found = [parameter.grad for parameter in learner.parameters if parameter.grad is not None]
    assert any(gradient.any() for gradient in found), "no trained weight has a gradient"
    return found
