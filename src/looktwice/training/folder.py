"""The folder of a run: what it holds, which process writes there, and what makes room for a run."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import TextIO

from looktwice.config import StageConfig
from looktwice.drafts import UNFINISHED, settle, settle_all
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
LEFT_BY_A_START = (LEFT_OUT, TENSORBOARD, CONFIG_FILE, RUN_FILE, TRAJECTORIES, ROLLOUT_PAGES)
"""What may be there before a step is finished."""
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

    None where none is named, or this run has none yet. Raises CheckpointError when what is named is none.
    """
    named = config.resume_from_checkpoint
    if named is None:
        return None
    folder = config.output_dir if goes_on(config) else named
    if (folder / STATE_FILE).is_file():
        return folder
    if found := checkpoints(folder):
        return found[max(found)]
    if goes_on(config):
        return None
    if not os.path.isdir(folder):  # of a name that is too long Path.is_dir raises an error
        raise CheckpointError(f"{folder}: no such folder to resume from; give a checkpoint-N or a run folder")
    raise CheckpointError(
        f"{folder}: no checkpoint to resume from (no {STATE_FILE} and no checkpoint-N in it; {FINAL_MODEL} holds "
        "weights alone); a run writes one at each epoch's end, and by --save_steps and --save_minutes"
    )


def goes_on(config: StageConfig) -> bool:
    """Whether the run in the folder is to go on wherever it is: from its latest checkpoint, or at its beginning."""
    return str(config.resume_from_checkpoint) == LATEST


def check_run(config: StageConfig, start: str) -> None:
    """Refuse a folder that holds another run, before anything heavy is imported.

    `start` is the model that the run starts from. Raises ConfigError and CheckpointError.
    """
    folder, checkpoint = config.output_dir, checkpoint_of(config)
    if checkpoint:
        check_whole(checkpoint)
    in_the_way = of_another_run(folder, checkpoint)
    if in_the_way and holds_steps(folder) and not (config.overwrite or goes_on(config)):
        names = ", ".join(path.name for path in in_the_way[:4]) + ", ..." * (len(in_the_way) > 4)
        raise ConfigError(
            f"{folder}: holds a run ({names}); go on with it: --resume, replace it: --overwrite, or give another folder"
        )
    for path in [*in_the_way, *later_checkpoints(folder, checkpoint)]:
        check_not_needed(path, start, checkpoint)


def check_whole(checkpoint: Path) -> None:
    """Raise CheckpointError when a file of a checkpoint is not as it was saved, naming the newest beside it whose files
    all are."""
    try:
        Record.of_whole(checkpoint)
    except CheckpointError as error:
        for _, other in sorted(checkpoints(checkpoint.parent).items(), reverse=True):
            if other != checkpoint and (other / STATE_FILE).is_file() and record_of_whole(other):
                raise CheckpointError(f"{error}; the newest that is whole: --resume {other}") from error
        raise


def record_of_whole(folder: Path) -> Record | None:
    """The record in a saved folder; None where there is none, or not all files are as they were saved."""
    try:
        return Record.of_whole(folder)
    except CheckpointError:
        return None


def check_place(config: StageConfig, start: str) -> None:
    """Refuse a run folder that cannot be written, in which another process is at work, or that holds another run.

    Raises ConfigError and CheckpointError.
    """
    check_run_folder(config.output_dir)
    check_free(config.output_dir)
    settle_all(config.output_dir)
    check_run(config, start)


def settle_start(model: Path) -> None:
    """Where a process was killed between the two steps in which it replaced a model, end that, unless another one is at
    work in the run folder."""
    with suppress(ConfigError, FileNotFoundError):  # other processes of the run may be doing it
        check_free(model.parent)
        settle(model)


def is_finished(config: StageConfig, record: Record) -> bool:
    """Whether the run that is to go on, and trains what the record says, has come to its end: its final model is there
    and whole. `check_run` has seen the checkpoint."""
    checkpoint = checkpoint_of(config)
    if config.resume_from_checkpoint is None or (checkpoint and not goes_on_in(config.output_dir, checkpoint)):
        return False
    if checkpoint and not (goes_on(config) or Record.read(checkpoint).step == record.order["steps"]):
        return False  # it is to go back
    found = record_of_whole(config.output_dir / FINAL_MODEL)
    if found is None or not found.is_over or (found.stage, found.order) != (record.stage, record.order):
        return False
    return found.start == record.start or None in (found.start, record.start)


def check_final_model(config: StageConfig, *, total_steps: int) -> None:
    """Raise ConfigError when the final model that is there was trained for more steps than this run has, or there is
    nothing else to go on from. One beside a checkpoint that does not say of which run it is is set aside later."""
    folder = config.output_dir / FINAL_MODEL
    if not folder.exists() or config.overwrite:
        return
    if checkpoint_of(config) is None:
        raise ConfigError(
            f"{folder}: not what this run would end with, or not whole, and there is no checkpoint to go on from; "
            "give another folder, or replace it: --overwrite"
        )
    try:
        step = Record.read(folder).step
    except CheckpointError:
        return
    if step > total_steps:
        raise ConfigError(
            f"{folder}: trained for {step:,} steps, and this run ends with step {total_steps:,}; give another folder, "
            "or replace it: add --overwrite"
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
    there = [folder / name for name in (FINAL_MODEL, LOG_FILE, *LEFT_BY_A_START)]
    return [*checkpoints(folder).values(), *(path for path in there if os.path.lexists(path))]


def holds_steps(folder: Path) -> bool:
    """Whether a run has come to a step there, or somebody else may have put there what one that has not would leave."""
    log = folder / LOG_FILE
    if checkpoints(folder) or os.path.lexists(folder / FINAL_MODEL) or (log.exists() and log.stat().st_size):
        return True
    is_started = (folder / RUN_FILE).is_file()  # written before the two that others may have put there
    return not is_started and any(os.path.lexists(folder / name) for name in (CONFIG_FILE, TENSORBOARD))


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
    """Remove another run and what a killed process left half-written. Of the run that goes on, what does not belong to
    it is set aside, or with `overwrite` removed. `check_run` has allowed it."""
    folder = config.output_dir
    old, beside = of_another_run(folder, checkpoint), later_checkpoints(folder, checkpoint)
    if checkpoint and not old:
        beside += unknown_final_model(folder)
    elif goes_on(config) and holds_steps(folder):
        old, beside = [], old
    if beside and not config.overwrite:
        set_aside(folder, beside)
        beside = []
    for path in [*old, *beside, *folder.glob(f".*{UNFINISHED}")]:
        remove(path)


def unknown_final_model(folder: Path) -> list[Path]:
    """The final model of a run folder, where it does not say of which run it is."""
    final = folder / FINAL_MODEL
    try:
        Record.read(final)
    except CheckpointError:
        return [final] if final.exists() else []
    return []


def set_aside(folder: Path, paths: Sequence[Path]) -> None:
    """Move these into a new folder in the run folder, and say so."""
    aside = next(place for number in count(1) if not (place := folder / f"set_aside-{number}").exists())
    aside.mkdir()
    for path in paths:
        path.rename(aside / path.name)
    print(f"{aside}: {', '.join(path.name for path in paths)}, from which this run does not go on")


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
