"""Who wrote what, and what follows from it: seven things that hold for every rollout that is trained on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.training.scripted import OTHER, RIGHT, WRONG

from looktwice.formats.sample_file import read_samples
from looktwice.processing.packing import pack
from looktwice.rewards import Reward
from looktwice.rollout.episode import Episode
from looktwice.training.policy import improve
from looktwice.training.rollouts import roll_out
from looktwice.training.sampler import Sampler

CALLS = "".join(f"<tool_call>[{n}, {n}, {n + 60}, {n + 40}]</tool_call> so " for n in range(0, 80, 10))
EIGHT_TURNS = f"<think>\n{CALLS}\n</think>\n\n<answer>7</answer><|im_end|>"
CUT_INSIDE_A_CALL = f"<think>\n{CALLS[:120]}"
MANY_CALLS = "<tool_call>[0, 0, 40, 40]</tool_call>" * 8


def played(script: str, play_scripts, **rules: int) -> Episode:
    script += " and so on" * 100  # more than any limit allows
    [[episode], *_] = play_scripts(script, **{"max_turns": 9, "max_new_tokens": 300, **rules})
    return episode


def test_1_a_crop_is_context_of_the_loss_and_no_label(load, rollouts_of) -> None:
    losses = []
    for change in ("nothing", "pixels", "labels"):
        learner = load()
        groups = rollouts_of(learner, [(RIGHT, 1.0), (WRONG, 0.0)])
        [[rollout, _]] = groups
        images, trajectory = rollout.example.images, rollout.trajectory
        if change == "pixels":
            images[-1] = replace(images[-1], pixel_values=255 - images[-1].pixel_values)
        if change == "labels":  # what the record says of ids that the tool wrote
            marks = trajectory.is_sampled
            for name in ("sampling_logprobs", "drawn_logprobs"):
                values = [value if flag else -9.0 for value, flag in zip(getattr(trajectory, name), marks)]
                setattr(trajectory, name, values)
        losses.append(improve(learner, groups, learner.config, None)["loss"])
    assert losses[0] != losses[1]
    assert losses[0] == losses[2]


def test_2_a_logit_that_predicts_what_the_tool_wrote_gets_no_gradient(load, rollouts_of) -> None:
    learner = load()
    groups = rollouts_of(learner, [(RIGHT, 1.0), (WRONG, 0.0), (OTHER, 0.0)])
    states: list[torch.Tensor] = []

    def keep(module: object, inputs: object, output) -> None:
        output.last_hidden_state.retain_grad()
        states.append(output.last_hidden_state)

    with learner.base.model.register_forward_hook(keep):
        improve(learner, groups, learner.config, None)
    [state] = states
    mask = torch.tensor([flag for rollout in groups[0] for flag in rollout.example.loss_mask])
    assert mask.sum() == sum(rollout.trajectory.num_sampled for rollout in groups[0])
    assert groups[0][0].trajectory.is_sampled.count(False) == 11  # of the crop
    # the head is applied to states alone, so a state without a gradient is one whose logits have none
    assert state.grad[0][~mask.roll(-1)].abs().max() == 0
    assert state.grad[0][mask.roll(-1)].abs().sum(-1).min() > 0


@pytest.mark.parametrize("script", [EIGHT_TURNS, MANY_CALLS, CUT_INSIDE_A_CALL, WRONG])
def test_3_the_mask_has_as_many_marks_as_the_engine_sampled(script, play_scripts, processor) -> None:
    episode = played(script, play_scripts)
    trajectory = episode.trajectory
    # the scripted engine gives its n-th id the logprob -n / 1000
    last = max(number for number, flag in enumerate(trajectory.is_sampled) if flag)
    assert sum(episode.example.loss_mask) == sum(trajectory.is_sampled)
    assert trajectory.sampling_logprobs[last] == -(sum(trajectory.is_sampled) - 1) / 1000


def test_4_after_eight_turns_the_ids_are_still_those_of_the_engine(play_scripts, processor) -> None:
    episode = played(EIGHT_TURNS, play_scripts)
    assert episode.trajectory.num_turns == 9 and len(episode.trajectory.calls) == 8
    written = processor.tokenizer.encode(EIGHT_TURNS, add_special_tokens=False)
    trained = [token for token, flag in zip(episode.example.input_ids, episode.example.loss_mask) if flag]
    assert trained == written


@pytest.mark.parametrize(
    ("script", "rules"),
    [
        (EIGHT_TURNS, {}),
        (MANY_CALLS, {"max_turns": 3}),
        (CUT_INSIDE_A_CALL, {"max_new_tokens": 90}),
        (MANY_CALLS, {"max_visual_tokens": 5}),
    ],
)
def test_5_there_are_as_many_visual_rows_as_places_for_them(script, rules, play_scripts, processor) -> None:
    episode = played(script, play_scripts, **rules)
    num_rows = sum(len(image.pixel_values) for image in episode.example.images) // processor.stride**2
    assert episode.example.input_ids.count(processor.config.image_token_id) == num_rows > 0


@pytest.mark.parametrize(("bf16", "limit"), [(False, 1e-5), (True, 0.02)])
def test_6_the_trainer_finds_the_logprobs_of_the_sampler_and_says_so(bf16, limit, load, dataset) -> None:
    learner = load(num_generations=4, max_new_tokens=12, mask_truncated_completions=False, bf16=bf16)
    samples = read_samples(dataset.rl, dataset.rl.parent)[:2]
    groups = roll_out(
        learner,
        samples,
        learner.config,
        lambda played: [Reward(total=float(n % 2)) for n in range(len(played))],
        Sampler(learner, learner.config),
    )
    assert improve(learner, groups, learner.config, None)["kl/sampling"] < limit
    rollouts = [rollout for group in groups for rollout in group]
    gaps = [
        abs(trained - sampled)
        for rollout in rollouts
        for trained, sampled in zip(
            rollout.trainer_logprobs[0], filter(None, rollout.trajectory.sampling_logprobs), strict=True
        )
    ]
    assert sum(gaps) / len(gaps) < limit


def test_7_positions_in_training_are_those_of_generation_with_several_pictures(play_scripts) -> None:
    first, second = played(RIGHT, play_scripts).example, played(EIGHT_TURNS, play_scripts).example
    row = pack([first, second])
    # a prompt is read and continued from position 0 on, one id after the other, whatever it shows
    assert row.position_ids.flatten().tolist() == [*range(len(first.input_ids)), *range(len(second.input_ids))]
