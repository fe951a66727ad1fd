"""When checkpoints are written, and which of them stay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from looktwice.config import SFTConfig
from looktwice.data.order import BatchOrder
from looktwice.training import checkpoints as checkpoints_module
from looktwice.training.checkpoints import Checkpoints, best_of
from looktwice.training.distributed import World

Run = Callable[..., list[int]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Goes through steps with these evaluations, by their step, and gives the steps whose checkpoints are left."""

    monkeypatch.setattr(checkpoints_module, "save", lambda learner, folder, record, with_optimizer: folder.mkdir())

    def go(*, steps: int = 12, losses: dict[int, float] | None = None, start: int = 0, **settings: Any) -> list[int]:
        config = SFTConfig(output_dir=tmp_path, **settings)
        learner = SimpleNamespace(config=config, step=start, total_steps=12, world=World())
        order = BatchOrder(8, samples_per_step=2, num_epochs=3, max_steps=None, seed=0)
        saves = Checkpoints(learner, None, order)  # type: ignore[arg-type]
        for step in range(start + 1, steps + 1):
            learner.step = step
            if saves.is_due({"eval/loss": (losses or {})[step]} if step in (losses or {}) else {}):
                saves.save()
        return sorted(int(path.name.removeprefix("checkpoint-")) for path in tmp_path.glob("checkpoint-*"))

    return go


def test_by_default_each_epoch_ends_in_a_checkpoint(run) -> None:
    assert run() == [4, 8, 12]


def test_checkpoints_come_every_so_many_steps_when_asked_and_after_the_last(run) -> None:
    assert run(save_steps=5) == [5, 10, 12]


def test_a_checkpoint_is_due_when_the_minutes_since_the_last_are_over(run, monkeypatch) -> None:
    minutes = iter(range(100))
    monkeypatch.setattr(checkpoints_module.time, "monotonic", lambda: 60.0 * next(minutes))
    assert run(save_steps=100, save_minutes=4, save_total_limit=10) == [4, 8, 12]


def test_without_minutes_only_steps_count(run, monkeypatch) -> None:
    hours = iter(range(100))
    monkeypatch.setattr(checkpoints_module.time, "monotonic", lambda: 3600.0 * next(hours))
    assert run(save_steps=100, save_minutes=None) == [12]


def test_only_the_newest_are_kept(run, tmp_path) -> None:
    assert run(save_steps=1, save_total_limit=2) == [11, 12]
    assert not list(tmp_path.glob(".*"))


def test_none_is_written_where_none_is_to_be_kept(run) -> None:
    assert run(save_steps=1, save_total_limit=0, losses={3: 1.0}) == []


def test_the_best_evaluation_has_a_checkpoint_that_stays(run) -> None:
    losses = {1: 3.0, 3: 1.0, 5: 2.0, 7: 1.0}
    assert run(save_steps=2, save_total_limit=2, losses=losses) == [3, 10, 12]


def test_the_best_is_not_kept_when_that_is_off(run) -> None:
    assert run(save_steps=2, save_total_limit=2, losses={3: 1.0}, keep_best=False) == [10, 12]


def test_a_run_that_goes_on_remembers_its_best(run, tmp_path) -> None:
    assert run(steps=4, save_steps=2, losses={3: 1.0}) == [2, 3, 4]
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "eval/loss": 1.0}\nmine\n{"step": 9, "eval/loss": 0.1}\n')
    assert run(start=4, save_steps=2, save_total_limit=1, losses={5: 2.0}) == [3, 12]


def test_more_right_answers_are_better_and_less_loss_is(tmp_path) -> None:
    log = tmp_path / "log"
    log.write_text('{"step": 1, "eval/accuracy": 0.5}\n{"step": 2, "eval/accuracy": 0.7}\n{"step": 3}\n')
    assert best_of(log, last=3) == (2, 0.7)
    assert best_of(log, last=1) == (1, 0.5)
    assert best_of(tmp_path / "none", last=1) is None
