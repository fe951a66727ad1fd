"""Where the time of a step goes."""

from __future__ import annotations

import pytest

from looktwice.training import phases as phases_module
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
        with phases.of(phase):
            clock[0] += seconds
    clock[0] += 1
    assert phases.take(is_sampled_here=is_sampled_here) == pytest.approx(
        {"time/rollout_s": 2, "time/reward_s": 3, "time/update_s": 4, "time/idle_share": idle}
    )


def test_what_was_taken_is_not_taken_again(clock) -> None:
    phases = Phases()
    with phases.of("update"):
        clock[0] += 1
    phases.take()
    with phases.of("saving"):
        clock[0] += 2
    assert phases.take() == {"time/saving_s": 2, "time/idle_share": 1}


def test_a_phase_that_fails_has_taken_its_time_too(clock) -> None:
    phases = Phases()
    with pytest.raises(ValueError), phases.of("eval"):
        clock[0] += 1
        raise ValueError
    assert phases.take()["time/eval_s"] == 1
