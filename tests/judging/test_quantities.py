"""Numbers in any writing, with their units."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from looktwice.judging.quantities import Quantity, read_quantity
from looktwice.judging.units import unit_of


@pytest.mark.parametrize(
    ("text", "quantity"),
    [
        ("1,234.5", Quantity(Fraction(2469, 2))),
        ("-1 1/2", Quantity(Fraction(-3, 2))),
        ("$2.5M", Quantity(Fraction(2_500_000), "dollar")),
        ("5 cm", Quantity(Fraction(1, 20), "length")),
        ("two hundred and five", Quantity(Fraction(205))),
        ("3rd", Quantity(Fraction(3), "ordinal")),
        ("7 red apples", Quantity(Fraction(7), "counted red apple")),
        ("zero", Quantity(Fraction(0))),
        ("ten five", None),
        ("twenty, five", None),
        ("one thousand, two hundred", Quantity(Fraction(1200))),
        ("two zero", Quantity(Fraction(2), "counted zero")),
        ("007", None),
        ("1/0", None),
        ("12A3", None),
        ("10-20", None),
        ("5 MeV", Quantity(Fraction(5), "counted MeV")),
        ("$5 €", None),
        ("red", None),
    ],
)
def test_a_quantity_is_a_value_of_something(text: str, quantity: Quantity | None) -> None:
    assert read_quantity(text) == quantity


@given(st.fractions(min_value=-(10**9), max_value=10**9, max_denominator=999))
def test_a_fraction_is_read_as_its_value(value: Fraction) -> None:
    assert read_quantity(f"{value.numerator}/{value.denominator}") == Quantity(value)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("MBps", "Mbps"),
        ("Kb", "KB"),
        ("Gib", "GiB"),
        ("Mbar", "mbar"),
        ("nm", "Nm"),
        ("mW", "MW"),
        ("Mb", "MB"),
        ("m", "min"),
        ("m", "m^2"),
        ("°C", "°F"),
        ("kW", "kWh"),
        ("m", "M"),
    ],
)
def test_units_that_look_alike_are_others(one: str, other: str) -> None:
    assert unit_of(one) != unit_of(other)


@pytest.mark.parametrize("score", ["4/4", "6/8", "0/5", "5/1", "10/10 points"])
def test_a_fraction_that_is_not_in_lowest_terms_equals_only_itself(score: str) -> None:
    gold = read_quantity(score)
    assert gold is not None
    assert gold.equals(gold)
    assert not gold.equals(Quantity(gold.value, gold.dimension))


@pytest.mark.parametrize("name", ["KM", "km", "Km", "kilometers", "Kilometre"])
def test_case_that_tells_nothing_is_passed_over(name: str) -> None:
    assert unit_of(name) == unit_of("km") is not None


@pytest.mark.parametrize(
    ("one", "other"), [("mbps", "Mbps"), ("GB", "gb"), ("Mpa", "MPa"), ("Mph", "mph"), ("KW", "kW")]
)
def test_a_symbol_of_another_case_is_the_only_one_that_it_can_be(one: str, other: str) -> None:
    assert unit_of(one) == unit_of(other) is not None


@pytest.mark.parametrize("text", ["1" * 5000, "1" * 5000 + " km", "1/" + "2" * 5000, "$" + "9" * 5000])
def test_a_number_longer_than_python_reads_is_no_quantity(text) -> None:
    assert read_quantity(text) is None
