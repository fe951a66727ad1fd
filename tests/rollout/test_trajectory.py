"""What a finished rollout says of itself."""

from __future__ import annotations

from dataclasses import replace

from looktwice.geometry import Box, Size
from looktwice.rollout.trajectory import ToolCall, Trajectory

CALL = ToolCall(requested=None, box=Box(0, 0, 30, 40), size=Size(48, 48), error=None, image_number=2)


def test_a_crop_covers_a_share_of_the_image_that_it_names() -> None:
    trajectory = Trajectory(prompt_ids=[], image_sizes=(Size(1000, 1000), Size(60, 40)))
    assert trajectory.share_of_image(CALL) == 0.5


def test_a_crop_of_no_image_covers_nothing() -> None:
    trajectory = Trajectory(prompt_ids=[], image_sizes=(Size(60, 40),))
    calls = [CALL, replace(CALL, image_number=0), replace(CALL, image_number=1, box=None)]
    assert [trajectory.share_of_image(call) for call in calls] == [0, 0, 0]


def test_what_was_sampled_is_told_from_what_was_put_in() -> None:
    trajectory = Trajectory(prompt_ids=[1], completion_ids=[5, 6, 7], is_sampled=[True, False, True])
    assert trajectory.of_sampled(trajectory.completion_ids) == [5, 7]
    assert trajectory.num_sampled == 2


def test_a_refused_call_is_no_crop() -> None:
    refused = replace(CALL, box=None, error="outside")
    assert not Trajectory(prompt_ids=[], calls=[refused]).has_crop
    assert Trajectory(prompt_ids=[], calls=[refused, CALL]).has_crop
