"""The folder of a run: what it holds, whose it is, and what makes room."""

from __future__ import annotations

import fcntl
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from looktwice.config import SFTConfig
from looktwice.errors import CheckpointError, ConfigError
from looktwice.training.folder import (
    check_final_model,
    check_free,
    check_run,
    checkpoint_of,
    checkpoints,
    claimed,
    is_finished,
    make_room,
    settle_start,
)
from looktwice.training.record import Record

Save = Callable[..., Path]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that is over: two checkpoints, a final model and a log."""
    folder = tmp_path / "run"
    save(folder / "checkpoint-2", step=2)
    save(folder / "checkpoint-10", step=10)
    save(folder / "final_model", step=12)
    (folder / "final_model" / "trainer_state.pt").unlink()
    (folder / "metrics.jsonl").write_text('{"step": 12}\n')
    (folder / "notes.txt").write_text("mine")
    return folder


def save(folder: Path, *, step: int, order: dict[str, int] | None = None) -> None:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weight")
    Record(stage="sft", order=order or {}, settings={}).write(folder, step=step)
    (folder / "trainer_state.pt").touch()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_checkpoints_come_in_the_order_of_their_steps(run) -> None:
    (run / "checkpoint-best").mkdir()
    (run / ".checkpoint-12.unfinished").mkdir()
    assert list(checkpoints(run)) == [2, 10]


@pytest.mark.parametrize(("named", "found"), [("run/checkpoint-2", "checkpoint-2"), ("run", "checkpoint-10")])
def test_a_run_goes_on_from_a_checkpoint_or_the_last_of_a_run_folder(named, found, run, tmp_path) -> None:
    assert checkpoint_of(SFTConfig(output_dir="new", resume_from_checkpoint=tmp_path / named)) == run / found


def test_latest_is_the_last_checkpoint_of_the_run_itself(run) -> None:
    assert checkpoint_of(SFTConfig(output_dir=run, resume_from_checkpoint="latest")) == run / "checkpoint-10"


@pytest.mark.parametrize(
    ("named", "problem"), [("none", "no such folder"), ("run/final_model", "no checkpoint to resume")]
)
def test_what_is_no_checkpoint_is_named(named, problem, run, tmp_path) -> None:
    with pytest.raises(CheckpointError, match=f"{named}: {problem}"):
        checkpoint_of(SFTConfig(resume_from_checkpoint=tmp_path / named))


def test_a_folder_that_holds_a_run_is_refused_with_all_ways_out(run) -> None:
    with pytest.raises(ConfigError, match=r"a run \(checkpoint-2, .*--resume, .*--overwrite, or give another"):
        check_run(SFTConfig(output_dir=run), "tiny")
    check_run(SFTConfig(output_dir=run, overwrite=True), "tiny")


@pytest.mark.parametrize("left", ["final_model", "tensorboard", "checkpoint-3", "config.yaml"])
def test_each_thing_that_a_run_leaves_makes_it_a_used_folder(left, tmp_path) -> None:
    """Also those that others may have put there, where no file says that a run did."""
    (tmp_path / left).mkdir()
    with pytest.raises(ConfigError, match=f"holds a run \\({left}\\)"):
        check_run(SFTConfig(output_dir=tmp_path), "tiny")


@pytest.mark.parametrize("names", [["left_out.jsonl"], ["run.json", "config.yaml", "tensorboard", "metrics.jsonl"]])
def test_a_run_that_came_to_no_step_makes_room_by_itself(names, tmp_path) -> None:
    for name in names:
        (tmp_path / name).touch()
    check_run(SFTConfig(output_dir=tmp_path), "tiny")
    make_room(SFTConfig(output_dir=tmp_path), None)
    assert not list(tmp_path.iterdir())
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ConfigError, match=r"holds a run \(metrics.jsonl"):
        check_run(SFTConfig(output_dir=tmp_path), "tiny")


def test_a_run_that_has_no_checkpoint_yet_goes_on_at_its_beginning_and_what_it_left_is_kept(tmp_path, capsys) -> None:
    config = SFTConfig(output_dir=tmp_path, resume_from_checkpoint="latest")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    check_run(config, "tiny")
    assert checkpoint_of(config) is None
    make_room(config, None)
    assert [path.name for path in tmp_path.iterdir()] == ["set_aside-1"]
    assert "set_aside-1: metrics.jsonl, from which this run does not go on" in capsys.readouterr().out
    make_room(config, None)  # and where nothing is there
    assert names(tmp_path) == {"set_aside-1"}


def test_other_files_do_not_make_it_a_used_folder(tmp_path) -> None:
    (tmp_path / "notes.txt").touch()
    check_run(SFTConfig(output_dir=tmp_path), "tiny")


def test_a_run_does_not_go_on_in_the_folder_of_another(run, tmp_path) -> None:
    save(tmp_path / "other" / "checkpoint-4", step=4)
    with pytest.raises(ConfigError, match="holds a run"):
        check_run(SFTConfig(output_dir=run, resume_from_checkpoint=tmp_path / "other"), "tiny")
    check_run(SFTConfig(output_dir=tmp_path / "new", resume_from_checkpoint=run), "tiny")


@pytest.mark.parametrize("settings", [{}, {"resume_from_checkpoint": "run/checkpoint-2"}])
def test_what_the_run_starts_from_is_never_removed(settings, run, monkeypatch) -> None:
    monkeypatch.chdir(run.parent)
    with pytest.raises(ConfigError, match="checkpoint-10: this run starts from it"):
        check_run(SFTConfig(output_dir=run, overwrite=True, **settings), str(run / "checkpoint-10"))


def test_a_start_in_the_home_folder_is_found_too(run, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(run.parent))
    with pytest.raises(ConfigError, match="final_model: this run starts from it"):
        check_run(SFTConfig(output_dir=run, overwrite=True), "~/run/final_model")


def test_the_base_of_an_adapter_is_not_removed_either(run, tmp_path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(f'{{"base_model_name_or_path": "{run}/final_model"}}')
    with pytest.raises(ConfigError, match="final_model: this run starts from it"):
        check_run(SFTConfig(output_dir=run, overwrite=True), str(tmp_path / "adapter"))


def test_overwriting_removes_the_run_and_what_was_half_written_and_nothing_else(run) -> None:
    (run / ".checkpoint-12.unfinished").mkdir()
    make_room(SFTConfig(output_dir=run, overwrite=True), None)
    assert names(run) == {"notes.txt"}


def test_later_checkpoints_are_set_aside_when_a_run_goes_back(run, capsys) -> None:
    config = SFTConfig(output_dir=run, resume_from_checkpoint=run / "checkpoint-2")
    for number in (1, 2):
        make_room(config, run / "checkpoint-2")
        assert names(run / f"set_aside-{number}") == {"checkpoint-10"}
        assert "checkpoint-10, from which this run does not go on" in capsys.readouterr().out
        save(run / "checkpoint-10", step=10)
    assert {"checkpoint-2", "final_model", "metrics.jsonl"} <= names(run)
    make_room(config.model_copy(update={"overwrite": True}), run / "checkpoint-2")
    assert "checkpoint-10" not in names(run) and "set_aside-3" not in names(run)


def test_a_final_model_of_more_steps_is_not_replaced(run) -> None:
    config = SFTConfig(output_dir=run, resume_from_checkpoint="latest")
    check_final_model(config, total_steps=12)
    with pytest.raises(ConfigError, match="trained for 12 steps, and this run ends with step 11"):
        check_final_model(config, total_steps=11)
    check_final_model(config.model_copy(update={"overwrite": True}), total_steps=11)


@pytest.mark.parametrize(
    "damage", [lambda file: file.unlink(), lambda file: file.write_bytes(b""), lambda file: file.write_bytes(b"stale")]
)
def test_a_checkpoint_that_is_not_whole_is_named_with_the_newest_that_is(damage, tmp_path) -> None:
    for step in (2, 4, 6, 8):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.pt").write_bytes(b"state")
        Record(stage="sft", order={}, settings={}).write(folder, step=step)
    for step in (6, 8):
        damage(tmp_path / f"checkpoint-{step}" / "trainer_state.pt")
    config = SFTConfig(output_dir=tmp_path, resume_from_checkpoint=tmp_path / "checkpoint-8")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match="(?s)no checkpoint|checkpoint-8/trainer_state.pt: .*checkpoint-4$"):
        check_run(config, "tiny")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_final_model_that_says_nothing_of_its_run_is_set_aside(run, capsys) -> None:
    (run / "final_model" / "train_config.json").unlink()
    config = SFTConfig(output_dir=run, resume_from_checkpoint="latest")
    check_final_model(config, total_steps=12)
    make_room(config, run / "checkpoint-10")
    assert names(run / "set_aside-1") == {"final_model"} and "final_model" not in names(run)
    assert {"checkpoint-2", "checkpoint-10", "metrics.jsonl"} <= names(run)


def test_a_final_model_from_which_nothing_can_go_on_is_not_replaced_unasked(tmp_path) -> None:
    save(tmp_path / "final_model", step=12)
    config = SFTConfig(output_dir=tmp_path, resume_from_checkpoint="latest")
    with pytest.raises(
        ConfigError, match="final_model: not what this run would end with, .* no checkpoint to go on from"
    ):
        check_final_model(config, total_steps=20)
    check_final_model(config.model_copy(update={"overwrite": True}), total_steps=20)


def finished(folder: Path, total: int, **settings: object) -> bool:
    """Whether a run of so many steps is done there."""
    record = Record(stage="sft", order={"steps": total}, settings={})
    return is_finished(SFTConfig(output_dir=folder, **settings), record)


def test_a_run_is_finished_when_its_final_model_is_there_and_whole(tmp_path) -> None:
    for name, step in (("checkpoint-8", 8), ("checkpoint-12", 12), ("final_model", 12)):
        save(tmp_path / name, step=step, order={"steps": 12})
    (tmp_path / "final_model" / "trainer_state.pt").unlink()
    assert finished(tmp_path, 12, resume_from_checkpoint="latest")
    assert finished(tmp_path, 12, resume_from_checkpoint=tmp_path / "checkpoint-12")
    assert not finished(tmp_path, 12, resume_from_checkpoint=tmp_path / "checkpoint-8")  # it goes back
    assert not finished(tmp_path, 20, resume_from_checkpoint="latest")  # it is made longer
    assert not finished(tmp_path, 12)
    assert not finished(tmp_path / "new", 12, resume_from_checkpoint=tmp_path / "checkpoint-12")
    (tmp_path / "final_model" / "model.safetensors").write_bytes(b"damage")
    assert not finished(tmp_path, 12, resume_from_checkpoint="latest")


def test_a_run_that_keeps_no_checkpoints_is_finished_by_its_final_model_alone(tmp_path) -> None:
    save(tmp_path / "final_model", step=12, order={"steps": 12})
    (tmp_path / "final_model" / "trainer_state.pt").unlink()
    assert finished(tmp_path, 12, resume_from_checkpoint="latest")


def test_a_model_that_was_being_replaced_is_found_again_unless_its_run_is_at_work(tmp_path) -> None:
    save(tmp_path / ".final_model.replaced", step=12)
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        settle_start(tmp_path / "final_model")
        assert not (tmp_path / "final_model").exists()
    settle_start(tmp_path / "final_model")
    assert names(tmp_path / "final_model") == {"train_config.json", "trainer_state.pt", "model.safetensors"}
    settle_start(Path("AIDC-AI/Ovis2.5-2B"))


def test_who_looks_whether_a_folder_is_free_keeps_nobody_out(tmp_path) -> None:
    with claimed(tmp_path):
        pass
    with (tmp_path / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        check_free(tmp_path)  # two may look at once
        threading.Timer(0.1, lambda: fcntl.flock(lock, fcntl.LOCK_UN)).start()
        with claimed(tmp_path):
            pass


def test_a_folder_is_one_process_at_a_time_and_the_other_is_named(tmp_path) -> None:
    code = (
        "import sys, pathlib\nfrom looktwice.training.folder import claimed\n"
        "with claimed(pathlib.Path(sys.argv[1])):\n    print(flush=True)\n    sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdin and other.stdout
    other.stdout.readline()
    try:
        for use in (lambda: check_free(tmp_path / "run"), lambda: claimed(tmp_path / "run").__enter__()):
            with pytest.raises(ConfigError, match=f"run: process {other.pid} on .*, since .*, is at work there; wait"):
                use()
    finally:
        other.kill()  # no farewell: the claim ends with the process
        other.communicate()
    check_free(tmp_path / "run")
    with claimed(tmp_path / "run"):
        pass
