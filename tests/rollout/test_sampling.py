"""Choosing the next id: greedy, truncated and not, and the logprob that goes with it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from looktwice.errors import ConfigError
from looktwice.rollout.sampling import Sampling, sample

PROBABILITIES = (0.4, 0.3, 0.2, 0.1)
LOGITS = torch.tensor(PROBABILITIES).log() + 3
NOTHING = torch.tensor([], dtype=torch.long)


def draw(sampling: Sampling, *, forbidden: Tensor = NOTHING, num_draws: int = 4000) -> list[float]:
    """How often each of the four ids is drawn."""
    logits = LOGITS.expand(num_draws, -1)
    ids, _ = sample(logits, sampling, forbidden, torch.Generator().manual_seed(0))
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
        (Sampling(temperature=0), (1, 0, 0, 0)),
        (Sampling(temperature=0, top_k=3, top_p=0.5), (1, 0, 0, 0)),
    ],
)
def test_ids_are_drawn_in_these_shares(sampling, shares) -> None:
    assert draw(sampling) == pytest.approx(shares, abs=0.025)
    assert [share == 0 for share in draw(sampling)] == [share == 0 for share in shares]


@pytest.mark.parametrize(
    ("sampling", "shares"),
    [
        (Sampling(temperature=0), (0, 1, 0, 0)),
        (Sampling(), (0, 3 / 6, 2 / 6, 1 / 6)),
        (Sampling(top_k=2), (0, 3 / 5, 2 / 5, 0)),
        (Sampling(top_p=0.45), (0, 1, 0, 0)),
    ],
)
def test_a_forbidden_id_is_never_drawn_and_takes_no_place_in_the_truncation(sampling, shares) -> None:
    assert draw(sampling, forbidden=torch.tensor([0])) == pytest.approx(shares, abs=0.025)


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
    ids, logprobs = sample(LOGITS.expand(50, -1), sampling, torch.tensor([1]), torch.Generator().manual_seed(0))
    torch.testing.assert_close(logprobs, torch.tensor([math.log(probabilities[i]) for i in ids.tolist()]))


def test_each_row_is_truncated_by_itself() -> None:
    logits = torch.stack([LOGITS, LOGITS.flip(0)])
    ids, _ = sample(logits, Sampling(top_k=1), NOTHING, torch.Generator().manual_seed(0))
    assert ids.tolist() == [0, 3]


def test_logprobs_are_float32_also_of_bfloat16_logits() -> None:
    _, logprobs = sample(LOGITS[None].bfloat16(), Sampling(), NOTHING, torch.Generator().manual_seed(0))
    assert logprobs.dtype == torch.float32


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"top_k": -1},
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(setting) -> None:
    [name] = setting
    with pytest.raises(ConfigError, match=f"{name} is {setting[name]}"):
        Sampling(**setting)
