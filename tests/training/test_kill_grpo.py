"""Stage 2 killed at random moments, with rollouts made ahead: it goes on as a run that was left alone, bit for bit."""

from __future__ import annotations

from typing import Any

from tests.training.test_kill import nursery, run, survive

__all__ = ["nursery", "run"]

GRPO: dict[str, Any] = {
    "max_steps": 4,
    "train_batch_size": 2,
    "num_generations": 2,
    "max_new_tokens": 6,
    "max_turns": 2,
}
GRPO |= {"learning_rate": 1e-3, "deterministic": True, "drop_constant_groups": False}
GRPO |= {"mask_truncated_completions": False, "beta": 0.1}


def test_rollouts_made_ahead_survive_being_killed(run, model_folder, tmp_path) -> None:
    settings = {**GRPO, "sft_checkpoint_path": str(model_folder), "one_step_off": True, "save_steps": 2}
    survive(run, tmp_path, "grpo", settings, kills=3, seed=5)
