"""What must hold before a policy learns from its rollouts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from PIL import Image

from looktwice.errors import TrainingError
from looktwice.metrics import METRICS
from looktwice.processing.packing import pack
from looktwice.rollout.episode import Episode
from looktwice.training.canaries import check_rollout, check_rollouts
from looktwice.training.learner import Learner

ANSWER = "<think>\n<tool_call>[0, 0, 48, 48]</tool_call> red.\n</think>\n\n<answer>7</answer><|im_end|>"


@pytest.fixture
def rollout(play_scripts) -> Callable[..., Episode]:
    """A scripted rollout with the logprobs of a learner, as if its model had sampled it."""

    def make(learner: Learner, *, temperature: float = 1.0, **options: object) -> Episode:
        [episode], _ = play_scripts(ANSWER, **options)
        learner.model.eval()
        with torch.no_grad():
            logprobs = iter(learner.score(pack([episode.example]), temperature=temperature).logprobs.tolist())
        trajectory = episode.trajectory
        trajectory.sampling_logprobs = [next(logprobs) if flag else 0.0 for flag in trajectory.is_sampled]
        return episode

    return make


def shift(episode: Episode, nats: float) -> None:
    """Record other logprobs than the trainer has."""
    trajectory = episode.trajectory
    trajectory.sampling_logprobs = [logprob + nats for logprob in trajectory.sampling_logprobs]


def teach(learner: Learner, *matrices: str) -> None:
    """Fill LoRA matrices: A and B make an adapter that does something."""
    with torch.no_grad():
        for name, parameter in learner.model.named_parameters():
            if any(f".lora_{matrix}." in name for matrix in "AB"):
                parameter.fill_(0.01 if any(f".lora_{matrix}." in name for matrix in matrices) else 0.0)


# -- pictures


def test_a_model_that_sees_its_pictures_passes(load, rollout) -> None:
    learner = load()
    seen = check_rollout(learner, rollout(learner), temperature=1.0)
    assert set(seen) == {"canary/gap", "canary/picture"} <= set(METRICS)
    assert seen["canary/picture"] > 1e-3 and seen["canary/gap"] < 1e-6


@pytest.mark.parametrize("grey", [0, 128, 255])
def test_it_is_seen_on_a_blank_picture_too(grey, load, rollout) -> None:
    learner = load()
    blank = rollout(learner, shown=Image.new("RGB", (64, 64), (grey, grey, grey)))
    assert check_rollout(learner, blank, temperature=1.0)["canary/picture"] > 1e-3


@pytest.mark.parametrize("bf16", [False, True])
def test_a_blind_model_stops_the_run(bf16, load, rollout) -> None:
    learner = load(bf16=bf16)
    learner.base.model.vte.weight.data.zero_()
    with pytest.raises(TrainingError, match="moves the logprobs of an answer by 0 nats: the model does not see its"):
        check_rollout(learner, rollout(learner), temperature=1.0)


def test_a_rollout_keeps_its_own_pictures(load, rollout) -> None:
    learner = load()
    episode = rollout(learner)
    before = [(image, image.pixel_values.clone()) for image in episode.example.images]
    check_rollout(learner, episode, temperature=1.0)
    assert all(image is was for image, (was, _) in zip(episode.example.images, before, strict=True))
    assert all(torch.equal(image.pixel_values, pixels) for image, pixels in before)


def test_without_a_picture_there_is_nothing_to_see(load, rollout) -> None:
    learner = load()
    learner.base.model.vte.weight.data.zero_()
    assert set(check_rollout(learner, rollout(learner, shown=None), temperature=1.0)) == {"canary/gap"}


# -- the adapter


def test_an_adapter_at_work_passes(load, rollout) -> None:
    learner = load(use_lora=True, lora_r=2)
    teach(learner, "A", "B")
    assert check_rollout(learner, rollout(learner), temperature=1.0)["canary/adapter"] > 1e-4


def test_a_fresh_adapter_is_not_judged(load, rollout) -> None:
    learner = load(use_lora=True, lora_r=2)
    assert "canary/adapter" not in check_rollout(learner, rollout(learner), temperature=1.0)


def test_an_adapter_that_does_nothing_stops_the_run(load, rollout) -> None:
    learner = load(use_lora=True, lora_r=2)
    teach(learner, "B")
    with pytest.raises(
        TrainingError, match="switching the adapter off moves .* by 0 nats: it has weights, and they do"
    ):
        check_rollout(learner, rollout(learner), temperature=1.0)


# -- engine and trainer


@pytest.mark.parametrize(
    ("bf16", "nats", "told"),
    [(False, 0.01, "0.01 nats .* in float32 gives at most 0.001"), (True, 0.2, "0.2 nats .* bfloat16 .* at most 0.1")],
)
def test_an_engine_that_disagrees_stops_the_run_and_the_gap_is_told(bf16, nats, told, load, rollout) -> None:
    learner = load(bf16=bf16)
    episode = rollout(learner)
    shift(episode, nats)
    num_tokens = sum(episode.trajectory.is_sampled)
    with pytest.raises(TrainingError, match=f"disagree: the logprobs of {num_tokens} sampled tokens differ by {told}"):
        check_rollout(learner, episode, temperature=1.0)


@pytest.mark.parametrize(("bf16", "nats"), [(False, 5e-4), (True, 0.01)])
def test_a_gap_of_rounding_passes_and_is_measured(bf16, nats, load, rollout) -> None:
    learner = load(bf16=bf16)
    episode = rollout(learner)
    shift(episode, nats)
    assert check_rollout(learner, episode, temperature=1.0)["canary/gap"] == pytest.approx(nats, rel=0.05)


def test_a_logprob_that_is_no_number_stops_the_run(load, rollout) -> None:
    learner = load()
    episode = rollout(learner)
    shift(episode, float("nan"))
    with pytest.raises(TrainingError, match="differ by nan nats"):
        check_rollout(learner, episode, temperature=1.0)


def test_logprobs_are_compared_at_the_temperature_of_sampling(load, rollout) -> None:
    learner = load()
    warm = rollout(learner, temperature=0.7)
    assert check_rollout(learner, warm, temperature=0.7)["canary/gap"] < 1e-6
    with pytest.raises(TrainingError, match="engine and trainer disagree"):
        check_rollout(learner, warm, temperature=1.0)


# -- which rollout is judged


def unsampled(episode: Episode) -> Episode:
    """The rollout as it would be if it had ended before its first token."""
    episode.example = episode.prompt.copy()
    episode.trajectory.sampling_logprobs, episode.trajectory.is_sampled = [], []
    return episode


def test_a_rollout_with_a_picture_goes_before_one_without(load, rollout) -> None:
    learner = load()
    episodes = [unsampled(rollout(learner)), rollout(learner, shown=None), rollout(learner)]
    assert "canary/picture" in check_rollouts(learner, episodes, temperature=1.0)
    assert set(check_rollouts(learner, episodes[:2], temperature=1.0)) == {"canary/gap"}


def test_rollouts_without_a_sampled_token_cannot_be_judged_and_it_is_said(load, rollout, capsys) -> None:
    learner = load()
    assert check_rollouts(learner, [unsampled(rollout(learner))] * 2, temperature=1.0) == {}
    assert "none of 2 rollouts holds a sampled token" in capsys.readouterr().out
