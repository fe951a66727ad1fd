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
    make_room,
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


def save(folder: Path, *, step: int) -> None:
    folder.mkdir(parents=True)
    Record(stage="sft", order={}, settings={}).write(folder, step=step)
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
    with pytest.raises(ConfigError, match=r"a run \(checkpoint-2, .*--resume, .*--overwrite"):
        check_run(SFTConfig(output_dir=run), "tiny")
    check_run(SFTConfig(output_dir=run, overwrite=True), "tiny")


@pytest.mark.parametrize("left", ["final_model", "metrics.jsonl", "tensorboard", "checkpoint-3", "left_out.jsonl"])
def test_each_thing_that_a_run_leaves_makes_it_a_used_folder(left, tmp_path) -> None:
    (tmp_path / left).mkdir()
    with pytest.raises(ConfigError, match=f"holds a run \\({left}\\)"):
        check_run(SFTConfig(output_dir=tmp_path), "tiny")


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
        assert "checkpoint-10, which came later" in capsys.readouterr().out
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


@pytest.mark.parametrize("damage", [lambda file: file.unlink(), lambda file: file.write_bytes(b"")])
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


def test_a_final_model_that_says_nothing_of_its_run_is_not_replaced_unasked(run) -> None:
    (run / "final_model" / "train_config.json").unlink()
    config = SFTConfig(output_dir=run, resume_from_checkpoint="latest")
    with pytest.raises(ConfigError, match="final_model: would be replaced at the end, .*; move it away, or"):
        check_final_model(config, total_steps=12)
    check_final_model(config.model_copy(update={"overwrite": True}), total_steps=12)


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
