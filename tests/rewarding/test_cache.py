"""The cache of rewards: what is asked again, and what is not."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from looktwice.config import GRPOConfig
from looktwice.errors import ConfigError
from looktwice.geometry import Box, Size
from looktwice.rewarding.paying import load_rewards
from looktwice.rewards import Played
from looktwice.rollout.trajectory import ToolCall, Trajectory

CROP = ToolCall(requested=Box(0, 0, 10, 10), box=Box(0, 0, 10, 10), size=Size(56, 56), error=None)
ONE = Played(Trajectory(prompt_ids=[], text="a", calls=[CROP]), "cup", "What?", source="a.jsonl:1")
SOURCE = """
from pathlib import Path
def f(trajectory, solution):
    seen = Path(__file__).with_name("seen.txt")
    seen.write_text((seen.read_text() if seen.exists() else "") + trajectory.text)
    if trajectory.text == "fails":
        raise OSError("busy")
    return {"accuracy": 1, "style": 0.1}
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "my.py").write_text(SOURCE)
    return tmp_path


def pay(folder, *rollouts, cache="memory"):
    function = load_rewards(GRPOConfig(reward=f"{folder / 'my.py'}:f", reward_cache=str(cache)))
    return function([*rollouts])


def asked(folder) -> str:
    return (folder / "seen.txt").read_text()


def test_the_same_text_is_paid_once(folder) -> None:
    first, second = pay(folder, ONE, ONE)
    assert asked(folder) == "a"
    assert first == second
    assert (first.total, first.parts, first.accuracy) == (1.1, {"accuracy": 1.0, "style": 0.1}, 1.0)


def test_another_question_answer_gold_answer_or_call_is_paid_anew(folder) -> None:
    trajectory = ONE.trajectory
    pay(
        folder,
        ONE,
        replace(ONE, source="a.jsonl:2"),
        replace(ONE, question="Who?"),
        replace(ONE, solution=("cup",)),
        replace(ONE, trajectory=replace(trajectory, calls=[])),
        replace(ONE, trajectory=replace(trajectory, text="b")),
    )
    assert asked(folder) == "aaaaab"


def test_a_file_is_known_to_the_next_run_until_the_function_is_changed(folder) -> None:
    for _ in range(2):
        [reward] = pay(folder, ONE, cache=folder / "paid.sqlite")
    assert (asked(folder), reward.total) == ("a", 1.1)
    (folder / "my.py").write_text(SOURCE + "\n")
    pay(folder, ONE, cache=folder / "paid.sqlite")
    assert asked(folder) == "aa"


def test_what_failed_is_asked_again(folder) -> None:
    failing = replace(ONE, trajectory=replace(ONE.trajectory, text="fails"))
    for _ in range(2):
        [reward] = pay(folder, failing, cache=folder / "paid.sqlite")
        assert reward.error == "OSError: busy (my.py:7)"
    assert asked(folder) == "failsfails"


def test_a_cache_serves_the_thread_that_makes_rollouts_ahead(folder) -> None:
    function = load_rewards(GRPOConfig(reward=f"{folder / 'my.py'}:f", reward_cache="memory"))
    with ThreadPoolExecutor(1) as pool:
        [reward] = pool.submit(function, [ONE]).result()
    assert reward.total == 1.1


def test_without_a_cache_each_is_paid(folder) -> None:
    load_rewards(GRPOConfig(reward=f"{folder / 'my.py'}:f"))([ONE, ONE])
    assert asked(folder) == "aa"


def test_a_file_that_is_no_cache_is_refused(folder) -> None:
    with pytest.raises(ConfigError, match="my.py: cannot hold the cache of rewards"):
        pay(folder, ONE, cache=folder / "my.py")


def test_a_function_of_all_trajectories_is_not_cached(folder) -> None:
    (folder / "my.py").write_text("def f(trajectories, solutions): return [1 for _ in trajectories]")
    with pytest.raises(ConfigError, match="takes all trajectories of a step"):
        pay(folder, ONE)
