"""The rollouts of a step: their order and rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import pytest
import torch
from tests.training.scripted import RIGHT, SAMPLE, WRONG, paid, rollout_of

from looktwice.config import GRPOConfig
from looktwice.engine.builtin import BuiltinEngine
from looktwice.errors import TrainingError
from looktwice.formats.sample_file import read_samples
from looktwice.metrics import METRICS
from looktwice.processing.packing import pack
from looktwice.rewards import Played, PresetReward, Reward
from looktwice.rollout.trajectory import StopReason
from looktwice.training.rollouts import rewarded, roll_out, tell_failures
from looktwice.training.sampler import Sampler


def unpaid(played: Sequence[Played]) -> list[Reward]:
    return [paid(0.0) for _ in played]


def test_each_prompt_gets_its_group_in_order_and_each_rollout_its_reward(load, dataset) -> None:
    learner = load(num_generations=3, max_new_tokens=5, rollout_batch_size=4)
    samples = read_samples(dataset.rl, dataset.rl.parent)[:2]
    groups = roll_out(
        learner,
        samples,
        learner.config,
        lambda played: [Reward(total=float(one.solution) + 100) for one in played],
        Sampler(learner, learner.config),
    )
    assert [[rollout.sample for rollout in group] for group in groups] == [[sample] * 3 for sample in samples]
    assert [rollout.reward.total for group in groups for rollout in group] == [
        float(sample.solution) + 100 for sample in samples for _ in range(3)
    ]
    for sample, group in zip(samples, groups):
        assert all(sample.question in learner.processor.decode(rollout.trajectory.prompt_ids) for rollout in group)
    assert len({tuple(rollout.trajectory.completion_ids) for group in groups for rollout in group}) == 6


def test_rollouts_of_another_step_are_others_and_those_of_the_same_step_the_same(load, dataset) -> None:
    learner = load(num_generations=2, max_new_tokens=5)
    samples = read_samples(dataset.rl, dataset.rl.parent)[:1]
    seen = []
    for learner.step in (0, 0, 1):
        [group] = roll_out(learner, samples, learner.config, unpaid, Sampler(learner, learner.config))
        seen.append([rollout.trajectory.completion_ids for rollout in group])
    assert seen[0] == seen[1] != seen[2]


def test_rollouts_that_failed_are_told_and_stop_a_run_when_all_did(play_scripts, capsys) -> None:
    [good], [bad] = (play_scripts(script)[0] for script in (RIGHT, WRONG))
    bad.trajectory.stop_reason, bad.trajectory.error = "error", "ZeroDivisionError: in the tool"
    rewards = rewarded([Played(one.trajectory, SAMPLE.solution) for one in (good, bad)], PresetReward())
    rollouts = [rollout_of(one, reward) for one, reward in zip((good, bad), rewards)]
    assert rollouts[0].reward.error is None and rollouts[1].reward.error == "ZeroDivisionError: in the tool"
    tell_failures([rollouts])
    assert "1 rollout of this step failed, the first by: ZeroDivisionError" in capsys.readouterr().out
    with pytest.raises(TrainingError, match="nothing can be learnt"):
        tell_failures([rollouts[1:]])


@pytest.mark.parametrize("reason", get_args(StopReason))
def test_every_stop_reason_is_a_metric(reason) -> None:
    assert f"rollout/stop/{reason}" in METRICS


def test_vllm_servers_sample_after_they_got_the_weights_of_the_step(
    load, dataset, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed: list[tuple] = []

    class Servers(BuiltinEngine):
        """The built-in engine in their place."""

        def __init__(self, addresses, config, *, max_rollouts: int) -> None:
            assert config is learner.processor.config
            super().__init__(learner.base, max_rows=max_rollouts)
            self.addresses = addresses

        def push_weights(self, model, folder, version: str) -> None:
            pushed.append((model, folder, version, self.addresses))

    monkeypatch.setattr("looktwice.engine.vllm.VllmEngine", Servers)
    settings = {"num_generations": 2, "max_new_tokens": 4, "output_dir": tmp_path}
    learner = load(**settings, vllm_servers="http://a:8000, http://b:8000")
    learner.step = 3
    samples = read_samples(dataset.rl, dataset.rl.parent)[:1]
    [group] = roll_out(learner, samples, learner.config, unpaid, Sampler(learner, learner.config))
    [(model, folder, version, addresses)] = pushed
    assert (model, folder, addresses) == (
        learner.model,
        tmp_path / "served_weights",
        ("http://a:8000", "http://b:8000"),
    )
    assert version.endswith("-3")
    config = GRPOConfig(**settings)
    [here] = roll_out(learner, samples, config, unpaid, Sampler(learner, config))
    assert [one.trajectory.completion_ids for one in group] == [one.trajectory.completion_ids for one in here]


@pytest.mark.parametrize("bf16", [False, True])
def test_rollouts_are_sampled_in_the_precision_of_training(bf16, load, dataset) -> None:
    learner = load(num_generations=4, max_new_tokens=12, bf16=bf16)
    samples = read_samples(dataset.rl, dataset.rl.parent)[:2]
    during: list[bool] = []
    learner.base.lm_head.register_forward_hook(lambda *_: during.append(torch.is_autocast_enabled("cpu")))
    groups = roll_out(learner, samples, learner.config, unpaid, Sampler(learner, learner.config))
    assert {*during} == {bf16}
    rollouts = [rollout for group in groups for rollout in group]
    with torch.no_grad():
        trained = learner.score(pack([rollout.example for rollout in rollouts])).logprobs
    recorded = [logprob for rollout in rollouts for logprob in rollout.trajectory.sampling_logprobs if logprob]
    # how much bfloat16 rounds away depends on the processor
    assert (trained - torch.tensor(recorded)).abs().mean() < (0.02 if bf16 else 1e-5)
