"""Validation questions: accuracy, and what the tool gained and spoiled."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.conftest import ScriptedEngine
from tests.training.scripted import CALL

from looktwice.config import DataConfig, GRPOConfig
from looktwice.engine.sampling import Sampling
from looktwice.formats.sample_file import read_samples
from looktwice.rollout.episode import play
from looktwice.training.sampler import Sampler
from looktwice.training.sets import LengthReport
from looktwice.training.validation import validate

END = "</answer><|im_end|>"
CROPPED = f"<think>\n{CALL}\n</think>\n\n<answer>7{END}"


@pytest.fixture
def validated(load, dataset, tmp_path):
    """Asks questions whose gold answer is 7, the policy writing these scripts; gives the metrics and what was asked."""
    learner = load(num_generations=2)

    def ask(*asked: list[str], **settings: object) -> tuple[dict[str, float], list[int]]:
        scripts, counts = iter(asked), []

        class Scripted(Sampler):
            def play(self, groups, config, seeds, images):
                counts.append(len(groups))
                play(ScriptedEngine(learner.processor, next(scripts)), groups, Sampling(), seeds)

        samples = [replace(sample, solution="7") for sample in read_samples(dataset.eval, dataset.eval.parent)]
        config = GRPOConfig(output_dir=tmp_path, max_new_tokens=200, **settings)
        sampler = Scripted(learner, config)
        return validate(learner, samples[: len(asked[0])], DataConfig(), config, LengthReport(config), sampler), counts

    return ask


def test_only_questions_that_were_answered_with_a_call_are_asked_again(validated) -> None:
    plain = [f"<think>\nno.\n</think>\n\n<answer>{digit}{END}" for digit in "78"]
    # without the crop the answer was opened for the model, which goes on with a guess
    metrics, counts = validated([CROPPED, *plain, CROPPED], [f"<think>\n{CALL}8{END}", f"<think>\n{CALL}7{END}"])
    assert counts == [4, 2]
    assert metrics == {
        "eval/accuracy": 0.75,
        "eval/accuracy_without_tool": 0.5,
        "eval/tool_gain": 0.25,
        "eval/tool_harm": 0.0,
        "eval/calls": 0.5,
    }


def test_what_a_crop_spoiled_is_harm(validated) -> None:
    metrics, _ = validated([CROPPED.replace("7", "8")], [f"<think>\n{CALL}7{END}"])
    assert (metrics["eval/accuracy"], metrics["eval/tool_harm"], metrics["eval/tool_gain"]) == (0, 1, 0)


def test_without_the_comparison_each_question_is_asked_once(validated) -> None:
    metrics, counts = validated([CROPPED], eval_tool_gain=False)
    assert counts == [1] and metrics == {"eval/accuracy": 1.0, "eval/calls": 1.0}


def test_no_question_that_fits_is_no_accuracy(validated) -> None:
    assert validated([])[0] == {}
