"""Stage 1: supervised fine-tuning on look-twice rationales. Reads top to bottom."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from looktwice.config import DataConfig, ModelConfig, SFTConfig
from looktwice.data.dataset import encode_sample
from looktwice.data.records import Sample
from looktwice.metrics import Recorder
from looktwice.processing.packing import PackedBatch
from looktwice.training.learner import Learner
from looktwice.training.run import (
    batch_order,
    close_step,
    is_due,
    load_processor,
    load_samples,
    prepare_output,
    required,
    save_final,
    trained_table,
)

SHOWN = ("loss", "eval/loss", "optim/lr", "perf/tokens_per_s")


def train_sft(model: ModelConfig, data: DataConfig, config: SFTConfig) -> Path:
    """Fine-tune and give back the folder of the final model. Everything a user can get wrong is checked first."""
    processor = load_processor(model.model_name, data)
    train = load_samples(required(data.train_data_path, "--train_data"), data, processor)
    held_out = load_samples(data.val_data_path, data, processor) if data.val_data_path else []
    prepare_output(config)
    order = batch_order(len(train), config)
    learner = Learner.load(model.model_name, model, config, processor, total_steps=order.total_steps)
    if config.resume_from_checkpoint:
        learner.resume(config.resume_from_checkpoint)
    resolved = (model, data, config)
    with Recorder(
        config.output_dir, total_steps=order.total_steps, shown=SHOWN, title="SFT", append=learner.step > 0
    ) as recorder:
        recorder.console.print(trained_table(learner))
        eval_every = config.eval_steps or order.steps_per_epoch
        while learner.step < order.total_steps:
            metrics = train_step(learner, [train[number] for number in order[learner.step]], data)
            learner.step += 1
            metrics["epoch"] = order.epoch(learner.step)
            if held_out and is_due(learner, eval_every):
                metrics["eval/loss"] = evaluation_loss(learner, held_out, data)
            close_step(learner, recorder, metrics, resolved)
    return save_final(learner, resolved)


def train_step(learner: Learner, samples: Sequence[Sample], data: DataConfig) -> dict[str, float]:
    """One optimizer step on the mean loss per trained token of all its samples, whatever the rows."""
    started = time.perf_counter()
    rows = learner.rows([encode_sample(sample, learner.processor, max_length=data.max_length) for sample in samples])
    num_loss_tokens = sum(row.num_loss_tokens for row in rows)
    update = learner.update(rows, lambda scores, row: -scores.logprobs.sum() / num_loss_tokens)
    seconds = time.perf_counter() - started
    return {
        "loss": update.loss,
        "optim/grad_norm": update.grad_norm,
        "optim/lr": learner.optimizer.param_groups[0]["lr"],
        "perf/tokens_per_s": sum(row.num_tokens for row in rows) / seconds,
        "time/step_s": seconds,
    }


@torch.no_grad()
def evaluation_loss(learner: Learner, samples: Sequence[Sample], data: DataConfig) -> float:
    """Mean negative logprob per trained token over all samples, in eval mode."""
    learner.model.eval()
    total, num_tokens = 0.0, 0
    size = learner.config.train_batch_size
    for first in range(0, len(samples), size):
        batch = samples[first : first + size]
        rows: list[PackedBatch] = learner.rows(
            [encode_sample(sample, learner.processor, max_length=data.max_length) for sample in batch]
        )
        for row in rows:
            total -= float(learner.score(row).logprobs.sum())
            num_tokens += row.num_loss_tokens
    return total / num_tokens
