"""How sure a score is, and whether two differ: intervals and paired tests over questions, by scipy and statsmodels.

A unit is a question: the mean score of its variants and samples, so that what belongs together counts once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from looktwice.extras import require

CONFIDENCE = 0.95
RESAMPLES = 4000
BATCH = 50
SURE = 0.05
"""A p-value below this is taken for a difference."""


class Estimate(NamedTuple):
    """A mean over so many questions with its interval at 95 %."""

    mean: float
    low: float
    high: float
    num_units: int


class Difference(NamedTuple):
    """One score minus another over the same questions: the mean with its interval, the p-value of a paired test, and on
    how many questions the one, or the other, was better."""

    mean: float
    low: float
    high: float
    p_value: float
    num_better: int
    num_worse: int
    num_units: int
    test: str

    @property
    def is_above(self) -> bool:
        """Whether the one is better: its interval lies above 0, and so does chance by the test."""
        return self.low > 0 and self.p_value < SURE


def estimate(units: Sequence[float]) -> Estimate:
    """The mean of scores from 0 to 1 and its interval: Wilson's where all are 0 or 1, else a bootstrap over questions.

    Raises ConfigError where statsmodels or scipy is not installed.
    """
    values = np.asarray(units, dtype=np.float64)
    if is_binary(values):
        proportion = _library("statsmodels.stats.proportion")
        low, high = proportion.proportion_confint(int(values.sum()), len(values), 1 - CONFIDENCE, method="wilson")
    else:
        low, high = _bootstrap(values)
    return Estimate(float(values.mean()), float(low), float(high), len(values))


def difference(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """How much better `ours` is on the same questions in the same order.

    The interval is a bootstrap over questions, which cannot say how sure it is of gaps that are all alike: of scores of
    0 and 1 Wilson's bound does. The test is McNemar's exact one where all scores are 0 or 1, else a
    permutation of signs. Raises ConfigError as `estimate`.
    """
    one, other = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    gaps = one - other
    better, worse = int((gaps > 0).sum()), int((gaps < 0).sum())
    low, high = _alike(gaps) if np.ptp(gaps) == 0 and is_binary(abs(gaps)) else _bootstrap(gaps)
    if is_binary(one) and is_binary(other):
        both = int(((one == 1) & (other == 1)).sum())
        table = [[both, better], [worse, len(gaps) - both - better - worse]]
        p_value = float(_library("statsmodels.stats.contingency_tables").mcnemar(table, exact=True).pvalue)
        test = "McNemar, exact"
    else:
        p_value, test = _permuted(gaps), "permutation of signs"
    return Difference(float(gaps.mean()), low, high, p_value, better, worse, len(gaps), test)


def _alike(gaps: np.ndarray) -> tuple[float, float]:
    """The interval of gaps that are all -1, 0 or 1, with the share of others that Wilson's bound allows for so many."""
    proportion = _library("statsmodels.stats.proportion")
    rest = proportion.proportion_confint(0, len(gaps), 1 - CONFIDENCE, method="wilson")[1]
    mean = float(gaps[0])
    width = rest * (1 + abs(mean))  # another question is better rather than worse, or worse rather than alike
    return max(-1.0, mean - width), min(1.0, mean + width)


def is_binary(values: Any) -> bool:
    return bool(np.isin(values, (0.0, 1.0)).all())


def _bootstrap(values: np.ndarray) -> tuple[float, float]:
    if len(values) < 2 or np.ptp(values) == 0:
        return float(values.mean()), float(values.mean())
    found = _library("scipy.stats").bootstrap(
        (values,),
        np.mean,
        confidence_level=CONFIDENCE,
        method="percentile",
        n_resamples=RESAMPLES,
        batch=BATCH,
        rng=np.random.default_rng(0),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def _permuted(gaps: np.ndarray) -> float:
    if not gaps.any():
        return 1.0
    found = _library("scipy.stats").permutation_test(
        (gaps,),
        np.mean,
        permutation_type="samples",
        n_resamples=RESAMPLES,
        batch=BATCH,
        vectorized=True,
        rng=np.random.default_rng(0),
    )
    return float(found.pvalue)


def _library(module: str) -> Any:
    return require(module, extra="eval", needed_by="an evaluation")
