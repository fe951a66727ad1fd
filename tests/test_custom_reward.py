"""A user's own reward: what it may give, and that nothing it does ends a run without a word."""

from __future__ import annotations

import asyncio
import math
import re
import time
from pathlib import Path

import pytest

from looktwice.config import GRPOConfig
from looktwice.custom_reward import CustomReward
from looktwice.errors import ConfigError
from looktwice.geometry import Box, Size
from looktwice.rewarding.paying import load_rewards
from looktwice.rewards import Played, Reward
from looktwice.rollout.trajectory import ToolCall, Trajectory


def rollout(text, *calls):
    return Trajectory(prompt_ids=[], text=text, calls=list(calls))


def paid(reward, trajectory, solution) -> Reward:
    [found] = reward([Played(trajectory, solution)])
    return found


def load_reward(spec):
    return load_rewards(GRPOConfig(reward=spec))


def write_rewards(tmp_path, source):
    path = tmp_path / "my_rewards.py"
    path.write_text(source)
    return path


def test_user_reward_gets_the_trajectory_and_the_solution(tmp_path):
    crop = ToolCall(requested=Box(1, 2, 3, 4), box=Box(1, 2, 3, 4), size=Size(192, 128), error=None)
    path = write_rewards(
        tmp_path, "def f(trajectory, solution):\n    return len(trajectory.calls) + (solution == 'STOP')"
    )
    reward = paid(load_reward(f"{path}:f"), rollout("", crop), "STOP")
    assert (reward.total, reward.error, reward.parts) == (2.0, None, {})
    assert reward.accuracy == 2.0


@pytest.mark.parametrize(
    ("value", "error", "line"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero", 2),
        ("None", "TypeError: returned NoneType, not a number", 1),
        ("'1.0'", "TypeError: returned str, not a number", 1),
        ("float('nan')", "ValueError: returned nan, not a finite number", 1),
        ("float('inf')", "ValueError: returned inf, not a finite number", 1),
        ("10 ** 400", "OverflowError: int too large to convert to float", 1),
    ],
)
def test_failed_user_reward_names_its_line_and_is_never_zero(tmp_path, value, error, line):
    path = write_rewards(tmp_path, f"def f(trajectory, solution):\n    return {value}")
    reward = paid(load_reward(f"{path}:f"), rollout("x"), "x")
    assert reward.error == f"{error} (my_rewards.py:{line})"
    assert math.isnan(reward.total)
    assert math.isnan(reward.accuracy)


def test_user_file_may_hold_dataclasses(tmp_path):
    source = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass A:\n    x: float = 0.5\n"
        "def f(trajectory, solution):\n    return A().x"
    )
    assert paid(load_reward(f"{write_rewards(tmp_path, source)}:f"), rollout("x"), "x").total == 0.5


@pytest.mark.parametrize(
    ("source", "name", "message"),
    [
        ("def score_it(t, s): return 1", "scoreit", 'no function "scoreit".*Did you mean "score_it"'),
        ("f = 3", "f", "is a int, not a function"),
        ("import no_such_module", "f", "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"),
        ("def f(:", "f", "cannot be imported: SyntaxError"),
        ("import sys\nsys.exit(0)", "f", r"ends the program while it is imported \(SystemExit\(0\)\); put what only"),
        ("import argparse\nargparse.ArgumentParser().parse_args(['--x'])", "f", r"SystemExit\(2\)"),
        ("import asyncio\nraise asyncio.CancelledError", "f", "cannot be imported: CancelledError"),
    ],
)
def test_unusable_user_function_is_a_config_error(tmp_path, source, name, message):
    with pytest.raises(ConfigError, match=message):
        load_reward(f"{write_rewards(tmp_path, source)}:{name}")


def test_unusable_reward_setting_names_the_mend(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        load_reward(f"{tmp_path}/missing.py:f")
    with pytest.raises(ConfigError, match='Did you mean "robust"'):
        load_reward("robost")
    (tmp_path / "rewards.txt").write_text("")
    with pytest.raises(ConfigError, match="its name must end in"):
        load_reward(f"{tmp_path}/rewards.txt:f")


def test_named_parts_are_added_up_and_accuracy_among_them_is_the_filter() -> None:
    reward = paid(CustomReward(lambda trajectory, solution: {"accuracy": 1, "style": 0.5}), rollout("x"), "x")
    assert (reward.total, reward.parts, reward.accuracy) == (1.5, {"accuracy": 1.0, "style": 0.5}, 1.0)
    bad = paid(CustomReward(lambda trajectory, solution: {"accuracy": 1, "style": None}), rollout("x"), "x")
    assert bad.error == "TypeError: style: returned NoneType, not a number"


@pytest.mark.parametrize(
    ("parts", "error"),
    [
        ({1: 0.5, "1": 0.25}, "ValueError: several parts are called alike: 1, '1'"),
        ({"a": 1e308, "b": 1e308}, "ValueError: the parts add up to inf, not a finite number"),
    ],
)
def test_parts_that_are_no_reward_together_fail(parts, error) -> None:
    assert paid(CustomReward(lambda trajectory, solution: parts), rollout("x"), "x").error == error


def test_async_rewards_are_awaited_at_once() -> None:
    together = asyncio.Barrier(3)

    async def judge(trajectory: Trajectory, solution: str) -> float:
        await together.wait()  # none goes on before all are here
        return len(trajectory.text)

    rewards = CustomReward(judge, seconds=20)([Played(rollout(text), "x") for text in ("a", "bb", "ccc")])
    assert [reward.total for reward in rewards] == [1, 2, 3]


def test_a_function_of_trajectories_gets_all_at_once() -> None:
    def of_all(trajectories: list[Trajectory], solutions: list[str]) -> list[object]:
        return [len(one.text) if one.text else None for one in trajectories]

    rewards = CustomReward(of_all)([Played(rollout(text), "x") for text in ("ab", "", "c")])
    assert [reward.error for reward in rewards] == [None, "TypeError: returned NoneType, not a number", None]
    [short] = CustomReward(lambda trajectories, solutions: [])([Played(rollout("a"), "x")])
    assert short.error == "ValueError: gave 0 rewards for 1 trajectories"


async def sleeps_and_awaits(trajectory: Trajectory, solution: str) -> float:
    await asyncio.sleep(30)
    return 1.0


async def exits_and_awaits(trajectory: Trajectory, solution: str) -> float:
    raise SystemExit("no key")


async def never_awaits(trajectory: Trajectory, solution: str) -> float:
    time.sleep(0.2)
    return 1.0


class Judge:
    async def __call__(self, trajectory: Trajectory, solution: str) -> float:
        return 0.5


def test_an_object_that_is_awaited_is_a_reward_too() -> None:
    assert paid(CustomReward(Judge()), rollout("x"), "x").total == 0.5


def test_a_batch_has_the_time_of_all_its_rollouts() -> None:
    def of_all(trajectories: list[Trajectory], solutions: list[str]) -> list[float]:
        time.sleep(0.3)
        return [1.0 for _ in trajectories]

    rewards = CustomReward(of_all, seconds=0.2)([Played(rollout("x"), "x")] * 8)
    assert [reward.error for reward in rewards] == [None] * 8


def sleeps(trajectory: Trajectory, solution: str) -> float:
    time.sleep(30)
    return 1.0


def test_after_three_that_hang_the_others_of_a_step_are_not_asked() -> None:
    rewards = CustomReward(sleeps, seconds=0.05)([Played(rollout("x"), "x")] * 5)
    assert [reward.error.split(",")[0] for reward in rewards] == [
        *["TooSlow: took longer than 0.05 s"] * 3,
        *["TooSlow: not asked"] * 2,
    ]


def test_a_timeout_that_a_function_raises_itself_says_nothing_of_the_others() -> None:
    def asks(trajectory: Trajectory, solution: str) -> float:
        raise TimeoutError("the socket's own")

    rewards = CustomReward(asks)([Played(rollout("x"), "x")] * 5)
    assert [reward.error for reward in rewards] == ["TimeoutError: the socket's own"] * 5


async def cancels(trajectory: Trajectory, solution: str) -> float:
    if trajectory.text:
        raise asyncio.CancelledError("gave up")
    return 1.0


def test_an_awaited_reward_that_is_cancelled_fails_alone() -> None:
    rewards = CustomReward(cancels)([Played(rollout(text), "x") for text in ("a", "")])
    assert [reward.error for reward in rewards] == ["CancelledError: gave up", None]


def exits(trajectory: Trajectory, solution: str) -> float:
    raise SystemExit("no key")


@pytest.mark.parametrize(
    ("function", "error"),
    [
        (sleeps, "TooSlow: took longer than 0.05 s"),
        (sleeps_and_awaits, "TooSlow: took longer than 0.05 s"),
        (never_awaits, "TooSlow: took longer than 0.05 s"),
        (exits, "RuntimeError: raised SystemExit(no key)"),
        (exits_and_awaits, "SystemExit: no key"),
        (lambda trajectories, solutions: exits(None, ""), "RuntimeError: raised SystemExit(no key)"),
    ],
)
def test_what_would_hang_or_end_the_run_fails_that_reward(function, error) -> None:
    assert paid(CustomReward(function, seconds=0.05), rollout("x"), "x").error == error


@pytest.mark.parametrize("is_async", [False, True])
def test_a_failed_reward_is_tried_again(is_async) -> None:
    calls = []

    def flaky(trajectory: Trajectory, solution: str) -> float:
        calls.append(solution)
        if len(calls) < 3:
            raise OSError("busy")
        return 1.0

    async def flaky_and_awaits(trajectory: Trajectory, solution: str) -> float:
        return flaky(trajectory, solution)

    function = flaky_and_awaits if is_async else flaky
    assert paid(CustomReward(function, retries=1), rollout("x"), "x").error == "OSError: busy"
    assert paid(CustomReward(function, retries=1), rollout("x"), "x").total == 1.0


def of_tries(*tries: list[object]) -> CustomReward:
    """A reward of all trajectories that gives these lists in turn, and as many more tries."""
    each = iter(tries)
    return CustomReward(lambda trajectories, solutions: next(each), retries=len(tries) - 1)


@pytest.mark.parametrize(
    ("tries", "totals"),
    [
        ([[1.0, math.nan], [2.0, 3.0]], [2.0, 3.0]),
        ([[1.0, None], [2.0]], [1.0, None]),
        ([[1.0, None], [None, None]], [1.0, None]),
        ([[1.0, None], [2.0, None]], [2.0, None]),
    ],
)
def test_a_list_with_what_is_no_number_is_made_again_and_the_try_that_pays_most_counts(tries, totals) -> None:
    rewards = of_tries(*tries)([Played(rollout("x"), "x")] * 2)
    assert [None if reward.error else reward.total for reward in rewards] == totals


def test_the_example_of_the_documentation_pays(tmp_path) -> None:
    text = (Path(__file__).parents[1] / "docs" / "answers.md").read_text(encoding="utf-8")
    path = write_rewards(tmp_path, re.search(r"```python\n(.*?)```", text, re.DOTALL)[1])
    reward = paid(load_reward(f"{path}:score"), rollout("<think>a</think> <answer>cup</answer>"), "cup")
    assert reward.parts == {"accuracy": 1.0, "short": 0.1}
    both = load_rewards(GRPOConfig(reward=["robust", f"{path}:score"], reward_weights=[1, 0.5]))
    assert paid(both, rollout("<think>a</think> <answer>cup</answer>"), "cup").parts["score.short"] == 0.05


@pytest.mark.parametrize("head", ["async def f(trajectory, solution)", "def f(trajectories, solutions)"])
def test_a_failure_names_the_innermost_line_of_the_users_file(tmp_path, head) -> None:
    path = write_rewards(
        tmp_path, f"import json\ndef read(text):\n    return json.loads(text)\n{head}:\n    return read('{{')"
    )
    assert paid(load_reward(f"{path}:f"), rollout("x"), "x").error.endswith("(my_rewards.py:3)")


def test_a_function_gets_what_else_is_known_by_the_names_of_its_parameters() -> None:
    one = Played(rollout("x"), "x", question="What?", gold_boxes=(Box(1, 2, 3, 4),), group=7)
    [single] = CustomReward(lambda trajectory, solution, group, question: group + len(question))([one])
    [of_all] = CustomReward(lambda trajectories, solutions, groups, gold_boxes: [groups[0] + len(gold_boxes[0])])([one])
    assert (single.total, of_all.total) == (12, 8)
