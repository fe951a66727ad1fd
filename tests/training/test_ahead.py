"""Rollouts made ahead: from which weights, what comes of them, and when none are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.training.scripted import paid

from looktwice.formats.files import RowFile
from looktwice.formats.sample_file import read_samples
from looktwice.training.ahead import Ahead
from looktwice.training.sampler import Sampler, copied

RUN = {"max_steps": 3, "learning_rate": 3e-3, "num_generations": 4, "save_steps": 100}
LORA = {"use_lora": True, "lora_r": 4}


def weights(folder: Path) -> bytes:
    [path] = folder.glob("*model.safetensors")
    return path.read_bytes()


def rewards(lines: list[dict[str, float]]) -> list[tuple[float, float]]:
    """What tells the rollouts of a step from others."""
    return [(line["reward/total"], line["policy/entropy"]) for line in lines]


@pytest.mark.parametrize("settings", [{}, LORA])
def test_rollouts_are_those_of_the_weights_before_the_update(settings, run) -> None:
    _, ahead = run("ahead", one_step_off=True, **RUN, **settings)
    _, here = run("here", **RUN, **settings)
    _, still = run("still", **{**RUN, "learning_rate": 0}, **settings)
    assert [line["reward/total"] for line in ahead[:2]] == [line["reward/total"] for line in still[:2]]
    assert ahead[0]["kl/sampling"] < 1e-5 < 1e-3 < ahead[1]["kl/sampling"]
    assert here[1]["kl/sampling"] < 1e-5
    assert ["gap/mean" in line for line in (*ahead[:2], here[1])] == [True, False, True]  # what is older has no gap


def test_a_rollout_says_which_weights_made_it(run, tmp_path) -> None:
    run("ahead", one_step_off=True, **RUN)
    files = [RowFile(tmp_path / "ahead" / "trajectories" / f"step-{step}.jsonl.zst") for step in (1, 2, 3)]
    assert [{row.values["version"] for row in file} for file in files] == [{0}, {0}, {1}]


def test_after_a_checkpoint_nothing_is_made_ahead(run) -> None:
    every = {**RUN, "save_steps": 1}
    ahead, lines = run("ahead", one_step_off=True, **every)
    here, expected = run("here", **every)
    assert rewards(lines) == rewards(expected) and weights(ahead) == weights(here)


@pytest.mark.parametrize("settings", [{}, LORA])
def test_a_resumed_run_ends_in_the_weights_of_an_uninterrupted_one(settings, run, tmp_path) -> None:
    settings = {**RUN, "max_steps": 4, "save_steps": 2, "one_step_off": True, "beta": 0.1, **settings}
    whole, expected = run("whole", **settings)
    assert [line["kl/sampling"] > 1e-3 for line in expected] == [False, True, False, True]
    resumed, lines = run("resumed", resume_from_checkpoint=tmp_path / "whole" / "checkpoint-2", **settings)
    assert rewards(lines) == rewards(expected[2:])
    assert weights(resumed) == weights(whole)


def test_an_update_leaves_the_copy_as_it_was_and_what_is_frozen_is_there_once(load) -> None:
    learner = load(**LORA)
    before = [weight.clone() for weight in learner.base.parameters()]
    apart = copied(learner.base)
    for own, live, was in zip(apart.parameters(), learner.base.parameters(), before, strict=True):
        assert (own.data_ptr() == live.data_ptr()) == (not live.requires_grad) and own is not live
        with torch.no_grad():
            live += live.requires_grad
        assert torch.equal(own, was)


def test_what_goes_wrong_ahead_is_told_when_its_step_comes(load, dataset) -> None:
    learner = load(num_generations=2, max_new_tokens=4, one_step_off=True)
    samples = read_samples(dataset.rl, dataset.rl.parent)[:1]
    sampler = Sampler(learner, learner.config, is_apart=True)

    def fails(played):
        raise ValueError("no reward")

    ahead = Ahead(learner, learner.config, fails, sampler)
    assert ahead.take() is None
    ahead.begin(1, samples)
    ahead.wait()
    with pytest.raises(ValueError, match="no reward"):
        ahead.take()


def test_what_is_dropped_is_not_taken(load, dataset) -> None:
    learner = load(num_generations=2, max_new_tokens=4, one_step_off=True)
    samples = read_samples(dataset.rl, dataset.rl.parent)[:1]
    sampler = Sampler(learner, learner.config, is_apart=True)
    ahead = Ahead(learner, learner.config, lambda played: [paid(0.0) for _ in played], sampler)
    ahead.begin(1, samples)
    ahead.drop()
    assert ahead.take() is None


def test_pictures_of_the_coming_step_are_kept_apart_from_those_of_this_one(load, dataset) -> None:
    learner = load(num_generations=2, max_new_tokens=4, one_step_off=True, freeze_vision=True)
    samples = read_samples(dataset.rl, dataset.rl.parent)[:1]
    ahead = Ahead(learner, learner.config, lambda played: [paid(0.0) for _ in played], Sampler(learner, learner.config))
    with learner.images_kept():
        present = learner.vision_cache
        ahead.begin(1, samples)
    _, images = ahead.take()
    assert images is not None and images is not present
