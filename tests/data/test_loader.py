"""Items prepared in worker processes: their order, their number ahead, and what becomes of errors and dead workers."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from multiprocessing import active_children, forkserver
from operator import itemgetter
from pathlib import Path

import numpy as np
import pytest
import torch

from looktwice.data.examples import Encoder, PackedSamples, Packer
from looktwice.data.loader import prepare_batches
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
        case ("slowly", inner):
            time.sleep(1)  # what was finished before is on its way by then
            return act(inner)
        case "lambda":
            return lambda: None
        case ("note", Path() as folder, int(number)):
            (folder / str(number)).touch()
        case "who":
            return os.getpid()
        case "threads":
            return torch.get_num_threads(), signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])
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
        started.append(prepare_batches(function, batches, **options))
        return started[-1]

    yield start
    for items in started:
        items.close()


def join_numbers(items: list) -> list:
    for item in items:
        if not isinstance(item, int):
            raise DataError(f"no number: {item}")
    return items


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


def test_workers_go_on_when_a_scheduler_ends_the_job(load: Load) -> None:
    items = load(range(50), num_workers=1)
    first = next(items)
    [worker] = active_children()
    server = forkserver._forkserver._forkserver_pid
    for process in (worker.pid, server):
        os.kill(process, signal.SIGTERM)
    assert [first, *items] == list(range(50))
    assert Path(f"/proc/{server}/stat").read_text().split()[2] in "RS"


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


def test_many_batches_can_be_kept_without_keeping_files_open(load: Load) -> None:
    before = len(os.listdir("/dev/fd"))
    rows = [pack([Example(input_ids=[number, 1], loss_mask=[False, True])]) for number in range(50)]
    kept = list(load(rows, num_workers=1))
    assert [row.input_ids.tolist() for row in kept] == [[[number, 1]] for number in range(50)]
    assert len(os.listdir("/dev/fd")) < before + 20


@BOTH_WAYS
def test_batches_are_joined(num_workers: int) -> None:
    batches = prepare_batches(act, [(1, 2), (3,)], join=tuple, num_workers=num_workers)
    assert list(batches) == [(1, 2), (3,)]


def test_workers_prepare_samples_bit_for_bit_as_this_process_does(
    dataset: DatasetFiles, processor: Ovis2_5Processor
) -> None:
    samples: list[Sample] = read_samples(dataset.train, dataset.train.parent)
    encoder = Encoder(processor=processor, max_length=4096, length_policy="error")
    packer = Packer(max_tokens_per_row=10_000)
    here, there = (
        [row for batch in prepare_batches(encoder, [samples], join=packer, num_workers=workers) for row in batch.rows]
        for workers in (0, 2)
    )
    assert len(here) == len(there) == 1
    for name, value in here[0].model_inputs().items():
        other = there[0].model_inputs()[name]
        assert (value is None and other is None) or torch.equal(value, other), name


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
    with pytest.raises(Exception, match="lambda"):
        list(load(["lambda"]))


def test_a_task_that_does_not_pickle_waits_for_the_items_before_it(load: Load) -> None:
    loader = load([1, 2, lambda: None])
    assert [next(loader), next(loader)] == [1, 2]
    with pytest.raises(Exception, match="lambda"):
        next(loader)


@BOTH_WAYS
def test_an_error_of_joining_comes_as_itself_in_its_turn(num_workers: int) -> None:
    batches = prepare_batches(act, [(1, 2), (3, "never")], join=join_numbers, num_workers=num_workers)
    assert next(batches) == [1, 2]
    with pytest.raises(DataError, match=r"^no number: never$"):
        next(batches)


def test_an_error_of_the_tasks_need_not_pickle(load: Load) -> None:
    def tasks() -> Iterator[int]:
        yield 1
        raise NoPickle("a", "b")

    loader = load(tasks())
    assert next(loader) == 1
    with pytest.raises(NoPickle, match="^ab$"):
        next(loader)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_nothing_is_left_in_the_temporary_folder(
    num_workers: int, load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    loader = load(range(9), num_workers=num_workers)
    next(loader)
    loader.close()
    assert list(tmp_path.glob("looktwice-*")) == []


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
    ("task", "cause"),
    [("die", r"SIGKILL, as when memory runs out"), (("exit", 3), "exit code 3"), (("exit", 0), "exit code 0")],
)
def test_a_worker_that_dies_names_the_row_it_was_at(task: object, cause: str, load: Load) -> None:
    loader = load([0, 1, 2, ("slowly", task), 4, 5, 6])
    assert [next(loader) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DataError) as caught:
        next(loader)
    message = str(caught.value)
    row = place_of(("slowly", task))
    assert message.startswith(f"{row}: the worker process that was preparing this row died ({cause}); leave the row")
    assert active_children() == []


@pytest.mark.parametrize("victim", [0, 1])
def test_a_worker_killed_while_it_waits_blames_no_row_and_hangs_nobody(victim: int, load: Load) -> None:
    # results larger than a pipe holds wait to be fetched, as while a training step runs
    loader = load([np.zeros(3_000_000, dtype=np.uint8)] * 20)
    next(loader)
    time.sleep(1)
    os.kill(sorted(worker.pid for worker in active_children())[victim], signal.SIGKILL)
    with pytest.raises(
        ConfigError, match=r"a worker process died while it waited \(SIGKILL, as when memory runs out\)"
    ):
        list(loader)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_the_process_that_asks(how: signal.Signals, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import time\n"
        "from multiprocessing import active_children\n"
        "from operator import itemgetter\n"
        "from looktwice.data.loader import prepare_batches\n"
        'if __name__ == "__main__":\n'
        "    batches = prepare_batches(abs, ([n] for n in range(99)), join=itemgetter(0), num_workers=1)\n"
        "    next(batches)\n"
        "    print(*[worker.pid for worker in active_children()], flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as asking:
        assert asking.stdout is not None
        [pid] = map(int, asking.stdout.readline().split())
        asking.send_signal(how)
    seconds_until(lambda: not is_alive(pid))


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the DataLoader start its own thread, which pins; that itself is left out."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda *_: None)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda *_: 0)


class Pinnable:
    """A batch that says whether it was pinned."""

    def __init__(self, items: list) -> None:
        self.items, self.is_pinned = items, False

    def pin_memory(self) -> Pinnable:
        self.is_pinned = True
        return self


@pytest.mark.usefixtures("beside_a_gpu")
def test_beside_a_gpu_batches_are_pinned_and_errors_still_come_in_their_turn() -> None:
    large = np.zeros(3_000_000, dtype=np.uint8)
    keys = [[large], [large], [DataError("d.jsonl:3: no")], *[[large]] * 20]
    batches = prepare_batches(act, keys, join=Pinnable, num_workers=2, pin_memory=True)
    assert [next(batches).is_pinned for _ in range(2)] == [True, True]
    started = time.monotonic()
    with pytest.raises(DataError, match=r"^d\.jsonl:3: no$"):
        next(batches)
    assert time.monotonic() - started < 30
    assert active_children() == []


def test_rows_are_pinned_by_what_holds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)
    row = pack([Example(input_ids=[1, 2], loss_mask=[False, True])])
    [pinned] = PackedSamples([row], []).pin_memory().rows
    assert pinned.input_ids.tolist() == [[2, 3]] and pinned.examples == row.examples


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
    loader = prepare_batches(act, [[0], ["sleep"], ["sleep"]], join=itemgetter(0), num_workers=2)
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
