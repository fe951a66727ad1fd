"""Items prepared in worker processes: their order, their number ahead, and what becomes of errors and dead workers."""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest
import torch

from looktwice.data.examples import encode_sample
from looktwice.data.loader import Loader
from looktwice.demo.task import DatasetFiles
from looktwice.errors import BoxError, ConfigError, DataError
from looktwice.formats.sample_file import Sample, read_samples
from looktwice.processing.packing import pack
from looktwice.processing.processor import Ovis2_5Processor

BOTH_WAYS = pytest.mark.parametrize("num_workers", [0, 2])


class NoPickle(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(first + second)


def act(task: object) -> object:
    """Does as the task says: dies, raises it, waits for a file, gives a thing back."""
    match task:
        case np.ndarray() | torch.Tensor():
            return task
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case ("exit", int(code)):
            os._exit(code)
        case BaseException():
            raise task
        case "no pickle":
            raise NoPickle("a", "b")
        case "lambda":
            return lambda: None
        case ("note", Path() as folder, int(number)):
            (folder / str(number)).touch()
        case "who":
            return os.getpid()
        case "threads":
            return torch.get_num_threads(), signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        case "sleep":
            time.sleep(60)
        case "same twice":
            tensor = torch.arange(6.0).view(2, 3)
            return [tensor, tensor]
    return task


@pytest.fixture
def load() -> Iterator[Callable[..., Loader]]:
    """Loaders of `act`, closed at the end whatever happens."""
    loaders: list[Loader] = []

    def start(tasks: object, *, num_workers: int = 2, ahead: int = 3, function: Callable = act) -> Loader:
        loaders.append(Loader(function, tasks, num_workers=num_workers, ahead=ahead, where=lambda task: f"<{task}>"))
        return loaders[-1]

    yield start
    for loader in loaders:
        loader.close()


def seconds_until(is_so: Callable[[], bool]) -> None:
    """Waits for what another process does; fails after a time that is long for it."""
    end = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


# -- items


@BOTH_WAYS
@pytest.mark.parametrize("ahead", [1, 4])
def test_items_come_in_order_and_end(num_workers: int, ahead: int, load: Callable[..., Loader]) -> None:
    loader = load(range(9), num_workers=num_workers, ahead=ahead)
    assert list(loader) == list(range(9))
    assert list(loader) == []
    assert active_children() == []


def test_all_workers_work(load: Callable[..., Loader]) -> None:
    assert len(set(load(["who"] * 8, ahead=8))) == 2


def test_a_worker_has_one_thread_and_leaves_ctrl_c_to_the_parent(load: Callable[..., Loader]) -> None:
    assert list(load(["threads"], num_workers=1)) == [(1, True)]


@pytest.mark.parametrize(
    "item",
    [
        torch.zeros(0, 3),
        torch.arange(12, dtype=torch.uint8).view(3, 4).T,
        torch.randn(3, dtype=torch.bfloat16),
        torch.randn(100, 100),
        torch.ones(2, requires_grad=True),
    ],
)
def test_a_tensor_arrives_as_it_was_and_may_be_written(item: torch.Tensor, load: Callable[..., Loader]) -> None:
    [arrived] = load([item], num_workers=1)
    assert (arrived.dtype, arrived.requires_grad) == (item.dtype, item.requires_grad)
    assert torch.equal(arrived, item)
    arrived.detach().fill_(1)


def test_one_picture_shown_twice_arrives_as_one(load: Callable[..., Loader]) -> None:
    [[first, second]] = load(["same twice"])
    assert first is second


def test_many_items_can_be_kept_without_keeping_files_open(load: Callable[..., Loader]) -> None:
    before = len(os.listdir("/dev/fd"))
    kept = list(load([np.full(100, number) for number in range(50)], num_workers=1, ahead=20))
    assert [array[0] for array in kept] == list(range(50))
    assert len(os.listdir("/dev/fd")) < before + 20


def test_workers_prepare_samples_bit_for_bit_as_this_process_does(
    dataset: DatasetFiles, processor: Ovis2_5Processor
) -> None:
    samples: list[Sample] = read_samples(dataset.train, dataset.train.parent)
    encode = partial(encode_sample, processor=processor, max_length=4096)
    with Loader(encode, samples, num_workers=2, ahead=4) as loader:
        here, there = pack([encode(sample) for sample in samples]), pack(list(loader))
    for name, value in here.model_inputs().items():
        assert torch.equal(value, there.model_inputs()[name]), name


# -- how far ahead


@BOTH_WAYS
def test_tasks_are_read_no_further_than_ahead(num_workers: int, load: Callable[..., Loader]) -> None:
    read: list[int] = []

    def tasks() -> Iterator[int]:
        for number in range(100):
            read.append(number)
            yield number

    loader = load(tasks(), num_workers=num_workers, ahead=3)
    for number in range(5):
        assert next(loader) == number
        assert len(read) == number + 1 + (3 if num_workers else 0)


def test_items_are_prepared_before_they_are_asked_for(tmp_path: Path, load: Callable[..., Loader]) -> None:
    loader = load([("note", tmp_path, number) for number in range(10)], ahead=3)
    next(loader)
    seconds_until(lambda: len(list(tmp_path.iterdir())) == 4)
    next(loader)
    seconds_until(lambda: len(list(tmp_path.iterdir())) == 5)


# -- errors


@BOTH_WAYS
@pytest.mark.parametrize(
    "error",
    [DataError("d.jsonl:7: no"), BoxError("outside", "the box lies outside"), KeyError("a"), StopAsyncIteration()],
)
def test_an_error_comes_as_itself_in_its_turn(num_workers: int, error: Exception, load: Callable[..., Loader]) -> None:
    loader = load([1, 2, error, 3], num_workers=num_workers, ahead=4)
    assert [next(loader), next(loader)] == [1, 2]
    with pytest.raises(type(error)) as caught:
        next(loader)
    assert (caught.value.args, str(caught.value)) == (error.args, str(error))
    assert list(loader) == []
    assert active_children() == []


def test_the_traceback_of_the_worker_is_told_where_it_is_no_fault_of_the_user(load: Callable[..., Loader]) -> None:
    with pytest.raises(KeyError) as caught:
        list(load([KeyError("a")]))
    assert "in act\n    raise task" in caught.value.__notes__[0]
    with pytest.raises(RuntimeError, match=r"(?s)In a worker process:.*NoPickle: ab"):
        list(load(["no pickle"]))
    with pytest.raises(Exception, match="lambda"):
        list(load(["lambda"]))


def test_a_task_that_does_not_pickle_waits_for_the_items_before_it(load: Callable[..., Loader]) -> None:
    loader = load([1, 2, lambda: None], ahead=3)
    assert [next(loader), next(loader)] == [1, 2]
    with pytest.raises(Exception, match="lambda"):
        next(loader)


@BOTH_WAYS
def test_an_error_of_the_tasks_waits_for_the_items_before_it(num_workers: int, load: Callable[..., Loader]) -> None:
    def tasks() -> Iterator[int]:
        yield 1
        raise DataError("d.jsonl:2: broken")

    loader = load(tasks(), num_workers=num_workers)
    assert next(loader) == 1
    with pytest.raises(DataError, match=r"^d\.jsonl:2: broken$"):
        next(loader)


# -- workers that die


@pytest.mark.parametrize(
    ("task", "cause"), [("die", r"SIGKILL, as when memory runs out"), (("exit", 3), "exit code 3")]
)
def test_a_worker_that_dies_names_its_row_after_the_items_before_it(
    task: object, cause: str, load: Callable[..., Loader]
) -> None:
    loader = load([0, 1, 2, task, 4, 5, 6], ahead=7)
    assert [next(loader) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DataError) as caught:
        next(loader)
    message = str(caught.value)
    assert message.startswith(f"<{task}>: the worker process that was preparing this row died ({cause}); leave the row")
    assert active_children() == []


def test_a_worker_that_cannot_start_does_not_blame_a_row(load: Callable[..., Loader]) -> None:
    with pytest.raises(ConfigError, match=r"a worker process could not start \(exit code 1;"):
        list(load([1, 2], function=Unreadable()))


class Unreadable:
    def __call__(self, task: object) -> None: ...

    def __reduce__(self) -> tuple:
        return fail, ()


def fail() -> None:
    raise OSError("cannot be read again")


@pytest.mark.parametrize("num_workers", [1, 2])
def test_more_tasks_and_results_than_sockets_hold_do_not_block_either_side(
    num_workers: int, load: Callable[..., Loader]
) -> None:
    task = "x" * 20_000  # much more than a socket holds, in both directions
    assert list(load([task] * 600, num_workers=num_workers, ahead=400)) == [task] * 600


# -- the end


def test_closing_ends_workers_at_once_whatever_they_are_at(load: Callable[..., Loader]) -> None:
    loader = load([0, "sleep", "sleep", "sleep"])
    assert next(loader) == 0
    workers = [worker.process.pid for worker in loader._workers]
    started = time.monotonic()
    loader.close()
    loader.close()
    assert time.monotonic() - started < 30
    for pid in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert list(loader) == []


def test_a_loader_nobody_holds_ends_its_workers() -> None:
    loader = Loader(act, ["sleep"] * 3, num_workers=2, ahead=2)
    del loader
    gc.collect()
    assert active_children() == []


def test_ctrl_c_while_waiting_ends_the_workers(load: Callable[..., Loader]) -> None:
    loader = load(["sleep"])
    old = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            next(loader)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert active_children() == []


@pytest.mark.parametrize(("num_workers", "ahead"), [(-1, 1), (0, 0)])
def test_impossible_numbers_are_refused(num_workers: int, ahead: int) -> None:
    with pytest.raises(ValueError, match=f"num_workers {num_workers} and ahead {ahead}"):
        Loader(act, [], num_workers=num_workers, ahead=ahead)
