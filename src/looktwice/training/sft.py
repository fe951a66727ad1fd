"""Stage 1: supervised fine-tuning on look-twice rationales. Reads top to bottom."""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from itertools import islice
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
from looktwice.training.distributed import World
from looktwice.training.join import joined
from looktwice.training.learner import Learner
from looktwice.training.run import (
    batch_order,
    begin,
    close_step,
    held,
    is_due,
    load_alike,
    planned,
    recorded,
    save_final,
    tell_finished,
)
from looktwice.training.sets import LengthReport, begin_report, load_sets
from looktwice.training.shares import Shares, own_share

WORKERS_BESIDE_A_GPU = 4
SHOWN = ("loss", "eval/loss", "optim/lr", "perf/tokens_per_s")


def train_sft(model: ModelConfig, data: DataConfig, config: SFTConfig) -> Path:
    """Fine-tune and give back the folder of the final model. Everything a user can get wrong is checked first.

    Under torchrun every process calls this, and rank 0 alone writes and shows.
    """
    with joined(model, config) as world:
        return train_in(world, model, data, config)


def train_in(world: World, model: ModelConfig, data: DataConfig, config: SFTConfig) -> Path:
    """`train_sft` as one of the processes of a world."""
    # a CPU has no time to spare for them
    default = 0 if pick_device(model.device) == "cpu" else min(WORKERS_BESIDE_A_GPU, os.cpu_count() or 1)
    workers = default if config.num_workers is None else config.num_workers
    if workers:
        warm_up()
    processor = load_processor(model.model_name, data)
    train, held_out, refits, sizes = load_sets(data, processor, "sft")
    order = batch_order(sizes, config, data.train_weights)
    settings = (model, data, config)
    with held(world, config) as stop:
        record = world.from_main(lambda: planned("sft", settings, order, model.model_name))
        if record.is_over:
            return tell_finished(record, settings)
        learner = load_alike(model.model_name, settings, processor, order, world)
        record = begin(learner, record, settings, order)
        lengths = begin_report(config, world, refits)
        encoder = Encoder(processor=processor, max_length=data.max_length, length_policy=data.length_policy)
        shares = Shares(train, order, processor, world, batch_size=config.train_batch_size)
        batches = (
            [train[number] for number in batch]
            for step in range(learner.step, order.total_steps)
            for batch in shares.batches(step)
        )
        with (
            recorded(learner, record, settings, order, sizes, shown=SHOWN, title="SFT") as recorder,
            closing(packed_batches(learner, batches, encoder, lengths, num_workers=workers)) as rows_of_batches,
        ):
            saves = Checkpoints(learner, record, order)
            eval_every = config.eval_steps or order.steps_per_epoch
            stop.arm()
            while learner.step < order.total_steps:
                world.at("data", learner.step + 1)
                num_batches = len(shares.batches(learner.step))
                started = time.perf_counter()
                rows = [row for batch in islice(rows_of_batches, num_batches) for row in batch]
                waited = time.perf_counter() - started
                metrics = train_step(learner, rows)
                num_tokens, waited = world.sum(sum(row.num_tokens for row in rows), waited)
                metrics |= timing(num_tokens, waited=waited / world.size, seconds=time.perf_counter() - started)
                learner.step += 1
                metrics["epoch"] = order.epoch(learner.step)
                if held_out and is_due(learner, eval_every):
                    metrics["eval/loss"] = evaluation_loss(learner, held_out, encoder, lengths, num_workers=workers)
                lengths.collect()
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
    """One optimizer step on the mean loss per trained token of all its samples, whatever the rows.

    `rows` are those of this process; where no process has any, nothing is done and nothing to log.
    """
    num_rows, num_loss_tokens = learner.world.sum(len(rows), sum(row.num_loss_tokens for row in rows))
    if not num_rows:
        return {}
    learner.world.at("rows", learner.step + 1)
    update = learner.update(rows, lambda scores, row: -scores.logprobs.sum() / num_loss_tokens, summed=True)
    splits = {"memory/row_splits": float(update.num_splits)} if update.num_splits else {}
    return splits | {
        "loss": update.loss,
        "optim/grad_norm": update.grad_norm,
        "optim/lr": learner.optimizer.param_groups[0]["lr"],
    }


def timing(num_tokens: float, *, waited: float, seconds: float) -> dict[str, float]:
    """How fast a step was that took `seconds`, of which it `waited` for its rows."""
    return {
        "perf/tokens_per_s": num_tokens / seconds,
        "time/step_s": seconds,
        "time/data_wait_share": waited / seconds,
    }


@torch.no_grad()
def evaluation_loss(
    learner: Learner, samples: Sequence[Sample], encoder: Encoder, lengths: LengthReport, *, num_workers: int
) -> float:
    """Mean negative logprob per trained token over all samples, in eval mode; those too long are noted."""
    learner.model.eval()
    world, total, num_tokens = learner.world, 0.0, 0.0
    size = learner.config.train_batch_size * world.size
    batches = (
        own_share(samples[first : first + size], learner.processor, world) for first in range(0, len(samples), size)
    )
    with closing(packed_batches(learner, batches, encoder, lengths, num_workers=num_workers)) as rows_of_batches:
        world.at("data of the evaluation", learner.step)
        for rows in rows_of_batches:
            world.at("rows of the evaluation", learner.step)
            for row in world.even(rows, learner.step):
                total -= float(learner.score(row, summed=True).logprobs)
                num_tokens += row.num_loss_tokens
            world.at("data of the evaluation", learner.step)
    total, num_tokens = world.sum(total, num_tokens)
    return total / num_tokens
