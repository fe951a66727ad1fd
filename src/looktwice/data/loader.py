"""Batches prepared ahead of whoever asks for them, in the worker processes of torch's DataLoader.

What the DataLoader does not do is done here: errors come as themselves and in their turn, a worker that dies names the
row it was at, and no worker outlives the one who asks, however that ends.
"""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import active_children, forkserver, get_context, parent_process, resource_tracker
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


def warm_up() -> None:
    """Start the process from which workers are forked, which then imports for seconds beside what goes on here."""
    get_context(START_METHOD).set_forkserver_preload(PRELOADED)
    resource_tracker.ensure_running()  # it would let signals in again while it starts
    with _ctrl_c_held_back():
        forkserver.ensure_running()


def prepare_batches(
    function: Callable[[Key], Item],
    batches: Iterable[Sequence[Key]],
    *,
    join: Callable[[list[Item]], Batch],
    num_workers: int,
    where: Callable[[Key], str] = str,
    pin_memory: bool = False,
) -> Generator[Batch]:
    """`join([function(key) for key in batch])` of all batches in order, two for each worker ahead of the asking.

    `function`, `join`, the keys and what is joined must pickle; a key is sent to its worker, which is given whole
    batches. With `pin_memory` what is joined has a method of that name. Without workers each batch is made when it is
    asked for, in this process, the same bit for bit. Use it in `closing`.

    An error of `function`, `join` or `batches` is raised in its batch's turn: a LooktwiceError as it is, any other with
    the worker's traceback as a note. A worker that dies, which is noticed within five seconds, raises a DataError that
    says `where(key)` of what it was at, or a ConfigError where it was at nothing.
    """
    # a folder for what travels: messages of more than a pipe takes at once would be torn when a worker is killed
    temporary = tempfile.TemporaryDirectory(prefix="looktwice-")
    folder, workers, outcomes, failures = Path(temporary.name), list[BaseProcess](), None, list[Exception]()
    try:
        if num_workers:
            warm_up()
        keys = _until_error(batches, failures, is_sent=num_workers > 0)
        others = active_children()
        with _ctrl_c_held_back():
            outcomes = _started(function, keys, join, num_workers, where, pin_memory, folder)
            workers += [process for process in active_children() if process not in others]
        while (outcome := _next(outcomes, workers, folder)) is not None:
            if isinstance(outcome, _Failure):
                raise outcome.error
            yield outcome.batch
        if failures:
            raise failures[0]
    finally:
        with _ctrl_c_held_back():
            _stop(workers)
            # here and now, not with a traceback that holds this frame: it would be taken apart before it can close
            del outcomes
            temporary.cleanup()


def _started(
    function: Callable[[Key], Item],
    keys: Iterable[list[Any]],
    join: Callable[[list[Item]], Batch],
    num_workers: int,
    where: Callable[[Key], str],
    pin_memory: bool,
    folder: Path,
) -> Iterator[Any]:
    """The outcomes of a DataLoader whose workers are at work."""
    with warnings.catch_warnings():  # more workers than cores are the caller's choice
        warnings.filterwarnings("ignore", "This DataLoader will create")
        loader: DataLoader[Any] = DataLoader(
            _Dataset(function, where, folder),
            batch_sampler=keys,
            collate_fn=_Collation(join, folder),
            num_workers=num_workers,
            pin_memory=pin_memory,
            worker_init_fn=_Start(folder),
            generator=torch.Generator(),  # or it would draw a number from the one that all share
            multiprocessing_context=START_METHOD if num_workers else None,
            prefetch_factor=BATCHES_AHEAD if num_workers else None,
        )
        return iter(loader)


@contextmanager
def _ctrl_c_held_back() -> Iterator[None]:
    """Ctrl-C comes at the end of the block: what is half started cannot be ended.

    What is started in it gets neither that nor SIGTERM, which schedulers send to all processes of a job: they are to go
    on until the step is saved.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[object] = []
    handler = signal.signal(signal.SIGINT, lambda *what: held.append(what))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
        if held:
            signal.raise_signal(signal.SIGINT)


def _next(outcomes: Iterator[Any], workers: Sequence[BaseProcess], folder: Path) -> _Made | _Failure | None:
    """The next outcome, None at the end. Raises what became of a worker that died."""
    try:
        outcome = next(outcomes, None)
    except RuntimeError as error:  # how the DataLoader says that a worker is gone
        dead = [worker for worker in workers if worker.exitcode is not None]
        if not dead:
            raise
        raise _cause_of_death(dead, folder) from error
    return outcome.opened() if isinstance(outcome, _Parcel) else outcome


def _stop(workers: Sequence[BaseProcess]) -> None:
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join()


@dataclass(frozen=True)
class _Made:
    """A batch that is ready."""

    batch: Any


@dataclass(frozen=True)
class _Failure:
    """An error on its way out of a worker."""

    error: Exception


@dataclass(frozen=True)
class _Parcel:
    """A file that holds an outcome; only its name goes through the pipe that all workers share."""

    path: Path

    @classmethod
    def packed(cls, outcome: _Made | _Failure, folder: Path) -> _Parcel:
        handle, name = tempfile.mkstemp(dir=folder)
        with os.fdopen(handle, "wb") as file:
            torch.save(outcome, file)
        return cls(Path(name))

    def opened(self) -> _Made | _Failure:
        """The outcome. Its tensors are mapped from the file, which has no name from then on."""
        outcome = torch.load(self.path, mmap=True, weights_only=False)
        self.path.unlink()
        return outcome

    def pin_memory(self) -> _Made | _Failure:
        """The outcome in page-locked memory; the DataLoader's own thread calls this."""
        outcome = self.opened()
        return _Made(outcome.batch.pin_memory()) if isinstance(outcome, _Made) else outcome


class _Dataset(Dataset[Any], Generic[Key, Item]):
    """A map-style dataset from keys to items."""

    def __init__(self, function: Callable[[Key], Item], where: Callable[[Key], str], folder: Path) -> None:
        self.function, self.where, self.folder = function, where, folder

    def __getitem__(self, key: Any) -> Any:
        try:
            if get_worker_info():
                key = pickle.loads(key)
                _note(self.folder, self.where(key))
            return self.function(key)
        except Exception as error:
            return _Failure(_portable(error))


@dataclass(frozen=True)
class _Collation(Generic[Item, Batch]):
    """The items of a batch joined, or the first error among them; out of a worker in a file."""

    join: Callable[[list[Item]], Batch]
    folder: Path

    def __call__(self, items: list[Any]) -> _Made | _Failure | _Parcel:
        failures = [item for item in items if isinstance(item, _Failure)]
        outcome: _Made | _Failure
        try:
            outcome = failures[0] if failures else _Made(self.join(items))
        except Exception as error:
            outcome = _Failure(_portable(error))
        if not get_worker_info():
            return outcome
        try:
            parcel = _Parcel.packed(outcome, self.folder)
            _note(self.folder, "")
            return parcel
        except Exception as error:
            return _Failure(_portable(error))


def _until_error(batches: Iterable[Sequence[Key]], failures: list[Exception], *, is_sent: bool) -> Iterator[list[Any]]:
    """The keys, pickled where they are sent. They are read ahead, so an error ends them and waits in `failures`."""
    try:
        for batch in batches:
            yield [pickle.dumps(key) if is_sent else key for key in batch]
    except Exception as error:
        failures.append(error)


@dataclass(frozen=True)
class _Start:
    """What a worker does first."""

    folder: Path

    def __call__(self, worker: int) -> None:
        _note(self.folder, "")
        # torch's own watch is on the process that forked the worker, which lives as long as the worker does
        threading.Thread(target=_end_with_parent, args=(self.folder,), daemon=True).start()


def _end_with_parent(folder: Path) -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def _note(folder: Path, text: str) -> None:
    """Write down what this worker is at, "" for nothing."""
    (folder / str(os.getpid())).write_text(text, encoding="utf-8", errors="replace")


def _cause_of_death(dead: Sequence[BaseProcess], folder: Path) -> LooktwiceError:
    notes = {worker: folder / str(worker.pid) for worker in dead}
    rows = {worker: note.read_text(encoding="utf-8") for worker, note in notes.items() if note.exists()}
    # the others were ended by what ended this one, or wait
    worker = next((worker for worker in dead if rows.get(worker)), dead[0])
    code = worker.exitcode or 0
    cause = f"exit code {code}"
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        cause = f"{name}{', as when memory runs out' if code == -signal.SIGKILL else ''}"
    if worker not in rows:
        return ConfigError(
            f"a worker process could not start ({cause}; what it said stands above); use 0 workers, and in a "
            'script of your own start under `if __name__ == "__main__":`'
        )
    if not rows[worker]:
        return ConfigError(f"a worker process died while it waited ({cause}); use fewer workers if memory is short")
    return DataError(
        f"{rows[worker]}: the worker process that was preparing this row died ({cause}); leave the row out, or use "
        "fewer workers if memory is short"
    )


def _portable(error: Exception) -> Exception:
    """The error as it can be sent: a LooktwiceError as it is, any other with its traceback as a note."""
    if isinstance(error, LooktwiceError) or not get_worker_info():
        return error
    trace = f"In a worker process:\n{''.join(traceback.format_exception(error)).rstrip()}"
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(trace)
    error.add_note(trace)
    return error
