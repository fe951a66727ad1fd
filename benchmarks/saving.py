"""What it costs that a run is never lost: CPU seconds of an update in deterministic mode over one without, and seconds
of writing a checkpoint over those of a training step.

The models and rows are those of `exact.py`; a step is an update of all weights, or of LoRA of rank 16, on all rows.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
from exact import draw_examples
from measure import interleaved, median_ratio, medians, publish
from models import build

from looktwice.config import SFTConfig
from looktwice.model.adapters import add_lora
from looktwice.model.weights import TINY, locate
from looktwice.processing.processor import Ovis2_5Processor
from looktwice.training.determinism import deterministic
from looktwice.training.learner import Learner
from looktwice.training.record import Record

MODELS = ("tiny", "body")
REPEATS = 5


def main() -> None:
    torch.set_num_threads(1)
    processor = Ovis2_5Processor.from_pretrained(locate(TINY))
    figures: dict[str, float] = {}
    for name in MODELS:
        for kind in ("all_weights", "lora"):
            model = build(TINY if name == "tiny" else name, "cpu")
            trained = add_lora(model, r=16, alpha=32) if kind == "lora" else model
            with tempfile.TemporaryDirectory() as folder:
                figures |= costs(f"{name}.{kind}", Learner(trained, processor, SFTConfig(), total_steps=100), folder)
    publish(figures)


def costs(name: str, learner: Learner, folder: str) -> dict[str, float]:
    rows = learner.rows(draw_examples(learner.processor))
    record = Record(stage="sft", order={}, settings={})

    def step() -> None:
        learner.update(rows, lambda scores, row: -scores.logprobs.mean())

    def step_deterministically() -> None:
        with deterministic(True):
            step()

    def save() -> None:
        save(learner, Path(folder) / "checkpoint", record, with_optimizer=True)

    step(), step_deterministically()
    ways = {"deterministic": step_deterministically, "plain": step}
    cpu = interleaved(ways, repeats=REPEATS, clock=time.process_time)
    clock = medians({"step": step, "save": save}, repeats=REPEATS)
    return {
        f"{name}.deterministic_vs_plain": median_ratio(cpu["deterministic"], cpu["plain"]),
        f"{name}.checkpoint_vs_step": clock["save"] / clock["step"],
    }


if __name__ == "__main__":
    main()
