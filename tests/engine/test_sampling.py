"""Choosing the next id: greedy, truncated and not, and the logprob that goes with it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from looktwice.engine.sampling import BLOCK, Sampling, Seen, draw, mixed_seed, uniforms
from looktwice.errors import ConfigError

PROBABILITIES = (0.4, 0.3, 0.2, 0.1)
LOGITS = torch.tensor(PROBABILITIES).log() + 3
NOTHING = torch.tensor([], dtype=torch.long)


def numbers(count: int) -> Tensor:
    return torch.from_numpy(uniforms([7] * count, range(count)))


def shares_of(sampling: Sampling, *, banned: Tensor = NOTHING, num_draws: int = 4000, seen: Seen | None = None) -> list:
    """How often each of the four ids is drawn."""
    logits = LOGITS.repeat(num_draws, 1)
    ids = draw(logits, sampling, banned, numbers(num_draws), [seen] * num_draws if seen else ()).ids
    return (torch.bincount(ids, minlength=4) / num_draws).tolist()


@pytest.mark.parametrize(
    ("sampling", "shares"),
    [
        (Sampling(), (0.4, 0.3, 0.2, 0.1)),
        (Sampling(temperature=0.5), (16 / 30, 9 / 30, 4 / 30, 1 / 30)),
        (Sampling(top_k=2), (4 / 7, 3 / 7, 0, 0)),
        (Sampling(top_k=4), (0.4, 0.3, 0.2, 0.1)),
        (Sampling(top_k=9), (0.4, 0.3, 0.2, 0.1)),
        (Sampling(top_p=0.69), (4 / 7, 3 / 7, 0, 0)),
        (Sampling(top_p=0.71), (4 / 9, 3 / 9, 2 / 9, 0)),
        (Sampling(top_p=1e-6), (1, 0, 0, 0)),
        (Sampling(top_p=0.5, top_k=3), (4 / 7, 3 / 7, 0, 0)),
        (Sampling(min_p=0.6), (4 / 7, 3 / 7, 0, 0)),
        (Sampling(min_p=0.2, top_k=3), (4 / 9, 3 / 9, 2 / 9, 0)),
        (Sampling(min_p=1), (1, 0, 0, 0)),
        (Sampling(temperature=0), (1, 0, 0, 0)),
        (Sampling(temperature=0, top_k=3, top_p=0.5), (1, 0, 0, 0)),
    ],
)
def test_ids_are_drawn_in_these_shares(sampling, shares) -> None:
    assert shares_of(sampling) == pytest.approx(shares, abs=0.025)
    assert [share == 0 for share in shares_of(sampling)] == [share == 0 for share in shares]


@pytest.mark.parametrize(
    ("sampling", "shares"),
    [
        (Sampling(temperature=0), (0, 1, 0, 0)),
        (Sampling(), (0, 3 / 6, 2 / 6, 1 / 6)),
        (Sampling(top_k=2), (0, 3 / 5, 2 / 5, 0)),
        (Sampling(top_p=0.45), (0, 1, 0, 0)),
    ],
)
def test_a_banned_id_is_never_drawn_and_takes_no_place_in_the_truncation(sampling, shares) -> None:
    assert shares_of(sampling, banned=torch.tensor([0])) == pytest.approx(shares, abs=0.025)


@pytest.mark.parametrize(
    ("sampling", "probabilities"),
    [
        (Sampling(temperature=0), PROBABILITIES),
        (Sampling(top_k=1), PROBABILITIES),
        (Sampling(top_p=0.1), PROBABILITIES),
        (Sampling(temperature=0.5, top_k=2), (16 / 30, 9 / 30, 4 / 30, 1 / 30)),
    ],
)
def test_the_logprob_is_of_the_whole_distribution_at_its_temperature(sampling, probabilities) -> None:
    drawn = draw(LOGITS.repeat(50, 1), sampling, torch.tensor([1]), numbers(50))
    torch.testing.assert_close(drawn.logprobs, torch.tensor([math.log(probabilities[i]) for i in drawn.ids.tolist()]))


@pytest.mark.parametrize(
    ("sampling", "banned", "probabilities"),
    [
        (Sampling(), [], PROBABILITIES),
        (Sampling(), [1], (4 / 7, 0, 2 / 7, 1 / 7)),
        (Sampling(top_k=2), [], (4 / 7, 3 / 7, 0, 0)),
        (Sampling(top_p=0.71), [], (4 / 9, 3 / 9, 2 / 9, 0)),
        (Sampling(min_p=0.6), [3], (4 / 7, 3 / 7, 0, 0)),
        (Sampling(temperature=0.5, top_k=2), [], (16 / 25, 9 / 25, 0, 0)),
        (Sampling(temperature=0), [0], (0, 1, 0, 0)),
    ],
)
def test_the_drawn_logprob_is_of_what_was_really_drawn_from(sampling, banned, probabilities) -> None:
    drawn = draw(LOGITS.repeat(50, 1), sampling, torch.tensor(banned, dtype=torch.long), numbers(50))
    expected = torch.tensor([math.log(probabilities[i]) for i in drawn.ids.tolist()])
    torch.testing.assert_close(drawn.drawn_logprobs, expected, atol=1e-6, rtol=1e-5)


SEEN = Seen(context=torch.tensor([0, 1]), answer=torch.tensor([1]))


@pytest.mark.parametrize(
    ("sampling", "logits"),
    [
        (Sampling(repetition_penalty=2.0), (0.5, -2.0, 2.0)),
        (Sampling(presence_penalty=0.5), (1.0, -1.5, 2.0)),
        (Sampling(repetition_penalty=0.5, presence_penalty=-1.0), (2.0, 0.5, 2.0)),
        (Sampling(repetition_penalty=2.0, temperature=0.5), (1.0, -4.0, 4.0)),
    ],
)
def test_penalties_change_the_drawn_distribution_and_not_the_plain_one(sampling, logits) -> None:
    plain = torch.tensor([[1.0, -1.0, 2.0]])
    drawn = draw(plain.repeat(200, 1), sampling, NOTHING, numbers(200), [SEEN] * 200)
    changed = torch.tensor(logits).log_softmax(-1)
    torch.testing.assert_close(drawn.drawn_logprobs, changed[drawn.ids])
    torch.testing.assert_close(drawn.logprobs, (plain[0] / sampling.temperature).log_softmax(-1)[drawn.ids])
    assert len(set(drawn.ids.tolist())) > 1


def test_each_row_is_truncated_by_itself() -> None:
    logits = torch.stack([LOGITS, LOGITS.flip(0)])
    assert draw(logits, Sampling(top_k=1), NOTHING, numbers(2)).ids.tolist() == [0, 3]


def test_logprobs_are_float32_also_of_bfloat16_logits() -> None:
    drawn = draw(LOGITS[None].bfloat16(), Sampling(), NOTHING, numbers(1))
    assert drawn.logprobs.dtype == drawn.drawn_logprobs.dtype == torch.float32


@pytest.mark.parametrize("size", [1, 7, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 5 * BLOCK + 77])
@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_a_draw_in_blocks_is_the_draw_of_the_running_sum(size, top_p) -> None:
    logits = torch.randn(300, size, generator=torch.Generator().manual_seed(size), dtype=torch.float32) * 3
    at = numbers(300)
    drawn = draw(logits.clone(), Sampling(top_p=top_p), NOTHING, at)
    probabilities = logits.double().softmax(-1)
    ranked, order = probabilities.sort(descending=True)
    kept = torch.zeros_like(probabilities).scatter(1, order, (ranked.cumsum(-1) - ranked < top_p).double())
    probabilities = probabilities * kept
    running = probabilities.cumsum(-1) / probabilities.sum(-1, keepdim=True)
    rows = torch.arange(300)
    # between the sums before and after its own id, but for what float32 rounds away
    assert (running[rows, drawn.ids] > at - 1e-5).all()
    assert (
        running[rows, drawn.ids] - (probabilities / probabilities.sum(-1, keepdim=True))[rows, drawn.ids] < at + 1e-5
    ).all()
    assert (kept[rows, drawn.ids] == 1).all()


def test_the_largest_number_still_draws_an_id_with_weight() -> None:
    logits = torch.full((1, 3000), -torch.inf)
    logits[0, [5, 1500]] = 0.0
    for number, expected in ((0.0, 5), (0.4999, 5), (0.5001, 1500), (1 - 2**-53, 1500)):
        at = torch.tensor([number], dtype=torch.float64)
        assert draw(logits.clone(), Sampling(), NOTHING, at).ids.tolist() == [expected]


def test_equal_scores_share_their_fate_whatever_their_order() -> None:
    tied = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]]).repeat(500, 1)
    ids = draw(tied, Sampling(top_k=2), NOTHING, numbers(500)).ids
    assert sorted(set(ids.tolist())) == [0, 1, 2, 3]


def test_numbers_belong_to_their_seed_and_position_alone() -> None:
    both = uniforms([3, 9, 3], [0, 0, 1])
    assert both.tolist() == [*uniforms([3], [0]), *uniforms([9], [0]), *uniforms([3], [1])]
    assert len(set(both.tolist())) == 3


@pytest.mark.parametrize("seeds", [[5] * 20_000, range(20_000)])
def test_numbers_are_spread_evenly_along_a_rollout_and_across_seeds(seeds) -> None:
    positions = range(20_000) if len({*seeds}) == 1 else [0] * 20_000
    found = torch.from_numpy(uniforms(seeds, positions))
    assert found.min() >= 0 and found.max() < 1
    counts = torch.histc(found.float(), 20, 0, 1)
    assert (counts - 1000).abs().max() < 150
    assert abs(float(torch.corrcoef(torch.stack([found[:-1], found[1:]]))[0, 1])) < 0.03


def test_a_mixed_seed_keeps_its_parts_apart() -> None:
    assert len({mixed_seed(1, 23), mixed_seed(12, 3), mixed_seed(123), mixed_seed(1, 2, 3)}) == 4
    assert mixed_seed(5, b"ids") == mixed_seed(5, b"ids") < 2**64


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"top_k": -1},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"presence_penalty": math.inf},
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(setting) -> None:
    [name] = setting
    with pytest.raises(ConfigError, match=f"{name} is {setting[name]}"):
        Sampling(**setting)
