"""What an evaluation counts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from looktwice.config import InferenceConfig
from looktwice.data.sample import Sample
from looktwice.evaluation.accuracy import evaluate, judged, wilson_interval, worth_of
from looktwice.evaluation.controls import CONTROLS
from looktwice.formats.sample_file import read_samples
from looktwice.geometry import Box, Size
from looktwice.inference import OvisInference
from looktwice.messages import Conversation, question_about
from looktwice.rollout.trajectory import ToolCall, Trajectory

GOLD = Box(0, 0, 40, 40)
HIT = ToolCall(requested=GOLD, box=Box(0, 0, 40, 20), size=Size(48, 48), error=None)
REFUSED = ToolCall(requested=None, box=None, size=None, error="no_box")


@dataclass
class Written:
    """Stands where the model stands: gives the rollouts it was made with."""

    trajectories: list[Trajectory]
    processor: object = None

    def play(self, questions: list[Conversation], look: object = None) -> list[Trajectory]:
        assert look is None
        assert questions == [PROMPT] * len(self.trajectories)
        return self.trajectories


def said(text: str, *calls: ToolCall) -> Trajectory:
    return Trajectory(prompt_ids=[], text=text, calls=list(calls), stop_reason="answered")


PROMPT = question_about("What?", Path("a.png"))
SAMPLE = Sample(conversation=PROMPT, solution="7", gold_box=GOLD, where="a:1", field="A")


def test_answers_calls_and_overlaps_are_counted() -> None:
    rollouts = [
        said("<answer>7</answer>", HIT, REFUSED),
        said("<answer>seven</answer>", HIT),
        said("<answer>8</answer>"),
        said("<think>7"),
    ]
    result = evaluate(Written(rollouts), [SAMPLE] * 4)
    assert result.is_right == (True, True, False, False)
    assert (result.accuracy, result.calls_per_answer) == (0.5, 0.75)
    assert (result.valid_share, result.mean_iou) == (pytest.approx(2 / 3), 0.5)
    assert result.trajectories == tuple(rollouts)


def test_a_crop_of_another_picture_than_the_first_does_not_overlap_its_gold_box() -> None:
    result = evaluate(Written([said("<answer>7</answer>", HIT, replace(HIT, image_number=2))]), [SAMPLE])
    assert result.mean_iou == 0.25


def test_a_crop_overlaps_the_nearest_of_several_gold_boxes() -> None:
    sample = replace(SAMPLE, more_gold_boxes=(Box(100, 0, 140, 40),))
    second = replace(HIT, box=Box(100, 0, 140, 40))
    result = evaluate(Written([said("<answer>7</answer>", HIT, second)]), [sample])
    assert result.mean_iou == 0.75


def test_without_calls_there_is_no_share_and_no_overlap() -> None:
    result = evaluate(Written([said("<answer>7</answer>")]), [SAMPLE])
    assert (result.accuracy, result.calls_per_answer, result.valid_share, result.mean_iou) == (1, 0, None, None)


def test_crops_without_a_gold_box_have_no_overlap() -> None:
    result = evaluate(Written([said("<answer>7</answer>", HIT)]), [replace(SAMPLE, gold_box=None)])
    assert (result.valid_share, result.mean_iou) == (1, None)


def test_the_tool_gains_what_was_wrong_without_it_and_harms_what_was_right() -> None:
    right, wrong = said("<answer>7</answer>"), said("<answer>8</answer>")
    with_tool = judged([right, right, right, wrong, wrong], [SAMPLE] * 5)
    without = judged([wrong, wrong, right, right, wrong], [SAMPLE] * 5)
    worth = worth_of(with_tool, without)
    assert (worth.accuracy, worth.accuracy_without, worth.gain, worth.harm) == (0.6, 0.4, 0.4, 0.2)


def test_an_answer_that_an_error_ended_is_not_right() -> None:
    failed = replace(said("<answer>7</answer>"), stop_reason="error")
    assert judged([failed], [SAMPLE]).is_right == (False,)


@pytest.mark.parametrize("control", [None, *CONTROLS])
def test_a_model_is_asked_every_question_under_every_control(control, model_folder, dataset) -> None:
    inference = OvisInference(InferenceConfig(model_path=str(model_folder), max_new_tokens=4, device="cpu"))
    samples = read_samples(dataset.eval, dataset.eval.parent)
    result = evaluate(inference, samples, control=control)
    assert len(result.is_right) == len(result.trajectories) == len(samples) == 4
    for sample, trajectory in zip(samples, result.trajectories):
        assert sample.question in inference.processor.decode(trajectory.prompt_ids)


@pytest.mark.parametrize(
    ("num_right", "num_asked", "interval"),
    [(0, 400, (0.0, 0.0095)), (400, 400, (0.9905, 1.0)), (260, 400, (0.6020, 0.6951)), (5, 10, (0.2366, 0.7634))],
)
def test_intervals_are_those_of_wilson(num_right: int, num_asked: int, interval: tuple[float, float]) -> None:
    # scipy.stats.binomtest(num_right, num_asked).proportion_ci(method="wilson")
    assert wilson_interval(num_right, num_asked) == pytest.approx(interval, abs=5e-5)
