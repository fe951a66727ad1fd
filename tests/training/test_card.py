"""What the card of a final model says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from looktwice.config import DataConfig, ModelConfig, SFTConfig
from looktwice.processing.processor import Ovis2_5Processor
from looktwice.training.card import model_card
from looktwice.training.learner import Learner
from looktwice.training.provenance import write_provenance
from looktwice.training.record import Record


@pytest.fixture
def card(model_folder: Path, processor: Ovis2_5Processor, tmp_path: Path) -> str:
    (tmp_path / "signs.jsonl").write_text("{}\n")
    config = SFTConfig(output_dir=tmp_path, use_lora=True, lora_r=4, learning_rate=1e-4)
    data = DataConfig(train_data_path=[tmp_path / "signs.jsonl"], train_weights=[2])
    settings = (ModelConfig(model_name=str(model_folder), device="cpu"), data, config)
    learner = Learner.load(str(model_folder), settings[0], config, processor, total_steps=9)
    learner.step = 9
    write_provenance(settings, "sft", [7], "cpu", step=0)
    lines = [{"step": 3, "loss": 2.0, "eval/loss": 1.5}, {"step": 9, "loss": 1.25}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "mine\n")
    return model_card(learner, Record(stage="sft", order={}, settings={}))


def test_the_card_names_data_recipe_metrics_pixels_and_base(card, model_folder, processor) -> None:
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "peft",
        "pipeline_tag": "image-text-to-text",
        "tags": ["looktwice", "sft"],
    }
    for words in (
        f"stage 1, supervised fine-tuning, from `{model_folder}`; LoRA of rank 4, alpha 256, on 28 layers.",
        "- `signs.jsonl`: 7 samples, 2 passes an epoch, fingerprint `",
        "| steps | 9 |",
        "| learning rate | 0.0001, cosine |",
        "| `--lora_r` | 4 |",
        "| training loss of the step, per trained token | 1.25 (step 9) |",
        "nats | 1.5 (step 3) |",
        f"| image max pixels | {processor.policy.image_max_pixels:,} |",
        "| box frame | original_px |",
    ):
        assert words in text
