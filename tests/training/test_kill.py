"""A run that is killed at random moments, saving included, and goes on ends as one that was left alone, bit for bit."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

NURSERY = """
import json, os, signal, sys, traceback
from torch.utils.tensorboard import SummaryWriter
from looktwice.config import DataConfig, GRPOConfig, ModelConfig, SFTConfig
from looktwice.training.grpo import train_grpo
from looktwice.training.sft import train_sft

EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.scandir", "os.listdir", "os.truncate"}

def run(stage, folder, kill_at, model, data, settings):
    seen = 0

    def count(event, arguments):
        nonlocal seen
        if event in EVENTS and folder in str(arguments[0]):
            seen += 1
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    if stage == "sft":
        train_sft(ModelConfig(**model), DataConfig(**data), SFTConfig(output_dir=folder, **settings))
    else:
        model.pop("model_name")
        train_grpo(ModelConfig(**model), DataConfig(**data), GRPOConfig(output_dir=folder, **settings))
    return seen

for line in sys.stdin:
    read_end, write_end = os.pipe()
    child = os.fork()
    if not child:
        told = os.fdopen(os.dup(1), "w")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        try:
            answer = run(**json.loads(line))
        except BaseException:
            answer = traceback.format_exc()
        print(json.dumps(answer), file=told, flush=True)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status:
        print(json.dumps(None if os.WTERMSIG(status) == signal.SIGKILL else f"status {status}"), flush=True)
os._exit(0)  # nothing to tidy up, which takes seconds
"""
"""Runs in forks of a process that has imported everything; says how many operations on files in its folder a run took,
null where it was killed before one of them, or what went wrong."""

Run = Callable[..., int | None]


@pytest.fixture(scope="module")
def few(dataset, tmp_path_factory) -> Path:
    """Two of the samples to train on."""
    path = tmp_path_factory.mktemp("few") / "train.jsonl"
    path.write_text("".join(dataset.train.read_text().splitlines(keepends=True)[:2]))
    return path


@pytest.fixture(scope="module")
def nursery() -> Iterator[subprocess.Popen[str]]:
    options: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", NURSERY], env={**os.environ, "OMP_NUM_THREADS": "1"}, **options) as it:
        yield it
        assert it.stdin
        it.stdin.close()


@pytest.fixture
def run(nursery, model_folder, dataset, few) -> Run:
    """Trains in a process of its own; None when that was killed."""

    def go(stage: str, folder: Path, *, kill_at: int = 0, **settings: Any) -> int | None:
        data = {"train_data_path": str(few if stage == "sft" else dataset.rl)}
        data |= {"val_data_path": str(few)} if stage == "sft" else {}
        data["image_base_path"] = str(dataset.train.parent)
        order = {"stage": stage, "folder": str(folder), "kill_at": kill_at, "data": data, "settings": settings}
        order["model"] = {"model_name": str(model_folder), "device": "cpu"}
        nursery.stdin.write(json.dumps(order) + "\n")
        nursery.stdin.flush()
        answer = json.loads(nursery.stdout.readline())
        assert not isinstance(answer, str), answer
        return answer

    return go


def curve(folder: Path) -> list[dict[str, float]]:
    """The lines of the log without what a clock says, and without what is looked at once in each process."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if not name.startswith(("time/", "perf/", "canary/"))}
        for line in lines
    ]


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "final_model").glob("*.safetensors")}


def points(folder: Path) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    scalars = EventAccumulator(str(folder / "tensorboard")).Reload().Scalars("loss")
    return [(point.step, point.value) for point in scalars]


def survive(run: Run, tmp_path: Path, stage: str, settings: dict[str, Any], *, kills: int, seed: int) -> None:
    """Runs that are killed so many times in all, each until it has come to its end, are as one that was not."""
    whole = run(stage, tmp_path / "whole", **settings)
    assert whole is not None and whole > 20
    draw, killed, number = random.Random(seed), 0, 0
    while killed < kills:
        folder, ended = tmp_path / f"run-{number}", None
        while ended is None:
            is_begun = any(folder.glob("checkpoint-*"))
            how = {"resume_from_checkpoint": "latest"} if is_begun else {"overwrite": True}
            kill_at = draw.randrange(1, whole) if killed < kills else 0
            ended = run(stage, folder, kill_at=kill_at, **settings, **how)
            killed += ended is None
        assert curve(folder) == curve(tmp_path / "whole")
        assert weights(folder) == weights(tmp_path / "whole")
        assert points(folder) == points(tmp_path / "whole")
        assert not list(folder.glob(".*unfinished"))
        number += 1


SFT = {"num_train_epochs": 2, "train_batch_size": 1, "learning_rate": 1e-3, "deterministic": True}
SFT |= {"save_steps": 2, "eval_steps": 3, "save_total_limit": 1}  # over 4 steps, of which the last is saved by itself
LORA = {"use_lora": True, "lora_r": 4, "lora_dropout": 0.1}


@pytest.mark.parametrize(("settings", "kills", "seed"), [(LORA, 12, 1), ({}, 4, 2)])
def test_sft_survives_being_killed(settings, kills, seed, run, tmp_path) -> None:
    survive(run, tmp_path, "sft", {**SFT, **settings}, kills=kills, seed=seed)


AHEAD = {"one_step_off": True, "max_steps": 4, "save_steps": 2}


@pytest.mark.parametrize(("settings", "kills", "seed"), [(LORA, 4, 3), (AHEAD, 3, 5)])
def test_grpo_survives_being_killed(settings, kills, seed, run, model_folder, tmp_path) -> None:
    common = {"sft_checkpoint_path": str(model_folder), "max_steps": 2, "train_batch_size": 1, "num_generations": 2}
    common |= {"max_new_tokens": 8, "max_turns": 2, "learning_rate": 1e-3, "deterministic": True, "save_steps": 1}
    common |= {"drop_constant_groups": False, "mask_truncated_completions": False, "beta": 0.1}
    survive(run, tmp_path, "grpo", {**common, **settings}, kills=kills, seed=seed)


def test_a_run_that_is_left_alone_is_no_kill(run, tmp_path) -> None:
    """The moments are counted: the first comes before anything is there."""
    assert run("sft", tmp_path / "run", kill_at=1, **SFT) is None
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
