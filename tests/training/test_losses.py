"""Advantages, surrogates, KL and aggregation against hand-computed values."""

import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from looktwice.training.losses import (
    Aggregation,
    advantages_by_term,
    aggregate,
    cispo_surrogate,
    group_advantages,
    gspo_surrogate,
    has_accuracy_signal,
    importance_weights,
    kl_estimate,
    policy_surrogate,
    reinforce_surrogate,
    sapo_surrogate,
)

NAN = math.nan
REWARDS = torch.tensor([2.1, 1.6, 0.6, 0.5, 0.0])


def close(actual, expected, atol=5e-5):
    torch.testing.assert_close(actual, torch.as_tensor(expected), atol=atol, rtol=0)


def test_group_advantages_divide_by_the_unbiased_std():
    close(group_advantages(REWARDS), [1.3224, 0.7424, -0.4176, -0.5336, -1.1136])


def test_unscaled_advantages_are_centred_rewards():
    close(group_advantages(REWARDS, scale="none"), [1.14, 0.64, -0.36, -0.46, -0.96])


def test_leave_one_out_centres_on_the_mean_of_the_others():
    others = [(REWARDS.sum() - reward) / 4 for reward in REWARDS]
    close(group_advantages(REWARDS, scale="leave_one_out"), REWARDS - torch.stack(others))


def test_terms_are_scaled_each_by_itself_and_then_by_the_batch():
    accuracy, rare = torch.tensor([[1.0, 1.0, 0.0, 0.0]]), torch.tensor([[0.01, 0.0, 0.0, 0.0]])
    found = advantages_by_term(torch.stack([accuracy, rare], -1), torch.tensor([1.0, 0.5]))
    total = group_advantages(accuracy) + 0.5 * group_advantages(rare)
    close(found, (total - total.mean()) / (total.std() + 1e-4))
    assert found[0, 0] - found[0, 1] > 0.5  # a term a hundred times smaller counts by its weight


def test_a_failed_reward_is_in_no_term():
    terms = torch.tensor([[[1.0], [0.0], [NAN]]])
    found = advantages_by_term(terms, torch.ones(1))
    close(found[0, :2], advantages_by_term(terms[:, :2], torch.ones(1))[0])
    assert found[0, 2] == 0


def test_phantom_advantages_of_an_all_wrong_group():
    rewards = torch.tensor([0.60, 0.55, 0.60, 0.58, 0.60])
    close(group_advantages(rewards), [0.64, -1.64, 0.64, -0.27, 0.64], atol=6e-3)
    assert not has_accuracy_signal(torch.zeros(5))


@pytest.mark.parametrize("scale", ["std", "batch", "none"])
@pytest.mark.parametrize("reward", [0.0, 0.1, 1.85])
def test_equal_rewards_give_exactly_zero(scale, reward):
    assert group_advantages(torch.full((7,), reward), scale=scale).tolist() == [0.0] * 7


def test_rounding_noise_is_no_advantage():
    rewards = torch.tensor([0.1 + 0.2, 0.3, 0.3 + 3e-8], dtype=torch.float64)
    assert group_advantages(rewards).tolist() == [0.0] * 3
    with_failed = torch.cat([rewards, torch.tensor([NAN])])
    assert group_advantages(with_failed).tolist() == [0.0] * 4


def test_failed_rollouts_are_outside_the_statistics():
    rewards = torch.tensor([2.1, NAN, 1.6, 0.6, 0.5, NAN, 0.0])
    close(group_advantages(rewards), [1.3224, 0, 0.7424, -0.4176, -0.5336, 0, -1.1136])


@pytest.mark.parametrize("rewards", [[1.0], [1.0, NAN], [NAN, NAN], [[1.0, 0.0], [NAN, 1.0]]])
def test_group_without_two_rewards_is_refused(rewards):
    with pytest.raises(ValueError, match="2 or more"):
        group_advantages(torch.tensor(rewards))


def test_groups_of_a_batch_are_scaled_each_by_their_own_std():
    groups = torch.stack([REWARDS, REWARDS.flip(0) / 10])
    close(group_advantages(groups)[0], group_advantages(REWARDS))
    close(group_advantages(groups)[1], group_advantages(REWARDS.flip(0) / 10))


def test_batch_std_keeps_near_constant_groups_small():
    groups = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.60, 0.58, 0.60, NAN]])
    std = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.60, 0.58, 0.60]).std()
    advantages = group_advantages(groups, scale="batch")
    close(advantages[0], torch.tensor([0.5, -0.5, 0.5, -0.5]) / (std + 1e-4))
    close(advantages[1], torch.tensor([0.02 / 3, -0.04 / 3, 0.02 / 3, 0.0]) / (std + 1e-4))


@given(st.lists(st.floats(0, 3, width=32), min_size=2, max_size=16))
def test_advantages_of_a_group_add_up_to_zero(rewards):
    assert abs(group_advantages(torch.tensor(rewards)).sum().item()) < 1e-2


@pytest.mark.parametrize(
    ("accuracies", "has_signal"),
    [
        ([1.0, 0.0, 0.0], True),
        ([1.0, 1.0], False),
        ([0.0, 0.0], False),
        ([1.0, NAN, 0.0], True),
        ([1.0, NAN, NAN], False),
        ([1.0, NAN, 1.0], False),
        ([NAN, NAN], False),
        ([], False),
    ],
)
def test_group_has_signal_when_two_rollouts_differ_in_accuracy(accuracies, has_signal):
    assert has_accuracy_signal(torch.tensor(accuracies)) is has_signal


# -- surrogates


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "objective"),
    [
        (0.5, 1.0, 1.28),
        (0.5, -1.0, -1.64872),
        (-0.5, 1.0, 0.60653),
        (-0.5, -1.0, -0.8),
        (0.1, 1.0, 1.10517),
        (-0.1, 1.0, 0.90484),
    ],
)
def test_clipped_surrogate_values(log_ratio, advantage, objective):
    found = policy_surrogate(torch.tensor([log_ratio - 2]), torch.tensor([-2.0]), torch.tensor([advantage]))
    close(found.loss, [-objective])


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "objective"),
    [(2.0, -1.0, -3.0), (1.0, -1.0, -math.e), (2.0, 1.0, 1.28), (-2.0, -1.0, -0.8)],
)
def test_delta_bounds_what_a_worse_token_can_cost(log_ratio, advantage, objective):
    policy_logprobs = torch.tensor([log_ratio], requires_grad=True)
    found = policy_surrogate(policy_logprobs, torch.zeros(1), torch.tensor([advantage]), delta=3.0)
    close(found.loss, [-objective])
    (gradient,) = torch.autograd.grad(found.loss.sum(), policy_logprobs)
    assert bool(found.clipped_low | found.clipped_high) == (gradient.item() == 0)


def test_the_tokens_that_lost_their_gradient_are_marked():
    policy_logprobs = torch.tensor([0.5, 0.5, -0.5, -0.5, 0.1], requires_grad=True)
    found = policy_surrogate(policy_logprobs, torch.zeros(5), torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0]))
    (gradient,) = torch.autograd.grad(found.loss.sum(), policy_logprobs)
    assert (gradient == 0).tolist() == [True, False, False, True, False]
    assert found.clipped_high.tolist() == [True, False, False, False, False]
    assert found.clipped_low.tolist() == [False, False, False, True, False]


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("log_ratio", [1000.0, -1000.0])
@pytest.mark.parametrize("surrogate", [policy_surrogate, cispo_surrogate, sapo_surrogate])
def test_extreme_ratio_keeps_the_gradient_finite(surrogate, log_ratio, advantage):
    policy_logprobs = torch.tensor([log_ratio], requires_grad=True)
    loss = surrogate(policy_logprobs, torch.zeros(1), torch.tensor([advantage])).loss
    loss.sum().backward()
    assert loss.isfinite().all()
    assert policy_logprobs.grad.isfinite().all()


def test_no_tokens_give_no_loss():
    empty = torch.zeros(0)
    assert [part.shape for part in policy_surrogate(empty, empty, empty)] == [(0,)] * 3


def test_gspo_ratio_is_the_geometric_mean_of_a_sequence():
    log_ratios, index = torch.tensor([0.1, -0.2, 0.05, 0.3]), torch.tensor([0, 0, 0, 1])
    loss = gspo_surrogate(log_ratios, torch.zeros(4), torch.ones(4), index, clip_low=1.0, clip_high=1.0).loss
    close(loss, [-0.983471, -0.983471, -0.983471, -math.exp(0.3)])
    found = gspo_surrogate(log_ratios, torch.zeros(4), torch.tensor([-1.0, -1.0, -1.0, 1.0]), index)
    close(found.loss, [0.9997, 0.9997, 0.9997, -1.0004])
    assert found.clipped_low.tolist() == [True, True, True, False]
    assert found.clipped_high.tolist() == [False, False, False, True]


@pytest.mark.parametrize("by_token", [False, True])
def test_gspo_gradient_is_that_of_the_sequence_ratio(by_token):
    log_ratios = torch.tensor([0.1, -0.2, 0.05], requires_grad=True)
    index = torch.zeros(3, dtype=torch.int64)
    found = gspo_surrogate(log_ratios, torch.zeros(3), torch.ones(3), index, clip_low=1.0, by_token=by_token)
    (gradient,) = torch.autograd.grad(found.loss.mean(), log_ratios)
    (wanted,) = torch.autograd.grad(-log_ratios.mean().exp(), log_ratios)
    close(gradient, wanted)


def test_gspo_by_token_lets_tokens_of_a_sequence_have_advantages_of_their_own():
    log_ratios = torch.tensor([0.1, -0.1], requires_grad=True)
    found = gspo_surrogate(
        log_ratios, torch.zeros(2), torch.tensor([1.0, 0.0]), torch.zeros(2, dtype=torch.int64), by_token=True
    )
    (gradient,) = torch.autograd.grad(found.loss.sum(), log_ratios)
    close(gradient, [-1.0, 0.0])


def test_cispo_drops_no_token():
    policy_logprobs = torch.tensor([-1.0, -1.0], requires_grad=True)
    sampling_logprobs = torch.tensor([-3.0, -0.5])
    found = cispo_surrogate(policy_logprobs, sampling_logprobs, torch.tensor([2.0, -1.0]), clip_high=4.0)
    (gradient,) = torch.autograd.grad(found.loss.sum(), policy_logprobs)
    close(found.loss, [5.0 * 2, -math.exp(-0.5)])
    close(gradient, [-5.0 * 2, math.exp(-0.5)])
    assert (found.clipped_low.tolist(), found.clipped_high.tolist()) == ([False, False], [True, False])


def test_sapo_weighs_by_a_sigmoid_of_the_ratio():
    log_ratios = torch.tensor([math.log(2), math.log(2)])
    found = sapo_surrogate(log_ratios, torch.zeros(2), torch.tensor([1.0, -1.0]))
    close(found.loss, [-4 / (1 + math.exp(-1)), 4 / 1.05 / (1 + math.exp(-1.05))])


def test_every_surrogate_has_the_gradient_of_reinforce_before_the_first_update():
    sampling_logprobs, advantages = torch.tensor([-0.3, -2.0, -1.0]), torch.tensor([1.5, 1.5, -0.5])
    index = torch.tensor([0, 0, 1])
    policy_logprobs = sampling_logprobs.clone().requires_grad_()
    losses = [
        policy_surrogate(policy_logprobs, sampling_logprobs, advantages),
        gspo_surrogate(policy_logprobs, sampling_logprobs, advantages, index),
        gspo_surrogate(policy_logprobs, sampling_logprobs, advantages, index, by_token=True),
        cispo_surrogate(policy_logprobs, sampling_logprobs, advantages),
        sapo_surrogate(policy_logprobs, sampling_logprobs, advantages),
        reinforce_surrogate(policy_logprobs, sampling_logprobs, advantages),
    ]
    for found in losses:
        (gradient,) = torch.autograd.grad(found.loss.sum(), policy_logprobs)
        close(gradient, -advantages, atol=1e-7)


# -- importance


@pytest.mark.parametrize(
    ("correction", "expected"),
    [("none", [1, 1, 1, 1]), ("truncate", [1.5, 2, 0.25, 1]), ("mask", [1.5, 0, 0, 1])],
)
def test_importance_weights_are_capped_or_left_out(correction, expected):
    ratios = torch.tensor([1.5, 4.0, 0.25, 1.0])
    drawn = torch.full((4,), -2.0)
    old = (drawn + ratios.log()).requires_grad_()
    weights = importance_weights(old, drawn, correction=correction, cap=2.0)
    close(weights, [float(value) for value in expected])
    assert not weights.requires_grad


# -- KL


@pytest.mark.parametrize(
    ("estimator", "d", "expected"),
    [
        ("k3", 0.2, 0.021403),
        ("k3", -0.2, 0.018731),
        ("k2", 0.2, 0.02),
        ("k2", -0.2, 0.02),
        ("k1", 0.2, -0.2),
        ("k1", -0.2, 0.2),
        ("k3", 0.0, 0.0),
    ],
)
def test_kl_estimates(estimator, d, expected):
    close(kl_estimate(torch.tensor([-1.0]), torch.tensor([-1.0 + d]), estimator=estimator), [expected], atol=1e-6)


def test_kl_is_measured_from_the_policy():
    generator = torch.Generator().manual_seed(0)
    policy, ref = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.2, 0.3, 0.5])
    draws = torch.multinomial(policy, 200_000, replacement=True, generator=generator)
    true_kl = (policy * (policy / ref).log()).sum()
    for estimator in ("k1", "k3"):
        estimate = kl_estimate(policy.log()[draws], ref.log()[draws], estimator=estimator).mean()
        close(estimate, true_kl, atol=0.01)


# -- aggregation

PER_TOKEN = torch.tensor([1.0, 2.0, 3.0, 10.0])
INDEX = torch.tensor([0, 0, 0, 1])


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token_mean", 16 / 4),
        ("seq_mean_token_mean", (2 + 10) / 2),
        ("seq_mean_token_sum", 16 / 2),
        ("constant", 16 / (2 * 8)),
    ],
)
def test_aggregation_values(mode, expected):
    loss = aggregate(PER_TOKEN, INDEX, mode=mode, num_tokens=4, num_sequences=2, max_tokens=8)
    assert loss.item() == pytest.approx(expected)


def test_constant_aggregation_needs_its_divisor():
    with pytest.raises(ValueError, match="max_tokens"):
        aggregate(PER_TOKEN, INDEX, mode="constant", num_tokens=4, num_sequences=2)


@pytest.mark.parametrize("mode", get_args(Aggregation))
@settings(deadline=None, max_examples=30)
@given(lengths=st.lists(st.integers(0, 6), min_size=2, max_size=6), data=st.data())
def test_accumulation_equals_one_batch(mode, lengths, data):
    lengths = [1, *lengths]
    cut = data.draw(st.integers(1, len(lengths) - 1))
    counts = {"num_tokens": sum(lengths), "num_sequences": sum(n > 0 for n in lengths), "max_tokens": 6}
    losses = [torch.linspace(-1, 2, n) for n in lengths]

    def share(part):
        index = torch.repeat_interleave(torch.arange(len(part)), torch.tensor([len(loss) for loss in part]))
        return aggregate(torch.cat(part), index, mode=mode, **counts)

    close(share(losses[:cut]) + share(losses[cut:]), share(losses), atol=1e-5)
