"""The folder of a run: what it holds, which process writes there, and what makes room for a run."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TextIO

from looktwice.config import StageConfig
from looktwice.drafts import UNFINISHED, settle_all
from looktwice.errors import CheckpointError, ConfigError
from looktwice.metrics import LOG_FILE
from looktwice.model.location import FINAL_MODEL, adapter_base, local_adapter
from looktwice.paths import check_run_folder, place
from looktwice.trackers import TENSORBOARD
from looktwice.training.record import Record

STATE_FILE = "trainer_state.pt"
"""The optimizer's state, which makes a saved folder a checkpoint."""
LEFT_OUT = "left_out.jsonl"
"""The samples that were too long, one a line, and what was done with each."""
CONFIG_FILE = "config.yaml"
"""The settings of the run; --model_config, --data_config, --sft_config and --grpo_config each read their part of it."""
RUN_FILE = "run.json"
"""What the run was trained on, and where."""
TRAJECTORIES = "trajectories"
"""The rollouts of each step of stage 2."""
ROLLOUT_PAGES = "rollouts"
"""Pages of rollouts to look at."""
LATEST = "latest"
LOCK = ".lock"
LOOKS = 5
"""How often a lock is tried before somebody is at work there."""


def checkpoints(folder: Path) -> dict[int, Path]:
    """The `checkpoint-N` folders of a run by their steps, in order."""
    found = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in folder.glob("checkpoint-*"))
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def checkpoint_of(config: StageConfig) -> Path | None:
    """The checkpoint to go on from: as named, or the latest of the run folder that is named or of this run's own.

    Raises CheckpointError when there is none.
    """
    named = config.resume_from_checkpoint
    if named is None:
        return None
    folder = config.output_dir if str(named) == LATEST else named
    if not os.path.isdir(folder):  # of a name that is too long Path.is_dir raises an error
        raise CheckpointError(f"{folder}: no such folder to resume from; give a checkpoint-N or a run folder")
    if (folder / STATE_FILE).is_file():
        return folder
    if found := checkpoints(folder):
        return found[max(found)]
    raise CheckpointError(
        f"{folder}: no checkpoint to resume from (no {STATE_FILE} and no checkpoint-N in it; {FINAL_MODEL} holds "
        "weights alone); a run writes one at each epoch's end, and by --save_steps and --save_minutes"
    )


def check_run(config: StageConfig, start: str) -> None:
    """Refuse a folder that holds another run, before anything heavy is imported.

    `start` is the model that the run starts from. Raises ConfigError and CheckpointError.
    """
    folder, checkpoint = config.output_dir, checkpoint_of(config)
    if checkpoint:
        check_whole(checkpoint)
    in_the_way = of_another_run(folder, checkpoint)
    if in_the_way and not config.overwrite:
        names = ", ".join(path.name for path in in_the_way[:4]) + ", ..." * (len(in_the_way) > 4)
        go_on = "go on with it: --resume, " if checkpoints(folder) else ""
        raise ConfigError(f"{folder}: holds a run ({names}); {go_on}replace it: --overwrite, or give another folder")
    for path in [*in_the_way, *later_checkpoints(folder, checkpoint)]:
        check_not_needed(path, start, checkpoint)


def check_whole(checkpoint: Path) -> None:
    """Raise CheckpointError when a file of a checkpoint is missing or cut, naming the newest whole one beside it."""
    try:
        Record.read(checkpoint)
    except CheckpointError as error:
        for _, other in sorted(checkpoints(checkpoint.parent).items(), reverse=True):
            if other != checkpoint and _is_whole(other):
                raise CheckpointError(f"{error}; the newest that is whole: --resume {other}") from error
        raise


def _is_whole(checkpoint: Path) -> bool:
    try:
        Record.read(checkpoint)
    except CheckpointError:
        return False
    return (checkpoint / STATE_FILE).is_file()


def check_place(config: StageConfig, start: str) -> None:
    """Refuse a run folder that cannot be written, in which another process is at work, or that holds another run.

    Raises ConfigError and CheckpointError.
    """
    check_run_folder(config.output_dir)
    check_free(config.output_dir)
    check_run(config, start)


def check_final_model(config: StageConfig, *, total_steps: int) -> None:
    """Raise ConfigError when the final model that is there was trained for more steps than this run has, or does not
    say for how many."""
    folder = config.output_dir / FINAL_MODEL
    if not folder.exists() or config.overwrite:
        return
    try:
        step = Record.read(folder).step
    except CheckpointError as error:
        raise ConfigError(
            f"{folder}: would be replaced at the end, and no file in it says by which run it was written; move it "
            "away, or replace it: --overwrite"
        ) from error
    if step > total_steps:
        raise ConfigError(
            f"{folder}: trained for {step:,} steps, and this run ends with step {total_steps:,}; give another folder, "
            "or replace it: --overwrite"
        )


def check_not_needed(path: Path, start: str, checkpoint: Path | None) -> None:
    """Raise ConfigError when what is to make room holds what the run starts from."""
    needed = [place(start), *([checkpoint] if checkpoint else [])]
    if adapter := local_adapter(place(start)):
        needed.append(place(adapter_base(adapter)))
    for one in needed:
        if one.resolve().is_relative_to(path.resolve()):
            raise ConfigError(f"{one}: this run starts from it and would have to remove it; give another folder")


def of_another_run(folder: Path, checkpoint: Path | None) -> list[Path]:
    """What a run left in the folder, unless it is the one that goes on from the checkpoint."""
    if checkpoint and goes_on_in(folder, checkpoint):
        return []
    names = (FINAL_MODEL, LOG_FILE, LEFT_OUT, TENSORBOARD, CONFIG_FILE, RUN_FILE, TRAJECTORIES, ROLLOUT_PAGES)
    there = [folder / name for name in names]
    return [*checkpoints(folder).values(), *(path for path in there if os.path.lexists(path))]


def later_checkpoints(folder: Path, checkpoint: Path | None) -> list[Path]:
    """What the run that goes on from a checkpoint had saved after it."""
    if not checkpoint or not goes_on_in(folder, checkpoint):
        return []
    step = Record.read(checkpoint).step
    return [path for number, path in checkpoints(folder).items() if number > step]


def goes_on_in(folder: Path, checkpoint: Path) -> bool:
    """Whether the checkpoint is one of the run in this folder."""
    return folder.is_dir() and checkpoint.resolve().parent.samefile(folder)


def make_room(config: StageConfig, checkpoint: Path | None) -> None:
    """Remove another run and what a killed process left half-written; checkpoints after the one to go on from are set
    aside, or with `overwrite` removed. `check_run` has allowed it."""
    folder = config.output_dir
    later = later_checkpoints(folder, checkpoint)
    if later and not config.overwrite:
        aside = next(place for number in count(1) if not (place := folder / f"set_aside-{number}").exists())
        aside.mkdir()
        for path in later:
            path.rename(aside / path.name)
        print(f"{aside}: {', '.join(path.name for path in later)}, which came later")
        later = []
    for path in [*of_another_run(folder, checkpoint), *later, *folder.glob(f".*{UNFINISHED}")]:
        remove(path)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Make a run folder and hold it, so that no other process writes there; at the latest it ends with the process.

    Raises ConfigError when another process holds it, naming it, or when the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be used as a run folder ({error}); give another one") from error
    with lock:
        _take_from_lookers(lock, folder)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')},")
        lock.flush()
        settle_all(folder)
        yield


def check_free(folder: Path) -> None:
    """Raise ConfigError when another process holds the run folder. Nothing is made."""
    if (folder / LOCK).is_file():
        with (folder / LOCK).open("r", encoding="utf-8") as lock:
            _take(lock, folder, fcntl.LOCK_SH)


def _take_from_lookers(lock: TextIO, folder: Path) -> None:
    """Take the lock; who only looks whether it is free has it for an instant."""
    for _ in range(LOOKS):
        try:
            return _take(lock, folder, fcntl.LOCK_EX)
        except ConfigError:
            time.sleep(0.05)
    _take(lock, folder, fcntl.LOCK_EX)


def _take(lock: TextIO, folder: Path, kind: int) -> None:
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.seek(0)
        holder = lock.read().strip() or "another process"
        raise ConfigError(f"{folder}: {holder} is at work there; wait for it, or give another folder") from error
    except OSError:
        return  # a file system without locks
