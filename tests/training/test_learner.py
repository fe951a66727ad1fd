"""One update whatever the rows, the schedule, and the memory at hand."""

from __future__ import annotations

import math
from functools import partialmethod

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.training.updates import gradients, update

from looktwice.config import ModelConfig, SFTConfig
from looktwice.errors import ConfigError, TrainingError
from looktwice.model import attention
from looktwice.model.adapters import LLM_LINEARS
from looktwice.model.weights import load_model, save_model
from looktwice.processing.packing import PackedBatch, pack
from looktwice.processing.processor import Example
from looktwice.training import learner as learner_module
from looktwice.training import rows as rows_module
from looktwice.training import start
from looktwice.training.learner import Learner, Scores


@pytest.mark.parametrize(
    ("settings", "num_rows"),
    [({"max_tokens_per_row": 1}, 4), ({"max_tokens_per_row": 320}, 2), ({"memory_efficient": True}, 4)],
)
def test_an_update_is_the_same_in_one_packed_row_and_in_several(settings, num_rows, load_sft, examples) -> None:
    packed, split = load_sft(max_grad_norm=0), load_sft(max_grad_norm=0, **settings)
    assert (len(packed.rows(examples)), len(split.rows(examples))) == (1, num_rows)
    assert update(packed, examples) == pytest.approx(update(split, examples), abs=1e-5)
    for expected, gradient in zip(gradients(packed), gradients(split), strict=True):
        torch.testing.assert_close(gradient, expected, atol=2e-6, rtol=1e-3)


@pytest.fixture(scope="module")
def groups(examples) -> list[Example]:
    """Two groups of three siblings, some of which see a picture more."""
    found = []
    for example, other in (examples[:2], examples[2:4]):
        start = example.loss_mask.index(True)
        image = example.images[0]
        prompt = Example(input_ids=example.input_ids[:start], loss_mask=[False] * start, images=[image])
        tails = [example.input_ids[start:], other.input_ids[other.loss_mask.index(True) :][:9], [5, 6, 7]]
        for tail in tails:
            sibling = prompt.sibling()
            sibling.append(tail, is_trained=True)
            found.append(sibling)
        found[-3].loss_mask = example.loss_mask
        found[-3].images = example.images
    return found


@pytest.mark.parametrize(
    "settings", [{}, {"use_lora": True, "lora_dropout": 0.0}, {"gradient_checkpointing": "all"}], ids=str
)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_an_update_is_the_same_with_prompts_shared(settings, implementation, load_sft, groups) -> None:
    def loss(scores: Scores, row: PackedBatch) -> torch.Tensor:
        by_token = torch.tensor([1.0, -2.0, 0.5, 0.25, 3.0, -1.0])[row.loss_sequence()]
        return (scores.logprobs * by_token).sum() / 100

    shared, plain = load_sft(max_grad_norm=0, **settings), load_sft(max_grad_norm=0, **settings)
    for learner in (shared, plain):
        learner.base.set_attn_implementation(implementation)
    [row], whole = shared.rows(groups), pack(groups)
    assert row.parents is not None and row.num_tokens < whole.num_tokens
    assert shared.update([row], loss).loss == pytest.approx(plain.update([whole], loss).loss, rel=1e-5)
    for expected, gradient in zip(gradients(plain), gradients(shared), strict=True):
        torch.testing.assert_close(gradient, expected, atol=2e-6, rtol=1e-3)


def test_the_gradient_of_a_batch_is_the_mean_over_its_tokens(load_sft, examples) -> None:
    together = load_sft(max_grad_norm=0)
    update(together, examples[:2])
    counts = [sum(example.loss_mask) for example in examples[:2]]
    apart = []
    for example in examples[:2]:
        learner = load_sft(max_grad_norm=0)
        update(learner, [example])
        apart.append(gradients(learner))
    for total, first, second in zip(gradients(together), *apart):
        mean = (counts[0] * first + counts[1] * second) / sum(counts)
        torch.testing.assert_close(total, mean, atol=2e-6, rtol=1e-3)


def test_repeated_updates_on_the_same_samples_lower_the_loss(load_sft, examples) -> None:
    learner = load_sft(learning_rate=3e-3, warmup_ratio=0, lr_scheduler_type="constant")
    losses = [update(learner, examples[:2]) for _ in range(12)]
    assert losses[-1] < losses[0] - 3


def test_gradients_are_scaled_down_to_the_largest_norm(load_sft, examples) -> None:
    free, bound = load_sft(max_grad_norm=0), load_sft(max_grad_norm=0.5)
    rows = free.rows(examples[:1])
    norms = [learner.update(rows, lambda scores, row: -scores.logprobs.mean()).grad_norm for learner in (free, bound)]
    assert norms[0] == pytest.approx(norms[1]) and norms[0] > 1
    after = [torch.stack([gradient.norm() for gradient in gradients(learner)]).norm() for learner in (free, bound)]
    assert [float(norm) for norm in after] == pytest.approx([norms[0], 0.5], rel=1e-4)


def test_a_loss_that_is_no_number_stops_before_the_update_and_names_the_step(load_sft, examples) -> None:
    learner = load_sft()
    learner.step = 4
    before = [parameter.clone() for parameter in learner.parameters]
    with pytest.raises(TrainingError, match=r"^step 5: loss nan, .*; in 1 row of .*:1; lower --learning_rate"):
        learner.update(learner.rows(examples[:1]), lambda scores, row: scores.logprobs.sum() * torch.nan)
    assert all(torch.equal(old, new) for old, new in zip(before, learner.parameters))


def failing_above(learner: Learner, num_tokens: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Runs out of memory in the backward of rows of more tokens; the lengths of the rows that were tried."""
    tried: list[int] = []
    score = learner.score

    def scored(row: PackedBatch, **options: object) -> Scores:
        scores = score(row, **options)
        tried.append(row.num_tokens)
        if row.num_tokens > num_tokens:
            scores.logprobs.register_hook(run_out)
        return scores

    def run_out(_: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("of memory")

    monkeypatch.setattr(learner, "score", scored)
    return tried


def test_a_step_that_runs_out_of_memory_splits_its_rows_and_comes_to_the_same(load_sft, examples, monkeypatch) -> None:
    plain, short = load_sft(max_grad_norm=0), load_sft(max_grad_norm=0)
    [row] = short.rows(examples)
    tried = failing_above(short, row.num_tokens - 1, monkeypatch)
    expected = update(plain, examples)
    num_tokens = sum(each.num_loss_tokens for each in plain.rows(examples))
    found = short.update([row], lambda scores, row: -scores.logprobs.sum() / num_tokens)
    assert found.loss == pytest.approx(expected, abs=1e-5)
    assert found.num_splits == len(tried) - 2 >= 1
    for gradient, wanted in zip(gradients(short), gradients(plain), strict=True):
        torch.testing.assert_close(gradient, wanted, atol=2e-6, rtol=1e-3)
    tried.clear()  # and later steps do not try the long row again
    short.update([row], lambda scores, row: -scores.logprobs.sum() / num_tokens)
    assert max(tried) < row.num_tokens


def test_memory_that_runs_out_twice_stops_and_names_what_helps(load_sft, examples, monkeypatch) -> None:
    learner = load_sft(max_grad_norm=0)
    failing_above(learner, 0, monkeypatch)
    with pytest.raises(
        TrainingError,
        match=r"step 1: out of memory with rows of \d+ tokens, and again with rows of \d+; what helps: "
        r"--gradient_checkpointing all \(about .* GB less\), --max_tokens_per_row \d+ .*--use_lora .*--optim paged",
    ):
        update(learner, examples)


def test_rows_that_processes_run_together_are_not_taken_again(load_sft, examples, monkeypatch) -> None:
    learner = load_sft()
    monkeypatch.setattr(learner.world, "can_repeat", False, raising=False)
    tried = failing_above(learner, 0, monkeypatch)
    with pytest.raises(TrainingError, match=r"step 1: out of memory with rows of \d+ tokens; what helps: "):
        update(learner, examples)
    assert len(tried) == 1


@pytest.mark.parametrize("settings", [{"offload_activations": True}, {"optim": "adamw_torch"}, {"torch_compile": True}])
def test_what_changes_memory_or_speed_changes_no_weight(load_sft, examples, settings, monkeypatch) -> None:
    # inductor's code takes a minute to build; by hand it was seen to pass
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    plain, other = (load_sft(warmup_ratio=0, learning_rate=1e-3, **more) for more in ({}, settings))
    assert update(other, examples[:2]) == pytest.approx(update(plain, examples[:2]), abs=1e-5)
    for found, wanted in zip(other.parameters, plain.parameters, strict=True):
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-3)


def test_under_fp16_the_loss_is_scaled_and_an_overflow_leaves_the_update_out(load_sft, examples) -> None:
    learner = load_sft(fp16=True, warmup_ratio=0, learning_rate=1e-3)
    before = [parameter.clone() for parameter in learner.parameters]
    scale = learner.scaler.get_scale()
    learner.update(learner.rows(examples[:1]), lambda scores, row: scores.logprobs.mean() * 1e6)
    assert learner.scaler.get_scale() < scale and learner.num_overflows == 1 and not learner.has_learnt
    assert all(torch.equal(old, new) for old, new in zip(before, learner.parameters))
    loss = update(learner, examples[:2])
    assert loss == pytest.approx(update(load_sft(), examples[:2]), rel=0.01)
    assert any(not torch.equal(old, new) for old, new in zip(before, learner.parameters))
    assert learner.num_overflows == 1


def test_a_learner_has_learnt_once_an_update_with_a_gradient_was_taken(load_sft, examples) -> None:
    learner = load_sft(skip_nonfinite=1)
    rows = learner.rows(examples[:1])
    for factor in (0.0, float("nan")):
        learner.update(rows, lambda scores, row, by=factor: by * scores.logprobs.mean())
        assert not learner.has_learnt
    update(learner, examples[:1])
    assert learner.has_learnt
    learner.update(rows, lambda scores, row: 0 * scores.logprobs.mean())
    assert learner.has_learnt


def test_under_fp16_an_update_that_is_left_out_is_followed_by_others(load_sft, examples) -> None:
    learner = load_sft(fp16=True, skip_nonfinite=1)
    learner.update(learner.rows(examples[:1]), lambda scores, row: scores.logprobs.sum() * torch.nan)
    assert math.isfinite(update(learner, examples[:1]))


@pytest.mark.parametrize(
    ("kind", "rates"),
    [("cosine", [0.5, 1, 1, 0.8535534, 0.5, 0.1464466]), ("constant", [0.5, 1, 1, 1, 1, 1])],
)
def test_the_schedule_rises_and_then_falls_or_stays(kind, rates, load_sft) -> None:
    learner = load_sft(total_steps=6, warmup_ratio=0.3, lr_scheduler_type=kind)
    seen = []
    for learner.step in range(6):
        seen.append(learner.schedule())
    assert seen == pytest.approx(rates)


def test_the_update_uses_the_rate_of_its_step(load_sft, examples) -> None:
    learner = load_sft(learning_rate=1e-3, warmup_ratio=0.5)
    update(learner, examples[:1])
    assert [group["lr"] for group in learner.optimizer.param_groups] == [pytest.approx(2e-4)] * 8


def test_bfloat16_computes_nearly_the_same_loss_on_float32_weights(load_sft, examples) -> None:
    plain, half = load_sft(), load_sft(bf16=True)
    assert update(half, examples[:2]) == pytest.approx(update(plain, examples[:2]), rel=0.02)
    assert {parameter.dtype for parameter in half.parameters} == {torch.float32}
    assert all(gradient.isfinite().all() for gradient in gradients(half))


@pytest.mark.parametrize(("bf16", "picked"), [(True, "flash_attention_2"), (False, "sdpa")])
def test_on_a_gpu_training_in_bfloat16_uses_flash_attention_by_itself(
    bf16, picked, load_sft, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {}

    def stop(name: str, **options: object) -> None:
        asked.update(options)
        raise StopIteration

    monkeypatch.setattr(attention, "is_gpu", lambda device: True)
    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(learner_module, "load_model", stop)
    with pytest.raises(StopIteration):
        load_sft(bf16=bf16)
    assert asked["attn_implementation"] == picked


def test_flash_attention_that_cannot_train_is_refused_before_the_model_is_loaded(
    model_folder, processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start, "find_spec", lambda name: True)
    asked = ModelConfig(device="cpu", attn_implementation="flash_attention_2")
    with pytest.raises(ConfigError, match="flash_attention_2 runs in bfloat16, on a CUDA GPU"):
        Learner.load(str(model_folder), asked, SFTConfig(bf16=True), processor, total_steps=1)


# -- the KL reference


def test_the_reference_of_a_pissa_start_is_the_adapted_model(model_folder, load_sft, examples, tmp_path) -> None:
    """PiSSA moves part of the base into the adapter, so the model with the adapter off is no policy at all."""
    base = load_model(str(model_folder))
    start = get_peft_model(base, LoraConfig(r=4, target_modules=LLM_LINEARS, init_lora_weights="pissa"))
    save_model(start, tmp_path)
    learner = load_sft(name=tmp_path, learning_rate=0.01, warmup_ratio=0)
    row = pack(examples[:1])
    reference, before = learner.freeze_reference(), learner.score(row).logprobs.detach()
    update(learner, examples[:1])
    with torch.no_grad():
        with reference.active():
            kept = learner.score(row).logprobs
        assert torch.equal(kept, before)
        assert not torch.equal(learner.score(row).logprobs, before)


def test_in_deterministic_mode_rows_do_not_depend_on_the_memory_that_is_free(load_sft, monkeypatch) -> None:
    monkeypatch.setattr(rows_module, "free_bytes", lambda device: 10**6)
    assert load_sft().max_tokens_per_row < 1000
    learner = load_sft(deterministic=True)
    assert learner.max_tokens_per_row == learner.max_sibling_tokens == 1024


def test_the_reference_keeps_the_weights_of_its_moment_and_gives_the_live_ones_back(load_sft, examples) -> None:
    learner = load_sft(learning_rate=0.01, warmup_ratio=0)
    start = [parameter.clone() for parameter in learner.parameters]
    reference = learner.freeze_reference()
    update(learner, examples[:1])
    live = [parameter.clone() for parameter in learner.parameters]
    assert not torch.equal(start[0], live[0])
    with pytest.raises(ZeroDivisionError), reference.active():
        assert all(torch.equal(parameter, value) for parameter, value in zip(learner.parameters, start))
        raise ZeroDivisionError
    assert all(torch.equal(parameter, value) for parameter, value in zip(learner.parameters, live))
