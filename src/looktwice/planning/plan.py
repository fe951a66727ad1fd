"""What fits on a GPU: the peaks of all ways to run a model, and settings for the largest GPU memory that is there.

Sizes in GB are 10^9 bytes. A card sold as 24 GB has 24 * 2^30 bytes, 7 % more, which are left to CUDA and its
allocator.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from looktwice.config import GRPOConfig, ModelConfig, PlanConfig, SFTConfig
from looktwice.errors import CheckpointError
from looktwice.model.configuration import Ovis2_5Config
from looktwice.model.location import CONFIG, adapter_base, local_adapter, locate
from looktwice.planning.layers import Peak, few_layers, whole_peak
from looktwice.planning.live_bytes import Moments
from looktwice.planning.rehearsal import Load, answer, grpo, sft
from looktwice.processing.image_processor import read_settings

T = TypeVar("T")
Task = Literal["inference", "sft", "grpo"]
STAGES: tuple[Task, ...] = ("sft", "grpo")
MOST_TOKENS = 16384
"""Of a row; more are no faster on a GPU (`training/rows.py`)."""
STEP = 512
"""Budgets of rows are multiples of it."""
ROLLOUTS = (16, 8, 4, 2)
MOST_PROCESSES = 4


@dataclass(frozen=True)
class Method:
    """A way to train: its name, and what it sets."""

    name: str
    settings: tuple[tuple[str, Any], ...] = ()
    quantization: Literal["none", "nf4"] = "none"

    @property
    def given(self) -> dict[str, Any]:
        """The settings by name."""
        return dict(self.settings)


def lora(rank: int, **others: Any) -> tuple[tuple[str, Any], ...]:
    """Settings of LoRA of a rank."""
    return (("use_lora", True), ("lora_r", rank), ("lora_alpha", 2 * rank), *others.items())


FULL = Method("full")
LORA = {rank: Method(f"LoRA r={rank}", lora(rank)) for rank in (128, 64, 32)}
QLORA = Method("QLoRA r=64", lora(64), "nf4")
SMALL_LORA = Method("LoRA r=32, 8-bit AdamW", lora(32, optim="adamw_8bit"))
SMALL_QLORA = Method("QLoRA r=32, 8-bit AdamW", lora(32, optim="adamw_8bit"), "nf4")
SHOWN = (*LORA.values(), QLORA, FULL)
BY_CHOICE = (FULL, *LORA.values(), SMALL_LORA, QLORA, SMALL_QLORA)
"""What is proposed, if it fits: the first of them."""
COMMON: dict[str, Any] = {"bf16": True, "gradient_checkpointing": "all"}


class Case(NamedTuple):
    """What is measured. An answer has no method."""

    task: Task
    method: Method | None
    load: Load


@dataclass(frozen=True)
class Documented:
    """A row of the documented memory table: GB on one GPU, where `or_more` at the least."""

    task: Task
    method: Method | None
    gigabytes: int
    or_more: bool = False


DOCUMENTED = (
    Documented("inference", None, 18),
    Documented("sft", LORA[128], 28),
    Documented("sft", LORA[64], 24),
    Documented("sft", LORA[32], 20),
    Documented("sft", FULL, 40, or_more=True),
)


def is_documented(config: Ovis2_5Config) -> bool:
    """Whether the documented table is of a model of this size: Ovis2.5-9B."""
    return (config.llm_config.hidden_size, config.llm_config.num_hidden_layers) == (4096, 36)


@dataclass(frozen=True)
class Proposal:
    """Settings that fit, by config class as `looktwice train --config` reads them, and the peak of each stage."""

    method: Method
    peaks: dict[Task, Peak]
    settings: dict[str, dict[str, Any]]


class Planner:
    """Peaks of one model, each measured once. Rehearsals run in the processes of `executor`, here without one."""

    def __init__(self, config: Ovis2_5Config, load: Load, executor: Executor | None = None) -> None:
        self.config, self.load, self.executor = config, load, executor
        self.begun: dict[Case, list[Future[list[Moments]]]] = {}
        self.known: dict[Case, Peak] = {}

    def begin(self, case: Case) -> None:
        """Have it measured, if it is not yet."""
        if case not in self.begun:
            rehearse = rehearsal_of(case)
            submit = self.executor.submit if self.executor else _at_once
            self.begun[case] = [submit(rehearse, small) for small in few_layers(self.config)]

    def begin_all(self) -> list[Case]:
        """What a plan shows, all of it begun; and the one that is asked for beside it."""
        shown = [Case(task, method, self.load) for task in STAGES for method in SHOWN]
        shown = [Case("inference", None, self.load), *shown]
        for case in [*shown, Case("sft", SMALL_LORA, self.load)]:
            self.begin(case)
        return shown

    def peak(self, task: Task, method: Method | None, load: Load | None = None) -> Peak:
        """The fullest moment of an answer, or of a step of a stage."""
        case = Case(task, method, load or self.load)
        if case not in self.known:
            self.begin(case)
            self.known[case] = whole_peak(self.config, [run.result() for run in self.begun[case]])
        return self.known[case]

    def proposal(self, tasks: Sequence[Task], num_bytes: int) -> Proposal | None:
        """The first method of `BY_CHOICE` whose steps of all these stages fit, with rows as long as fit too."""
        for method in BY_CHOICE:
            loads = {task: load for task in tasks if (load := self.largest(task, method, num_bytes))}
            if len(loads) == len(tasks):
                peaks = {task: self.peak(task, method, load) for task, load in loads.items()}
                return Proposal(method, peaks, settings_of(method, loads))
        return None

    def largest(self, task: Task, method: Method, num_bytes: int) -> Load | None:
        """The most rollouts, then the longest rows, with which a step fits; None where none does.

        The peak bends upwards with the tokens, if at all: what a straight line from the shortest to the longest row
        says of a row between them is enough for it.
        """
        least = self.with_fewer_rollouts(task, method, num_bytes)
        if least is None:
            return None
        most = replace(least, tokens=max(MOST_TOKENS, least.tokens))
        low, high = (self.peak(task, method, load).total for load in (least, most))
        if high <= num_bytes:
            return most
        room = (num_bytes - low) * (most.tokens - least.tokens) // (high - low)
        between = replace(least, tokens=(least.tokens + room) // STEP * STEP)
        is_better = between.tokens > least.tokens and self.peak(task, method, between).total <= num_bytes
        return between if is_better else least

    def with_fewer_rollouts(self, task: Task, method: Method, num_bytes: int) -> Load | None:
        """The least load, with as many rollouts at a time as fit."""
        peak = self.peak(task, method)
        if peak.total <= num_bytes:
            return self.load
        for count in ROLLOUTS:
            spared = peak.parts["cache"] * (self.load.rollouts - count) // self.load.rollouts
            if spared > 0 and peak.total - spared <= num_bytes:
                fewer = replace(self.load, rollouts=count)
                return fewer if self.peak(task, method, fewer).total <= num_bytes else None
        return None


def rehearsal_of(case: Case) -> Callable[[Ovis2_5Config], list[Moments]]:
    """What gives the moments of a case for a model of any size."""
    task, method, load = case
    model = ModelConfig(quantization=method.quantization if method else "none")
    if task == "inference":
        return partial(answer, model=model, load=load)
    assert method is not None
    if task == "sft":
        return partial(sft, model=model, stage=SFTConfig(**COMMON, **method.given), load=load)
    return partial(grpo, model=model, stage=GRPOConfig(**COMMON, **method.given), load=load)


def _at_once(function: Callable[..., T], *arguments: Any) -> Future[T]:
    found: Future[T] = Future()
    found.set_result(function(*arguments))
    return found


def processes() -> ProcessPoolExecutor | None:
    """Processes for rehearsals, which are Python at work and nothing else; None where there is one core."""
    number = min(MOST_PROCESSES, os.cpu_count() or 1)
    if number == 1:
        return None
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["looktwice.planning.rehearsal"])
    return ProcessPoolExecutor(number, mp_context=context)


def settings_of(method: Method, loads: dict[Task, Load]) -> dict[str, dict[str, Any]]:
    """What `looktwice train --config` is to be given."""
    classes = {"sft": "SFTConfig", "grpo": "GRPOConfig"}
    settings: dict[str, dict[str, Any]] = {"ModelConfig": {"quantization": method.quantization}}
    for task, load in loads.items():
        own = {**COMMON, **method.given, "max_tokens_per_row": load.tokens}
        if task == "grpo":
            own |= {"rollout_batch_size": load.rollouts, "cache_tokens": load.rollouts * load.rollout_tokens}
        settings[classes[task]] = own
    return settings


def load_of(plan: PlanConfig, config: Ovis2_5Config, folder: str) -> Load:
    """The least that a step has to bear: the settings, and pictures as large as the model's folder allows them."""
    max_pixels = plan.max_pixels or read_settings(folder)[0].image_max_pixels
    return Load(
        tokens=plan.max_tokens_per_row,
        image_tokens=max(1, max_pixels // config.vit_config.factor**2),
        rollouts=plan.rollout_batch_size,
        rollout_tokens=plan.rollout_tokens,
    )


def config_of(name: str) -> tuple[Ovis2_5Config, str]:
    """The config of a model, of which nothing else has to be there, and where it was found; of an adapter its base's.

    Raises CheckpointError where there is none.
    """
    folder = name if (Path(name) / CONFIG).is_file() else locate(name)
    if (adapter := local_adapter(folder)) is not None:
        return config_of(adapter_base(adapter))
    try:
        fields, _ = Ovis2_5Config.get_config_dict(folder)
        if "llm_config" not in fields:
            raise CheckpointError(f"{name}: config.json has no llm_config, so this is not an Ovis2.5 model")
        return Ovis2_5Config.from_pretrained(folder), folder
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{name}: its config.json cannot be read ({error})") from error
