"""What of a model is trained, in which precision and at which rate."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from tests.training.updates import RECORD, gradients, update

from looktwice.errors import ConfigError
from looktwice.model.adapters import part_of, part_sizes
from looktwice.model.weights import save_model
from looktwice.training import learner as learner_module
from looktwice.training.state import save
from looktwice.training.trainable import towers_of


def test_layers_share_their_input_with_their_adapters_under_bf16(load_sft, examples) -> None:
    learner = load_sft(bf16=True, use_lora=True, lora_r=2)
    layer = learner.base.model.language_model.layers[0].self_attn
    kept: list[torch.Tensor] = []
    with learner.precision(), torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        x = torch.randn(1, 5, learner.base.config.hidden_size, dtype=torch.bfloat16)
        for projection in (layer.q_proj, layer.k_proj, layer.v_proj):
            projection(x)
    assert len({each.data_ptr() for each in kept if each.shape[-2:] == x.shape[-2:]}) == 1


def test_frozen_vision_is_kept_in_the_compute_dtype_where_that_is_lossless(load_sft, model, tmp_path) -> None:
    halved = copy.deepcopy(model).bfloat16().float()
    halved.model.vte.weight.data += 1e-4
    save_model(halved, tmp_path / "model")
    learner = load_sft(name=tmp_path / "model", bf16=True, freeze_vision=True)
    dtypes = {part_of(name): weight.dtype for name, weight in learner.model.named_parameters()}
    assert (dtypes["vit"], dtypes["visual_table"], dtypes["llm"]) == (torch.bfloat16, torch.float32, torch.float32)


def test_a_frozen_part_of_which_one_weight_is_not_lossless_stays_as_it_is(load_sft, examples) -> None:
    learner = load_sft(bf16=True, freeze_vision=True)  # norms of ones are lossless, random matrices are not
    dtypes = {weight.dtype for name, weight in learner.model.named_parameters() if part_of(name) == "vit"}
    assert dtypes == {torch.float32}
    assert math.isfinite(update(learner, examples[:1]))


def test_matrices_decay_and_vectors_do_not(load_sft, examples) -> None:
    learner = load_sft(weight_decay=0.5, learning_rate=0.1, warmup_ratio=0)
    before = [parameter.clone() for parameter in learner.parameters]
    learner.update(learner.rows(examples[:1]), lambda scores, row: scores.logprobs.sum() * 0)
    for old, new in zip(before, learner.parameters):
        torch.testing.assert_close(new, old * 0.95 if old.ndim >= 2 else old)


def test_lora_trains_adapters_of_the_language_model_and_nothing_else(load_sft, examples) -> None:
    learner = load_sft(use_lora=True, lora_r=4, lora_alpha=8)
    names = [name for name, parameter in learner.model.named_parameters() if parameter.requires_grad]
    assert names and all("lora_" in name and "language_model" in name for name in names)
    assert sum(".q_proj.lora_A" in name for name in names) == learner.base.config.llm_config.num_hidden_layers
    update(learner, examples[:1])
    assert any(gradient.abs().sum() > 0 for gradient in gradients(learner))


def test_lora_on_bfloat16_keeps_its_adapters_in_float32(load_sft, examples) -> None:
    learner = load_sft(use_lora=True, lora_r=4, bf16=True)
    assert {parameter.dtype for parameter in learner.parameters} == {torch.float32}
    assert learner.base.lm_head.weight.dtype == torch.bfloat16
    assert update(learner, examples[:1]) == pytest.approx(update(load_sft(), examples[:1]), rel=0.02)


def test_whole_parts_beside_lora_on_bfloat16_take_in_small_steps(load_sft, examples) -> None:
    """Weights of 0.02 in bfloat16 lie 1e-4 apart, and a step of 2e-5 would be rounded away."""
    learner = load_sft(
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


def test_memory_efficient_lora_gives_the_same_gradient(load_sft, examples) -> None:
    plain, efficient = (load_sft(use_lora=True, lora_r=4, memory_efficient=flag) for flag in (False, True))
    for learner in (plain, efficient):
        update(learner, examples[:2])
    for expected, gradient in zip(gradients(plain), gradients(efficient), strict=True):
        torch.testing.assert_close(gradient, expected, atol=2e-6, rtol=1e-3)


def test_a_frozen_vision_tower_stays_as_it_is(load_sft) -> None:
    learner = load_sft(freeze_vision=True)
    frozen = {name for name, parameter in learner.model.named_parameters() if not parameter.requires_grad}
    assert frozen == {
        name
        for name, _ in learner.model.named_parameters()
        if name.startswith(("model.visual_tokenizer.", "model.vte."))
    }


def test_parts_learn_at_their_own_rates(load_sft, examples) -> None:
    rates = {"vit": 2e-3, "visual_table": 0}
    learner = load_sft(learning_rate=1e-3, part_learning_rates=rates, freeze="embeddings", warmup_ratio=0)
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


def test_rates_of_parts_follow_the_schedule(load_sft, examples) -> None:
    learner = load_sft(learning_rate=1e-3, part_learning_rates={"vit": 1e-4}, warmup_ratio=0.5)
    update(learner, examples[:1])
    rates = {group["part"]: group["lr"] for group in learner.optimizer.param_groups}
    assert (rates["vit"], rates["llm"]) == (pytest.approx(2e-5), pytest.approx(2e-4))


def test_a_rate_of_a_part_that_is_not_trained_is_refused(load_sft) -> None:
    with pytest.raises(ConfigError, match="part_learning_rates: vit is not trained"):
        load_sft(use_lora=True, part_learning_rates={"vit": 1e-4})


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
def test_a_lora_knob_without_lora_is_refused(knob, load_sft) -> None:
    [name] = knob
    with pytest.raises(ConfigError, match=f"^{name}: all weights are trained, without LoRA; add --use_lora"):
        load_sft(**knob)


def test_lora_knobs_beside_lora_turned_off_are_no_mistake(load_sft) -> None:
    assert len(load_sft(use_lora=False, lora_r=4).parameters) == len(load_sft().parameters)


def test_lora_cannot_be_turned_off_for_an_adapter_that_goes_on(load_sft, tmp_path) -> None:
    save(load_sft(use_lora=True, lora_r=4), tmp_path, RECORD, with_optimizer=False)
    with pytest.raises(ConfigError, match=r"use_lora is off, but .* is an adapter, .*: looktwice export"):
        load_sft(name=tmp_path, use_lora=False)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("towers", ["llm", "vit", "all"])
def test_recomputing_the_layers_of_a_tower_gives_the_same_gradient(towers, load_sft, examples) -> None:
    plain, recomputed = load_sft(), load_sft(gradient_checkpointing=towers)
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
def test_every_kind_of_lora_trains_and_goes_on_from_disk(settings, load_sft, examples, tmp_path) -> None:
    learner = load_sft(use_lora=True, lora_r=4, learning_rate=0.01, warmup_ratio=0, **settings)
    losses = [update(learner, examples[:1]) for _ in range(3)]
    assert losses[-1] < losses[0]
    save(learner, tmp_path, RECORD, with_optimizer=False)
    assert update(load_sft(name=tmp_path, **settings), examples[:1]) == pytest.approx(update(learner, examples[:1]))


@pytest.mark.parametrize(("has_gpu", "is_recomputed"), [(False, False), (True, True)])
def test_layers_are_recomputed_by_default_on_a_gpu(
    has_gpu, is_recomputed, load_sft, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learner_module, "is_gpu", lambda device: has_gpu)
    towers = towers_of(load_sft().base).values()
    assert [tower.gradient_checkpointing for tower in towers] == [is_recomputed] * 2


@pytest.mark.usefixtures("bitsandbytes")
@pytest.mark.parametrize(("kind", "layer"), [("nf4", "Linear4bit"), ("int8", "Linear8bitLt")])
def test_lora_trains_over_a_quantised_language_model(kind, layer, load_sft, examples) -> None:
    learner = load_sft(quantization=kind, use_lora=True, lora_r=4, learning_rate=0.01, warmup_ratio=0)
    attention = learner.base.model.language_model.layers[0].self_attn
    assert type(attention.q_proj.base_layer).__name__ == layer
    losses = [update(learner, examples[:1]) for _ in range(3)]
    assert losses[-1] < losses[0]
    assert losses[0] == pytest.approx(update(load_sft(), examples[:1]), rel=0.05)


@pytest.mark.usefixtures("bitsandbytes")
def test_what_images_and_words_pass_through_is_not_quantised(load_sft) -> None:
    base = load_sft(quantization="nf4", use_lora=True).base
    vision = [layer for layer in base.model.visual_tokenizer.modules() if isinstance(layer, torch.nn.Linear)]
    assert {type(layer) for layer in [*vision, base.lm_head]} == {torch.nn.Linear}


@pytest.mark.usefixtures("bitsandbytes")
def test_an_adapter_of_a_quantised_base_fits_the_whole_one(load_sft, examples, tmp_path) -> None:
    learner = load_sft(quantization="nf4", use_lora=True, lora_r=4, learning_rate=0.01, warmup_ratio=0)
    update(learner, examples[:1])
    save(learner, tmp_path, RECORD, with_optimizer=False)
    whole = load_sft(name=tmp_path, quantization="none")
    for old, new in zip(learner.parameters, whole.parameters, strict=True):
        assert torch.equal(old, new)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_an_adapter_of_a_quantised_base_goes_on_over_another_one_only_when_told(
    quantised_adapter, load_sft, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConfigError, match=r"was trained over a base in nf4; add --quantization nf4, or .* none"):
        load_sft(name=quantised_adapter)
    assert load_sft(name=quantised_adapter, quantization="nf4") and not caplog.messages
    load_sft(name=quantised_adapter, quantization="none")
    assert caplog.messages == [f"{quantised_adapter}: trained over a base in nf4, used over one in none"]


@pytest.mark.usefixtures("bitsandbytes")
def test_the_parameters_of_a_quantised_model_are_counted_as_what_they_stand_for(load_sft) -> None:
    quantised = part_sizes(load_sft(quantization="nf4", use_lora=True).model)
    assert quantised == part_sizes(load_sft(use_lora=True).model)


def test_quantised_weights_are_not_trained_themselves(load_sft) -> None:
    with pytest.raises(ConfigError, match="quantization nf4 trains adapters alone; add --use_lora"):
        load_sft(quantization="nf4")


def test_an_adapter_goes_on_from_its_own_weights(load_sft, examples, tmp_path) -> None:
    first = load_sft(use_lora=True, lora_r=4, learning_rate=0.01, warmup_ratio=0)
    update(first, examples[:1])
    save(first, tmp_path, RECORD, with_optimizer=False)
    second = load_sft(name=tmp_path, use_lora=True)
    for old, new in zip(first.parameters, second.parameters, strict=True):
        assert torch.equal(old, new)


def test_an_adapter_of_another_rank_than_asked_for_is_refused(load_sft, examples, tmp_path) -> None:
    save(load_sft(use_lora=True, lora_r=4), tmp_path, RECORD, with_optimizer=False)
    with pytest.raises(ConfigError, match="lora_r is 16, the adapter to go on from has 4"):
        load_sft(name=tmp_path, use_lora=True, lora_r=16)
