"""What plays the episodes of a run: servers that are asked once, and what is left of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.training.scripted import paid

from looktwice.engine.builtin import BuiltinEngine
from looktwice.formats.sample_file import read_samples
from looktwice.training.distributed import World
from looktwice.training.rollouts import roll_out
from looktwice.training.sampler import SERVED_WEIGHTS, Sampler


@pytest.fixture
def told(load, tmp_path, monkeypatch: pytest.MonkeyPatch):
    """A learner whose servers are the built-in engine, and what they were told."""
    told: list[str] = []

    class Servers(BuiltinEngine):
        def __init__(self, addresses, config, *, max_rollouts: int) -> None:
            told.append("connected")
            super().__init__(learner.base, max_rows=max_rollouts)

        def push_weights(self, model, folder: Path, version: str) -> None:
            told.append(f"pushed {version[-2:]}")
            folder.mkdir(exist_ok=True)

        def note_weights(self, version: str) -> None:
            told.append(f"noted {version[-2:]}")

    monkeypatch.setattr("looktwice.engine.vllm.VllmEngine", Servers)
    learner = load(num_generations=2, max_new_tokens=4, output_dir=tmp_path, vllm_servers="http://a:8000")
    return learner, told


def test_servers_are_asked_once_a_run_and_leave_no_weights(told, dataset, tmp_path) -> None:
    learner, told = told
    samples = read_samples(dataset.rl, dataset.rl.parent)[:1]
    sampler = Sampler(learner, learner.config)
    for learner.step in (0, 1):
        roll_out(learner, samples, learner.config, lambda played: [paid(0.0) for _ in played], sampler)
    assert told == ["connected", "pushed -0", "pushed -1"]
    assert (tmp_path / SERVED_WEIGHTS).exists()
    sampler.close()
    assert not (tmp_path / SERVED_WEIGHTS).exists()


def test_of_several_processes_rank_0_pushes_and_the_others_note_it(told) -> None:
    learner, told = told

    class Second(World):
        rank, size = 1, 2

    learner.world = Second()
    Sampler(learner, learner.config).take_weights(3)
    assert told == ["connected", "noted -3"]
