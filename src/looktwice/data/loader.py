"""Items prepared ahead of whoever asks for them, in the worker processes of torch's DataLoader.

What the DataLoader does not do is done here: errors come as themselves and in their turn, a worker that dies names the
row it was at, and all workers end when the one who asks does.
"""

from __future__ import annotations

import os
import pickle
import signal
import tempfile
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import active_children, forkserver, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from looktwice.errors import ConfigError, DataError, LooktwiceError

Key = TypeVar("Key")
Item = TypeVar("Item")
Batch = TypeVar("Batch")

START_METHOD = "forkserver"
"""Workers are forked from a process that has neither threads nor CUDA, both of which a fork does not survive."""
PRELOADED = ["looktwice.data.examples"]
"""What that process imports once for all workers."""
BATCHES_AHEAD = 2
"""Of each worker."""
SECONDS_TO_STOP = 5.0


def warm_up() -> None:
    """Start the process from which workers are forked, which then imports for seconds beside what goes on here."""
    get_context(START_METHOD).set_forkserver_preload(PRELOADED)
    forkserver.ensure_running()


def prepared(
    function: Callable[[Key], Item],
    batches: Iterable[Sequence[Key]],
    *,
    join: Callable[[list[Item]], Batch],
    num_workers: int,
    where: Callable[[Key], str] = str,
    pin_memory: bool = False,
) -> Generator[Batch]:
    """`join([function(key) for key in batch])` of all batches in order, two for each worker ahead of the asking.

    `function`, `join` and the keys must pickle; a key is sent to its worker, which is given whole batches. Without
    workers each batch is made when it is asked for, in this process, the same bit for bit. Use it in `closing`.

    An error of `function` or of `batches` is raised in its batch's turn: a LooktwiceError as it is, any other with the
    worker's traceback as a note. A worker that dies, which is noticed within five seconds, raises a DataError that says
    `where(key)` of what it was at.
    """
    with tempfile.TemporaryDirectory(prefix="looktwice-") as notes:
        if num_workers:
            warm_up()
        loader = DataLoader(
            _Dataset(function, where, Path(notes)),
            batch_sampler=_with_error_in_turn(batches),
            collate_fn=_Collation(join),
            num_workers=num_workers,
            pin_memory=pin_memory,
            worker_init_fn=_leave_ctrl_c_to_the_parent,
            generator=torch.Generator(),  # or it would draw a number from the one that all share
            multiprocessing_context=START_METHOD if num_workers else None,
            prefetch_factor=BATCHES_AHEAD if num_workers else None,
        )
        others = active_children()
        outcomes = iter(loader)
        workers = [process for process in active_children() if process not in others]
        try:
            for outcome in outcomes:
                if isinstance(outcome, _Failure):
                    raise outcome.error
                yield outcome
        except RuntimeError as error:  # how the DataLoader says that a worker is gone
            dead = [worker for worker in workers if worker.exitcode]
            if not dead:
                raise
            raise _cause_of_death(dead[0], Path(notes)) from error
        finally:
            _stop(workers)
            # here and now, not with a traceback that holds this frame: it would be taken apart before it can close
            del outcomes


@dataclass(frozen=True)
class _Failure:
    """An error on its way out of a worker."""

    error: Exception


class _Dataset(Dataset[Any], Generic[Key, Item]):
    """A map-style dataset from keys to items. In a worker it notes, in a file named by the process, what it is at."""

    def __init__(self, function: Callable[[Key], Item], where: Callable[[Key], str], notes: Path) -> None:
        self.function, self.where, self.notes = function, where, notes

    def __getitem__(self, key: Key | _Failure) -> Item | _Failure:
        if isinstance(key, _Failure):
            return key
        if get_worker_info():
            (self.notes / str(os.getpid())).write_text(self.where(key), encoding="utf-8", errors="replace")
        try:
            return self.function(key)
        except Exception as error:
            return _Failure(_portable(error) if get_worker_info() else error)


@dataclass(frozen=True)
class _Collation(Generic[Item, Batch]):
    """The items of a batch joined, or the first error among them."""

    join: Callable[[list[Item]], Batch]

    def __call__(self, items: list[Item | _Failure]) -> Batch | _Failure:
        failures = [item for item in items if isinstance(item, _Failure)]
        return failures[0] if failures else self.join(items)  # type: ignore[arg-type]


def _stop(workers: Sequence[BaseProcess]) -> None:
    for worker in workers:
        worker.terminate()
    for worker in workers:
        worker.join(SECONDS_TO_STOP)
        if worker.exitcode is None:
            worker.kill()
            worker.join()


def _with_error_in_turn(batches: Iterable[Sequence[Key]]) -> Iterator[list[Any]]:
    """The batches, and an error that ends them as the last one: they are read ahead of their turn."""
    try:
        yield from map(list, batches)
    except Exception as error:
        yield [_Failure(error)]


def _leave_ctrl_c_to_the_parent(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _cause_of_death(worker: BaseProcess, notes: Path) -> LooktwiceError:
    code = worker.exitcode or 0
    cause = f"exit code {code}"
    if code < 0:
        cause = f"{signal.Signals(-code).name}{', as when memory runs out' if code == -signal.SIGKILL else ''}"
    note = notes / str(worker.pid)
    if not note.exists():
        return ConfigError(
            f"a worker process could not start ({cause}; what it said stands above); use 0 workers, and in a "
            'script of your own start under `if __name__ == "__main__":`'
        )
    return DataError(
        f"{note.read_text(encoding='utf-8')}: the worker process that was preparing this row died ({cause}); leave the "
        "row out, or use fewer workers if memory is short, and go on from the last checkpoint"
    )


def _portable(error: Exception) -> Exception:
    """The error as it can be sent: a LooktwiceError as it is, any other with its traceback as a note."""
    if isinstance(error, LooktwiceError):
        return error
    trace = f"In a worker process:\n{''.join(traceback.format_exception(error)).rstrip()}"
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(trace)
    error.add_note(trace)
    return error
