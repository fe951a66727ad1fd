"""What the start of a run shows."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from looktwice.config import GRPOConfig, ModelConfig
from looktwice.console import open_console
from looktwice.training.learner import Learner
from looktwice.training.overview import run_facts, show_overview
from looktwice.training.run import batch_order


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
def test_the_start_of_a_run_says_what_is_about_to_happen(settings, rows, load_sft) -> None:
    learner = load_sft(**settings)
    facts = run_facts(learner, batch_order([24], learner.config), ModelConfig(model_name="tiny"))
    assert {name: facts[name] for name in rows} == rows


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"freeze_vision": True, "vision_cache": "1GB"}, "vectors of pictures, up to 1GB in memory"),
        ({"freeze": "vit", "vision_cache": "1GB"}, "features of the tower, up to 1GB in memory"),
    ],
)
def test_the_start_of_a_run_says_what_the_vision_cache_keeps(settings, told, load_sft) -> None:
    learner = load_sft(**settings)
    order = batch_order([24], learner.config)
    assert run_facts(learner, order, ModelConfig(model_name="tiny"))["vision cache"] == told


def test_the_second_stage_names_the_model_it_starts_from_and_its_rollouts(load_sft, model_folder, processor) -> None:
    config = GRPOConfig(sft_checkpoint_path=model_folder, num_generations=6)
    learner = Learner(load_sft().model, processor, config, total_steps=3)
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


def test_the_path_of_the_run_folder_is_never_broken(load_sft, start_of) -> None:
    folder = "/".join(["a_long_name_of_a_folder"] * 6)
    assert f"run folder              {folder}" in start_of(load_sft(output_dir=folder))


def test_the_table_of_what_trains_names_each_part(load_sft, start_of) -> None:
    learner = load_sft(
        use_lora=True, lora_r=4, modules_to_save="visual_table", part_learning_rates={"visual_table": 1e-4}
    )
    rows = {line.split()[0]: line.split()[1:] for line in start_of(learner)}
    table = learner.base.config.visual_vocab_size * learner.base.config.hidden_size
    assert rows["visual_table"] == [f"{table:,}", f"{table:,}", "100.00", "%", "0.0001"]
    assert rows["vit"][1:] == ["0", "0.00", "%", "frozen"]
    assert rows["all"][1] == f"{sum(parameter.numel() for parameter in learner.parameters):,}"


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}])
def test_the_trained_share_is_that_of_peft(settings, load_sft, start_of) -> None:
    learner = load_sft(use_lora=True, **settings)
    trained, total = learner.model.get_nb_trainable_parameters()
    assert start_of(learner)[-1].split() == ["all", f"{total:,}", f"{trained:,}", f"{100 * trained / total:.2f}", "%"]


def test_a_model_that_trains_whole_trains_a_share_of_100_percent(load_sft, start_of) -> None:
    assert start_of(load_sft())[-1].split()[-2:] == ["100.00", "%"]
