"""Stage 2: which rollouts train, what the update does to them, what is logged, and whole runs with a user's reward."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch

from looktwice.config import DataConfig, GRPOConfig, ModelConfig, SFTConfig
from looktwice.data.sample import Sample
from looktwice.engine.builtin import BuiltinEngine
from looktwice.errors import DataError, TrainingError
from looktwice.formats.sample_file import read_samples
from looktwice.geometry import Box, Size
from looktwice.messages import question_about
from looktwice.metrics import METRICS
from looktwice.model.numerics import NumericsError
from looktwice.processing.packing import pack
from looktwice.rewards import PresetReward, Reward
from looktwice.rollout.trajectory import StopReason, ToolCall
from looktwice.training.grpo import (
    Rollout,
    improve,
    rewarded,
    roll_out,
    rollout_metrics,
    tell_failures,
    train_grpo,
    train_step,
)
from looktwice.training.learner import Learner
from looktwice.training.sft import train_sft

CALL = "<tool_call>[0, 0, 48, 48]</tool_call>"
RIGHT = f"<think>\n{CALL} red.\n</think>\n\n<answer>7</answer><|im_end|>"
WRONG = "<think>\nno.\n</think>\n\n<answer>8</answer><|im_end|>"
OTHER = "I see a cup, <answer>9</answer><|im_end|>"
CUT = "<think>\nand on and on and on and on and on"
SAMPLE = Sample(conversation=question_about("What?", Path("x.png")), solution="7", where="a:1", field="A")

Group = list[tuple[str, float]]
"""Script and accuracy of each rollout; NaN is a reward that failed."""


@pytest.fixture
def load(model_folder, processor) -> Callable[..., Learner]:
    def make(**settings: object) -> Learner:
        config = GRPOConfig(**{"max_grad_norm": 0, "warmup_ratio": 0, **settings})
        return Learner.load(
            str(model_folder), ModelConfig(device="cpu"), config, processor, total_steps=10, is_exact=config.exact
        )

    return make


@pytest.fixture
def rollouts_of(play_scripts) -> Callable[..., list[list[Rollout]]]:
    """Groups of scripted rollouts, as if the model of the learner had sampled them."""

    def make(learner: Learner, *groups: Group) -> list[list[Rollout]]:
        made = []
        for group in groups:
            episodes = [play_scripts(script, max_new_tokens=20 if script is CUT else 200)[0][0] for script, _ in group]
            with torch.no_grad():
                logprobs = iter(learner.score(pack([episode.example for episode in episodes])).logprobs.tolist())
            for episode in episodes:
                trajectory = episode.trajectory
                trajectory.sampling_logprobs = [next(logprobs) if flag else 0.0 for flag in trajectory.is_sampled]
            made.append(
                [
                    Rollout(episode=episode, sample=SAMPLE, reward=paid(total))
                    for episode, (_, total) in zip(episodes, group)
                ]
            )
        return made

    return make


def paid(total: float) -> Reward:
    return Reward(total=total, error="ValueError: no" if total != total else None)


def step(learner: Learner, groups: list[list[Rollout]]) -> dict[str, float]:
    assert isinstance(learner.config, GRPOConfig)
    return improve(learner, groups, learner.config, None)


def gradients(learner: Learner) -> list[torch.Tensor]:
    return [parameter.grad for parameter in learner.parameters if parameter.grad is not None]


def assert_same_gradients(first: Learner, second: Learner) -> None:
    for one, other in zip(gradients(first), gradients(second), strict=True):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=1e-3)


def mean_logprobs(learner: Learner, groups: list[list[Rollout]]) -> list[float]:
    with torch.no_grad():
        return [
            float(learner.score(pack([rollout.episode.example])).logprobs.mean())
            for group in groups
            for rollout in group
        ]


# -- the update


def test_the_better_rollouts_become_likelier_and_the_worse_ones_less_likely(load, rollouts_of) -> None:
    learner = load(learning_rate=1e-4)
    groups = rollouts_of(learner, [(RIGHT, 1.0), (WRONG, 0.0), (RIGHT, 1.0), (OTHER, 0.0)])
    before = mean_logprobs(learner, groups)
    metrics = step(learner, groups)
    after = mean_logprobs(learner, groups)
    assert [new > old for old, new in zip(before, after)] == [True, False, True, False]
    assert [rollout.advantage for rollout in groups[0]] == pytest.approx([0.866, -0.866, 0.866, -0.866], abs=1e-3)
    assert (metrics["kl/sampling"], metrics["clip/low"], metrics["clip/high"]) == pytest.approx((0, 0, 0), abs=1e-4)


def test_only_states_that_predict_a_sampled_id_get_a_gradient(load, rollouts_of) -> None:
    learner = load()
    groups = rollouts_of(learner, [(RIGHT, 1.0), (WRONG, 0.0), (OTHER, 0.0)])
    states: list[torch.Tensor] = []

    def keep(module: object, inputs: object, output: object) -> None:
        output.last_hidden_state.retain_grad()
        states.append(output.last_hidden_state)

    with learner.base.model.register_forward_hook(keep):
        step(learner, groups)
    [state] = states
    mask = torch.tensor([flag for rollout in groups[0] for flag in rollout.episode.example.loss_mask])
    predicts_a_sampled_id = mask.roll(-1)
    has_gradient = state.grad[0].abs().sum(-1) > 0
    assert torch.equal(has_gradient, predicts_a_sampled_id)
    num_tool_ids = sum(not flag for flag in groups[0][0].trajectory.is_sampled)
    assert num_tool_ids == 11 and mask.sum() == sum(sum(rollout.trajectory.is_sampled) for rollout in groups[0])


def test_the_pixels_of_a_crop_are_context_of_what_follows_it_and_of_nothing_before(load, rollouts_of) -> None:
    learner = load()
    [[rollout]] = rollouts_of(learner, [(RIGHT, 1.0)])
    example = rollout.episode.example
    plain = learner.score(pack([example])).logprobs
    overview, crop = example.images
    repainted = replace(crop, pixel_values=255 - crop.pixel_values)
    example.images[:] = [overview, repainted]
    changed = learner.score(pack([example])).logprobs
    num_before = rollout.trajectory.is_sampled.index(False)
    torch.testing.assert_close(changed[:num_before], plain[:num_before])
    assert (changed[num_before:] - plain[num_before:]).abs().min() > 1e-4


@pytest.mark.parametrize("loss_aggregation", ["token_mean", "seq_mean_token_mean"])
def test_an_update_is_the_same_in_one_row_and_in_many(loss_aggregation, load, rollouts_of) -> None:
    group = [(RIGHT, 1.0), (WRONG, 0.0), (OTHER, 0.5)]
    packed, split = (load(loss_aggregation=loss_aggregation, max_tokens_per_row=size, beta=0.1) for size in (10_000, 1))
    for learner in (packed, split):
        improve(learner, rollouts_of(learner, group), learner.config, learner.freeze_reference())
    assert_same_gradients(packed, split)


def test_the_surrogates_agree_on_rollouts_of_the_policy_itself(load, rollouts_of) -> None:
    learners = [load(surrogate=name) for name in ("ppo", "gspo", "cispo")]
    for learner in learners:
        step(learner, rollouts_of(learner, [(RIGHT, 1.0), (WRONG, 0.0)]))
    for other in learners[1:]:
        assert_same_gradients(learners[0], other)


def test_the_kl_to_the_reference_is_zero_at_first_and_enters_the_loss_by_its_weight(load, rollouts_of) -> None:
    learner = load(beta=0.5, learning_rate=1e-3, drop_constant_groups=False)
    reference = learner.freeze_reference()
    first, second = (
        improve(learner, rollouts_of(learner, [(RIGHT, 1.0), (WRONG, total)]), learner.config, reference)
        for total in (0.0, 1.0)
    )
    assert first["kl/reference"] == pytest.approx(0, abs=1e-6)
    # without advantages the KL is alone in the loss
    assert second["kl/reference"] > 1e-3
    assert second["loss"] == pytest.approx(0.5 * second["kl/reference"], rel=1e-3)


def test_a_second_update_on_the_same_rollouts_is_clipped(load, rollouts_of) -> None:
    learner = load(num_iterations=2, learning_rate=1e-2, epsilon=0.01, epsilon_high=0.01)
    metrics = step(learner, rollouts_of(learner, [(RIGHT, 1.0), (WRONG, 0.0)]))
    assert metrics["clip/low"] > 0.05 and metrics["clip/high"] > 0.05
    assert metrics["kl/sampling"] > 0.01


# -- which rollouts train


def test_groups_that_are_all_right_or_all_wrong_are_dropped_and_counted(load, rollouts_of) -> None:
    learner, alone = load(), load()
    mixed = [(RIGHT, 1.0), (WRONG, 0.0)]
    groups = rollouts_of(learner, mixed, [(RIGHT, 1.0), (OTHER, 1.0)], [(WRONG, 0.0), (OTHER, 0.0)])
    assert step(learner, groups)["group/dropped"] == pytest.approx(2 / 3)
    assert step(alone, rollouts_of(alone, mixed))["group/dropped"] == 0
    assert_same_gradients(learner, alone)


def test_without_any_signal_the_weights_stay(load, rollouts_of) -> None:
    learner = load(learning_rate=1e-2)
    before = [parameter.clone() for parameter in learner.parameters]
    metrics = step(learner, rollouts_of(learner, [(RIGHT, 1.0), (OTHER, 1.0)]))
    assert metrics == {"group/dropped": 1.0, "loss": 0.0}
    assert all(torch.equal(old, new) for old, new in zip(before, learner.parameters))


def test_a_group_that_differs_in_shaping_alone_trains_only_when_asked(load, rollouts_of) -> None:
    learner = load()
    [group] = rollouts_of(learner, [(WRONG, 0.0), (OTHER, 0.0)])
    group[0].reward = Reward(total=1.0, parts={"accuracy": 0.0, "format": 1.0})
    group[1].reward = Reward(total=0.0, parts={"accuracy": 0.0, "format": 0.0})
    assert step(learner, [group])["group/dropped"] == 1
    assert improve(learner, [group], GRPOConfig(drop_constant_groups=False), None)["group/dropped"] == 0
    assert group[0].advantage > 0 > group[1].advantage


def test_a_failed_reward_changes_neither_the_advantages_nor_the_update(load, rollouts_of) -> None:
    learner, without = load(), load()
    group = [(RIGHT, 1.0), (WRONG, 0.0), (OTHER, 0.5)]
    groups = rollouts_of(learner, [group[0], (OTHER, float("nan")), *group[1:]])
    expected = rollouts_of(without, group)
    metrics, wanted = step(learner, groups), step(without, expected)
    advantages = [rollout.advantage for rollout in groups[0] if rollout.reward.error is None]
    assert advantages == pytest.approx([rollout.advantage for rollout in expected[0]])
    assert metrics["loss"] == pytest.approx(wanted["loss"], abs=1e-6)
    assert_same_gradients(learner, without)


def test_a_group_with_one_reward_left_is_dropped(load, rollouts_of) -> None:
    learner = load(drop_constant_groups=False)
    groups = rollouts_of(learner, [(RIGHT, 1.0), (WRONG, float("nan"))])
    assert step(learner, groups) == {"group/dropped": 1.0, "loss": 0.0}


@pytest.mark.parametrize("is_masked", [True, False])
def test_a_truncated_rollout_counts_in_its_group_and_trains_only_when_asked(is_masked, load, rollouts_of) -> None:
    learner = load(learning_rate=1e-3, mask_truncated_completions=is_masked)
    groups = rollouts_of(learner, [(RIGHT, 1.0), (CUT, 0.0)])
    assert groups[0][1].trajectory.stop_reason == "max_tokens"
    seen: list[int] = []
    plain = learner.rows
    learner.rows = lambda examples: seen.append(len(examples)) or plain(examples)
    step(learner, groups)
    assert seen == [1 if is_masked else 2]
    assert groups[0][0].advantage == pytest.approx(0.707, abs=1e-3)


# -- metrics


def test_the_metrics_of_a_step_are_these_means(play_scripts) -> None:
    outside = "<tool_call>[500, 500, 600, 600]</tool_call>"
    scripts = [f"{CALL}{outside}{OTHER}", f"{CALL} no.<|im_end|>", WRONG, CALL * 6]
    episodes = [play_scripts(script, max_turns=3)[0][0] for script in scripts]
    sample = replace(SAMPLE, gold_box=Box(0, 0, 48, 24))
    rewards = [
        Reward(total=1.5, parts={"accuracy": 1.0, "format": 0.5}),
        Reward(total=0.5, parts={"accuracy": 0.0, "format": 0.5}),
        Reward(total=float("nan"), error="ValueError: no"),
        Reward(total=0.0, parts={"accuracy": 0.0, "format": 0.0}),
    ]
    rollouts = [Rollout(episode=one, sample=sample, reward=reward) for one, reward in zip(episodes, rewards)]
    metrics = rollout_metrics([rollouts[:2], rollouts[2:]])
    num_tokens = sum(sum(one.trajectory.is_sampled) for one in episodes) / 4
    assert metrics == pytest.approx(
        {
            "reward/failed": 0.25,
            "reward/total": 2 / 3,
            "reward/accuracy": 1 / 3,
            "reward/format": 1 / 3,
            "rollout/num_turns": 9 / 4,
            "rollout/num_tokens": num_tokens,
            "rollout/stop/answered": 0.5,
            "rollout/stop/no_answer": 0.25,
            "rollout/stop/max_turns": 0.25,
            "tool/calls": 5 / 4,
            "tool/valid_share": 4 / 5,
            "tool/mean_iou": 0.5,
        }
    )
    assert set(metrics) <= set(METRICS)


def test_calls_without_a_gold_box_have_no_overlap(play_scripts) -> None:
    [episode], _ = play_scripts(RIGHT)
    metrics = rollout_metrics([[Rollout(episode=episode, sample=SAMPLE, reward=paid(1.0))]])
    assert "tool/mean_iou" not in metrics and metrics["tool/valid_share"] == 1
    assert episode.trajectory.calls == [
        ToolCall(requested=Box(0, 0, 48, 48), box=Box(0, 0, 48, 48), size=Size(48, 48), error=None)
    ]


# -- rollouts


def test_each_prompt_gets_its_group_in_order_and_each_rollout_its_reward(load, dataset) -> None:
    learner = load(num_generations=3, max_new_tokens=5, rollout_batch_size=4)
    samples = read_samples(dataset.rl, dataset.rl.parent)[:2]
    groups = roll_out(
        learner, samples, learner.config, lambda played: [Reward(total=float(solution) + 100) for _, solution in played]
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
        [group] = roll_out(learner, samples, learner.config, lambda played: [Reward(total=0.0) for _ in played])
        seen.append([rollout.trajectory.completion_ids for rollout in group])
    assert seen[0] == seen[1] != seen[2]


def test_rollouts_that_failed_are_told_and_stop_a_run_when_all_did(play_scripts, capsys) -> None:
    [good], [bad] = (play_scripts(script)[0] for script in (RIGHT, WRONG))
    bad.trajectory.stop_reason, bad.trajectory.error = "error", "ZeroDivisionError: in the tool"
    rewards = rewarded([(one.trajectory, SAMPLE.solution) for one in (good, bad)], PresetReward())
    rollouts = [Rollout(episode=one, sample=SAMPLE, reward=reward) for one, reward in zip((good, bad), rewards)]
    assert rollouts[0].reward.error is None and rollouts[1].reward.error == "ZeroDivisionError: in the tool"
    tell_failures([rollouts])
    assert "1 rollout of this step failed, the first by: ZeroDivisionError" in capsys.readouterr().out
    with pytest.raises(TrainingError, match="nothing can be learnt"):
        tell_failures([rollouts[1:]])


def test_no_picture_is_encoded_twice_in_a_step_where_vision_is_frozen(load, dataset, monkeypatch) -> None:
    learner = load(use_lora=True, lora_r=2, num_generations=2, max_new_tokens=4, beta=0.1, max_tokens_per_row=1)
    samples = read_samples(dataset.rl, dataset.rl.parent)[:2]
    encoded: list[int] = []
    tower = learner.base.model.visual_tokenizer.vit
    tower.register_forward_hook(lambda module, given, out: encoded.append(len(given[1])))
    paid = iter([0.0, 1.0] * 2)
    settings = {"drop_constant_groups": False, "mask_truncated_completions": False}
    config = learner.config.model_copy(update=settings)
    metrics = train_step(
        learner,
        samples,
        config,
        lambda played: [Reward(total=next(paid)) for _ in played],
        learner.freeze_reference(),
        with_canaries=False,
    )
    assert metrics["loss"] != 0 and sum(encoded) == 2
    assert learner.vision_cache is None


def test_metrics_count_once_what_is_computed_again_when_memory_runs_out(load, rollouts_of, monkeypatch) -> None:
    learner, whole = load(), load()
    [group] = rollouts_of(learner, [(RIGHT, 1.0), (WRONG, 0.0), (OTHER, 0.0)])
    score, calls = Learner.score, []

    def scored(self, batch, **options):
        calls.append(batch)
        if len(calls) == 1:
            score(self, batch, **options)  # as far as the metrics
            raise torch.OutOfMemoryError
        return score(self, batch, **options)

    expected = step(whole, [group])
    monkeypatch.setattr(Learner, "score", scored)
    found = step(learner, [group])
    assert found.pop("memory/row_splits") > 0
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_reward_that_always_fails_stops_the_run_with_its_text(run, tmp_path) -> None:
    (tmp_path / "reward.py").write_text("def f(completions, **kwargs):\n    return [0.0 for _ in completions]")
    with pytest.raises(TrainingError, match=r"8 rewards of this step failed, the first by: TypeError: f\(\) takes 1"):
        run(max_steps=1, reward="f")


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
    [group] = roll_out(learner, samples, learner.config, lambda played: [Reward(total=0.0) for _ in played])
    [(model, folder, version, addresses)] = pushed
    assert (model, folder, addresses) == (
        learner.model,
        tmp_path / "served_weights",
        ("http://a:8000", "http://b:8000"),
    )
    assert version.endswith("-3")
    [here] = roll_out(learner, samples, GRPOConfig(**settings), lambda played: [Reward(total=0.0) for _ in played])
    assert [one.trajectory.completion_ids for one in group] == [one.trajectory.completion_ids for one in here]


@pytest.mark.parametrize("bf16", [False, True])
def test_rollouts_are_sampled_in_the_precision_of_training(bf16, load, dataset) -> None:
    learner = load(num_generations=4, max_new_tokens=12, bf16=bf16)
    samples = read_samples(dataset.rl, dataset.rl.parent)[:2]
    during: list[bool] = []
    learner.base.lm_head.register_forward_hook(lambda *_: during.append(torch.is_autocast_enabled("cpu")))
    groups = roll_out(learner, samples, learner.config, lambda played: [Reward(total=0.0) for _ in played])
    assert {*during} == {bf16}
    rollouts = [rollout for group in groups for rollout in group]
    with torch.no_grad():
        trained = learner.score(pack([rollout.episode.example for rollout in rollouts])).logprobs
    recorded = [logprob for rollout in rollouts for logprob in rollout.trajectory.sampling_logprobs if logprob]
    # how much bfloat16 rounds away depends on the processor
    assert (trained - torch.tensor(recorded)).abs().mean() < (0.02 if bf16 else 1e-5)


# -- whole runs

EVEN_IDS = """
def score(trajectory, solution):
    ids = [i for i, sampled in zip(trajectory.completion_ids, trajectory.is_sampled) if sampled]
    return sum(i % 2 == 0 for i in ids) / len(ids)

def fails_on_odd(trajectory, solution):
    return 1 / (1 - trajectory.completion_ids[0] % 2)
"""


@pytest.fixture
def run(model_folder, dataset, tmp_path):
    """Runs R-GRPO under a user's reward on the four prompts; gives the final folder and the lines of the log."""
    (tmp_path / "reward.py").write_text(EVEN_IDS)

    def train(name: str = "run", *, reward: str = "score", **settings: object) -> tuple[Path, list[dict[str, float]]]:
        folder = tmp_path / name
        config = GRPOConfig(
            **{
                "sft_checkpoint_path": model_folder,
                "output_dir": folder,
                "reward": f"{tmp_path / 'reward.py'}:{reward}",
                "num_train_epochs": 0,
                "train_batch_size": 2,
                "num_generations": 4,
                "max_new_tokens": 6,
                "mask_truncated_completions": False,
                "warmup_ratio": 0,
                **settings,
            }
        )
        data = DataConfig(train_data_path=dataset.rl, image_base_path=dataset.rl.parent)
        final = train_grpo(ModelConfig(device="cpu"), data, config)
        return final, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    return train


def weights(folder: Path) -> bytes:
    [path] = folder.glob("*model.safetensors")
    return path.read_bytes()


def test_what_the_reward_pays_becomes_more_frequent(run) -> None:
    _, lines = run(max_steps=10, learning_rate=3e-3, num_generations=8, scale_rewards="none")
    first, last = (sum(line["reward/total"] for line in part) / 2 for part in (lines[:2], lines[-2:]))
    assert 0.35 < first < 0.65 and last > first + 0.2


def test_every_step_is_logged_with_what_the_table_of_metrics_explains(run) -> None:
    _, lines = run(max_steps=2, beta=0.01)
    assert [line.pop("step") for line in lines] == [1, 2]
    for line in lines:
        assert set(line) <= set(METRICS)
        assert set(line) >= {
            "loss",
            "epoch",
            "optim/lr",
            "optim/grad_norm",
            "reward/total",
            "reward/failed",
            "group/dropped",
            "rollout/num_turns",
            "rollout/num_tokens",
            "tool/calls",
            "policy/entropy",
            "kl/sampling",
            "kl/reference",
            "clip/low",
            "clip/high",
            "time/rollout_s",
            "time/update_s",
            "time/step_s",
        }
        assert line["kl/sampling"] < 1e-4 and line["clip/low"] == line["clip/high"] == 0
    assert lines[0]["kl/reference"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("settings", [{}, {"bf16": True}, {"use_lora": True, "lora_r": 4}])
def test_a_resumed_run_ends_in_the_weights_of_an_uninterrupted_one(settings, run, tmp_path) -> None:
    settings = {"max_steps": 3, "learning_rate": 1e-3, "beta": 0.1, "save_steps": 1, **settings}
    whole, expected = run("whole", **settings)
    resumed, lines = run("resumed", resume_from_checkpoint=tmp_path / "whole" / "checkpoint-1", **settings)
    for name in ("reward/total", "kl/reference", "loss"):
        assert [line[name] for line in lines] == [line[name] for line in expected[1:]]
    assert weights(resumed) == weights(whole)


@pytest.mark.parametrize("settings", [{}, {"use_lora": True, "lora_r": 4, "gradient_checkpointing": "all"}])
def test_exact_mode_leaves_no_gap_between_sampling_and_the_first_update(settings, run) -> None:
    settings = {"max_steps": 2, "learning_rate": 1e-3, "temperature": 0.8, "drop_constant_groups": False, **settings}
    final, lines = run(exact=True, **settings)
    assert [line["kl/sampling"] for line in lines] == [0.0, 0.0]
    assert lines[0]["canary/gap"] == 0.0
    told = json.loads((final.parent / "numerics.json").read_text())
    assert len(told["digest"]) == 64 and told["facts"]["threads"] == 1


def test_exact_mode_refuses_an_update_that_computes_otherwise_than_the_sampler(load, dataset) -> None:
    kept = {"drop_constant_groups": False, "mask_truncated_completions": False}
    learner = load(exact=True, num_generations=2, max_new_tokens=5, **kept)
    samples = read_samples(dataset.rl, dataset.rl.parent)[:1]
    groups = roll_out(learner, samples, learner.config, lambda played: [paid(0.0) for _ in played])
    with torch.no_grad():
        learner.base.lm_head.weight += 1
    with pytest.raises(NumericsError, match=r"weights: sampler \"\w+\", trainer \"\w+\""):
        improve(learner, groups, learner.config, None)


def test_canaries_are_logged_at_the_first_step_of_a_run_also_of_one_that_goes_on(run, tmp_path) -> None:
    settings = {"max_steps": 3, "save_steps": 1, "logging_steps": 3}
    _, whole = run("whole", **settings)
    _, resumed = run("resumed", resume_from_checkpoint=tmp_path / "whole" / "checkpoint-1", **settings)
    for lines, steps in ((whole, [1, 3]), (resumed, [2, 3])):
        assert [line["step"] for line in lines] == steps
        assert lines[0]["canary/gap"] < 1e-4 < lines[0]["canary/picture"]
        assert not any(name.startswith("canary/") for line in lines[1:] for name in line)


def test_a_run_of_a_blind_model_stops_before_its_first_update(run, model, processor, tmp_path) -> None:
    blind = copy.deepcopy(model)
    blind.model.vte.weight.data.zero_()
    blind.save_pretrained(tmp_path / "blind")
    processor.save_pretrained(tmp_path / "blind")
    with pytest.raises(TrainingError, match="the model does not see its pictures"):
        run(sft_checkpoint_path=tmp_path / "blind", max_steps=1)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_an_adapter_of_stage_1_is_what_stage_2_starts_from(run, model_folder, dataset, tmp_path) -> None:
    data = DataConfig(train_data_path=dataset.train, image_base_path=dataset.train.parent)
    settings = SFTConfig(output_dir=tmp_path / "sft", max_steps=1, num_train_epochs=0, use_lora=True, lora_r=4)
    adapter = train_sft(ModelConfig(model_name=str(model_folder), device="cpu"), data, settings)
    final, _ = run(sft_checkpoint_path=adapter, use_lora=True, max_steps=1, learning_rate=0)
    assert weights(final) == weights(adapter)
    settings = json.loads((final / "train_config.json").read_text())
    assert settings["ModelConfig"]["model_name"] == str(model_folder)
    assert (settings["GRPOConfig"]["use_lora"], settings["GRPOConfig"]["lora_r"]) == (True, 4)
    assert settings["GRPOConfig"]["lora_targets"] == "llm"


def test_rewards_that_raise_are_counted_and_do_not_end_the_run(run) -> None:
    _, [line] = run(max_steps=1, reward="fails_on_odd", drop_constant_groups=False)
    assert 0 < line["reward/failed"] < 1
    assert line["reward/total"] == 1


def test_samples_without_a_gold_answer_are_named(model_folder, dataset, tmp_path) -> None:
    row = json.loads(dataset.rl.read_text().splitlines()[0])
    row["QnA"] = [{"Q": "What?", "A3": "A cup."}]
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(row))
    data = DataConfig(train_data_path=path, image_base_path=dataset.rl.parent)
    with pytest.raises(DataError, match=r"data\.jsonl:1: QnA\[0\]\.A3: no <answer> block and no field"):
        train_grpo(
            ModelConfig(device="cpu"), data, GRPOConfig(sft_checkpoint_path=model_folder, output_dir=tmp_path / "out")
        )
    assert not (tmp_path / "out").exists()


def test_the_greedy_accuracy_on_validation_questions_is_logged(model_folder, dataset, tmp_path) -> None:
    config = GRPOConfig(
        output_dir=tmp_path, sft_checkpoint_path=model_folder, max_steps=1, num_generations=2, max_new_tokens=4
    )
    data = DataConfig(train_data_path=dataset.rl, val_data_path=dataset.eval, image_base_path=dataset.rl.parent)
    train_grpo(ModelConfig(device="cpu"), data, config)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["eval/accuracy"] == 0.0
