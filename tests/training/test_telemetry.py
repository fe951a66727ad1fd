"""What the rollouts of a step say of the policy."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.training.scripted import CALL, OTHER, RIGHT, SAMPLE, WRONG, paid, rollout_of

from looktwice.geometry import Box, Size
from looktwice.metrics import METRICS, Recorder
from looktwice.rewards import Reward
from looktwice.rollout.trajectory import ToolCall
from looktwice.training.rollouts import Rollout
from looktwice.training.telemetry import rollout_metrics

WHOLE = "<tool_call>[0, 0, 160, 118]</tool_call>"


@pytest.fixture
def played(play_scripts):
    """Rollouts of scripts, each paid its number."""

    def make(*scripts: tuple[str, float]) -> list[Rollout]:
        episodes = [play_scripts(script, max_turns=3)[0][0] for script, _ in scripts]
        return [rollout_of(one, paid(total)) for one, (_, total) in zip(episodes, scripts)]

    return make


def test_the_metrics_of_a_step_are_these_means(play_scripts) -> None:
    outside = "<tool_call>[500, 500, 600, 600]</tool_call>"
    scripts = [f"{CALL}{outside}{OTHER}", f"{CALL} no.<|im_end|>", WRONG, CALL * 6]
    episodes = [play_scripts(script, max_turns=3)[0][0] for script in scripts]
    sample = replace(SAMPLE, gold_box=Box(100, 100, 120, 110), more_gold_boxes=(Box(0, 0, 48, 24),))
    rewards = [
        Reward(total=1.5, parts={"accuracy": 1.0, "format": 0.5}),
        Reward(total=0.5, parts={"accuracy": 0.0, "format": 0.5}),
        Reward(total=float("nan"), error="ValueError: no"),
        Reward(total=0.0, parts={"accuracy": 0.0, "format": 0.0}),
    ]
    rollouts = [rollout_of(one, reward, sample=sample) for one, reward in zip(episodes, rewards)]
    metrics = rollout_metrics([rollouts[:2], rollouts[2:]])
    num_tokens = sum(one.trajectory.num_sampled for one in episodes) / 4
    num_visual = sum(one.example.input_ids.count(one.processor.config.image_token_id) for one in episodes) / 4
    assert metrics == pytest.approx(
        {
            "reward/failed": 0.25,
            "reward/total": 2 / 3,
            "reward/accuracy": 1 / 3,
            "reward/format": 1 / 3,
            "reward/total_wrong": 2 / 3,
            "group/number": 2,
            "group/all_right": 0,
            "group/all_wrong": 0,
            "rollout/num_turns": 9 / 4,
            "rollout/num_tokens": num_tokens,
            "rollout/num_tokens_wrong": num_tokens,
            "rollout/visual_tokens": num_visual,
            "rollout/right": 0,
            "rollout/right_with_crop": 0,
            "rollout/right_without_crop": 0,
            "rollout/truncated": 0.25,
            "rollout/stop/answered": 0.5,
            "rollout/stop/no_answer": 0.25,
            "rollout/stop/max_turns": 0.25,
            "tool/calls": 5 / 4,
            "tool/crop_share": 3 / 4,
            "tool/valid_share": 4 / 5,
            "tool/refused/outside": 1 / 5,
            "tool/area_share": 0.12,
            "tool/whole_share": 0,
            "tool/mean_iou": 0.5,
        }
    )
    assert all({name, f"{name.rpartition('/')[0]}/*"} & {*METRICS} for name in metrics)


def test_what_is_right_is_what_the_rules_say_whatever_is_paid(played) -> None:
    metrics = rollout_metrics([played((RIGHT, 0.25), (WRONG, 1.0), (WRONG, 0.0))])
    assert metrics["rollout/right"] == 1 / 3
    assert (metrics["rollout/right_with_crop"], metrics["rollout/right_without_crop"]) == (1, 0)
    assert (metrics["reward/total_right"], metrics["reward/total_wrong"]) == (0.25, 0.5)
    assert metrics["rollout/num_tokens_right"] > metrics["rollout/num_tokens_wrong"]


def test_a_part_of_ones_own_takes_the_place_of_no_metric(played, tmp_path) -> None:
    [rollout] = played((RIGHT, 0.0))
    rollout.reward = Reward(total=3.0, parts={"total": 1.0, "failed": 0.5, "style/short": 1.5, "accuracy": 0.0})
    metrics = rollout_metrics([[rollout]])
    found = {name: value for name, value in metrics.items() if name.startswith("reward/")}
    assert found == {
        "reward/total": 3.0,
        "reward/failed": 0.0,
        "reward/total_right": 3.0,
        "reward/accuracy": 0.0,
        "reward/own/total": 1.0,
        "reward/own/failed": 0.5,
        "reward/own/style/short": 1.5,
    }
    with Recorder(tmp_path, total_steps=1, shown=(), title="R-GRPO") as recorder:
        recorder.log(1, metrics)


def test_groups_without_signal_are_counted_by_why_they_have_none(played) -> None:
    right, wrong, mixed = (played(*((WRONG, total) for total in totals)) for totals in ((1, 1), (0, 0), (0, 1)))
    metrics = rollout_metrics([right, wrong, mixed, wrong])
    assert (metrics["group/all_right"], metrics["group/all_wrong"]) == (0.25, 0.5)


def test_a_group_whose_rewards_failed_is_neither_all_right_nor_all_wrong(played) -> None:
    metrics = rollout_metrics([played((WRONG, 0.0), (WRONG, float("nan")))])
    assert (metrics["group/all_right"], metrics["group/all_wrong"]) == (0, 0)


def test_a_crop_of_nine_tenths_shows_the_whole_image(played) -> None:
    metrics = rollout_metrics([played((f"{WHOLE}{OTHER}", 0.0), (f"{CALL}{OTHER}", 0.0))])
    assert metrics["tool/whole_share"] == 0.5
    assert metrics["tool/area_share"] == pytest.approx((160 * 118 / 19200 + 0.12) / 2)


def test_calls_without_a_gold_box_have_no_overlap(play_scripts) -> None:
    [episode], _ = play_scripts(RIGHT)
    metrics = rollout_metrics([[rollout_of(episode, paid(1.0))]])
    assert "tool/mean_iou" not in metrics and metrics["tool/valid_share"] == 1
    assert episode.trajectory.calls == [
        ToolCall(requested=Box(0, 0, 48, 48), box=Box(0, 0, 48, 48), size=Size(48, 48), error=None)
    ]
