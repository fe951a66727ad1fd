"""The policy update: which rollouts train, and what an update does to them."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from tests.training.scripted import CUT, OTHER, RIGHT, WRONG
from tests.training.updates import gradients

from looktwice.config import GRPOConfig
from looktwice.processing.packing import PackedBatch, pack
from looktwice.rewards import Played, Reward
from looktwice.rollout.trajectory import Trajectory
from looktwice.training.learner import Learner, Scores
from looktwice.training.policy import advantages_of, improve, in_minibatches
from looktwice.training.rollouts import Rollout
from looktwice.training.trajectories import Recorded


def step(learner: Learner, groups: list[list[Rollout]]) -> dict[str, float]:
    assert isinstance(learner.config, GRPOConfig)
    return improve(learner, groups, learner.config, None)


def assert_same_gradients(first: Learner, second: Learner) -> None:
    for one, other in zip(gradients(first), gradients(second), strict=True):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=1e-3)


def mean_logprobs(learner: Learner, groups: list[list[Rollout]]) -> list[float]:
    with torch.no_grad():
        return [float(learner.score(pack([rollout.example])).logprobs.mean()) for group in groups for rollout in group]


def test_the_better_rollouts_become_likelier_and_the_worse_ones_less_likely(load, rollouts_of) -> None:
    learner = load(learning_rate=1e-4)
    groups = rollouts_of(learner, [(RIGHT, 1.0), (WRONG, 0.0), (RIGHT, 1.0), (OTHER, 0.0)])
    before = mean_logprobs(learner, groups)
    metrics = step(learner, groups)
    after = mean_logprobs(learner, groups)
    assert [new > old for old, new in zip(before, after)] == [True, False, True, False]
    assert [rollout.advantage for rollout in groups[0]] == pytest.approx([0.866, -0.866, 0.866, -0.866], abs=1e-3)
    assert (metrics["kl/sampling"], metrics["clip/low"], metrics["clip/high"]) == pytest.approx((0, 0, 0), abs=1e-4)


def test_the_pixels_of_a_crop_are_context_of_what_follows_it_and_of_nothing_before(load, rollouts_of) -> None:
    learner = load()
    [[rollout]] = rollouts_of(learner, [(RIGHT, 1.0)])
    example = rollout.example
    plain = learner.score(pack([example])).logprobs
    overview, crop = example.images
    repainted = replace(crop, pixel_values=255 - crop.pixel_values)
    example.images[:] = [overview, repainted]
    changed = learner.score(pack([example])).logprobs
    num_before = rollout.trajectory.is_sampled.index(False)
    torch.testing.assert_close(changed[:num_before], plain[:num_before])
    assert (changed[num_before:] - plain[num_before:]).abs().min() > 1e-4


@pytest.mark.parametrize("loss_aggregation", ["token_mean", "seq_mean_token_mean"])
def test_an_update_is_the_same_in_one_row_and_in_many(loss_aggregation, load, rollouts_of) -> None:
    group = [(RIGHT, 1.0), (WRONG, 0.0), (OTHER, 0.5)]
    packed, split = (load(loss_aggregation=loss_aggregation, max_tokens_per_row=size, beta=0.1) for size in (10_000, 1))
    for learner in (packed, split):
        improve(learner, rollouts_of(learner, group), learner.config, learner.freeze_reference())
    assert_same_gradients(packed, split)


def test_the_surrogates_agree_on_rollouts_of_the_policy_itself(load, rollouts_of) -> None:
    learners = [load(surrogate=name) for name in ("ppo", "gspo", "gspo_token", "cispo", "sapo", "reinforce")]
    for learner in learners:
        step(learner, rollouts_of(learner, [(RIGHT, 1.0), (WRONG, 0.0)]))
    for other in learners[1:]:
        assert_same_gradients(learners[0], other)


def test_the_kl_to_the_reference_is_zero_at_first_and_enters_the_loss_by_its_weight(load, rollouts_of) -> None:
    learner = load(beta=0.5, learning_rate=1e-3, drop_constant_groups=False)
    reference = learner.freeze_reference()
    first, second = (
        improve(learner, rollouts_of(learner, [(RIGHT, 1.0), (WRONG, total)]), learner.config, reference)
        for total in (0.0, 1.0)
    )
    assert first["kl/reference"] == pytest.approx(0, abs=1e-6)
    # without advantages the KL is alone in the loss
    assert second["kl/reference"] > 1e-3
    assert second["loss"] == pytest.approx(0.5 * second["kl/reference"], rel=1e-3)


def test_a_second_update_on_the_same_rollouts_is_clipped(load, rollouts_of) -> None:
    learner = load(num_iterations=2, learning_rate=1e-2, epsilon=0.01, epsilon_high=0.01)
    metrics = step(learner, rollouts_of(learner, [(RIGHT, 1.0), (WRONG, 0.0)]))
    assert metrics["clip/low"] > 0.05 and metrics["clip/high"] > 0.05
    assert metrics["kl/sampling"] > 0.01


def test_groups_that_are_all_right_or_all_wrong_are_dropped_and_counted(load, rollouts_of) -> None:
    learner, alone = load(), load()
    mixed = [(RIGHT, 1.0), (WRONG, 0.0)]
    groups = rollouts_of(learner, mixed, [(RIGHT, 1.0), (OTHER, 1.0)], [(WRONG, 0.0), (OTHER, 0.0)])
    assert step(learner, groups)["group/dropped"] == pytest.approx(2 / 3)
    assert step(alone, rollouts_of(alone, mixed))["group/dropped"] == 0
    assert_same_gradients(learner, alone)


def test_without_any_signal_the_weights_stay(load, rollouts_of) -> None:
    learner = load(learning_rate=1e-2)
    before = [parameter.clone() for parameter in learner.parameters]
    metrics = step(learner, rollouts_of(learner, [(RIGHT, 1.0), (OTHER, 1.0)]))
    assert metrics == {"group/dropped": 1.0, "loss": 0.0, "rollout/trained_tokens": 0.0}
    assert all(torch.equal(old, new) for old, new in zip(before, learner.parameters))


def test_a_group_that_differs_in_shaping_alone_trains_only_when_asked(load, rollouts_of) -> None:
    learner = load()
    [group] = rollouts_of(learner, [(WRONG, 0.0), (OTHER, 0.0)])
    group[0].reward = Reward(total=1.0, parts={"accuracy": 0.0, "format": 1.0})
    group[1].reward = Reward(total=0.0, parts={"accuracy": 0.0, "format": 0.0})
    assert step(learner, [group])["group/dropped"] == 1
    assert improve(learner, [group], GRPOConfig(drop_constant_groups=False), None)["group/dropped"] == 0
    assert group[0].advantage > 0 > group[1].advantage


def test_a_failed_reward_changes_neither_the_advantages_nor_the_update(load, rollouts_of) -> None:
    learner, without = load(), load()
    group = [(RIGHT, 1.0), (WRONG, 0.0), (OTHER, 0.5)]
    groups = rollouts_of(learner, [group[0], (OTHER, float("nan")), *group[1:]])
    expected = rollouts_of(without, group)
    metrics, wanted = step(learner, groups), step(without, expected)
    advantages = [rollout.advantage for rollout in groups[0] if rollout.reward.error is None]
    assert advantages == pytest.approx([rollout.advantage for rollout in expected[0]])
    assert metrics["loss"] == pytest.approx(wanted["loss"], abs=1e-6)
    assert_same_gradients(learner, without)


def test_a_group_with_one_reward_left_is_dropped(load, rollouts_of) -> None:
    learner = load(drop_constant_groups=False)
    groups = rollouts_of(learner, [(RIGHT, 1.0), (WRONG, float("nan"))])
    assert step(learner, groups) == {"group/dropped": 1.0, "loss": 0.0, "rollout/trained_tokens": 0.0}


@pytest.mark.parametrize("is_masked", [True, False])
def test_a_truncated_rollout_counts_in_its_group_and_trains_only_when_asked(is_masked, load, rollouts_of) -> None:
    learner = load(learning_rate=1e-3, mask_truncated_completions=is_masked)
    groups = rollouts_of(learner, [(RIGHT, 1.0), (CUT, 0.0)])
    assert groups[0][1].trajectory.stop_reason == "max_tokens"
    seen: list[int] = []
    plain = learner.rows
    learner.rows = lambda examples: seen.append(len(examples)) or plain(examples)
    step(learner, groups)
    assert seen == [1 if is_masked else 2]
    assert groups[0][0].advantage == pytest.approx(0.707, abs=1e-3)


def test_metrics_count_once_what_is_computed_again_when_memory_runs_out(load, rollouts_of, monkeypatch) -> None:
    learner, whole = load(), load()
    [group] = rollouts_of(learner, [(RIGHT, 1.0), (WRONG, 0.0), (OTHER, 0.0)])
    score, calls = Learner.score, []

    def scored(self, batch, **options):
        calls.append(batch)
        if len(calls) == 1:
            score(self, batch, **options)  # as far as the metrics
            raise torch.OutOfMemoryError
        return score(self, batch, **options)

    expected = step(whole, [group])
    monkeypatch.setattr(Learner, "score", scored)
    found = step(learner, [group])
    assert found.pop("memory/row_splits") > 0
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)


GROUPS = [[(RIGHT, 1.0), (WRONG, 0.0)], [(OTHER, 1.0), (WRONG, 0.0)], [(RIGHT, 1.0), (OTHER, 0.0)]]


def test_minibatches_are_optimizer_steps_in_an_order_of_seed_and_step(load, rollouts_of) -> None:
    learner = load(num_minibatches=2, learning_rate=1e-3)
    groups = rollouts_of(learner, *GROUPS)
    parts = in_minibatches(groups, learner.config, 0)
    assert sorted(map(len, parts)) == [2, 4]
    assert sorted(id(one) for part in parts for one in part) == sorted(id(one) for group in groups for one in group)
    assert in_minibatches(groups, learner.config, 0) == parts
    orders = [[id(part[0]) for part in in_minibatches(groups, learner.config, step)] for step in range(8)]
    assert len({tuple(order) for order in orders}) > 1
    assert step(learner, groups)["optim/updates"] == 2


def test_with_minibatches_the_surrogates_differ(load, rollouts_of) -> None:
    ends = []
    for name in ("ppo", "gspo", "cispo", "reinforce"):
        learner = load(surrogate=name, num_minibatches=3, learning_rate=3e-3)
        step(learner, rollouts_of(learner, *GROUPS))
        ends.append(torch.cat([parameter.detach().flatten() for parameter in learner.parameters]))
    assert all((one - other).abs().max() > 1e-5 for one, other in combinations(ends, 2))


def test_one_update_on_rollouts_of_the_policy_itself_takes_one_forward_of_each_row(
    load, rollouts_of, monkeypatch
) -> None:
    learner = load()
    groups = rollouts_of(learner, GROUPS[0])
    seen: list[int] = []
    score = Learner.score
    monkeypatch.setattr(Learner, "score", lambda self, row, **given: seen.append(1) or score(self, row, **given))
    metrics = step(learner, groups)
    assert len(seen) == 1
    assert metrics["gap/mean"] <= metrics["gap/max"] < 1e-4 and metrics["gap/ratio"] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("num_iterations", [1, 2])
def test_what_another_distribution_drew_counts_by_its_importance(num_iterations, load, rollouts_of) -> None:
    plain, weighted = (
        load(importance_correction=name, num_iterations=num_iterations, importance_cap=1.5, learning_rate=0)
        for name in ("none", "truncate")
    )
    for learner in (plain, weighted):
        groups = rollouts_of(learner, GROUPS[0])
        for rollout in groups[0]:
            trajectory = rollout.trajectory
            # half as likely to be drawn as the policy holds it for, or three times as likely
            shift = -0.5 if rollout.reward.total else 1.0
            trajectory.drawn_logprobs = [logprob + shift for logprob in trajectory.sampling_logprobs]
        metrics = step(learner, groups)
    assert 0.3 < metrics["importance/mean"] < 1.5
    pairs = zip(gradients(weighted), gradients(plain), strict=True)
    assert not all(torch.allclose(one, other) for one, other in pairs)


def test_the_entropy_is_raised_by_its_weight(load, rollouts_of) -> None:
    entropies = []
    for coefficient in (0.0, 1.0):
        learner = load(entropy_coef=coefficient, learning_rate=1e-3)
        groups = rollouts_of(learner, GROUPS[0])
        step(learner, groups)
        entropies.append(step(learner, groups)["policy/entropy"])
    assert entropies[1] > entropies[0] + 0.01


def test_cut_rollouts_can_be_left_out_of_the_statistics(load, rollouts_of) -> None:
    learner = load(truncated_in_statistics=False)
    groups = rollouts_of(learner, [(RIGHT, 1.0), (WRONG, 0.0), (CUT, 0.0)])
    step(learner, groups)
    right, wrong, cut = (rollout.advantage for rollout in groups[0])
    assert (right, cut) == (pytest.approx(-wrong), 0.0)


def test_terms_can_be_scaled_each_by_itself(load, rollouts_of) -> None:
    learner = load(scale_rewards="per_term")
    groups = rollouts_of(learner, [(RIGHT, 1.0), (RIGHT, 1.0), (WRONG, 0.0), (OTHER, 0.0)])
    for rollout, rare in zip(groups[0], (0.01, 0.0, 0.0, 0.0)):
        rollout.reward = Reward(total=rollout.reward.total + rare, parts={"accuracy": rollout.reward.total, "r": rare})
    step(learner, groups)
    first, second, *_ = (rollout.advantage for rollout in groups[0])
    assert first - second > 0.5


def advantages_by_term_of(rewards: list[Reward]) -> list[float]:
    played = Played(Trajectory(prompt_ids=[]))
    group = [Recorded(played=played, reward=reward, advantage=0.0) for reward in rewards]
    [advantages] = advantages_of([group], GRPOConfig(scale_rewards="per_term")).tolist()
    return advantages


def test_a_plain_number_is_a_term_too() -> None:
    advantages = advantages_by_term_of([Reward(total=1.0), Reward(total=0.0)])
    assert advantages == pytest.approx([0.707, -0.707], abs=1e-3)


def test_each_term_has_its_weight_where_rollouts_are_paid_different_ones() -> None:
    light, heavy = {"light": 1.0}, {"heavy": 10.0}
    rewards = [
        Reward(total=1.0, parts={"light": 1.0}, weights=light),
        Reward(total=0.0, parts={"light": 0.0}, weights=light),
        Reward(total=1.0, parts={"heavy": 1.0}, weights=heavy),
        Reward(total=0.0, parts={"heavy": 0.0}, weights=heavy),
    ]
    lightly, _, heavily, _ = advantages_by_term_of(rewards)
    assert heavily > 1 and lightly < 0  # with equal weights both are 0.87


def test_logprobs_are_found_in_shorter_rows_when_memory_runs_out(load, rollouts_of, monkeypatch) -> None:
    learner = load(max_tokens_per_row=10_000)
    groups = rollouts_of(learner, *GROUPS)
    rows = learner.rows([rollout.example for group in groups for rollout in group])
    whole = learner.logprobs(rows, temperature=1.0)
    score = Learner.score

    def short(self: Learner, row: PackedBatch, **given: object) -> Scores:
        if len(row.examples) > 1:
            raise torch.OutOfMemoryError
        return score(self, row, **given)

    monkeypatch.setattr(Learner, "score", short)
    found = learner.logprobs(rows, temperature=1.0)
    assert found.keys() == whole.keys()
    for name, logprobs in found.items():
        torch.testing.assert_close(logprobs, whole[name], atol=1e-5, rtol=1e-4)
