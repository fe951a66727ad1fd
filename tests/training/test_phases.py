"""Where the time of a step goes."""

from __future__ import annotations

import pytest

from looktwice.training import phases as phases_module
from looktwice.training.distributed import World
from looktwice.training.phases import Phases


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the clock shows; a test sets it."""
    now = [0.0]
    monkeypatch.setattr(phases_module.time, "perf_counter", lambda: now[0])
    return now


@pytest.mark.parametrize(("is_sampled_here", "idle"), [(True, 0.4), (False, 0.6)])
def test_what_is_neither_sampling_here_nor_training_is_idle(is_sampled_here, idle, clock) -> None:
    phases = Phases()
    for phase, seconds in (("rollout", 2), ("reward", 3), ("update", 4)):
        with phases.during(phase):
            clock[0] += seconds
    clock[0] += 1
    assert phases.take(is_sampled_here=is_sampled_here) == pytest.approx(
        {"time/rollout_s": 2, "time/reward_s": 3, "time/update_s": 4, "time/idle_share": idle}
    )


def test_what_was_taken_is_not_taken_again(clock) -> None:
    phases = Phases()
    with phases.during("update"):
        clock[0] += 1
    phases.take()
    with phases.during("saving"):
        clock[0] += 2
    assert phases.take() == {"time/saving_s": 2, "time/idle_share": 1}


def test_what_a_process_waits_for_others_in_a_phase_is_none_of_it_and_times_are_means_of_all(clock) -> None:
    class OfTwo(World):
        size = 2

        def gather(self, items):
            return [*items, *((name, value + 2) for name, value in items)]

    world = OfTwo()
    phases = Phases(world)
    with phases.during("update"):
        clock[0] += 4
        world.waited += 1
    taken = phases.take()
    assert (taken["time/update_s"], taken["time/waiting_s"], taken["time/idle_share"]) == (4, 2, 1.25)
    assert world.waited == 0


def test_phases_of_rollouts_made_ahead_are_added(clock) -> None:
    phases, ahead = Phases(), Phases()
    with ahead.during("rollout"):
        clock[0] += 3
    phases.add(ahead)
    assert phases.take() == {"time/rollout_s": 3, "time/idle_share": 0} and not ahead.seconds


def test_waiting_for_samples_has_its_share_of_the_step_as_in_stage_1(clock) -> None:
    phases = Phases()
    with phases.during("data"):
        clock[0] += 1
    clock[0] += 3
    assert phases.take()["time/data_wait_share"] == 0.25


def test_a_phase_that_fails_has_taken_its_time_too(clock) -> None:
    phases = Phases()
    with pytest.raises(ValueError), phases.during("eval"):
        clock[0] += 1
        raise ValueError
    assert phases.take()["time/eval_s"] == 1
