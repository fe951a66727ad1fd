"""The validation questions of stage 2: how often the policy is right, and what its crops gained and spoiled."""

from __future__ import annotations

from collections.abc import Sequence

from looktwice.config import DataConfig, GRPOConfig
from looktwice.data.sample import Sample
from looktwice.evaluation.accuracy import judged, worth_of
from looktwice.evaluation.controls import control_look
from looktwice.rollout.episode import Look
from looktwice.rollout.trajectory import Trajectory
from looktwice.training.learner import Learner
from looktwice.training.rollouts import begin_episodes, own_places, seeds_of
from looktwice.training.sampler import Sampler
from looktwice.training.sets import LengthReport, fitted


def validate(
    learner: Learner,
    samples: Sequence[Sample],
    data: DataConfig,
    config: GRPOConfig,
    lengths: LengthReport,
    sampler: Sampler,
) -> dict[str, float]:
    """The metrics `eval/...` of greedy answers, judged by the rules of `answers.py`; none where no question fits.
    Processes share the questions out, and all get all metrics.

    With `eval_tool_gain` the questions are asked again without the tool. An answer without a call would come out the
    same, so only the others are.
    """
    size = config.rollout_batch_size
    asked = [
        sample
        for first in range(0, len(samples), size)
        for sample in fitted(samples[first : first + size], learner.processor, data, lengths)
    ]
    if not asked:
        return {}
    with learner.images_kept():
        answers = greedy_answers(learner, asked, config, sampler)
        with_tool = judged(answers, asked)
        metrics = {
            "eval/accuracy": with_tool.accuracy,
            "eval/calls": with_tool.calls_per_answer,
        }
        if not config.eval_tool_gain:
            return metrics
        places = [place for place, answer in enumerate(answers) if answer.calls]
        look = control_look("no_crop", learner.processor, config.seed)
        again = greedy_answers(learner, [asked[place] for place in places], config, sampler, look)
    by_itself = [*answers]
    for place, answer in zip(places, again):
        by_itself[place] = answer
    worth = worth_of(with_tool, judged(by_itself, asked))
    return metrics | {
        "eval/accuracy_without_tool": worth.accuracy_without,
        "eval/tool_gain": worth.gain,
        "eval/tool_harm": worth.harm,
    }


def greedy_answers(
    learner: Learner,
    samples: Sequence[Sample],
    config: GRPOConfig,
    sampler: Sampler,
    look: Look | None = None,
) -> list[Trajectory]:
    """One greedy answer of the policy to each question; `look` replaces the crop tool."""
    greedy = config.model_copy(update={"num_generations": 1, "temperature": 0.0})
    world = learner.world
    size = config.rollout_batch_size * world.size
    answers: list[Trajectory] = []
    for first in range(0, len(samples), size):
        world.at("evaluation", learner.step)
        asked = samples[first : first + size]
        places = own_places(learner, asked, greedy)
        groups = begin_episodes(learner.processor, [asked[place] for place in places], greedy, look)
        with world.whole_model(learner.model):
            sampler.take_weights(learner.step)
            sampler.play(groups, greedy, seeds_of(greedy, learner.step, places), learner.vision_cache)
        own = [(place, episode.trajectory) for place, [episode] in zip(places, groups)]
        found = dict(world.gather(own))
        answers += [found[place] for place in range(len(asked))]
    return answers
