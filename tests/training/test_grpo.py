"""Stage 2: whole runs with a reward of a user."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.scripted import paid

from looktwice.config import DataConfig, GRPOConfig, ModelConfig, SFTConfig
from looktwice.data.order import BatchOrder
from looktwice.data.sample import Sample
from looktwice.errors import DataError, TrainingError
from looktwice.formats.files import RowFile
from looktwice.formats.sample_file import read_samples
from looktwice.metrics import METRICS
from looktwice.model.numerics import NumericsError
from looktwice.rewards import Reward
from looktwice.training.alarms import ALARMS
from looktwice.training.grpo import Stage2, train_grpo
from looktwice.training.policy import improve
from looktwice.training.rollouts import roll_out
from looktwice.training.sampler import Sampler
from looktwice.training.sets import FURTHER_EPOCHS, LengthReport, Prompts
from looktwice.training.sft import train_sft

NO_PROMPTS: Any = None
"""Of a step that asks for no further ones."""


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
            "rollout/trained_tokens",
            "rollout/right",
            "time/rollout_s",
            "time/reward_s",
            "time/reference_s",
            "time/data_s",
            "time/data_wait_share",
            "time/idle_share",
            "perf/sampled_tokens_per_s",
            "perf/trained_tokens_per_s",
            *(f"alarm/{name}" for name in ALARMS),
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
    sampler = Sampler(learner, learner.config)
    groups = roll_out(learner, samples, learner.config, lambda played: [paid(0.0) for _ in played], sampler)
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


def test_the_accuracy_with_and_without_the_tool_is_logged(model_folder, dataset, tmp_path) -> None:
    config = GRPOConfig(
        output_dir=tmp_path, sft_checkpoint_path=model_folder, max_steps=1, num_generations=2, max_new_tokens=4
    )
    data = DataConfig(train_data_path=dataset.rl, val_data_path=dataset.eval, image_base_path=dataset.rl.parent)
    train_grpo(ModelConfig(device="cpu"), data, config)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    seen = {name: value for name, value in json.loads(line).items() if name.startswith("eval/")}
    names = ("accuracy", "accuracy_without_tool", "tool_gain", "tool_harm", "calls")
    assert seen == {f"eval/{name}": 0.0 for name in names}
    assert json.loads(line)["time/eval_s"] > 0


def test_no_picture_is_encoded_twice_in_a_step_where_vision_is_frozen(load, dataset, monkeypatch) -> None:
    learner = load(use_lora=True, lora_r=2, num_generations=2, max_new_tokens=4, beta=0.1, max_tokens_per_row=1)
    samples = read_samples(dataset.rl, dataset.rl.parent)[:2]
    encoded: list[int] = []
    tower = learner.base.model.visual_tokenizer.vit
    tower.register_forward_hook(lambda module, given, out: encoded.append(len(given[1])))
    paid = iter([0.0, 1.0] * 2)
    settings = {"drop_constant_groups": False, "mask_truncated_completions": False}
    config = learner.config.model_copy(update=settings)
    stage = Stage2(
        learner,
        config,
        lambda played: [Reward(total=next(paid)) for _ in played],
        learner.freeze_reference(),
        NO_PROMPTS,
        Sampler(learner, config),
        is_checked=True,
    )
    metrics = stage.step(samples)
    assert metrics["loss"] != 0 and sum(encoded) == 2
    assert learner.vision_cache is None


def test_no_gradient_lives_on_through_the_next_rollouts(load, dataset) -> None:
    learner = load(num_generations=2, max_new_tokens=3, mask_truncated_completions=False)
    samples = read_samples(dataset.rl, dataset.rl.parent)[:1]
    stage = Stage2(
        learner,
        learner.config,
        lambda played: [Reward(total=float(place)) for place in range(len(played))],
        None,
        NO_PROMPTS,
        Sampler(learner, learner.config),
        is_checked=True,
    )
    metrics = stage.step(samples)
    assert metrics["optim/grad_norm"] > 0
    assert all(weight.grad is None for weight in learner.parameters)


def test_a_reward_that_always_fails_stops_the_run_with_its_text(run, tmp_path) -> None:
    (tmp_path / "reward.py").write_text("def f(completions, **kwargs):\n    return [0.0 for _ in completions]")
    with pytest.raises(TrainingError, match=r"8 rewards of this step failed, the first by: TypeError: f\(\) takes 1"):
        run(max_steps=1, reward="f")


def test_groups_without_signal_are_replaced_by_further_prompts(load, dataset) -> None:
    learner = load(num_generations=2, max_new_tokens=3, refill_batches=3)
    samples = read_samples(dataset.rl, dataset.rl.parent)
    asked: list[tuple[int, int]] = []

    class Further:
        def further(self, step: int, batch: int, *, per_step: int, count: int) -> list[Sample]:
            asked.append((batch, count))
            return samples[2 : 2 + count]

    paid_calls = iter(range(100))

    def pay(played):
        # no signal in the step itself and in the first batch of further prompts, some in every other
        has_signal = next(paid_calls) > 1
        return [Reward(total=float(place % 2 and has_signal)) for place in range(len(played))]

    sampler = Sampler(learner, learner.config)
    groups = roll_out(learner, samples[:2], learner.config, pay, sampler)
    found = Stage2(learner, learner.config, pay, None, Further(), sampler).refill(groups)
    assert asked == [(0, 2), (1, 2)]
    totals = [[rollout.reward.total for rollout in group] for group in found]
    assert totals == [[0.0, 0.0]] * 2 + [[0.0, 1.0]] * 2  # those without signal are rollouts of the step as well
    ids = [group[0].trajectory.completion_ids for group in (*groups, *found)]
    assert len({tuple(one) for one in ids}) > 1


def test_the_seed_that_is_written_is_the_one_that_a_group_was_drawn_with(load, dataset, tmp_path) -> None:
    learner = load(num_generations=2, max_new_tokens=5, refill_batches=2, rollout_page_steps=0)
    samples = read_samples(dataset.rl, dataset.rl.parent)
    drawn: dict[tuple[int, ...], int] = {}

    class Noting(Sampler):
        def play(self, groups, config, seeds, images):
            numerics = super().play(groups, config, seeds, images)
            drawn.update((ids_of(group), seed) for group, seed in zip(groups, seeds, strict=True))
            return numerics

    class Further:
        def further(self, step: int, batch: int, *, per_step: int, count: int) -> list[Sample]:
            return samples[2 : 2 + count]

    def ids_of(group) -> tuple[int, ...]:
        return tuple(token for one in group for token in one.trajectory.completion_ids)

    # the second group of the step has signal, and that of the second batch of further prompts
    totals = iter([0.0, 0.0, 0.0, 1.0] * 2)
    stage = Stage2(
        learner,
        learner.config,
        lambda played: [Reward(total=next(totals)) for _ in played],
        None,
        Further(),
        Noting(learner, learner.config),
        is_checked=True,
    )
    stage.step(samples[:2])
    stage.write(tmp_path)
    rows = RowFile(tmp_path / "trajectories" / "step-1.jsonl.zst")
    written = {ids_of(group): row.values["seed"] for group, row in zip(stage.groups, [*rows][::2], strict=True)}
    assert written == drawn and len(drawn) == 4


def test_further_prompts_follow_from_seed_and_step_and_are_none_of_the_run(processor, dataset) -> None:
    samples = read_samples(dataset.rl, dataset.rl.parent)
    config = GRPOConfig(refill_batches=2)
    order = BatchOrder(len(samples), samples_per_step=2, num_epochs=1, max_steps=None, seed=0)
    data = DataConfig(train_data_path=dataset.rl, image_base_path=dataset.rl.parent)
    prompts = Prompts(samples, order, processor, data, LengthReport(config))
    drawn = [prompts.further(step, batch, per_step=2, count=2) for step in range(2) for batch in range(2)]
    first = FURTHER_EPOCHS * order.steps_per_epoch
    assert drawn == [[samples[number] for number in order[first + place]] for place in range(4)]
    assert len(prompts.further(0, 0, per_step=2, count=1)) == 1


def test_an_adapter_goes_on_without_its_dropout(run, model_folder, dataset, tmp_path, capsys) -> None:
    run(max_steps=1, use_lora=True, lora_r=2, lora_dropout=0.5, learning_rate=1e-3)
    assert "stage 2 goes on without the adapter's dropout of 0.5" in capsys.readouterr().out


def test_pages_of_rollouts_are_written_at_the_first_step_the_last_and_between(run) -> None:
    settings = {"num_generations": 2, "max_new_tokens": 2, "max_steps": 5}
    final, _ = run("pages", rollout_page_steps=2, **settings)
    pages = sorted(path.name for path in (final.parent / "rollouts").iterdir())
    assert pages == ["step-1.html", "step-2.html", "step-4.html", "step-5.html"]
    final, _ = run("none", rollout_page_steps=0, **{**settings, "max_steps": 1})
    assert not (final.parent / "rollouts").exists()
