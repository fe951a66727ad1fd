"""Items prepared in worker processes: their order, their number ahead, and what becomes of errors and dead workers."""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from multiprocessing import active_children
from operator import itemgetter
from pathlib import Path

import numpy as np
import pytest
import torch

from looktwice.data.examples import Encoder, Packer
from looktwice.data.loader import prepared
from looktwice.demo.task import DatasetFiles
from looktwice.errors import BoxError, ConfigError, DataError
from looktwice.formats.sample_file import Sample, read_samples
from looktwice.processing.packing import pack
from looktwice.processing.processor import Example, Ovis2_5Processor

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


Load = Callable[..., Generator]


@pytest.fixture
def load() -> Iterator[Load]:
    """What `act` makes of tasks, each a batch of its own; ended at the end whatever happens."""
    started: list[Generator] = []

    def start(tasks: Iterable, *, num_workers: int = 2, function: Callable = act) -> Generator:
        batches = ([task] for task in tasks)
        options = {"join": itemgetter(0), "num_workers": num_workers, "where": place_of}
        started.append(prepared(function, batches, **options))
        return started[-1]

    yield start
    for items in started:
        items.close()


def place_of(task: object) -> str:
    return f"<{task}>"


def seconds_until(is_so: Callable[[], bool]) -> None:
    """Waits for what another process does; fails after a time that is long for it."""
    end = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


# -- items


@BOTH_WAYS
def test_items_come_in_order_and_end(num_workers: int, load: Load) -> None:
    loader = load(range(9), num_workers=num_workers)
    assert list(loader) == list(range(9))
    assert list(loader) == []
    assert active_children() == []


def test_all_workers_work(load: Load) -> None:
    assert len(set(load(["who"] * 8))) == 2


def test_a_worker_has_one_thread_and_leaves_ctrl_c_to_the_parent(load: Load) -> None:
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
def test_a_tensor_arrives_as_it_was_and_may_be_written(item: torch.Tensor, load: Load) -> None:
    [arrived] = load([item], num_workers=1)
    assert (arrived.dtype, arrived.requires_grad) == (item.dtype, item.requires_grad)
    assert torch.equal(arrived, item)
    arrived.detach().fill_(1)


def test_one_image_shown_twice_arrives_as_one(load: Load) -> None:
    [[first, second]] = load(["same twice"])
    assert first is second


def test_rows_travel_as_arrays_and_open_no_file(load: Load) -> None:
    before = len(os.listdir("/dev/fd"))
    rows = [pack([Example(input_ids=[number, 1], loss_mask=[False, True])]) for number in range(50)]
    kept = list(load(rows, num_workers=1))
    assert [row.input_ids.tolist() for row in kept] == [[[number, 1]] for number in range(50)]
    assert len(os.listdir("/dev/fd")) < before + 20


@BOTH_WAYS
def test_batches_are_joined(num_workers: int) -> None:
    batches = prepared(act, [(1, 2), (3,)], join=tuple, num_workers=num_workers)
    assert list(batches) == [(1, 2), (3,)]


def test_workers_prepare_samples_bit_for_bit_as_this_process_does(
    dataset: DatasetFiles, processor: Ovis2_5Processor
) -> None:
    samples: list[Sample] = read_samples(dataset.train, dataset.train.parent)
    encoder = Encoder(processor=processor, max_length=4096, length_policy="error")
    packer = Packer(max_tokens_per_row=10_000)
    here, there = (
        [row for batch in prepared(encoder, [samples], join=packer, num_workers=workers) for row in batch.rows]
        for workers in (0, 2)
    )
    assert len(here) == len(there) == 1
    for name, value in here[0].model_inputs().items():
        assert torch.equal(value, there[0].model_inputs()[name]), name


def test_the_numbers_that_others_draw_stay_the_same(load: Load) -> None:
    torch.manual_seed(0)
    expected = torch.rand(())
    torch.manual_seed(0)
    assert list(load([1])) == [1]
    assert torch.rand(()) == expected


# -- how far ahead


@BOTH_WAYS
def test_tasks_are_read_no_further_than_two_a_worker_ahead(num_workers: int, load: Load) -> None:
    read: list[int] = []

    def tasks() -> Iterator[int]:
        for number in range(100):
            read.append(number)
            yield number

    loader = load(tasks(), num_workers=num_workers)
    for number in range(5):
        assert next(loader) == number
        assert len(read) == number + 1 + 2 * num_workers


def test_items_are_prepared_before_they_are_asked_for(tmp_path: Path, load: Load) -> None:
    loader = load([("note", tmp_path, number) for number in range(10)])
    next(loader)
    seconds_until(lambda: len(list(tmp_path.iterdir())) == 5)
    next(loader)
    seconds_until(lambda: len(list(tmp_path.iterdir())) == 6)


# -- errors


@BOTH_WAYS
@pytest.mark.parametrize(
    "error",
    [DataError("d.jsonl:7: no"), BoxError("outside", "the box lies outside"), KeyError("a"), StopAsyncIteration()],
)
def test_an_error_comes_as_itself_in_its_turn(num_workers: int, error: Exception, load: Load) -> None:
    loader = load([1, 2, error, 3], num_workers=num_workers)
    assert [next(loader), next(loader)] == [1, 2]
    with pytest.raises(type(error)) as caught:
        next(loader)
    assert (caught.value.args, str(caught.value)) == (error.args, str(error))
    assert list(loader) == []
    assert active_children() == []


def test_the_traceback_of_the_worker_is_told_where_it_is_no_fault_of_the_user(load: Load) -> None:
    with pytest.raises(KeyError) as caught:
        list(load([KeyError("a")]))
    assert "in act\n    raise task" in caught.value.__notes__[0]
    with pytest.raises(RuntimeError, match=r"(?s)In a worker process:.*NoPickle: ab"):
        list(load(["no pickle"]))


@BOTH_WAYS
def test_an_error_of_the_tasks_waits_for_the_items_before_it(num_workers: int, load: Load) -> None:
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
def test_a_worker_that_dies_names_the_row_it_was_at(task: object, cause: str, load: Load) -> None:
    loader = load([0, 1, 2, task, 4, 5, 6])
    seen = []
    with pytest.raises(DataError) as caught:
        for item in loader:
            seen.append(item)
    # what it had finished may die with it on its way here, but nothing comes out of turn
    assert seen == [0, 1, 2][: len(seen)]
    message = str(caught.value)
    assert message.startswith(f"<{task}>: the worker process that was preparing this row died ({cause}); leave the row")
    assert active_children() == []


def test_a_worker_that_cannot_start_does_not_blame_a_row(load: Load) -> None:
    with pytest.raises(ConfigError, match=r"a worker process could not start \(exit code 1;"):
        list(load([1, 2], function=Unreadable()))


class Unreadable:
    def __call__(self, task: object) -> None: ...

    def __reduce__(self) -> tuple:
        return fail, ()


def fail() -> None:
    raise OSError("cannot be read again")


@pytest.mark.parametrize("num_workers", [1, 2])
def test_more_tasks_and_results_than_sockets_hold_do_not_block_either_side(num_workers: int, load: Load) -> None:
    task = "x" * 20_000  # much more than a socket holds, in both directions
    assert list(load([task] * 600, num_workers=num_workers)) == [task] * 600


# -- the end


def test_closing_ends_workers_at_once_whatever_they_are_at(load: Load) -> None:
    loader = load([0, "sleep", "sleep", "sleep"])
    assert next(loader) == 0
    workers = [worker.pid for worker in active_children()]
    started = time.monotonic()
    loader.close()
    loader.close()
    assert time.monotonic() - started < 30
    assert len(workers) == 2
    for pid in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert list(loader) == []


def test_items_nobody_asks_for_any_more_end_the_workers() -> None:
    loader = prepared(act, [[0], ["sleep"], ["sleep"]], join=itemgetter(0), num_workers=2)
    assert next(loader) == 0
    del loader
    gc.collect()
    assert active_children() == []


def test_ctrl_c_while_waiting_ends_the_workers(load: Load) -> None:
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
