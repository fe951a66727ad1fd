"""The steps of a run on a model without memory, by the trainer's and the engine's own code.

A rehearsal gives what was alive at each moment of an update, and of the rollouts or the answer before it. Nothing is
known of values, so every number reads as 1 (`planning/fakes.py`).
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch

from looktwice.config import GRPOConfig, ModelConfig, SFTConfig, StageConfig
from looktwice.data.sample import Sample
from looktwice.engine.builtin import BuiltinEngine
from looktwice.engine.interface import Continuation, Request, Segment
from looktwice.engine.state import Sequence
from looktwice.messages import Conversation
from looktwice.model.adapters import merged
from looktwice.model.configuration import Ovis2_5Config
from looktwice.model.modeling import Ovis2_5ForConditionalGeneration
from looktwice.planning.fakes import chunks_of_a_gpu, fake_model, faking, guessing
from looktwice.planning.live_bytes import Moments, Trace
from looktwice.planning.samples import group_of, sample_of
from looktwice.processing.packing import pack
from looktwice.processing.processor import Example
from looktwice.rewards import Reward
from looktwice.rollout.trajectory import Trajectory
from looktwice.training.distributed import World
from looktwice.training.learner import Learner
from looktwice.training.policy import update_policy
from looktwice.training.rollouts import Rollout
from looktwice.training.sft import train_step
from looktwice.training.trainable import compute_dtype, made_trainable

NUM_PLAYED, NUM_SAMPLED = 2, 2
"""Rollouts that are computed, and ids that each samples: they show a pass that is full of prompts, and one of ids."""
Where = Literal["gpu", "cpu", "real"]
"""Without memory, as beside a GPU or on a CPU; or real tensors on a CPU, which the others are checked against."""


@dataclass(frozen=True)
class Load:
    """What a rehearsed step has to bear: `tokens` of a row or question, with pictures of `image_tokens` visual tokens;
    in R-GRPO `rollouts` that live at a time, of `rollout_tokens` each at their end, and `siblings` in a row that share
    its prompt."""

    tokens: int
    image_tokens: int
    rollouts: int = 16
    rollout_tokens: int = 3072
    siblings: int = 2


def answer(config: Ovis2_5Config, model: ModelConfig, load: Load, on: Where = "gpu") -> list[Moments]:
    """A question of so many tokens, read and begun to be answered, in bfloat16."""
    with rehearsed(on) as trace:
        with trace.making("weights"):
            base = model_of(config, torch.bfloat16, model, on).eval()
        watch(trace, base)
        play(trace, base, load, tokens=load.tokens, num_rollouts=1)
    return trace.sections()


def sft(config: Ovis2_5Config, model: ModelConfig, stage: SFTConfig, load: Load, on: Where = "gpu") -> list[Moments]:
    """An update of stage 1 after others, on a row that comes after another one."""
    with rehearsed(on) as trace:
        learner = learner_of(trace, config, model, stage, on)
        row = sample_of(config, load.tokens, load.image_tokens)
        train_step(learner, [pack([row])] * num_rows(on))
        note(trace, learner)
    return trace.sections()


def grpo(config: Ovis2_5Config, model: ModelConfig, stage: GRPOConfig, load: Load, on: Where = "gpu") -> list[Moments]:
    """A step of stage 2 after others: rollouts, and an update on a group that fills a row and comes after another."""
    stage = stage.model_copy(update={"max_tokens_per_row": load.tokens})
    with rehearsed(on) as trace:
        learner = learner_of(trace, config, model, stage, on)
        reference = learner.freeze_reference() if stage.beta > 0 else None
        if reference:
            trace.call("adapters" if stage.use_lora else "weights", reference.frozen)
        learner.optimizer.zero_grad(set_to_none=True)  # as a step ends: rollouts need none
        with learner.precision(), ExitStack() as stack:
            with trace.making("weights"):
                stack.enter_context(merged(learner.base))
            play(trace, learner.base, load, tokens=load.rollout_tokens, num_rollouts=load.rollouts)
        groups = [group_of(config, load.tokens, load.image_tokens, load.siblings) for _ in range(num_rows(on))]
        with learner.images_kept():
            update_policy(learner, [[rollout_of(one) for one in group] for group in groups], stage, reference)
        note(trace, learner)
    return trace.sections()


@contextmanager
def rehearsed(on: Where) -> Iterator[Trace]:
    """A trace of what happens inside, where what nobody holds goes at once or not at all, as it happens to in a run."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        with chunks_of_a_gpu() if on == "gpu" else nullcontext(), Trace() as trace, guessing():
            yield trace
    finally:
        if was_enabled:
            gc.enable()


def model_of(
    config: Ovis2_5Config, dtype: torch.dtype, model: ModelConfig, on: Where
) -> Ovis2_5ForConditionalGeneration:
    if on == "real":
        return Ovis2_5ForConditionalGeneration._from_config(
            copy.deepcopy(config), dtype=dtype, attn_implementation="sdpa"
        )
    with faking():
        return fake_model(config, dtype=dtype, quantization=model.quantization)


def learner_of(trace: Trace, config: Ovis2_5Config, model: ModelConfig, stage: StageConfig, on: Where) -> Learner:
    """The learner as `Learner.load` makes it, with an optimizer that has its state."""
    dtype = compute_dtype(stage) if stage.use_lora else torch.float32
    with trace.making("weights"):
        base = model_of(config, dtype, model, on)
        with trace.making("adapters"), nullcontext() if on == "real" else faking():
            network = made_trainable(base, stage, is_on_gpu=on == "gpu")
    # a config alone has no tokenizer, and an update needs none
    learner = Learner(network, cast(Any, None), stage, total_steps=2, world=Alone(trace))
    leave_gradients(trace, learner)
    learner.optimizer.step()
    if num_rows(on) == 1:
        learner.base.register_forward_pre_hook(lambda *_: leave_gradients(trace, learner))
    watch(trace, learner.base)
    trace.section()
    learner.optimizer.register_step_pre_hook(lambda *_: trace.section())
    return learner


def num_rows(on: Where) -> int:
    """Rows of an update. Without memory the first one is spared, and what it leaves is put there."""
    return 2 if on == "real" else 1


def leave_gradients(trace: Trace, learner: Learner) -> None:
    """Have gradients where there are none, as a row before, or the last update, leaves them."""
    with trace.making("gradients"):
        for weight in learner.parameters:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)


def watch(trace: Trace, base: Ovis2_5ForConditionalGeneration) -> None:
    """Begin a section with each forward, and have what the vision side makes called so."""
    places = [base.model.visual_tokenizer.vit]
    kinds: list[Any] = []

    def begin(*_: Any) -> None:
        kinds.append(trace.kind)
        trace.kind = "pictures"

    def end(*_: Any) -> None:
        trace.kind = kinds.pop()

    for module in places:
        module.register_forward_pre_hook(begin)
        module.register_forward_hook(end)
    base.register_forward_pre_hook(lambda *_: trace.section())
    base.register_forward_hook(lambda *_: trace.section())


def note(trace: Trace, learner: Learner) -> None:
    """Say what the gradients and the optimizer's state are, after an update."""
    trace.call("gradients", (weight.grad for weight in learner.parameters))
    for state in learner.optimizer.state.values():
        trace.call("optimizer", (value for value in state.values() if isinstance(value, torch.Tensor)))


class Alone(World):
    """One process, which begins a section where several would wait for each other: between backward and update."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace

    def at(self, place: str, step: int) -> None:
        self.trace.section()


class Quiet:
    """A driver that lets its rollout end after its first segment."""

    def hear(self, token: int, logprob: float) -> None: ...

    def respond(self, segment: Segment) -> Continuation | None:
        return None

    def fail(self, error: Exception) -> None:
        raise error


def play(trace: Trace, base: Ovis2_5ForConditionalGeneration, load: Load, *, tokens: int, num_rollouts: int) -> None:
    """Rollouts at their full length of so many tokens in the cache. Two of them read their prompts and sample two ids;
    the others only hold their pages."""
    engine = BuiltinEngine(base, max_rows=num_rollouts, cache_tokens=num_rollouts * tokens)
    num_played = min(NUM_PLAYED, num_rollouts)
    for _ in range(num_rollouts - num_played):
        engine.cache.reserve(Sequence(), tokens)
    for _ in range(num_played):
        prompt = sample_of(cast(Ovis2_5Config, base.config), tokens - NUM_SAMPLED, load.image_tokens)
        engine.submit(Request(prompt=prompt, drivers=[Quiet()], max_new_tokens=NUM_SAMPLED))
    with engine.ready():
        trace.section()
        while engine.step():
            trace.call("cache", (*engine.cache.keys, *engine.cache.values))
            trace.section()


def rollout_of(example: Example) -> Rollout:
    marks = example.loss_mask
    trajectory = Trajectory(
        prompt_ids=[], is_sampled=marks, sampling_logprobs=[-1.0] * len(marks), drawn_logprobs=[-1.0] * len(marks)
    )
    sample = Sample(conversation=Conversation(messages=()), where="", field="")
    return Rollout(
        example=example, trajectory=trajectory, sample=sample, reward=Reward(total=1.0), advantage=1.0, seed=0
    )
