"""Stage 1: supervised fine-tuning on look-twice rationales. Reads top to bottom."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import islice
from operator import attrgetter
from pathlib import Path

import torch

from looktwice.config import DataConfig, ModelConfig, SFTConfig
from looktwice.data.examples import Encoder
from looktwice.data.loader import Loader, warm_up
from looktwice.data.sample import Sample
from looktwice.metrics import Recorder
from looktwice.model.weights import pick_device
from looktwice.processing.processor import Example, load_processor
from looktwice.training.learner import Learner
from looktwice.training.run import (
    LengthReport,
    batch_order,
    close_step,
    is_due,
    load_sets,
    prepare_output,
    save_final,
    trained_table,
)

WORKERS_BESIDE_A_GPU = 4
STEPS_AHEAD = 2
"""Steps whose samples the workers may prepare before they are needed."""
SHOWN = ("loss", "eval/loss", "optim/lr", "perf/tokens_per_s")


def train_sft(model: ModelConfig, data: DataConfig, config: SFTConfig) -> Path:
    """Fine-tune and give back the folder of the final model. Everything a user can get wrong is checked first."""
    # a CPU has no time to spare for them
    default = 0 if pick_device(model.device) == "cpu" else WORKERS_BESIDE_A_GPU
    workers = default if config.num_workers is None else config.num_workers
    if workers:
        warm_up()
    processor = load_processor(model.model_name, data)
    train, held_out, refits = load_sets(data, processor, "sft")
    prepare_output(config)
    lengths = LengthReport(config)
    lengths.note(refits)
    lengths.show()
    order = batch_order(len(train), config)
    learner = Learner.load(model.model_name, model, config, processor, total_steps=order.total_steps)
    if config.resume_from_checkpoint:
        learner.resume(config.resume_from_checkpoint)
    resolved = (model, data, config)
    encoder = Encoder(processor=processor, max_length=data.max_length, length_policy=data.length_policy)
    with (
        Recorder(
            config.output_dir, total_steps=order.total_steps, shown=SHOWN, title="SFT", append=learner.step > 0
        ) as recorder,
        Loader(
            encoder,
            (train[number] for step in range(learner.step, order.total_steps) for number in order[step]),
            num_workers=workers,
            ahead=STEPS_AHEAD * order.samples_per_step,
            where=attrgetter("where"),
        ) as prepared,
    ):
        recorder.console.print(trained_table(learner))
        eval_every = config.eval_steps or order.steps_per_epoch
        while learner.step < order.total_steps:
            encoded = list(islice(prepared, len(order[learner.step])))
            lengths.note(each.refit for each in encoded if each.refit)
            examples = [each.example for each in encoded if each.example]
            metrics = train_step(learner, examples) if examples else {}
            learner.step += 1
            metrics["epoch"] = order.epoch(learner.step)
            if held_out and is_due(learner, eval_every):
                metrics["eval/loss"] = evaluation_loss(learner, held_out, encoder, lengths, num_workers=workers)
            metrics |= lengths.metrics
            close_step(learner, recorder, metrics, resolved)
    lengths.show()
    return save_final(learner, resolved)


def train_step(learner: Learner, examples: Sequence[Example]) -> dict[str, float]:
    """One optimizer step on the mean loss per trained token of all its examples, whatever the rows."""
    started = time.perf_counter()
    rows = learner.rows(examples)
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
def evaluation_loss(
    learner: Learner, samples: Sequence[Sample], encoder: Encoder, lengths: LengthReport, *, num_workers: int
) -> float:
    """Mean negative logprob per trained token over all samples, in eval mode; those too long are noted."""
    learner.model.eval()
    total, num_tokens = 0.0, 0
    size = learner.config.train_batch_size
    with Loader(
        encoder, samples, num_workers=num_workers, ahead=STEPS_AHEAD * size, where=attrgetter("where")
    ) as prepared:
        while encoded := list(islice(prepared, size)):
            lengths.note(each.refit for each in encoded if each.refit)
            for row in learner.rows([each.example for each in encoded if each.example]):
                total -= float(learner.score(row).logprobs.sum())
                num_tokens += row.num_loss_tokens
    return total / num_tokens
