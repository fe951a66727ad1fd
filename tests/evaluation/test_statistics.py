"""Intervals and tests over questions."""

from __future__ import annotations

import builtins

import pytest

from looktwice.errors import ConfigError
from looktwice.evaluation.accuracy import wilson_interval
from looktwice.evaluation.statistics import difference, estimate


def test_shares_have_the_interval_of_wilson_as_the_demo_computes_it() -> None:
    found = estimate([1.0] * 160 + [0.0] * 31)
    assert (found.mean, found.num_units) == (pytest.approx(160 / 191), 191)
    assert (found.low, found.high) == pytest.approx(wilson_interval(160, 191))
    assert (found.high - found.low) / 2 == pytest.approx(0.052, abs=0.001)  # V*Bench at 84 %: 5.2 points


def test_other_scores_have_a_bootstrap_that_repeats() -> None:
    scores = [0.3, 0.6, 0.9, 1.0, 0.0] * 40
    found = estimate(scores)
    half = 1.96 * 0.375 / 200**0.5
    assert found == estimate(scores) and found.mean == pytest.approx(0.56)
    assert (found.low, found.high) == (pytest.approx(0.56 - half, abs=0.01), pytest.approx(0.56 + half, abs=0.01))


def test_the_test_of_right_and_wrong_is_mcnemars_exact_one() -> None:
    ours, theirs = [1.0] * 15 + [0.0] * 5 + [1.0] * 30, [0.0] * 15 + [1.0] * 5 + [1.0] * 30
    gap = difference(ours, theirs)
    assert (gap.num_better, gap.num_worse, gap.num_units, gap.test) == (15, 5, 50, "McNemar, exact")
    # scipy.stats.binomtest(5, 20).pvalue
    assert gap.p_value == pytest.approx(0.041389, abs=1e-6)
    assert gap.mean == pytest.approx(0.2) and gap.low == pytest.approx(0.04, abs=0.03) and gap.is_above


def test_three_of_three_is_no_proof_though_all_say_the_same() -> None:
    gap = difference([1.0] * 3, [0.0] * 3)
    assert (gap.low, gap.high, gap.p_value) == pytest.approx((-0.123, 1.0, 0.25), abs=1e-3) and not gap.is_above


def test_scores_between_are_tested_by_turning_signs() -> None:
    gap = difference([0.6, 0.9, 1.0, 0.7] * 5, [0.3, 0.6, 0.9, 0.8] * 5)
    assert gap.test == "permutation of signs" and gap.p_value < 0.01 and gap.is_above
    same = difference([0.5, 0.3], [0.5, 0.3])
    assert (same.mean, same.p_value, same.num_better) == (0.0, 1.0, 0)


def test_without_the_extra_the_mend_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    found = builtins.__import__

    def missing(name: str) -> object:
        if name.startswith("statsmodels"):
            raise ModuleNotFoundError(name)
        return found(name)

    monkeypatch.setattr("looktwice.extras.importlib.import_module", missing)
    with pytest.raises(ConfigError, match=r'statsmodels is not installed, .* pip install "looktwice\[eval\]"'):
        estimate([1.0, 0.0])


@pytest.mark.parametrize(
    ("ours", "theirs", "low", "high"), [(1, 0, 0.351, 1), (0, 1, -1, -0.351), (1, 1, -0.324, 0.324)]
)
def test_gaps_that_are_all_alike_are_not_sure_for_that(ours: int, theirs: int, low: float, high: float) -> None:
    found = difference([float(ours)] * 8, [float(theirs)] * 8)
    # 8 of 8: Wilson's lower bound is 0.676
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-3)
