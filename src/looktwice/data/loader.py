"""Items prepared ahead of the training loop, in worker processes: opening, resizing, cutting and tokenising.

Each worker has a pipe of its own for tasks, and a socket over which results come back as open files without a name, to
be mapped into memory here without a copy. Nothing is shared between workers, so one that is killed leaves no lock held
and no memory behind, and the parent knows which task it had. The files are not on /dev/shm, whose size containers
limit. A worker takes in tasks while it works, so that the parent, which sends tasks before it reads results, never
waits for a worker that waits for the parent.
"""

from __future__ import annotations

import io
import os
import pickle
import signal
import tempfile
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import forkserver, get_context, reduction
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from queue import SimpleQueue
from threading import Thread
from types import TracebackType
from typing import Any, BinaryIO, Generic, Self, TypeVar

import torch

from looktwice.errors import ConfigError, DataError, LooktwiceError

Task = TypeVar("Task")
Item = TypeVar("Item")

PRELOADED = ["looktwice.data.examples"]
"""What the process imports once from which all workers are forked."""
MOST_AHEAD = 512
"""Items ahead at the most, whatever is asked for: each on its way is an open file, of which a user may have 1,024."""
ALIGNMENT = 64
"""Bytes at whose multiples tensors start in a result."""
SECONDS_TO_STOP = 5.0


def warm_up() -> None:
    """Start the process from which workers are forked, which then imports for seconds beside what goes on here.

    A Loader does this itself; whoever calls it first thing has workers at once when there is something to load.
    """
    get_context("forkserver").set_forkserver_preload(PRELOADED)
    forkserver.ensure_running()


class Loader(Iterator[Item], Generic[Task, Item]):
    """The items `function(task)` of all tasks in order, up to `ahead` (at most 512) prepared before they are asked for.

    `function` and the tasks must pickle; the function is sent once to each of `num_workers` processes, which start here
    and now, forked from a fresh process that has never seen CUDA. Without workers each item is made when it is asked
    for, in this process, the same bit for bit. `tasks` is read in this process, no further than `ahead`.

    An error of `function` or of `tasks` is raised in its item's turn: of a LooktwiceError the same, of any other with
    the worker's traceback as a note. A worker that dies raises a DataError that says `where(task)` of what it was
    working on. After an error, as at the end, the loader is closed. Use it in a `with` block to end it early.
    """

    def __init__(
        self,
        function: Callable[[Task], Item],
        tasks: Iterable[Task],
        *,
        num_workers: int,
        ahead: int,
        where: Callable[[Task], str] = str,
    ) -> None:
        if num_workers < 0 or ahead < 1:
            raise ValueError(f"num_workers {num_workers} and ahead {ahead}: need at least 0 and 1")
        self._function, self._where = function, where
        self._tasks = iter(tasks)
        self._ahead = min(ahead, MOST_AHEAD)
        self._num_tasks = self._num_items = 0
        self._outcomes: dict[int, Any] = {}
        self._is_closed = False
        self._workers: list[_Worker] = []
        self._stop = weakref.finalize(self, _stop_all, self._workers)
        if num_workers:
            warm_up()
            packed = pickle.dumps(function)
            for _ in range(num_workers):
                self._workers.append(_start_worker(packed))

    def __next__(self) -> Item:
        if self._is_closed:
            raise StopIteration
        try:
            return self._next_prepared() if self._workers else self._function(next(self._tasks))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the workers, whatever they are at. May be called again."""
        self._is_closed = True
        self._stop()
        self._outcomes.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _next_prepared(self) -> Item:
        self._hand_out(self._num_items + self._ahead)
        if self._num_items == self._num_tasks:
            raise StopIteration
        while self._num_items not in self._outcomes:
            self._collect()
        outcome = self._outcomes.pop(self._num_items)
        if isinstance(outcome, _Failure):
            raise outcome.error
        self._num_items += 1
        self._hand_out(self._num_items + self._ahead)
        return outcome

    def _hand_out(self, limit: int) -> None:
        """Give the workers tasks until `limit` have been given in all, each to the one with the fewest waiting."""
        while self._num_tasks < limit:
            alive = [worker for worker in self._workers if worker.is_alive]
            if not alive:  # what the last one was working on is an error by now, and nothing comes behind it
                return
            try:
                task = next(self._tasks)
                min(alive, key=lambda worker: len(worker.waiting)).give(self._num_tasks, task)
            except StopIteration:
                return
            except Exception as error:  # of the tasks, or of one that does not pickle
                self._outcomes[self._num_tasks] = _Failure(error)
                self._tasks = iter(())
            self._num_tasks += 1

    def _collect(self) -> None:
        """Wait for one or more workers to report, and take what they report."""
        by_results = {worker.results: worker for worker in self._workers if worker.is_alive}
        for results in wait(list(by_results)):
            worker = by_results[results]  # type: ignore[index]
            try:
                if not worker.is_ready:
                    worker.results.recv_bytes()
                    worker.is_ready = True
                else:
                    outcome = _receive(worker.results)
                    self._outcomes[worker.waiting.popleft()[0]] = outcome
            except (EOFError, OSError):
                worker.is_alive = False
                if worker.waiting:  # its later tasks stand behind this one, where the loader ends
                    number, task = worker.waiting[0]
                    self._outcomes[number] = _Failure(worker.cause_of_death(self._where(task)))


@dataclass(kw_only=True)
class _Worker:
    """A worker seen from the parent: its process, the way of tasks to it and of results from it.

    `waiting` are numbers and tasks it was given, first the one it is working on.
    """

    process: BaseProcess
    tasks: Connection
    results: Connection
    waiting: deque[tuple[int, Any]] = field(default_factory=deque)
    is_ready: bool = False
    is_alive: bool = True

    def give(self, number: int, task: object) -> None:
        packed = pickle.dumps(task)
        self.waiting.append((number, task))
        self.send(packed)

    def send(self, data: bytes) -> None:
        with suppress(OSError):  # it is dead, which is found when its result is awaited
            self.tasks.send_bytes(data)

    def cause_of_death(self, where: str) -> LooktwiceError:
        self.process.join(SECONDS_TO_STOP)
        code = self.process.exitcode
        cause = f"exit code {code}"
        if code is not None and code < 0:
            cause = f"{signal.Signals(-code).name}{', as when memory runs out' if code == -signal.SIGKILL else ''}"
        if not self.is_ready:
            return ConfigError(
                f"a worker process could not start ({cause}; what it said stands above); use 0 workers, and in a "
                'script of your own start under `if __name__ == "__main__":`'
            )
        return DataError(
            f"{where}: the worker process that was preparing this row died ({cause}); leave the row out, "
            "or use fewer workers if memory is short, and go on from the last checkpoint"
        )


@dataclass(frozen=True)
class _Failure:
    error: Exception


def _start_worker(packed_function: bytes) -> _Worker:
    context = get_context("forkserver")
    their_tasks, tasks = context.Pipe(duplex=False)
    results, their_results = context.Pipe()  # an open file travels over a socket only
    process = context.Process(target=_work, args=(their_tasks, their_results), daemon=True, name="looktwice loader")
    process.start()
    their_tasks.close()
    their_results.close()
    worker = _Worker(process=process, tasks=tasks, results=results)
    worker.send(packed_function)
    return worker


def _stop_all(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        worker.process.terminate()
    for worker in workers:
        worker.process.join(SECONDS_TO_STOP)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()
        worker.process.close()
        worker.tasks.close()
        worker.results.close()


def _work(tasks: Connection, results: Connection) -> None:
    """A worker's life: the function, then tasks until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's affair
    torch.set_num_threads(1)
    function = pickle.loads(tasks.recv_bytes())
    waiting: SimpleQueue[bytes | None] = SimpleQueue()
    Thread(target=_take_in, args=(tasks, waiting), daemon=True).start()
    with suppress(BrokenPipeError, ConnectionResetError):
        results.send_bytes(b"ready")
        while (packed_task := waiting.get()) is not None:
            _send(results, packed_task, function)


def _take_in(tasks: Connection, waiting: SimpleQueue[bytes | None]) -> None:
    try:
        while True:
            waiting.put(tasks.recv_bytes())
    except (EOFError, OSError):
        waiting.put(None)


def _send(results: Connection, packed_task: bytes, function: Callable[[Any], Any]) -> None:
    try:
        file, sizes = _written(function(pickle.loads(packed_task)))
    except Exception as error:
        file, sizes = _written(_Failure(_portable(error)))
    with file:  # only sizes and the open file go over the socket
        results.send(sizes)
        reduction.send_handle(results, file.fileno(), None)


def _written(item: object) -> tuple[BinaryIO, list[int]]:
    """A file without a name that holds the parts of a packed item, and their sizes."""
    parts = _pack(item)
    sizes = [len(part) for part in parts]
    places = _places(sizes)
    file = _nameless_file()
    for part, place in zip(parts, places):
        file.seek(place)
        file.write(part)
    file.truncate(places[-1] + sizes[-1])  # a last part of no bytes writes none
    return file, sizes


def _receive(results: Connection) -> Any:
    sizes: list[int] = results.recv()
    handle = reduction.recv_handle(results)
    try:
        places = _places(sizes)
        # not Python's own mmap: it keeps the file open, and files that may be open are few
        mapped = torch.from_file(f"/dev/fd/{handle}", shared=True, size=places[-1] + sizes[-1], dtype=torch.uint8)
    finally:
        os.close(handle)
    view = mapped.numpy().data
    packed, *buffers = [view[place : place + size] for place, size in zip(places, sizes)]
    return pickle.loads(packed, buffers=buffers)


def _pack(item: object) -> list[memoryview]:
    """The pickled item, and apart from it the bytes of its tensors and arrays."""
    file, buffers = io.BytesIO(), list[pickle.PickleBuffer]()
    _Pickler(file, protocol=5, buffer_callback=buffers.append).dump(item)
    return [file.getbuffer(), *(buffer.raw() for buffer in buffers)]


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        if type(value) is torch.Tensor and not value.requires_grad:
            try:
                return torch.from_numpy, (value.numpy(),)
            except (TypeError, RuntimeError):  # a kind that numpy does not know goes torch's own way
                return NotImplemented
        return NotImplemented


def _places(sizes: Sequence[int]) -> list[int]:
    """Where parts of these sizes start in a file, each at a multiple of the alignment."""
    places = [0]
    for size in sizes[:-1]:
        places.append(-(-(places[-1] + size) // ALIGNMENT) * ALIGNMENT)
    return places


def _nameless_file() -> BinaryIO:
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("looktwice"), "w+b")
    return tempfile.TemporaryFile()  # type: ignore[return-value]


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
