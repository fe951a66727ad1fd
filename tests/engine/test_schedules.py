"""Random schedules of arrivals, cancellations, preemptions and insertions on the scripted model: every rollout comes
out as it does alone, and the cache is empty at the end."""

from __future__ import annotations

import random
from collections import Counter
from threading import Event

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.scripted import VOCABULARY, Plan, alone, request_for, scripted_engine

from looktwice.engine.interface import Continuation, Segment
from looktwice.errors import ConfigError

IDS = st.integers(0, VOCABULARY - 1)
PLANS = st.lists(st.tuples(st.integers(1, 6), st.lists(IDS, max_size=7)), min_size=1, max_size=4)
REQUESTS = st.tuples(
    st.lists(IDS, min_size=1, max_size=12), st.lists(PLANS, min_size=1, max_size=5), st.integers(0, 20)
)
SCHEDULES = st.fixed_dictionaries(
    {
        "requests": st.lists(REQUESTS, min_size=1, max_size=5),
        "cancelled": st.lists(st.tuples(st.integers(0, 12), st.integers(0, 30)), max_size=3),
        "page_size": st.integers(1, 5),
        "num_pages": st.integers(8, 60),
        "max_rows": st.integers(1, 7),
        "max_pass_tokens": st.integers(1, 30),
    }
)


def plan_of(parts: list[tuple[int, list[int]]], first_budget: int) -> Plan:
    budgets = [first_budget, *(budget for budget, _ in parts[1:])]
    return Plan(budgets=budgets, inserted=[ids for _, ids in parts])


@settings(max_examples=200, deadline=None)
@given(SCHEDULES)
def test_every_rollout_is_as_it_is_alone_whatever_happens_around_it(schedule) -> None:
    engine = scripted_engine(
        max_rows=schedule["max_rows"],
        page_size=schedule["page_size"],
        cache_tokens=schedule["page_size"] * schedule["num_pages"],
        max_pass_tokens=schedule["max_pass_tokens"],
    )
    arrivals = []
    for seed, (prompt, parts, start) in enumerate(schedule["requests"]):
        plans = [plan_of(one, parts[0][0][0]) for one in parts]
        arrivals.append((start, request_for(prompt, plans, seed=seed)))
    cancelled = {number: step for number, step in schedule["cancelled"]}
    requests = [request for _, request in arrivals]
    step, is_busy = 0, True
    with engine.ready():
        while arrivals or is_busy:
            for _, request in [arrival for arrival in arrivals if arrival[0] <= step]:
                engine.submit(request)
            arrivals = [arrival for arrival in arrivals if arrival[0] > step]
            for number in [number for number, when in cancelled.items() if when == step]:
                engine.cancel(number)
            is_busy = engine.step()
            assert engine.cache.num_used <= schedule["num_pages"]
            assert len(engine.scheduler.live) <= schedule["max_rows"]
            step += 1
            assert step < 1500, "it does not come to an end"
    for request in requests:
        for place, plan in enumerate(request.drivers):
            expected = alone(request, place)
            assert plan.error is None and plan.num_ended == 1
            if plan.stops[-1] == "length":
                assert plan.ids == expected
            else:
                assert plan.stops[-1] in ("cancelled", "no_room")
                assert plan.ids == expected[: len(plan.ids)]
            if plan.stops[-1] == "no_room":  # only what does not fit alone, beside a page that is copied
                whole = len(request.prompt) + len(expected) - 1
                assert engine.cache.pages_for(whole) + 1 > schedule["num_pages"]
    assert not engine.cache.holders and not engine.cache.num_bytes
    assert not engine.scheduler.prompts and not engine.scheduler.live and not engine.scheduler.waiting


def test_rows_that_do_not_fit_together_give_way_and_come_out_the_same() -> None:
    engine = scripted_engine(max_rows=4, page_size=2, cache_tokens=40)
    plans = [Plan(budgets=[16]) for _ in range(4)]
    requests = [request_for([number, 1, 2], [plan], seed=number) for number, plan in enumerate(plans)]
    engine.run(requests)
    assert engine.stats.num_preemptions > 0
    assert [plan.ids for plan in plans] == [alone(request, 0) for request in requests]


def test_a_rollout_longer_than_the_cache_ends_alone_and_says_so() -> None:
    engine = scripted_engine(max_rows=4, page_size=2, cache_tokens=12)
    long, short = Plan(budgets=[30]), Plan(budgets=[4])
    engine.run([request_for([1, 2, 3], [long], seed=0), request_for([4], [short], seed=1)])
    assert (long.stops, short.stops) == (["no_room"], ["length"])
    assert len(long.ids) == 10


def test_a_row_does_not_give_way_to_a_prompt_that_gave_way_to_it() -> None:
    engine = scripted_engine(max_rows=2, page_size=1, cache_tokens=14, max_pass_tokens=1)
    alone_in_time, siblings = Plan(budgets=[13]), [Plan(budgets=[2]) for _ in range(2)]
    engine.submit(request_for([1], [alone_in_time], seed=0))
    engine.step()
    engine.submit(request_for([2] * 10, siblings, seed=1))
    while engine.step():
        pass
    assert [plan.stops for plan in (alone_in_time, *siblings)] == [["length"]] * 3


def test_siblings_fit_where_one_of_them_does_alone() -> None:
    for size in (1, 2, 3):
        engine = scripted_engine(page_size=4, cache_tokens=20, max_rows=4)
        group = [Plan(budgets=[15]) for _ in range(size)]
        engine.run([request_for([1] * 6, group, seed=0)])
        assert [plan.stops for plan in group] == [["length"]] * size


def test_a_rollout_cancelled_as_soon_as_it_came_is_cancelled() -> None:
    engine = scripted_engine()
    plan = Plan(budgets=[50])
    hear = engine._hear_replies

    def from_another_thread() -> None:
        if not plan.stops and not engine._rows:
            engine.cancel(*engine.submit(request_for([1], [plan], seed=0)))
        hear()

    engine._hear_replies = from_another_thread  # type: ignore[method-assign]
    while engine.step():
        pass
    assert plan.stops == ["cancelled"] and len(plan.ids) <= 1


@pytest.mark.parametrize("where", ["hear", "respond"])
def test_an_interrupted_engine_is_empty_and_can_be_used_again(where) -> None:
    class Interrupted(Plan):
        def hear(self, token: int, logprob: float) -> None:
            if where == "hear":
                raise KeyboardInterrupt

        def respond(self, segment: Segment) -> None:
            raise KeyboardInterrupt

    engine = scripted_engine(max_rows=4)
    plans = [Interrupted(budgets=[2]), Plan(budgets=[9]), Plan(budgets=[9])]
    with pytest.raises(KeyboardInterrupt):
        engine.run([request_for([1, 2, 3], plans, seed=0)])
    assert not engine._rows and not engine.cache.holders and not engine.scheduler.prompts
    after = Plan(budgets=[3])
    engine.run([request_for([1, 2], [after], seed=1)])
    assert after.stops == ["length"]


def test_an_error_of_the_model_fails_the_rows_of_its_pass_alone() -> None:
    engine = scripted_engine(max_rows=2)
    plain, calls = engine.runner.forward, []

    def broken_once(feeds):
        calls.append(len(feeds))
        if len(calls) == 2:
            raise RuntimeError("no memory")
        return plain(feeds)

    engine.runner.forward = broken_once  # type: ignore[method-assign]
    plans = [Plan(budgets=[3]) for _ in range(3)]
    engine.run([request_for([1, number], [plan], seed=0) for number, plan in enumerate(plans)])
    assert [str(plan.error) for plan in plans] == ["no memory", "no memory", "None"]
    assert plans[2].stops == ["length"] and not engine.cache.holders


def test_time_is_up_for_a_rollout_that_waits_for_its_driver_too() -> None:
    released = Event()

    class Slow(Plan):
        def respond(self, segment: Segment) -> Continuation | None:
            if segment.stop == "length":
                released.wait(20)
            return super().respond(segment)

    engine = scripted_engine(max_rows=1, num_threads=1)
    slow, quick = Slow(budgets=[1, 5], inserted=[[1]]), Plan(budgets=[1])
    engine.submit(request_for([1], [slow], seed=0, max_seconds=0.05))
    engine.submit(request_for([2], [quick], seed=1))
    while engine.step():
        if quick.heard:  # the slot was free although the driver had not replied
            released.set()
    assert slow.stops == ["length", "seconds"] and quick.stops == ["length"]


def test_what_cannot_be_played_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="no ids"):
        scripted_engine().submit(request_for([], [Plan(budgets=[1])], seed=0))
    with pytest.raises(ValueError, match="outside the vocabulary"):
        scripted_engine().submit(request_for([VOCABULARY], [Plan(budgets=[1])], seed=0))
    for setting in ({"max_rows": 0}, {"cache_tokens": 3, "page_size": 4}):
        with pytest.raises(ConfigError, match=next(iter(setting))):
            scripted_engine(**setting)


def test_a_long_prompt_is_fed_in_chunks_while_others_decode() -> None:
    engine = scripted_engine(max_rows=2, page_size=4, max_pass_tokens=6)
    quick, slow = Plan(budgets=[10]), Plan(budgets=[1])
    engine.submit(request_for([1], [quick], seed=0))
    engine.submit(request_for([2] * 30, [slow], seed=1))
    heard_when_slow_began = None
    with engine.ready():
        while engine.step():
            if slow.heard and heard_when_slow_began is None:
                heard_when_slow_began = len(quick.heard)
    assert heard_when_slow_began is not None and 4 <= heard_when_slow_began <= 8


def test_ten_thousand_rollouts_pass_and_leave_nothing_behind() -> None:
    draws = random.Random(0)
    engine = scripted_engine(max_rows=32, page_size=4, cache_tokens=1200)
    plans: list[Plan] = []
    peak = 0
    with engine.ready():
        while len(plans) < 10_000 or engine.step():
            if len(plans) < 10_000 and engine.stats.num_waiting < 40:
                size = draws.randint(1, 8)
                budget = draws.randint(1, 4)
                group = [Plan(budgets=[budget, 1][: draws.randint(1, 2)], inserted=[[1, 2]]) for _ in range(size)]
                plans += group
                engine.submit(request_for([draws.randrange(VOCABULARY)] * draws.randint(1, 20), group, seed=len(plans)))
            engine.step()
            peak = max(peak, engine.cache.num_used)
    assert Counter(plan.num_ended for plan in plans) == {1: len(plans)}
    assert all(plan.stops == ["length"] * len(plan.budgets) for plan in plans)
    assert peak <= 300 and not engine.cache.holders and not engine.cache.num_bytes
    assert engine._rows == {} and engine.stats.num_finished == len(plans)


@pytest.mark.parametrize("when", range(6))
def test_a_cancelled_rollout_frees_its_slot_within_one_step(when) -> None:
    engine = scripted_engine(max_rows=1)
    first, second = Plan(budgets=[50]), Plan(budgets=[2])
    [number] = engine.submit(request_for([1, 2], [first], seed=0))
    engine.submit(request_for([3], [second], seed=1))
    with engine.ready():
        for _ in range(when):
            engine.step()
        engine.cancel(number)
        engine.step()
        assert (first.stops, len(first.ids)) == (["cancelled"], when)
        assert len(second.heard) == 1
        while engine.step():
            pass
    assert second.stops == ["length"]
