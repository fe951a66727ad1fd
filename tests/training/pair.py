"""What two processes do together, for `test_distributed.py`: the same script in each, with rank 0 or 1.

`python pair.py FOLDER` reads `FOLDER/model` and data files, and leaves what came of each part in `FOLDER/pair`.
"""

from __future__ import annotations

import json
import signal
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from looktwice.cli import main
from looktwice.config import DataConfig, ModelConfig, SFTConfig
from looktwice.data.examples import encode_sample
from looktwice.errors import DataError, TrainingError
from looktwice.formats.sample_file import read_samples
from looktwice.processing.processor import Ovis2_5Processor
from looktwice.training import sft
from looktwice.training.distributed import World
from looktwice.training.join import joined
from looktwice.training.learner import Learner
from looktwice.training.record import Record
from looktwice.training.state import save

STEPS: dict[str, tuple[list[int], list[int]]] = {
    "pictures on both": ([0], [1]),
    "texts on both": ([4], [5]),
    "a picture and a text": ([0], [6]),
    "a text and a picture": ([7], [2]),
    "nothing and a picture": ([], [3]),
    "a text and nothing": ([5], []),
    "more rows than the other": ([4, 1, 6], [3]),
}
"""Samples of rank 0 and of rank 1 in each step; 0 to 3 show a picture, 4 to 7 are texts."""
WAYS: dict[str, dict[str, Any]] = {
    "full": {"gradient_checkpointing": "all"},
    "lora": {"use_lora": True, "lora_r": 4, "lora_targets": "llm+vit", "modules_to_save": ("visual_head",)},
    "frozen_vision": {"freeze_vision": True, "vision_cache": "1GB"},
    "fp16": {"fp16": True},
}
TRAINING: dict[str, Any] = {"learning_rate": 1e-3, "lr_scheduler_type": "constant", "warmup_ratio": 0}
RUN: dict[str, Any] = {**TRAINING, "max_steps": 3, "train_batch_size": 2, "gradient_accumulation_steps": 2}


def examples_of(folder: Path) -> list[Any]:
    processor = Ovis2_5Processor.from_pretrained(folder / "model")
    shown = read_samples(folder / "data" / "train.jsonl", folder / "data")[:4]
    return [
        encode_sample(sample, processor, max_length=1000)
        for sample in shown + read_samples(folder / "texts.jsonl", folder)
    ]


def take_steps(world: World, folder: Path, way: str, place: Path, **settings: Any) -> None:
    """One update for each of STEPS, on the rows of this process; `place` gets the weights, and what was logged."""
    config = SFTConfig(**TRAINING, **WAYS[way], max_tokens_per_row=1, **settings)
    processor = Ovis2_5Processor.from_pretrained(folder / "model")
    model = ModelConfig(device="cpu")
    learner = Learner.load(str(folder / "model"), model, config, processor, total_steps=len(STEPS), world=world)
    examples, logged = examples_of(folder), {}
    for name, shares in STEPS.items():
        own = shares[world.rank] if world.size > 1 else shares[0] + shares[1]
        metrics = sft.train_step(learner, learner.rows([examples[number] for number in own]))
        logged[name] = [metrics["loss"], metrics["optim/grad_norm"]]
        learner.step += 1
    save(learner, place, Record(stage="sft", order={}, settings={}), with_optimizer=False)
    if world.is_main:
        (place / "logged.json").write_text(json.dumps(logged))


def run(folder: Path, place: Path, **settings: Any) -> None:
    """A whole run of three steps on six samples, with an evaluation."""
    data = DataConfig(
        train_data_path=folder / "data" / "train.jsonl",
        val_data_path=folder / "texts.jsonl",
        image_base_path=folder / "data",
    )
    model = ModelConfig(model_name=str(folder / "model"), device="cpu")
    sft.train_sft(model, data, SFTConfig(output_dir=place, **RUN, **settings))


def meet_faults(world: World, folder: Path, place: Path) -> None:
    """Updates in which rank 1 meets what one process by itself does not: memory that runs out, and losses that are no
    numbers; `place` gets what each process makes of it."""
    config = SFTConfig(**TRAINING, max_tokens_per_row=1000, skip_nonfinite=1)
    processor = Ovis2_5Processor.from_pretrained(folder / "model")
    model = ModelConfig(device="cpu")
    learner = Learner.load(str(folder / "model"), model, config, processor, total_steps=3, world=world)
    examples, faults, score = examples_of(folder), [], learner.score

    def scored(row: Any, **options: Any) -> Any:
        scores = score(row, **options)
        fault = faults.pop() if faults and world.rank == 1 else None
        if fault == "memory":
            raise torch.OutOfMemoryError("of memory")
        return scores._replace(logprobs=scores.logprobs * float("nan")) if fault else scores

    learner.score = scored  # type: ignore[method-assign]
    own = [[0], [1, 4, 5]][world.rank] if world.size > 1 else [0, 1, 4, 5]
    rows = learner.rows([replace(examples[number], where=f"data:{number}") for number in own])
    faults.append("memory")
    metrics = sft.train_step(learner, rows)
    told = {"loss": metrics["loss"], "splits": metrics.get("memory/row_splits", 0.0)}
    faults.append("number")
    weights = [parameter.detach().clone() for parameter in learner.parameters]
    if world.size > 1:
        sft.train_step(learner, rows)
        told["is_left_out"] = all(map(torch.equal, weights, learner.parameters))
        faults.append("number")
        try:
            sft.train_step(learner, rows)
        except TrainingError as error:
            told["error"] = str(error)
    place.mkdir(parents=True, exist_ok=True)
    (place / f"{world.rank}.json").write_text(json.dumps(told))


def stop_in_rank_1(folder: Path, place: Path) -> None:
    """A run whose second process gets a SIGTERM in its first step."""
    step = sft.train_step

    def stopped(learner: Learner, rows: Any) -> dict[str, float]:
        if learner.world.rank == 1:
            signal.raise_signal(signal.SIGTERM)
        return step(learner, rows)

    sft.train_step = stopped
    with suppress(KeyboardInterrupt, SystemExit):
        run(folder, place)
    sft.train_step = step


def fail_in_rank_1(folder: Path) -> int:
    """A run whose second process meets an error in its first step, as the command ends it."""
    step = sft.train_step

    def broken(learner: Learner, rows: Any) -> dict[str, float]:
        if learner.world.rank == 1:
            raise DataError("row 7: broken")
        return step(learner, rows)

    sft.train_step = broken
    words = ["train", "--stage", "sft", "--model_name", str(folder / "model"), "--device", "cpu"]
    words += ["--train_data", str(folder / "data" / "train.jsonl"), "--image_base_path", str(folder / "data")]
    return main([*words, "--sft_output_dir", str(folder / "pair" / "failed"), "--batch_size", "2"])


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    for kind in ("ddp", "fsdp"):
        config = SFTConfig(distributed=kind)
        for way in WAYS:
            with joined(ModelConfig(device="cpu"), config) as world:
                take_steps(world, folder, way, folder / "pair" / f"{kind}-{way}", distributed=kind)
    for name, way in {"ddp": "full", "fsdp": "full", "fsdp_lora": "lora"}.items():
        kind = name.removesuffix("_lora")
        run(folder, folder / "pair" / name, distributed=kind, save_steps=1, **WAYS[way])
        resumed = folder / "one" / way / "checkpoint-2"
        run(folder, folder / "pair" / f"{name}-resumed", distributed=kind, resume_from_checkpoint=resumed, **WAYS[way])
    with joined(ModelConfig(device="cpu"), SFTConfig()) as world:
        meet_faults(world, folder, folder / "pair" / "faults")
    stop_in_rank_1(folder, folder / "pair" / "stopped")
    sys.exit(fail_in_rank_1(folder))
