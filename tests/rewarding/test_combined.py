"""Several rewards with weights, and terms of groups beside them, as a run's settings put them together."""

from __future__ import annotations

import pytest

from looktwice.config import GRPOConfig, TermName
from looktwice.errors import ConfigError
from looktwice.geometry import Box, Size
from looktwice.rewarding.paying import load_rewards
from looktwice.rewarding.terms import TERMS
from looktwice.rewards import Played, Reward
from looktwice.rollout.trajectory import ToolCall, Trajectory

CROP = ToolCall(requested=Box(0, 0, 10, 10), box=Box(0, 0, 10, 10), size=Size(56, 56), error=None)


def played(answer="cup", *calls, group=0, **known) -> Played:
    text = f"<think>I look</think><answer>{answer}</answer>"
    return Played(Trajectory(prompt_ids=[], text=text, calls=[*calls]), "cup", group=group, **known)


@pytest.fixture
def my(tmp_path):
    (tmp_path / "my.py").write_text(
        "def short(trajectory, solution):\n    return -len(trajectory.text)\n"
        "def named(trajectory, solution):\n    return {'accuracy': 0.5, 'style': 2}\n"
        "def length(trajectory, solution):\n    return 0.25\n"
        "def accuracy(trajectory, solution):\n    return 0.0\n"
        "def curiosity(trajectory, solution):\n    return 0.125\n"
        "def style(trajectory, solution):\n    return {'curiosity': 1, 'length': 2, 'named': 4, 'named.style': 8}\n"
        "def fails(trajectory, solution):\n    raise OSError('busy')\n"
    )
    return lambda name: f"{tmp_path / 'my.py'}:{name}"


def paid(rollout, **settings) -> Reward:
    [reward] = load_rewards(GRPOConfig(**settings))([rollout])
    return reward


def test_each_part_is_kept_by_name_and_weighed(my) -> None:
    reward = paid(played(), reward=["accuracy", my("short"), my("named"), my("named")], reward_weights=[2, 0.5, -1, 1])
    assert {name: value for name, value in reward.parts.items() if value} == {
        "accuracy": 2.0,
        "short": -0.5 * len(played().trajectory.text),
        "named_3.accuracy": -0.5,
        "named_3.style": -2.0,
        "named_4.accuracy": 0.5,
        "named_4.style": 2.0,
    }
    assert reward.total == sum(reward.parts.values())
    assert reward.raw["short"] == -len(played().trajectory.text)
    assert (reward.weights["accuracy"], reward.weights["short"], reward.weights["named_3.style"]) == (2.0, 0.5, 1.0)


RIGHT = {"accuracy": 1.0, "format": 1.0, "length": 0.006, "region": 0.5}
"""What the rules pay for the right answer with a crop."""
STYLE = {"length": 2.0, "named": 4.0, "named.style": 8.0}
RARE = pytest.approx(0.2)
"""What curiosity pays the one of ten siblings that has a crop."""


@pytest.mark.parametrize(
    ("rewards", "terms", "parts"),
    [
        (["robust", "length"], [], {**RIGHT, "length_2": 0.25}),
        (["robust", "accuracy"], [], {**RIGHT, "accuracy_2": 0.0}),
        (["robust", "accuracy", "length"], [], {**RIGHT, "accuracy_2": 0.0, "length_3": 0.25}),
        (["robust", "curiosity"], ["curiosity"], {**RIGHT, "curiosity_2": 0.125, "curiosity": RARE}),
        (["curiosity"], ["curiosity"], {"curiosity_1": 0.125, "curiosity": RARE}),
        (["style"], ["redundancy"], {**STYLE, "curiosity": 1.0, "redundancy": 0.0}),
        (["style"], ["curiosity"], {**STYLE, "style.curiosity": 1.0, "curiosity": RARE}),
        (["style", "curiosity"], [], {**STYLE, "style.curiosity": 1.0, "curiosity": 0.125}),
    ],
)
def test_no_part_is_lost_to_another_of_its_name(rewards, terms, parts, my) -> None:
    specs = [name if name == "robust" else my(name) for name in rewards]
    pay = load_rewards(GRPOConfig(reward=specs, reward_terms=dict.fromkeys(terms, 1)))
    reward, *_ = pay([played("cup", CROP), *[played()] * 9])
    assert reward.parts == parts
    assert reward.total == pytest.approx(sum(reward.parts.values()))


def test_parts_that_no_name_tells_apart_are_refused(my) -> None:
    reward = paid(played(), reward=[my("style"), my("named")])
    assert reward.error == 'ValueError: two parts are called "named.style"; rename one of them'


def test_functions_of_one_name_have_a_name_each(my, tmp_path) -> None:
    names = "length", "length", "length_2"
    (tmp_path / "my.py").write_text("def length(trajectory, solution):\n    return 1\nlength_2 = length")
    assert paid(played(), reward=[my(name) for name in names]).parts == {"length_1": 1, "length_2": 1, "length_2_3": 1}


def test_groups_are_filtered_by_the_first_accuracy_before_its_weight(my) -> None:
    assert paid(played(), reward=["robust", my("named")], reward_weights=[0.25, 1]).accuracy == 1.0
    assert paid(played("pot"), reward=["robust", my("named")], reward_weights=[0.25, 1]).accuracy == 0.0
    assert paid(played(), reward=["robust", my("accuracy")]).accuracy == 1.0
    assert paid(played(), reward=[my("length"), my("accuracy")]).accuracy == 0.25
    assert paid(played(), reward=[my("short"), "robust"]).accuracy == -len(played().trajectory.text)


def test_a_rollout_that_one_reward_fails_has_failed_and_says_which(my) -> None:
    reward = paid(played(), reward=["robust", my("fails")])
    assert (reward.error, str(reward.total)) == ("fails: OSError: busy (my.py:14)", "nan")


def test_terms_look_at_the_siblings_of_a_group_alone() -> None:
    pay = load_rewards(GRPOConfig(reward="accuracy", reward_terms={"necessity": 1, "redundancy": 0.05}))
    rollouts = [played("cup", CROP, group=group) for group in (0, 1)] + [played(group=1), played("pot", CROP, CROP)]
    needed, needless, plain, wrong = pay(rollouts)
    assert (needed.total, plain.total) == (1.0, 1.0)
    assert needless.total == 0.25
    assert needless.raw["necessity"] == -0.75
    assert wrong.parts["redundancy"] == pytest.approx(-0.05) and wrong.raw["redundancy"] == -1


def test_terms_ask_the_rules_where_a_reward_has_no_accuracy(my) -> None:
    known = {"gold_boxes": (Box(0, 0, 10, 10),)}
    for answer, value in (("cup", 1.0), ("pot", 0.0)):
        reward = paid(played(answer, CROP, **known), reward=my("short"), reward_terms={"dual_iou": 1})
        assert reward.parts["dual_iou"] == value
        assert reward.accuracy == -len(played(answer).trajectory.text)


def test_overlong_is_measured_by_the_limit_of_the_run() -> None:
    one = played()
    one.trajectory.is_sampled = [True] * 90
    assert paid(one, reward_terms={"overlong": 1}, max_new_tokens=100).parts["overlong"] == pytest.approx(-0.5)


def test_a_failed_reward_stays_failed_beside_terms(my) -> None:
    assert paid(played(), reward=my("fails"), reward_terms={"curiosity": 1}).error == "OSError: busy (my.py:14)"


def test_every_term_is_a_setting() -> None:
    assert set(TermName.__args__) == TERMS.keys()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reward": ["robust", "paper"], "reward_weights": [1]}, "reward_weights: 1 weight for 2 rewards"),
        ({"reward_weights": [0]}, "a weight of 0 pays nothing"),
        ({"reward_terms": {"curiosity": 0}}, "a weight of 0 pays nothing"),
        ({"reward_terms": "curiousity=1"}, "curiosity"),
        ({"reward": []}, "reward"),
        ({"judge_url": "http://x/v1"}, "a judge needs both"),
        ({"judge_url": "file:///etc", "judge_model": "m"}, "begin it with http"),
        ({"judge_url": "http://x", "judge_model": "m", "reward": "my.py:f"}, "only robust, paper, code, accuracy ask"),
    ],
)
def test_what_cannot_be_paid_is_refused(settings, message) -> None:
    with pytest.raises(ConfigError, match=message):
        GRPOConfig(**settings)
