"""Stage 1: supervised fine-tuning on look-twice rationales. Reads top to bottom."""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from itertools import chain, islice
from operator import attrgetter
from pathlib import Path

import torch

from looktwice.config import DataConfig, ModelConfig, SFTConfig
from looktwice.data.examples import Encoder, Packer
from looktwice.data.loader import prepare_batches, warm_up
from looktwice.data.sample import Sample
from looktwice.model.weights import pick_device
from looktwice.processing.packing import PackedBatch
from looktwice.processing.processor import load_processor
from looktwice.training.checkpoints import Checkpoints
from looktwice.training.determinism import deterministic
from looktwice.training.folder import claimed
from looktwice.training.learner import Learner
from looktwice.training.overview import show_overview
from looktwice.training.run import batch_order, begin, close_step, is_due, open_recorder, planned, save_final
from looktwice.training.sets import LengthReport, load_sets
from looktwice.training.stopping import stop_requests

WORKERS_BESIDE_A_GPU = 4
SHOWN = ("loss", "eval/loss", "optim/lr", "perf/tokens_per_s")


def train_sft(model: ModelConfig, data: DataConfig, config: SFTConfig) -> Path:
    """Fine-tune and give back the folder of the final model. Everything a user can get wrong is checked first."""
    # a CPU has no time to spare for them
    default = 0 if pick_device(model.device) == "cpu" else min(WORKERS_BESIDE_A_GPU, os.cpu_count() or 1)
    workers = default if config.num_workers is None else config.num_workers
    if workers:
        warm_up()
    processor = load_processor(model.model_name, data)
    train, held_out, refits, sizes = load_sets(data, processor, "sft")
    order = batch_order(sizes, config, data.train_weights)
    settings = (model, data, config)
    with claimed(config.output_dir), stop_requests() as stop, deterministic(config.deterministic):
        record = planned("sft", settings, order, model.model_name)
        learner = Learner.load(model.model_name, model, config, processor, total_steps=order.total_steps)
        record = begin(learner, record, settings, order)
        lengths = LengthReport(config)
        lengths.note(refits)
        lengths.show()
        encoder = Encoder(processor=processor, max_length=data.max_length, length_policy=data.length_policy)
        batches = (
            [train[number] for number in batch]
            for step in range(learner.step, order.total_steps)
            for batch in order.batches(step, config.train_batch_size)
        )
        with (
            open_recorder(learner, record, settings, sizes, shown=SHOWN, title="SFT") as recorder,
            closing(packed_batches(learner, batches, encoder, lengths, num_workers=workers)) as rows_of_batches,
        ):
            saves = Checkpoints(learner, record, order)
            show_overview(recorder.console, learner, order, model)
            eval_every = config.eval_steps or order.steps_per_epoch
            stop.arm()
            while learner.step < order.total_steps:
                num_batches = len(order.batches(learner.step, config.train_batch_size))
                started = time.perf_counter()
                rows = [row for batch in islice(rows_of_batches, num_batches) for row in batch]
                waited = time.perf_counter() - started
                metrics = train_step(learner, rows) if rows else {}
                metrics |= timing(rows, waited=waited, seconds=time.perf_counter() - started)
                learner.step += 1
                metrics["epoch"] = order.epoch(learner.step)
                if held_out and is_due(learner, eval_every):
                    metrics["eval/loss"] = evaluation_loss(learner, held_out, encoder, lengths, num_workers=workers)
                metrics |= lengths.metrics
                close_step(learner, recorder, metrics, saves, stop)
        lengths.show()
        return save_final(learner, record, stop)


def packed_batches(
    learner: Learner,
    batches: Iterable[Sequence[Sample]],
    encoder: Encoder,
    lengths: LengthReport,
    *,
    num_workers: int,
) -> Generator[list[PackedBatch]]:
    """The packed rows of each batch, prepared ahead by the workers; samples that are too long are noted."""
    with closing(
        prepare_batches(
            encoder,
            batches,
            join=Packer(max_tokens_per_row=learner.max_tokens_per_row),
            num_workers=num_workers,
            where=attrgetter("where"),
            pin_memory=learner.base.device.type == "cuda",
        )
    ) as batches_of_rows:
        for rows, refits in batches_of_rows:
            lengths.note(refits)
            yield rows


def train_step(learner: Learner, rows: Sequence[PackedBatch]) -> dict[str, float]:
    """One optimizer step on the mean loss per trained token of all its samples, whatever the rows."""
    num_loss_tokens = sum(row.num_loss_tokens for row in rows)
    update = learner.update(rows, lambda scores, row: -scores.logprobs.sum() / num_loss_tokens, summed=True)
    splits = {"memory/row_splits": float(update.num_splits)} if update.num_splits else {}
    return splits | {
        "loss": update.loss,
        "optim/grad_norm": update.grad_norm,
        "optim/lr": learner.optimizer.param_groups[0]["lr"],
    }


def timing(rows: Sequence[PackedBatch], *, waited: float, seconds: float) -> dict[str, float]:
    """How fast a step was that took `seconds`, of which it `waited` for its rows."""
    return {
        "perf/tokens_per_s": sum(row.num_tokens for row in rows) / seconds,
        "time/step_s": seconds,
        "time/data_wait_share": waited / seconds,
    }


@torch.no_grad()
def evaluation_loss(
    learner: Learner, samples: Sequence[Sample], encoder: Encoder, lengths: LengthReport, *, num_workers: int
) -> float:
    """Mean negative logprob per trained token over all samples, in eval mode; those too long are noted."""
    learner.model.eval()
    total, num_tokens = 0.0, 0
    size = learner.config.train_batch_size
    batches = (samples[first : first + size] for first in range(0, len(samples), size))
    with closing(packed_batches(learner, batches, encoder, lengths, num_workers=num_workers)) as rows_of_batches:
        for row in chain.from_iterable(rows_of_batches):
            total -= float(learner.score(row, summed=True).logprobs)
            num_tokens += row.num_loss_tokens
    return total / num_tokens
