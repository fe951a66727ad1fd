"""The losses of stage 2 against those of TRL's GRPOTrainer, by its own code, on the same logprobs."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from looktwice.config import GRPOConfig
from looktwice.processing.packing import pack
from looktwice.processing.processor import Example
from looktwice.training.learner import Scores
from looktwice.training.policy import Minibatch, PolicyLoss

grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer")

LENGTHS = (5, 3, 1, 4)
MAX_TOKENS = 6
ADVANTAGES = torch.tensor([1.2, -0.7, 0.4, -0.9])


def drawn(seed: int) -> Tensor:
    """Logprobs of the sampled tokens [4, 5], as if a policy had computed them."""
    return -torch.rand(len(LENGTHS), max(LENGTHS), generator=torch.Generator().manual_seed(seed)) * 2


MASK = torch.tensor([[place < length for place in range(max(LENGTHS))] for length in LENGTHS]).float()


def of_trl(policy: Tensor, old: Tensor, ref: Tensor, **settings: object) -> Tensor:
    """The loss by TRL's `_compute_loss`, given the logprobs that its model would have computed."""
    arguments = {
        "delta": None,
        "use_bias_correction_kl": False,
        "sapo_temperature_pos": 1.0,
        "sapo_temperature_neg": 1.05,
        "steps_per_generation": 1,
    }
    trainer = grpo_trainer.GRPOTrainer.__new__(grpo_trainer.GRPOTrainer)
    trainer.args = SimpleNamespace(**{name: settings.pop(name, value) for name, value in arguments.items()})
    trainer.model = SimpleNamespace(training=True)
    trainer.accelerator = SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x)
    trainer._metrics = {"train": defaultdict(list)}
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (policy, torch.zeros_like(policy), None)
    chosen = {
        "aux_loss_enabled": False,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "importance_sampling_level": "token",
        "beta": 0.0,
        "loss_type": "dapo",
        "epsilon_low": 0.2,
        "epsilon_high": 0.28,
        "use_vllm": False,
        "vllm_importance_sampling_correction": False,
        "current_gradient_accumulation_steps": 1,
        "max_completion_length": MAX_TOKENS,
        "_entropy_bonus_enabled": False,
        **settings,
    }
    weights = chosen.pop("importance_sampling_ratio", None)
    vars(trainer).update(chosen)
    ids = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.int64)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1] + 1,
        "completion_ids": ids,
        "completion_mask": MASK,
        "advantages": ADVANTAGES,
        "old_per_token_logps": old,
        "ref_per_token_logps": ref,
        "num_items_in_batch": MASK.sum(),
        "importance_sampling_ratio": weights,
    }
    return trainer._compute_loss(None, inputs)


def of_looktwice(policy: Tensor, old: Tensor, ref: Tensor, **settings: object) -> Tensor:
    """The loss by `PolicyLoss`, of the same rollouts in one packed row."""
    config = GRPOConfig(max_new_tokens=MAX_TOKENS, **settings)
    examples = [Example(input_ids=[1] * (length + 1), loss_mask=[False, *[True] * length]) for length in LENGTHS]
    rollouts = {}
    for number, (example, length) in enumerate(zip(examples, LENGTHS)):
        row = old[number, :length].tolist()
        rollouts[id(example)] = SimpleNamespace(
            trajectory=SimpleNamespace(is_sampled=[True] * length, sampling_logprobs=row, drawn_logprobs=row),
            advantage=float(ADVANTAGES[number]),
            reference_logprobs=ref[number, :length].tolist() if config.beta else None,
            old_logprobs=None,
        )
    loss = PolicyLoss(config, rollouts)
    loss.begin(Minibatch([], sum(LENGTHS), len(LENGTHS)))
    return loss(Scores(policy[MASK.bool()], None), pack(examples))


def assert_alike(ours: dict[str, object], theirs: dict[str, object]) -> None:
    """Equal losses, and equal gradients of them by the policy's logprobs."""
    old, ref = drawn(1), drawn(2)
    policy = (old + 0.3 * torch.randn(old.shape, generator=torch.Generator().manual_seed(3))).requires_grad_()
    wanted = of_trl(policy, old, ref, **theirs)
    found = of_looktwice(policy, old, ref, **ours)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)
    gradients = [torch.autograd.grad(loss, policy)[0] for loss in (found, wanted)]
    assert gradients[1].any()
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {"loss_type": "dapo"}),
        ({}, {"loss_type": "bnpo"}),
        ({"loss_aggregation": "seq_mean_token_mean"}, {"loss_type": "grpo"}),
        ({"loss_aggregation": "constant"}, {"loss_type": "dr_grpo"}),
        ({"epsilon": 0.05, "epsilon_high": 0.1}, {"epsilon_low": 0.05, "epsilon_high": 0.1}),
        ({"delta": 1.3, "epsilon_high": 0.1}, {"epsilon_high": 0.1, "delta": 1.3}),
        # TRL's bound of CISPO is the largest weight itself, ours is what it exceeds 1 by
        ({"surrogate": "cispo", "epsilon_high": 0.2}, {"loss_type": "cispo", "epsilon_high": 1.2}),
        ({"surrogate": "sapo", "loss_aggregation": "seq_mean_token_mean"}, {"loss_type": "sapo"}),
        (
            {"surrogate": "gspo", "loss_aggregation": "seq_mean_token_mean", "epsilon": 0.05, "epsilon_high": 0.1},
            {
                "loss_type": "grpo",
                "importance_sampling_level": "sequence",
                "epsilon_low": 0.05,
                "epsilon_high": 0.1,
            },
        ),
        ({"beta": 0.3}, {"beta": 0.3}),
        ({"beta": 0.3, "loss_aggregation": "seq_mean_token_mean"}, {"beta": 0.3, "loss_type": "grpo"}),
    ],
)
def test_losses_and_gradients_are_those_of_trl(ours, theirs) -> None:
    assert_alike(ours, theirs)


@pytest.mark.parametrize(("correction", "cap"), [("truncate", 1.1), ("mask", 1.3)])
def test_importance_correction_is_that_of_trl(correction, cap) -> None:
    # the trainer before its only update, and a sampler that differs from it
    sampled = drawn(1)
    policy = (sampled + 0.3 * torch.randn(sampled.shape, generator=torch.Generator().manual_seed(3))).requires_grad_()
    ratio = (policy.detach() - sampled).exp()
    if correction == "truncate":
        weights = ratio.clamp(max=cap)
    else:
        weights = ratio.masked_fill((ratio < 1 / cap) | (ratio > cap), 0.0)
    wanted = of_trl(
        policy,
        policy.detach(),
        sampled,
        use_vllm=True,
        vllm_importance_sampling_correction=True,
        importance_sampling_ratio=weights,
    )
    found = of_looktwice(policy, sampled, sampled, importance_correction=correction, importance_cap=cap)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)
    gradients = [torch.autograd.grad(loss, policy)[0] for loss in (found, wanted)]
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-5)
