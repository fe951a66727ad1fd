"""Who is late is told with step and phase, and one failure ends all."""

from __future__ import annotations

import pytest
from torch.distributed import HashStore

from looktwice.training.watchdog import SAVING, START, Place, Watchdog, told


@pytest.fixture
def dogs() -> list[Watchdog]:
    """Of three processes, all of them in the data of step 2."""
    store = HashStore()
    dogs = [Watchdog(store, rank, 3, timeout=60) for rank in range(3)]
    for dog in dogs:
        dog.at("data", 2)
        assert dog.look() is None
    return dogs


def wait(dog: Watchdog, seconds: float) -> str | None:
    """What the watchdog says when its process has stood still for so long."""
    dog.since -= seconds
    return dog.look()


def test_a_process_that_does_not_arrive_is_told_with_step_and_phase(dogs) -> None:
    for dog in dogs[:2]:
        dog.arrive()
        assert wait(dog, 59) is None
    assert wait(dogs[0], 2) == (
        "rank 0 (at step 2, data) has waited 61 s for rank 2 (at step 2, data); look at what happens there, or raise "
        "--process_timeout"
    )


def test_the_first_to_fail_tells_it_and_the_others_end_silently(dogs) -> None:
    assert dogs[1].is_first_to_fail() and not dogs[2].is_first_to_fail()
    assert [dog.look() for dog in dogs] == ["", "", ""]


def test_nobody_is_late_who_is_as_far_as_the_others(dogs) -> None:
    assert [wait(dog, 1000) for dog in dogs] == [None] * 3


@pytest.mark.parametrize("phase", [START, SAVING])
def test_nobody_is_late_who_loads_or_saves(phase) -> None:
    slow, fast = (Watchdog(store, rank, 2, timeout=60) for store in [HashStore()] for rank in range(2))
    for dog in (slow, fast):
        dog.at(phase, 2)
        dog.look()
    fast.at("data", 3)
    assert wait(fast, 1000) is None
    slow.at("data", 3)
    slow.look()
    fast.arrive()
    assert wait(fast, 1000)


def test_the_thread_ends_the_process_when_another_has_failed() -> None:
    store, reasons = HashStore(), list[str]()
    dog = Watchdog(store, 0, 2, timeout=0.01, end=reasons.append)
    dog.start()
    Watchdog(store, 1, 2, timeout=60).is_first_to_fail()
    dog.thread.join(10)
    assert reasons == [""]


def test_of_many_processes_the_first_are_told() -> None:
    places = {rank: Place(1, "data", 3) for rank in range(6)}
    assert told(places).endswith("rank 3 (at step 3, data) and 2 more")
    assert told({7: Place(0, START, 0)}) == "rank 7 (starting)"
