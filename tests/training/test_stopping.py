"""What Ctrl-C and SIGTERM do while a run is at work."""

from __future__ import annotations

import signal
import threading

import pytest

from looktwice.training.distributed import World
from looktwice.training.stopping import Interrupted, StopRequest, stop_requests


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_waits_for_the_step_and_says_so(number, capfd) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as stopped, stop_requests() as stop:
        stop.arm()
        stop.agree(World().gather)
        stop.heed(is_done=False)
        signal.raise_signal(number)
        stop.heed(is_done=False)  # others do not know of it yet
        stop.agree(World().gather)
        stop.heed(is_done=True)
    assert (stopped.value.number, stopped.value.is_done) == (number, True)
    assert signal.getsignal(number) is before
    assert capfd.readouterr().err == "\nstopping when this step is finished and saved; Ctrl-C again stops at once\n"


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_ctrl_c_after_it_stops_at_once(first) -> None:
    with pytest.raises(KeyboardInterrupt), stop_requests() as stop:
        stop.arm()
        signal.raise_signal(first)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("it went on")


def test_before_the_first_step_a_signal_stops_at_once() -> None:
    with pytest.raises(Interrupted), stop_requests():
        signal.raise_signal(signal.SIGTERM)


def test_what_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_requests() as stop:
            stop.arm()
            signal.raise_signal(signal.SIGINT)
            assert stop.number is None
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_a_thread_signals_are_left_alone() -> None:
    outcome: list[object] = []

    def work() -> None:
        with stop_requests() as stop:
            outcome.append(stop.number)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert outcome == [None]


def test_a_process_stops_for_the_signal_of_another() -> None:
    stop = StopRequest()
    stop.agree(lambda own: [*own, signal.SIGTERM])
    with pytest.raises(Interrupted) as stopped:
        stop.heed(is_done=False)
    assert (stop.number, stopped.value.number) == (None, signal.SIGTERM)


def test_one_ctrl_c_may_reach_a_process_of_several_twice_and_rank_0_alone_tells(monkeypatch, capfd) -> None:
    torchrun = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    with stop_requests() as stop:
        stop.arm()
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    assert stop.number == signal.SIGINT
    assert capfd.readouterr().err == ""
