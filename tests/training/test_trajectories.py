"""Rollouts as they are written down, and read back."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import zstandard
from tests.training.scripted import CALL, OTHER, SAMPLE, WRONG, paid, rollout_of

from looktwice.errors import ConfigError, DataError
from looktwice.geometry import Box
from looktwice.rewards import Reward
from looktwice.rollout.trajectory import Trajectory
from looktwice.training.rollouts import Rollout, played_of
from looktwice.training.trajectories import drop_later, read_trajectories, write_trajectories, written_steps


@pytest.fixture
def group(play_scripts) -> list[Rollout]:
    """Two rollouts, the first with a crop and a refused call."""
    refused = "<tool_call>there</tool_call>"
    episodes = [play_scripts(script)[0][0] for script in (f"{CALL}{refused}{OTHER}", WRONG)]
    return [rollout_of(one, Reward(total=1.5, parts={"accuracy": 1.0, "format": 0.5})) for one in episodes]


def write(tmp_path, *groups: list[Rollout], step: int = 1, keep: int = 9) -> list[str]:
    write_trajectories(tmp_path, step, groups, keep=keep)
    return zstandard.decompress((tmp_path / f"step-{step}.jsonl.zst").read_bytes()).decode().splitlines()


def test_what_is_read_back_is_what_was_written(group, tmp_path) -> None:
    group[0].advantage, group[0].trainer_logprobs = 0.5, [[-0.1, -0.2], [-0.3, -0.4]]
    group[0].reference_logprobs = [-0.5, -0.6]
    boxes = (Box(0, 0, 48, 24), Box(1, 2, 3, 4))
    group[1].sample = replace(SAMPLE, solution=("7", "seven"), gold_box=boxes[0], more_gold_boxes=boxes[1:])
    for rollout, drawn in zip(group, (-1.0, -2.0)):
        marks = rollout.trajectory.is_sampled
        rollout.trajectory.sampling_logprobs = [-1.0 if flag else 0.0 for flag in marks]
        rollout.trajectory.drawn_logprobs = [drawn if flag else 0.0 for flag in marks]
    write(tmp_path, group, group[1:])
    [first, second], [third] = read_trajectories(tmp_path / "step-1.jsonl.zst")
    assert [one.played.group for one in (first, second, third)] == [0, 0, 1]
    for one, rollout in zip((first, second), group):
        assert one.trajectory == rollout.trajectory and isinstance(one.trajectory, Trajectory)
        assert (one.reward, one.played) == (rollout.reward, played_of(rollout.trajectory, rollout.sample, 0))
    assert first.advantage == 0.5
    assert first.trainer_logprobs == [pytest.approx([-0.1, -0.2]), pytest.approx([-0.3, -0.4])]
    assert first.reference_logprobs == pytest.approx([-0.5, -0.6])
    assert (second.trainer_logprobs, second.reference_logprobs) == ([], None)


def test_a_line_says_what_made_a_rollout_and_shows_crops_as_boxes(group, tmp_path) -> None:
    group[0].sample, group[0].version = replace(SAMPLE, gold_box=Box(0, 0, 48, 24)), 3
    first, _ = map(json.loads, write(tmp_path, group, step=4))
    assert (first["where"], first["field"], first["version"], first["solution"]) == ("a:1", "A", 3, "7")
    assert (first["images"], first["gold_box"]) == (["x.png"], [0, 0, 48, 24])
    assert [(call["box"], call["error"]) for call in first["calls"]] == [([0, 0, 48, 48], None), (None, "no_box")]
    assert first["reward"] == 1.5 and first["stop_reason"] == "answered"
    assert sum(first["sampled"]) == len(first["completion_ids"])
    assert len(first["sampling_logprobs"]) == sum(first["sampled"][::2])


def test_logprobs_come_back_to_the_last_bit_of_float32(group, tmp_path) -> None:
    exact = [float.fromhex("-0x1.99999ap-4"), float.fromhex("-0x1.5555560000000p-20")]
    group[0].trainer_logprobs = [exact]
    write(tmp_path, group)
    assert read_trajectories(tmp_path / "step-1.jsonl.zst")[0][0].trainer_logprobs == [exact]


def test_a_failed_reward_is_read_back_as_one(group, tmp_path) -> None:
    group[1].reward = paid(float("nan"))
    write(tmp_path, group)
    assert read_trajectories(tmp_path / "step-1.jsonl.zst")[0][1].reward.error == "ValueError: no"


def test_the_seed_of_a_group_is_written(group, tmp_path) -> None:
    for rollout in group:
        rollout.seed = 2**64 - 1
    assert [json.loads(line)["seed"] for line in write(tmp_path, group)] == [2**64 - 1] * 2


def test_of_all_steps_the_last_ones_stay(group, tmp_path) -> None:
    for step in (8, 9, 10, 11):
        write(tmp_path, group, step=step, keep=3)
    assert list(written_steps(tmp_path)) == [9, 10, 11]
    drop_later(tmp_path, 9)
    assert list(written_steps(tmp_path)) == [9]


def test_a_step_that_cannot_be_written_leaves_nothing_behind(group, tmp_path, monkeypatch) -> None:
    def full(packed: bytes) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("looktwice.drafts._flush", full)
    with pytest.raises(
        ConfigError, match=r"step-1\.jsonl\.zst: cannot be written \(No space left.*--keep_trajectories"
    ):
        write_trajectories(tmp_path, 1, [group], keep=9)
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_somebody_else_is_named(tmp_path) -> None:
    path = tmp_path / "step-1.jsonl.zst"
    path.write_bytes(zstandard.compress(b'{"a": 1}\n'))
    with pytest.raises(DataError, match=r"step-1\.jsonl\.zst: no trajectories of a run"):
        read_trajectories(path)


def test_a_rollout_that_begins_with_inserted_ids_keeps_its_marks(group, tmp_path) -> None:
    trajectory = group[1].trajectory
    trajectory.is_sampled = [False, *trajectory.is_sampled[1:]]
    trajectory.sampling_logprobs[0] = trajectory.drawn_logprobs[0] = 0.0
    write(tmp_path, group)
    assert read_trajectories(tmp_path / "step-1.jsonl.zst")[0][1].trajectory.is_sampled == trajectory.is_sampled
