"""What a saved folder holds of a learner, so that training goes on exactly from there."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from looktwice.errors import CheckpointError
from looktwice.model.adapters import part_of, trained_parameters
from looktwice.model.quantization import quantization_of
from looktwice.model.weights import load_trained, write_model
from looktwice.training.folder import STATE_FILE
from looktwice.training.learner import Learner
from looktwice.training.moments import placed_moments, read_moments
from looktwice.training.optimizers import BITSANDBYTES
from looktwice.training.randomness import random_state, restore_random_state
from looktwice.training.record import Record
from looktwice.training.watchdog import SAVING

ROW_LIMITS = ("max_tokens_per_row", "max_sibling_tokens", "tokens_that_fit")
"""What a run finds out of the memory at hand, and keeps when it goes on: how long rows are decides bits."""


def save(learner: Learner, folder: Path, record: Record, *, with_optimizer: bool, card: str | None = None) -> None:
    """Write model, processor and the run's record, and a model card if there is one; with the optimizer's state,
    training can go on from there.

    Raises CheckpointError when the folder cannot be written.
    """
    world = learner.world
    world.at(SAVING, learner.step)
    weights = world.weights(learner.model)
    with world.written_whole(folder) as draft:
        moments = world.moments(learner.optimizer, learner.names, draft) if with_optimizer else None
        if not world.is_main:
            return
        write_model(learner.model, draft, weights=weights)
        learner.processor.save_pretrained(draft)
        if with_optimizer:
            state = {
                "step": learner.step,
                "optimizer": moments,
                "trained": trained(learner),
                "random": random_state(),
                "skipped": (learner.guard.in_a_row, learner.guard.num_skipped),
                "scaler": learner.scaler.state_dict(),
                "overflows": learner.num_overflows,
                "has_learnt": learner.has_learnt,
                "rows": {name: vars(learner).get(name) for name in ROW_LIMITS},
            }
            try:
                with (draft / STATE_FILE).open("wb") as file:
                    torch.save(state, file)
            except RuntimeError as error:  # what torch makes of a full disk
                raise error.__context__ if isinstance(error.__context__, OSError) else OSError(error) from error
        if card is not None:
            (draft / "README.md").write_text(card, encoding="utf-8")
        record.write(draft, step=learner.step)


def resume(learner: Learner, folder: Path) -> None:
    """Go on from a checkpoint: its trained weights, optimizer state and step, under the present learning rates and
    weight decay.

    What was frozen before, such as the KL reference, stays as it is. Raises CheckpointError, before anything is
    changed, when the checkpoint is broken or this run trains something else.
    """
    path = folder / STATE_FILE
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        step, moments, saved = (state[name] for name in ("step", "optimizer", "trained"))
        random, skipped, scaler, limits = (state[name] for name in ("random", "skipped", "scaler", "rows"))
    except (OSError, EOFError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path}: no usable state; resume from another checkpoint ({error})") from error
    if saved.get("start") != learner.start:
        raise CheckpointError(
            f"{folder}: its run started from another model; name that one to go on, or give another run folder"
        )
    if difference := first_difference(saved, trained(learner)):
        other = f"or start another run from its weights: --model_name {folder}"
        raise CheckpointError(f"{folder}: {difference}; resume with the same settings, {other}")
    if moments is None:
        moments = read_moments(folder, learner.optimizer, learner.names)
    load_trained(learner.model, folder)
    present = [{name: group[name] for name in ("peak_lr", "weight_decay")} for group in learner.optimizer.param_groups]
    learner.optimizer.load_state_dict(placed_moments(moments, learner.optimizer))
    for group, settings in zip(learner.optimizer.param_groups, present):
        group |= settings
    learner.step = step
    learner.guard.in_a_row, learner.guard.num_skipped = skipped
    learner.num_overflows = state.get("overflows", 0)
    learner.has_learnt = state.get("has_learnt", bool(learner.optimizer.state))
    is_given = learner.config.max_tokens_per_row is not None or learner.config.memory_efficient
    kept = ROW_LIMITS[-1:] if is_given else ROW_LIMITS
    vars(learner).update({name: limits[name] for name in kept if limits.get(name) is not None})
    if scaler:  # of a run in fp16
        learner.scaler.load_state_dict(scaler)
    restore_random_state(random)


def trained(learner: Learner) -> dict[str, Any]:
    """What a checkpoint must have in common with the run that goes on from it: the weights it started from,
    settings, then shapes by name."""
    facts: dict[str, Any] = {"start": learner.start, "use_lora": isinstance(learner.model, PeftModel)}
    if isinstance(learner.model, PeftModel):
        adapter: Any = learner.model.peft_config[learner.model.active_adapter]
        facts |= {"lora_r": adapter.r, "lora_alpha": adapter.lora_alpha, "use_rslora": adapter.use_rslora}
    facts["quantization"] = quantization_of(learner.base)
    facts["optim"] = learner.config.optim if learner.config.optim in BITSANDBYTES else "adamw"
    return facts | {name: list(parameter.shape) for name, parameter in trained_parameters(learner.model)}


def first_difference(saved: dict[str, Any], present: dict[str, Any]) -> str | None:
    """What a checkpoint has otherwise than the run that is to go on from it, if anything: a fact, else the parts that
    are trained in one of them alone, else a weight."""
    names = [name for name in present | saved if saved.get(name) != present.get(name)]
    weights = [[name for name, fact in facts.items() if isinstance(fact, list)] for facts in (saved, present)]
    was, now = ({part_of(name) for name in there} for there in weights)
    if was != now and {*names} <= {*weights[0], *weights[1]}:
        told = [*(f"{part} was trained and is frozen" for part in sorted(was - now))]
        told += [f"{part} was frozen and is trained" for part in sorted(now - was)]
        return ", ".join(told)
    if not names:
        return None
    before, here = ("not trained" if facts.get(names[0]) is None else facts[names[0]] for facts in (saved, present))
    return f"{names[0]} was {before} and is {here}"
