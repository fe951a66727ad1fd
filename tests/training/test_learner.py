"""One update whatever the rows, the schedule, what is trained, and checkpoints."""

from __future__ import annotations

import copy
import json
import math
import resource
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from looktwice.config import GRPOConfig, ModelConfig, SFTConfig
from looktwice.console import open_console
from looktwice.data.examples import encode_sample
from looktwice.errors import CheckpointError, ConfigError, TrainingError
from looktwice.formats.sample_file import read_samples
from looktwice.model import attention
from looktwice.model.adapters import LLM_LINEARS, part_of, part_sizes
from looktwice.model.modeling import Ovis2_5ForConditionalGeneration
from looktwice.model.weights import is_adapter, load_model, save_model
from looktwice.processing.packing import PackedBatch, pack
from looktwice.processing.processor import Example
from looktwice.training import learner as learner_module
from looktwice.training import rows as rows_module
from looktwice.training import start
from looktwice.training.learner import Learner, Scores, towers_of
from looktwice.training.overview import run_facts, show_overview
from looktwice.training.record import Record
from looktwice.training.run import batch_order

RECORD = Record(stage="sft", order={}, settings={})
LoadLearner = Callable[..., Learner]


@pytest.fixture
def load(model_folder, processor) -> LoadLearner:
    def make(
        *, name: object = model_folder, total_steps: int = 10, quantization: str | None = None, **settings: object
    ) -> Learner:
        model_config = ModelConfig(device="cpu", **({} if quantization is None else {"quantization": quantization}))
        return Learner.load(str(name), model_config, SFTConfig(**settings), processor, total_steps=total_steps)

    return make


@pytest.fixture(scope="module")
def examples(dataset, processor) -> list[Example]:
    samples = read_samples(dataset.train, dataset.train.parent)[:4]
    return [encode_sample(sample, processor, max_length=1000) for sample in samples]


def update(learner: Learner, examples: list[Example]) -> float:
    """One update on the mean loss per token; gives the loss."""
    rows = learner.rows(examples)
    num_tokens = sum(row.num_loss_tokens for row in rows)
    return learner.update(rows, lambda scores, row: -scores.logprobs.sum() / num_tokens).loss


def gradients(learner: Learner) -> list[torch.Tensor]:
    """Of all trained weights; the tower's last norm is stored in checkpoints and not used, so it has none."""
    return [parameter.grad for parameter in learner.parameters if parameter.grad is not None]


# -- one update


@pytest.mark.parametrize(
    ("settings", "num_rows"),
    [({"max_tokens_per_row": 1}, 4), ({"max_tokens_per_row": 320}, 2), ({"memory_efficient": True}, 4)],
)
def test_an_update_is_the_same_in_one_packed_row_and_in_several(settings, num_rows, load, examples) -> None:
    packed, split = load(max_grad_norm=0), load(max_grad_norm=0, **settings)
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
def test_an_update_is_the_same_with_prompts_shared(settings, implementation, load, groups) -> None:
    def loss(scores: Scores, row: PackedBatch) -> torch.Tensor:
        by_token = torch.tensor([1.0, -2.0, 0.5, 0.25, 3.0, -1.0])[row.loss_sequence()]
        return (scores.logprobs * by_token).sum() / 100

    shared, plain = load(max_grad_norm=0, **settings), load(max_grad_norm=0, **settings)
    for learner in (shared, plain):
        learner.base.set_attn_implementation(implementation)
    [row], whole = shared.rows(groups), pack(groups)
    assert row.parents is not None and row.num_tokens < whole.num_tokens
    assert shared.update([row], loss).loss == pytest.approx(plain.update([whole], loss).loss, rel=1e-5)
    for expected, gradient in zip(gradients(plain), gradients(shared), strict=True):
        torch.testing.assert_close(gradient, expected, atol=2e-6, rtol=1e-3)


def test_the_gradient_of_a_batch_is_the_mean_over_its_tokens(load, examples) -> None:
    together = load(max_grad_norm=0)
    update(together, examples[:2])
    counts = [sum(example.loss_mask) for example in examples[:2]]
    apart = []
    for example in examples[:2]:
        learner = load(max_grad_norm=0)
        update(learner, [example])
        apart.append(gradients(learner))
    for total, first, second in zip(gradients(together), *apart):
        mean = (counts[0] * first + counts[1] * second) / sum(counts)
        torch.testing.assert_close(total, mean, atol=2e-6, rtol=1e-3)


def test_repeated_updates_on_the_same_samples_lower_the_loss(load, examples) -> None:
    learner = load(learning_rate=3e-3, warmup_ratio=0, lr_scheduler_type="constant")
    losses = [update(learner, examples[:2]) for _ in range(12)]
    assert losses[-1] < losses[0] - 3


def test_gradients_are_scaled_down_to_the_largest_norm(load, examples) -> None:
    free, bound = load(max_grad_norm=0), load(max_grad_norm=0.5)
    rows = free.rows(examples[:1])
    norms = [learner.update(rows, lambda scores, row: -scores.logprobs.mean()).grad_norm for learner in (free, bound)]
    assert norms[0] == pytest.approx(norms[1]) and norms[0] > 1
    after = [torch.stack([gradient.norm() for gradient in gradients(learner)]).norm() for learner in (free, bound)]
    assert [float(norm) for norm in after] == pytest.approx([norms[0], 0.5], rel=1e-4)


def test_a_loss_that_is_no_number_stops_before_the_update_and_names_the_step(load, examples) -> None:
    learner = load()
    learner.step = 4
    before = [parameter.clone() for parameter in learner.parameters]
    with pytest.raises(TrainingError, match=r"^step 5: loss nan, .*; in 1 row of .*:1; lower --learning_rate"):
        learner.update(learner.rows(examples[:1]), lambda scores, row: scores.logprobs.sum() * torch.nan)
    assert all(torch.equal(old, new) for old, new in zip(before, learner.parameters))


# -- memory that runs out


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


def test_a_step_that_runs_out_of_memory_splits_its_rows_and_comes_to_the_same(load, examples, monkeypatch) -> None:
    plain, short = load(max_grad_norm=0), load(max_grad_norm=0)
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


def test_memory_that_runs_out_twice_stops_and_names_what_helps(load, examples, monkeypatch) -> None:
    learner = load(max_grad_norm=0)
    failing_above(learner, 0, monkeypatch)
    with pytest.raises(
        TrainingError,
        match=r"step 1: out of memory with rows of \d+ tokens, and again with rows of \d+; what helps: "
        r"--gradient_checkpointing all \(about .* GB less\), --max_tokens_per_row \d+ .*--use_lora .*--optim paged",
    ):
        update(learner, examples)


def test_rows_that_processes_run_together_are_not_taken_again(load, examples, monkeypatch) -> None:
    learner = load()
    monkeypatch.setattr(learner.world, "can_repeat", False, raising=False)
    tried = failing_above(learner, 0, monkeypatch)
    with pytest.raises(TrainingError, match=r"step 1: out of memory with rows of \d+ tokens; what helps: "):
        update(learner, examples)
    assert len(tried) == 1


# -- precision, compiling, and activations on the host


@pytest.mark.parametrize("settings", [{"offload_activations": True}, {"optim": "adamw_torch"}, {"torch_compile": True}])
def test_what_changes_memory_or_speed_changes_no_weight(load, examples, settings, monkeypatch) -> None:
    # inductor's code takes a minute to build; by hand it was seen to pass
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    plain, other = (load(warmup_ratio=0, learning_rate=1e-3, **more) for more in ({}, settings))
    assert update(other, examples[:2]) == pytest.approx(update(plain, examples[:2]), abs=1e-5)
    for found, wanted in zip(other.parameters, plain.parameters, strict=True):
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-3)


def test_under_fp16_the_loss_is_scaled_and_an_overflow_leaves_the_update_out(load, examples) -> None:
    learner = load(fp16=True, warmup_ratio=0, learning_rate=1e-3)
    before = [parameter.clone() for parameter in learner.parameters]
    scale = learner.scaler.get_scale()
    learner.update(learner.rows(examples[:1]), lambda scores, row: scores.logprobs.mean() * 1e6)
    assert learner.scaler.get_scale() < scale and learner.num_overflows == 1
    assert all(torch.equal(old, new) for old, new in zip(before, learner.parameters))
    loss = update(learner, examples[:2])
    assert loss == pytest.approx(update(load(), examples[:2]), rel=0.01)
    assert any(not torch.equal(old, new) for old, new in zip(before, learner.parameters))
    assert learner.num_overflows == 1


def test_layers_share_their_input_with_their_adapters_under_bf16(load, examples) -> None:
    learner = load(bf16=True, use_lora=True, lora_r=2)
    layer = learner.base.model.language_model.layers[0].self_attn
    kept: list[torch.Tensor] = []
    with learner.precision(), torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        x = torch.randn(1, 5, learner.base.config.hidden_size, dtype=torch.bfloat16)
        for projection in (layer.q_proj, layer.k_proj, layer.v_proj):
            projection(x)
    assert len({each.data_ptr() for each in kept if each.shape[-2:] == x.shape[-2:]}) == 1


def test_under_fp16_an_update_that_is_left_out_is_followed_by_others(load, examples) -> None:
    learner = load(fp16=True, skip_nonfinite=1)
    learner.update(learner.rows(examples[:1]), lambda scores, row: scores.logprobs.sum() * torch.nan)
    assert math.isfinite(update(learner, examples[:1]))


def test_an_optimizer_of_bitsandbytes_goes_on(load, examples, tmp_path) -> None:
    pytest.importorskip("bitsandbytes")
    learner, resumed = load(optim="adamw_8bit"), load(optim="adamw_8bit")
    update(learner, examples[:1])
    learner.save(tmp_path / "saved", RECORD, with_optimizer=True)
    resumed.resume(tmp_path / "saved")
    for each in (learner, resumed):
        each.step = 1
        update(each, examples[:1])
    assert all(map(torch.equal, learner.parameters, resumed.parameters))


def test_frozen_vision_is_kept_in_the_compute_dtype_where_that_is_lossless(load, model, tmp_path) -> None:
    halved = copy.deepcopy(model).bfloat16().float()
    halved.model.vte.weight.data += 1e-4
    save_model(halved, tmp_path / "model")
    learner = load(name=tmp_path / "model", bf16=True, freeze_vision=True)
    dtypes = {part_of(name): weight.dtype for name, weight in learner.model.named_parameters()}
    assert (dtypes["vit"], dtypes["visual_table"], dtypes["llm"]) == (torch.bfloat16, torch.float32, torch.float32)


def test_a_frozen_part_of_which_one_weight_is_not_lossless_stays_as_it_is(load, examples) -> None:
    learner = load(bf16=True, freeze_vision=True)  # norms of ones are lossless, random matrices are not
    dtypes = {weight.dtype for name, weight in learner.model.named_parameters() if part_of(name) == "vit"}
    assert dtypes == {torch.float32}
    assert math.isfinite(update(learner, examples[:1]))


def test_matrices_decay_and_vectors_do_not(load, examples) -> None:
    learner = load(weight_decay=0.5, learning_rate=0.1, warmup_ratio=0)
    before = [parameter.clone() for parameter in learner.parameters]
    learner.update(learner.rows(examples[:1]), lambda scores, row: scores.logprobs.sum() * 0)
    for old, new in zip(before, learner.parameters):
        torch.testing.assert_close(new, old * 0.95 if old.ndim >= 2 else old)


@pytest.mark.parametrize(
    ("kind", "rates"),
    [("cosine", [0.5, 1, 1, 0.8535534, 0.5, 0.1464466]), ("constant", [0.5, 1, 1, 1, 1, 1])],
)
def test_the_schedule_rises_and_then_falls_or_stays(kind, rates, load) -> None:
    learner = load(total_steps=6, warmup_ratio=0.3, lr_scheduler_type=kind)
    seen = []
    for learner.step in range(6):
        seen.append(learner.schedule())
    assert seen == pytest.approx(rates)


def test_the_update_uses_the_rate_of_its_step(load, examples) -> None:
    learner = load(learning_rate=1e-3, warmup_ratio=0.5)
    update(learner, examples[:1])
    assert [group["lr"] for group in learner.optimizer.param_groups] == [pytest.approx(2e-4)] * 8


def test_bfloat16_computes_nearly_the_same_loss_on_float32_weights(load, examples) -> None:
    plain, half = load(), load(bf16=True)
    assert update(half, examples[:2]) == pytest.approx(update(plain, examples[:2]), rel=0.02)
    assert {parameter.dtype for parameter in half.parameters} == {torch.float32}
    assert all(gradient.isfinite().all() for gradient in gradients(half))


# -- what is trained


def test_lora_trains_adapters_of_the_language_model_and_nothing_else(load, examples) -> None:
    learner = load(use_lora=True, lora_r=4, lora_alpha=8)
    names = [name for name, parameter in learner.model.named_parameters() if parameter.requires_grad]
    assert names and all("lora_" in name and "language_model" in name for name in names)
    assert sum(".q_proj.lora_A" in name for name in names) == learner.base.config.llm_config.num_hidden_layers
    update(learner, examples[:1])
    assert any(gradient.abs().sum() > 0 for gradient in gradients(learner))


def test_lora_on_bfloat16_keeps_its_adapters_in_float32(load, examples) -> None:
    learner = load(use_lora=True, lora_r=4, bf16=True)
    assert {parameter.dtype for parameter in learner.parameters} == {torch.float32}
    assert learner.base.lm_head.weight.dtype == torch.bfloat16
    assert update(learner, examples[:1]) == pytest.approx(update(load(), examples[:1]), rel=0.02)


def test_whole_parts_beside_lora_on_bfloat16_take_in_small_steps(load, examples) -> None:
    """Weights of 0.02 in bfloat16 lie 1e-4 apart, and a step of 2e-5 would be rounded away."""
    learner = load(
        use_lora=True,
        lora_r=4,
        bf16=True,
        modules_to_save="visual_head,visual_table",
        learning_rate=2e-5,
        warmup_ratio=0,
    )
    whole = {name: p for name, p in learner.model.named_parameters() if "modules_to_save" in name and p.ndim > 1}
    before = {name: parameter.clone() for name, parameter in whole.items()}
    update(learner, examples)
    changed = {part_of(name): float((before[name] != parameter).float().mean()) for name, parameter in whole.items()}
    assert set(changed) == {"visual_head", "visual_table"} and min(changed.values()) > 0.99


def test_memory_efficient_lora_gives_the_same_gradient(load, examples) -> None:
    plain, efficient = (load(use_lora=True, lora_r=4, memory_efficient=flag) for flag in (False, True))
    for learner in (plain, efficient):
        update(learner, examples[:2])
    for expected, gradient in zip(gradients(plain), gradients(efficient), strict=True):
        torch.testing.assert_close(gradient, expected, atol=2e-6, rtol=1e-3)


def test_a_frozen_vision_tower_stays_as_it_is(load) -> None:
    learner = load(freeze_vision=True)
    frozen = {name for name, parameter in learner.model.named_parameters() if not parameter.requires_grad}
    assert frozen == {
        name
        for name, _ in learner.model.named_parameters()
        if name.startswith(("model.visual_tokenizer.", "model.vte."))
    }


def test_parts_learn_at_their_own_rates(load, examples) -> None:
    rates = {"vit": 2e-3, "visual_table": 0}
    learner = load(learning_rate=1e-3, part_learning_rates=rates, freeze="embeddings", warmup_ratio=0)
    before = {name: parameter.clone() for name, parameter in learner.model.named_parameters()}
    update(learner, examples[:1])
    # the first step of Adam moves a weight by its learning rate, whatever the gradient
    moved = {
        name: float((parameter - before[name]).detach().abs().max())
        for name, parameter in learner.model.named_parameters()
    }
    assert moved["model.visual_tokenizer.vit.encoder.layers.0.mlp.fc1.weight"] == pytest.approx(2e-3, rel=1e-2)
    assert moved["model.visual_tokenizer.head.0.weight"] == pytest.approx(1e-3, rel=1e-2)
    assert moved["model.language_model.layers.0.mlp.up_proj.weight"] == pytest.approx(1e-3, rel=1e-2)
    assert moved["model.vte.weight"] == moved["model.language_model.embed_tokens.weight"] == 0


def test_rates_of_parts_follow_the_schedule(load, examples) -> None:
    learner = load(learning_rate=1e-3, part_learning_rates={"vit": 1e-4}, warmup_ratio=0.5)
    update(learner, examples[:1])
    rates = {group["part"]: group["lr"] for group in learner.optimizer.param_groups}
    assert (rates["vit"], rates["llm"]) == (pytest.approx(2e-5), pytest.approx(2e-4))


def test_a_rate_of_a_part_that_is_not_trained_is_refused(load) -> None:
    with pytest.raises(ConfigError, match="part_learning_rates: vit is not trained"):
        load(use_lora=True, part_learning_rates={"vit": 1e-4})


@pytest.mark.parametrize(
    "knob",
    [
        {"lora_r": 4},
        {"lora_alpha": 4},
        {"lora_dropout": 0.1},
        {"lora_targets": "llm+vit"},
        {"use_dora": True},
        {"use_rslora": True},
        {"modules_to_save": "visual_head"},
    ],
)
def test_a_lora_knob_without_lora_is_refused(knob, load) -> None:
    [name] = knob
    with pytest.raises(ConfigError, match=f"^{name}: all weights are trained, without LoRA; add --use_lora"):
        load(**knob)


def test_lora_knobs_beside_lora_turned_off_are_no_mistake(load) -> None:
    assert len(load(use_lora=False, lora_r=4).parameters) == len(load().parameters)


def test_lora_cannot_be_turned_off_for_an_adapter_that_goes_on(load, tmp_path) -> None:
    load(use_lora=True, lora_r=4).save(tmp_path, RECORD, with_optimizer=False)
    with pytest.raises(ConfigError, match=r"use_lora is off, but .* is an adapter, .*: looktwice export"):
        load(name=tmp_path, use_lora=False)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("towers", ["llm", "vit", "all"])
def test_recomputing_the_layers_of_a_tower_gives_the_same_gradient(towers, load, examples) -> None:
    plain, recomputed = load(), load(gradient_checkpointing=towers)
    model = recomputed.base.model
    assert model.language_model.gradient_checkpointing is (towers != "vit")
    assert model.visual_tokenizer.vit.gradient_checkpointing is (towers != "llm")
    for learner in (plain, recomputed):
        update(learner, examples[:1])
    for expected, gradient in zip(gradients(plain), gradients(recomputed), strict=True):
        torch.testing.assert_close(gradient, expected, atol=2e-6, rtol=1e-3)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"lora_targets": "llm+vit", "modules_to_save": "visual_head,visual_table"},
    ],
)
def test_every_kind_of_lora_trains_and_goes_on_from_disk(settings, load, examples, tmp_path) -> None:
    learner = load(use_lora=True, lora_r=4, learning_rate=0.01, warmup_ratio=0, **settings)
    losses = [update(learner, examples[:1]) for _ in range(3)]
    assert losses[-1] < losses[0]
    learner.save(tmp_path, RECORD, with_optimizer=False)
    assert update(load(name=tmp_path, **settings), examples[:1]) == pytest.approx(update(learner, examples[:1]))


@pytest.mark.parametrize(("bf16", "picked"), [(True, "flash_attention_2"), (False, "sdpa")])
def test_on_a_gpu_training_in_bfloat16_uses_flash_attention_by_itself(
    bf16, picked, load, monkeypatch: pytest.MonkeyPatch
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
        load(bf16=bf16)
    assert asked["attn_implementation"] == picked


def test_flash_attention_that_cannot_train_is_refused_before_the_model_is_loaded(
    model_folder, processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start, "find_spec", lambda name: True)
    asked = ModelConfig(device="cpu", attn_implementation="flash_attention_2")
    with pytest.raises(ConfigError, match="flash_attention_2 runs in bfloat16, on a CUDA GPU"):
        Learner.load(str(model_folder), asked, SFTConfig(bf16=True), processor, total_steps=1)


@pytest.mark.parametrize(("has_gpu", "is_recomputed"), [(False, False), (True, True)])
def test_layers_are_recomputed_by_default_on_a_gpu(
    has_gpu, is_recomputed, load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learner_module, "is_gpu", lambda device: has_gpu)
    towers = towers_of(load().base).values()
    assert [tower.gradient_checkpointing for tower in towers] == [is_recomputed] * 2


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        (
            {"train_batch_size": 2, "gradient_accumulation_steps": 3},
            {"steps": "12, 3 epochs", "effective batch": "6 samples (batch size 2 x 3 accumulated)"},
        ),
        ({"gradient_checkpointing": "llm", "bf16": True}, {"gradient checkpointing": "llm", "precision": "bfloat16"}),
        ({"memory_efficient": True}, {"gradient checkpointing": "llm and vit", "attention": "sdpa (auto)"}),
        (
            {"train_batch_size": 32, "num_train_epochs": 1},
            {"steps": "1, 1 epoch", "effective batch": "all 24 samples (batch size 32 x 1 accumulated)"},
        ),
        ({"train_batch_size": 5}, {"effective batch": "up to 5 samples (batch size 5 x 1 accumulated)"}),
        (
            {},
            {
                "gradient checkpointing": "none (auto)",
                "stage": "1 (SFT)",
                "model": "tiny",
                "samples": "24",
                "trained": "all weights",
            },
        ),
        ({"output_dir": "out/run"}, {"run folder": "out/run"}),
        ({"freeze": "vit,llm"}, {"trained": "all weights of visual_head, visual_table, embeddings"}),
        ({"use_lora": True, "lora_r": 4}, {"trained": "LoRA of rank 4, alpha 256, on 28 layers"}),
        (
            {"use_lora": True, "use_dora": True, "lora_r": 4, "modules_to_save": "visual_head"},
            {"trained": "DoRA of rank 4, alpha 256, on 28 layers; all weights of visual_head"},
        ),
    ],
)
def test_the_start_of_a_run_says_what_is_about_to_happen(settings, rows, load) -> None:
    learner = load(**settings)
    facts = run_facts(learner, batch_order([24], learner.config), ModelConfig(model_name="tiny"))
    assert {name: facts[name] for name in rows} == rows


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"freeze_vision": True, "vision_cache": "1GB"}, "vectors of pictures, up to 1GB in memory"),
        ({"freeze": "vit", "vision_cache": "1GB"}, "features of the tower, up to 1GB in memory"),
    ],
)
def test_the_start_of_a_run_says_what_the_vision_cache_keeps(settings, told, load) -> None:
    learner = load(**settings)
    order = batch_order([24], learner.config)
    assert run_facts(learner, order, ModelConfig(model_name="tiny"))["vision cache"] == told


def test_the_second_stage_names_the_model_it_starts_from_and_its_rollouts(load, model_folder, processor) -> None:
    config = GRPOConfig(sft_checkpoint_path=model_folder, num_generations=6)
    learner = Learner(load().model, processor, config, total_steps=3)
    facts = run_facts(learner, batch_order([24], config), ModelConfig(model_name="tiny"))
    assert (facts["stage"], facts["model"]) == ("2 (R-GRPO)", str(model_folder))
    assert facts["rollouts"] == "6 of each sample"


@pytest.fixture
def start_of(monkeypatch, capsys) -> Callable[[Learner], list[str]]:
    """What the start of a run shows, where COLUMNS is 80."""
    monkeypatch.setenv("COLUMNS", "80")

    def shown(learner: Learner) -> list[str]:
        show_overview(open_console(stderr=True), learner, batch_order([24], learner.config), ModelConfig())
        return capsys.readouterr().err.splitlines()

    return shown


def test_the_path_of_the_run_folder_is_never_broken(load, start_of) -> None:
    folder = "/".join(["a_long_name_of_a_folder"] * 6)
    assert f"run folder              {folder}" in start_of(load(output_dir=folder))


def test_the_table_of_what_trains_names_each_part(load, start_of) -> None:
    learner = load(use_lora=True, lora_r=4, modules_to_save="visual_table", part_learning_rates={"visual_table": 1e-4})
    rows = {line.split()[0]: line.split()[1:] for line in start_of(learner)}
    table = learner.base.config.visual_vocab_size * learner.base.config.hidden_size
    assert rows["visual_table"] == [f"{table:,}", f"{table:,}", "100.00", "%", "0.0001"]
    assert rows["vit"][1:] == ["0", "0.00", "%", "frozen"]
    assert rows["all"][1] == f"{sum(parameter.numel() for parameter in learner.parameters):,}"


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}])
def test_the_trained_share_is_that_of_peft(settings, load, start_of) -> None:
    learner = load(use_lora=True, **settings)
    trained, total = learner.model.get_nb_trainable_parameters()
    assert start_of(learner)[-1].split() == ["all", f"{total:,}", f"{trained:,}", f"{100 * trained / total:.2f}", "%"]


def test_a_model_that_trains_whole_trains_a_share_of_100_percent(load, start_of) -> None:
    assert start_of(load())[-1].split()[-2:] == ["100.00", "%"]


# -- quantised bases


@pytest.fixture
def bitsandbytes() -> None:
    pytest.importorskip("bitsandbytes")


@pytest.mark.usefixtures("bitsandbytes")
@pytest.mark.parametrize(("kind", "layer"), [("nf4", "Linear4bit"), ("int8", "Linear8bitLt")])
def test_lora_trains_over_a_quantised_language_model(kind, layer, load, examples) -> None:
    learner = load(quantization=kind, use_lora=True, lora_r=4, learning_rate=0.01, warmup_ratio=0)
    attention = learner.base.model.language_model.layers[0].self_attn
    assert type(attention.q_proj.base_layer).__name__ == layer
    losses = [update(learner, examples[:1]) for _ in range(3)]
    assert losses[-1] < losses[0]
    assert losses[0] == pytest.approx(update(load(), examples[:1]), rel=0.05)


@pytest.mark.usefixtures("bitsandbytes")
@pytest.mark.parametrize(("first", "second"), [("adamw_torch", "adamw_8bit"), ("adamw_8bit", "adamw_torch_fused")])
def test_a_checkpoint_goes_on_with_its_kind_of_optimizer(first, second, load, examples, tmp_path) -> None:
    learner = load(optim=first)
    update(learner, examples)
    learner.save(tmp_path / "checkpoint-1", Record(stage="sft", order={}, settings={}), with_optimizer=True)
    load(optim=first).resume(tmp_path / "checkpoint-1")
    with pytest.raises(CheckpointError, match=r"optim was adamw\w* and is adamw\w*; resume with the same settings"):
        load(optim=second).resume(tmp_path / "checkpoint-1")


@pytest.mark.usefixtures("bitsandbytes")
def test_what_images_and_words_pass_through_is_not_quantised(load) -> None:
    base = load(quantization="nf4", use_lora=True).base
    vision = [layer for layer in base.model.visual_tokenizer.modules() if isinstance(layer, torch.nn.Linear)]
    assert {type(layer) for layer in [*vision, base.lm_head]} == {torch.nn.Linear}


@pytest.mark.usefixtures("bitsandbytes")
def test_an_adapter_of_a_quantised_base_fits_the_whole_one(load, examples, tmp_path) -> None:
    learner = load(quantization="nf4", use_lora=True, lora_r=4, learning_rate=0.01, warmup_ratio=0)
    update(learner, examples[:1])
    learner.save(tmp_path, RECORD, with_optimizer=False)
    whole = load(name=tmp_path, quantization="none")
    for old, new in zip(learner.parameters, whole.parameters, strict=True):
        assert torch.equal(old, new)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


@pytest.fixture
def quantised_adapter(bitsandbytes, load, tmp_path) -> Path:
    """A checkpoint of an adapter over a base in nf4."""
    load(quantization="nf4", use_lora=True, lora_r=4).save(tmp_path / "adapter", RECORD, with_optimizer=True)
    return tmp_path / "adapter"


def test_an_adapter_of_a_quantised_base_goes_on_over_another_one_only_when_told(
    quantised_adapter, load, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConfigError, match=r"was trained over a base in nf4; add --quantization nf4, or .* none"):
        load(name=quantised_adapter)
    assert load(name=quantised_adapter, quantization="nf4") and not caplog.messages
    load(name=quantised_adapter, quantization="none")
    assert caplog.messages == [f"{quantised_adapter}: trained over a base in nf4, used over one in none"]


def test_a_run_over_a_quantised_base_is_not_resumed_over_a_whole_one(quantised_adapter, load) -> None:
    with pytest.raises(CheckpointError, match="quantization was nf4 and is none; resume with the same settings"):
        load(use_lora=True, lora_r=4).resume(quantised_adapter)


@pytest.mark.usefixtures("bitsandbytes")
def test_the_parameters_of_a_quantised_model_are_counted_as_what_they_stand_for(load) -> None:
    quantised = part_sizes(load(quantization="nf4", use_lora=True).model)
    assert quantised == part_sizes(load(use_lora=True).model)


def test_quantised_weights_are_not_trained_themselves(load) -> None:
    with pytest.raises(ConfigError, match="quantization nf4 trains adapters alone; add --use_lora"):
        load(quantization="nf4")


# -- the KL reference


def test_the_reference_of_a_pissa_start_is_the_adapted_model(model_folder, load, examples, tmp_path) -> None:
    """PiSSA moves part of the base into the adapter, so the model with the adapter off is no policy at all."""
    base = load_model(str(model_folder))
    start = get_peft_model(base, LoraConfig(r=4, target_modules=LLM_LINEARS, init_lora_weights="pissa"))
    save_model(start, tmp_path)
    learner = load(name=tmp_path, learning_rate=0.01, warmup_ratio=0)
    row = pack(examples[:1])
    reference, before = learner.freeze_reference(), learner.score(row).logprobs.detach()
    update(learner, examples[:1])
    with torch.no_grad():
        with reference.active():
            kept = learner.score(row).logprobs
        assert torch.equal(kept, before)
        assert not torch.equal(learner.score(row).logprobs, before)


# -- checkpoints


@pytest.fixture
def file_limit() -> Callable[[int], AbstractContextManager[None]]:
    """No file can grow beyond so many kilobytes."""

    @contextmanager
    def limit(kilobytes: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000 * kilobytes, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limit


def logits(model: torch.nn.Module, example: Example) -> torch.Tensor:
    inputs = pack([example]).model_inputs()
    del inputs["loss_mask"]
    with torch.no_grad():
        return model.eval()(**inputs).logits


@pytest.mark.parametrize("settings", [{}, {"use_lora": True, "lora_r": 4}])
def test_a_saved_model_gives_the_same_logits_and_has_its_record(settings, load, examples, tmp_path) -> None:
    learner = load(learning_rate=0.01, warmup_ratio=0, **settings)
    start = logits(learner.model, examples[0])
    update(learner, examples[:1])
    learner.save(tmp_path, RECORD, with_optimizer=False)
    trained = logits(learner.model, examples[0])
    assert (trained - start).abs().max() > 0.01
    torch.testing.assert_close(logits(load_model(str(tmp_path)), examples[0]), trained, atol=1e-5, rtol=0)
    assert Record.read(tmp_path) == replace(RECORD, files=Record.read(tmp_path).files)
    assert not (tmp_path / "trainer_state.pt").exists()


def test_an_adapter_goes_on_from_its_own_weights(load, examples, tmp_path) -> None:
    first = load(use_lora=True, lora_r=4, learning_rate=0.01, warmup_ratio=0)
    update(first, examples[:1])
    first.save(tmp_path, RECORD, with_optimizer=False)
    second = load(name=tmp_path, use_lora=True)
    for old, new in zip(first.parameters, second.parameters, strict=True):
        assert torch.equal(old, new)


def test_an_adapter_of_another_rank_than_asked_for_is_refused(load, examples, tmp_path) -> None:
    load(use_lora=True, lora_r=4).save(tmp_path, RECORD, with_optimizer=False)
    with pytest.raises(ConfigError, match="lora_r is 16, the adapter to go on from has 4"):
        load(name=tmp_path, use_lora=True, lora_r=16)


def test_a_whole_model_saved_over_an_adapter_replaces_it(load, tmp_path) -> None:
    load(use_lora=True, lora_r=4).save(tmp_path, RECORD, with_optimizer=False)
    load().save(tmp_path, RECORD, with_optimizer=False)
    assert not is_adapter(str(tmp_path))


@pytest.mark.parametrize("settings", [{}, {"use_lora": True, "lora_r": 4}])
def test_a_resumed_learner_makes_the_same_next_update(settings, load, examples, tmp_path) -> None:
    settings = {"learning_rate": 0.01, "warmup_ratio": 0, **settings}
    learner = load(**settings)
    update(learner, examples[:1])
    learner.step = 1
    learner.save(tmp_path, RECORD, with_optimizer=True)
    resumed = load(**settings)
    resumed.resume(tmp_path)
    assert resumed.step == 1
    for one in (learner, resumed):
        update(one, examples[1:2])
    for expected, parameter in zip(learner.parameters, resumed.parameters, strict=True):
        assert torch.equal(parameter, expected)


def test_a_resumed_learner_knows_its_scale_and_how_long_rows_may_be(load, examples, tmp_path) -> None:
    learner = load(fp16=True)
    update(learner, examples[:1])
    learner.scaler.update(new_scale=512.0)
    learner.tokens_that_fit, learner.max_tokens_per_row, learner.num_overflows = 100, 200, 3
    learner.save(tmp_path, RECORD, with_optimizer=True)
    resumed, other = load(fp16=True), load(max_tokens_per_row=300)
    resumed.resume(tmp_path)
    assert (resumed.scaler.get_scale(), resumed.tokens_that_fit, resumed.max_tokens_per_row) == (512.0, 100, 200)
    assert resumed.num_overflows == 3
    other.resume(tmp_path)
    assert other.max_tokens_per_row == 300


def test_in_deterministic_mode_rows_do_not_depend_on_the_memory_that_is_free(load, monkeypatch) -> None:
    monkeypatch.setattr(rows_module, "free_bytes", lambda device: 10**6)
    assert load().max_tokens_per_row < 1000
    learner = load(deterministic=True)
    assert learner.max_tokens_per_row == learner.max_sibling_tokens == 1024


def test_a_folder_without_the_optimizer_cannot_be_resumed(load, tmp_path) -> None:
    learner = load()
    learner.save(tmp_path, RECORD, with_optimizer=False)
    with pytest.raises(CheckpointError, match=r"trainer_state\.pt: no usable state; resume from another checkpoint"):
        learner.resume(tmp_path)


@pytest.mark.parametrize(
    ("saved", "present", "difference"),
    [
        ({}, {"use_lora": True}, "use_lora was False and is True"),
        ({"use_lora": True, "lora_r": 4}, {"use_lora": True, "lora_r": 8}, "lora_r was 4 and is 8"),
        ({"use_lora": True, "lora_alpha": 4}, {"use_lora": True, "lora_alpha": 8}, "lora_alpha was 4 and is 8"),
        ({"use_lora": True}, {"use_lora": True, "use_rslora": True}, "use_rslora was False and is True"),
        ({}, {"freeze": "visual_table"}, "visual_table was trained and is frozen"),
        ({"freeze": "visual_table"}, {}, "visual_table was frozen and is trained"),
    ],
)
def test_a_checkpoint_of_another_training_is_not_resumed(saved, present, difference, load, tmp_path) -> None:
    load(**saved).save(tmp_path, RECORD, with_optimizer=True)
    learner = load(**present)
    before = [parameter.clone() for parameter in learner.parameters]
    with pytest.raises(CheckpointError, match=f"{difference}; resume with the same settings"):
        learner.resume(tmp_path)
    assert all(torch.equal(old, new) for old, new in zip(before, learner.parameters))


def test_a_resumed_learner_takes_the_present_rates_and_decay(load, examples, tmp_path) -> None:
    learner = load(learning_rate=0.01, weight_decay=0.1)
    update(learner, examples[:1])
    learner.save(tmp_path, RECORD, with_optimizer=True)
    resumed = load(learning_rate=0.002, weight_decay=0.3, part_learning_rates={"vit": 0.001})
    resumed.resume(tmp_path)
    groups = resumed.optimizer.param_groups
    assert {(group["part"] == "vit", group["peak_lr"]) for group in groups} == {(True, 0.001), (False, 0.002)}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.3}


def test_resuming_loads_no_second_model(load, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    learner, resumed = load(), load()
    learner.save(tmp_path, RECORD, with_optimizer=True)
    monkeypatch.setattr(Ovis2_5ForConditionalGeneration, "from_pretrained", None)
    resumed.resume(tmp_path)


@pytest.mark.parametrize("content", [b"", b"no state", None])
def test_a_broken_optimizer_state_is_named(content, load, tmp_path) -> None:
    learner = load()
    learner.save(tmp_path, RECORD, with_optimizer=True)
    file = tmp_path / "trainer_state.pt"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2] if content is None else content)
    with pytest.raises(CheckpointError, match=r"trainer_state\.pt: no usable state; resume from another checkpoint"):
        learner.resume(tmp_path)


@pytest.mark.parametrize("kilobytes", [10, 5000, 10000])
def test_a_disk_that_fills_up_while_saving_leaves_the_checkpoint_before(
    kilobytes, load, examples, tmp_path, file_limit
) -> None:
    """At the weights, and at the optimizer's state after them."""
    learner = load()
    update(learner, examples[:1])
    learner.save(tmp_path, RECORD, with_optimizer=True)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    update(learner, examples[:1])
    with file_limit(kilobytes), pytest.raises(CheckpointError, match=r"cannot be written \(.*; make room on the disk"):
        learner.save(tmp_path, RECORD, with_optimizer=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# -- the frozen reference


def test_the_reference_keeps_the_weights_of_its_moment_and_gives_the_live_ones_back(load, examples) -> None:
    learner = load(learning_rate=0.01, warmup_ratio=0)
    start = [parameter.clone() for parameter in learner.parameters]
    reference = learner.freeze_reference()
    update(learner, examples[:1])
    live = [parameter.clone() for parameter in learner.parameters]
    assert not torch.equal(start[0], live[0])
    with pytest.raises(ZeroDivisionError), reference.active():
        assert all(torch.equal(parameter, value) for parameter, value in zip(learner.parameters, start))
        raise ZeroDivisionError
    assert all(torch.equal(parameter, value) for parameter, value in zip(learner.parameters, live))
