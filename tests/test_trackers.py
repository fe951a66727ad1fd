"""What TensorBoard, Weights & Biases and trackio are told of a run; the latter two played by fakes of their modules."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from looktwice.errors import ConfigError
from looktwice.trackers import TrackedRun, check_trackers, open_trackers


def run_in(folder: Path, *, start: int = 0) -> TrackedRun:
    return TrackedRun(folder=folder, id="ab12", settings={"SFTConfig": {"seed": 1}}, start=start)


def test_the_curves_of_a_run_that_goes_on_have_each_step_once(tmp_path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, values in ((0, {1: 3.0, 2: 3.0, 3: 3.0}), (2, {3: 2.0})):
        [board] = open_trackers(["tensorboard"], run_in(tmp_path, start=start))
        for step, value in values.items():
            board.log(step, {"loss": value, "optim/lr": 0.1})
        board.flush()
        board.close()
    curves = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(point.step, point.value) for point in curves.Scalars("loss")] == [(1, 3.0), (2, 3.0), (3, 2.0)]
    assert set(curves.Tags()["scalars"]) == {"loss", "optim/lr"}


def test_wandb_gets_a_run_that_it_knows_again(tmp_path, monkeypatch) -> None:
    wandb = SimpleNamespace(init=Mock())
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setenv("WANDB_PROJECT", "signs")
    [tracker] = open_trackers(["wandb"], run_in(tmp_path / "sft"))
    tracker.log(3, {"loss": 1.0})
    tracker.close()
    assert wandb.init.call_args.kwargs == {
        "project": "signs",
        "name": "sft-ab12",
        "id": "ab12",
        "dir": str(tmp_path / "sft"),
        "config": {"SFTConfig": {"seed": 1}},
        "resume": "allow",
    }
    run = wandb.init.return_value
    run.define_metric.assert_called_once_with("*", step_metric="step")
    run.log.assert_called_once_with({"step": 3, "loss": 1.0})
    run.finish.assert_called_once_with()


def test_trackio_gets_a_run_that_it_knows_again(tmp_path, monkeypatch) -> None:
    trackio = SimpleNamespace(init=Mock())
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    [tracker] = open_trackers(["trackio"], run_in(tmp_path / "sft"))
    tracker.log(3, {"loss": 1.0})
    tracker.close()
    given = trackio.init.call_args.kwargs
    assert (given["project"], given["name"], given["resume"]) == ("looktwice", "sft-ab12", "allow")
    trackio.init.return_value.log.assert_called_once_with({"loss": 1.0}, step=3)
    trackio.init.return_value.finish.assert_called_once_with()


def test_a_tracker_that_cannot_be_opened_is_named_and_the_others_are_closed(tmp_path, monkeypatch) -> None:
    trackio = SimpleNamespace(init=Mock())
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=Mock(side_effect=RuntimeError("no login"))))
    with pytest.raises(ConfigError, match=r"report_to wandb: cannot be opened \(no login\); mend it"):
        open_trackers(["trackio", "wandb"], run_in(tmp_path))
    trackio.init.return_value.finish.assert_called_once_with()


def test_a_tracker_that_is_not_installed_is_named_with_the_mend(monkeypatch) -> None:
    monkeypatch.setattr("looktwice.trackers.find_spec", lambda name: None if name == "wandb" else object())
    check_trackers(["tensorboard", "trackio"])
    with pytest.raises(ConfigError, match=r"report_to wandb: not installed; pip install 'looktwice\[wandb\]'"):
        check_trackers(["tensorboard", "wandb"])
