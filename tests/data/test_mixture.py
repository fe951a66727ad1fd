"""How often samples of weighted files come, and in which epochs."""

from __future__ import annotations

from collections import Counter

from looktwice.data.mixture import Mixture
from looktwice.data.order import BatchOrder

SIZES = [3, 4, 5]


def counts(mixture: Mixture, epochs: range) -> Counter[int]:
    return Counter(number for epoch in epochs for number in mixture.epoch(epoch).tolist())


def test_each_file_comes_as_often_as_its_weight_says() -> None:
    mixture = Mixture(SIZES, [1, 2, 0.4], seed=0)
    assert mixture.num_samples == 3 + 8 + 2
    seen = counts(mixture, range(1))
    assert [seen[number] for number in range(7)] == [1] * 3 + [2] * 4
    assert sorted(seen[number] for number in range(7, 12)) == [0, 0, 0, 1, 1]


def test_a_pass_that_is_cut_goes_on_in_the_next_epoch() -> None:
    """Two fifths of five samples: after five epochs each has come twice."""
    seen = counts(Mixture(SIZES, [1, 1, 0.4], seed=0), range(5))
    assert [seen[number] for number in range(7, 12)] == [2] * 5
    assert [seen[number] for number in range(7)] == [5] * 7


def test_an_epoch_is_a_function_of_seed_and_number() -> None:
    one, other = (Mixture(SIZES, [2, 1, 1], seed=seed) for seed in (0, 1))
    assert one.epoch(3).tolist() == Mixture(SIZES, [2, 1, 1], seed=0).epoch(3).tolist()
    assert one.epoch(3).tolist() != one.epoch(4).tolist()
    assert one.epoch(3).tolist() != other.epoch(3).tolist()


def test_the_files_are_mixed() -> None:
    numbers = Mixture([50, 50], [1, 1], seed=0).epoch(0).tolist()
    assert 10 < sum(number < 50 for number in numbers[:50]) < 40


def test_steps_are_cut_from_the_epochs_of_a_mixture() -> None:
    mixture = Mixture(SIZES, [1, 2, 0.4], seed=0)
    order = BatchOrder(mixture.num_samples, samples_per_step=4, num_epochs=2, max_steps=None, seed=0, mixture=mixture)
    assert order.total_steps == 8
    assert [number for step in range(4) for number in order[step]] == mixture.epoch(0).tolist()
    assert order[7] == mixture.epoch(1).tolist()[12:]
