"""Units of measurement: which names mean the same one, and how large it is."""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple


class Unit(NamedTuple):
    """What is measured, and how many basic units one of these is: kilometres are Unit("length", Fraction(1000))."""

    dimension: str
    scale: Fraction


_PREFIXES = {
    "T": ("tera", Fraction(10) ** 12),
    "G": ("giga", Fraction(10) ** 9),
    "M": ("mega", Fraction(10) ** 6),
    "k": ("kilo", Fraction(10) ** 3),
    "K": ("kilo", Fraction(10) ** 3),
    "h": ("hecto", Fraction(10) ** 2),
    "": ("", Fraction(1)),
    "d": ("deci", Fraction(10) ** -1),
    "c": ("centi", Fraction(10) ** -2),
    "m": ("milli", Fraction(10) ** -3),
    "μ": ("micro", Fraction(10) ** -6),
    "n": ("nano", Fraction(10) ** -9),
    "Ki": ("kibi", Fraction(2) ** 10),
    "Mi": ("mebi", Fraction(2) ** 20),
    "Gi": ("gibi", Fraction(2) ** 30),
    "Ti": ("tebi", Fraction(2) ** 40),
}
_DATA_PREFIXES = ("T", "G", "M", "K", "k", "", "Ki", "Mi", "Gi", "Ti")

_METRIC = (
    # dimension, prefixes in use (a blank for none), symbols, names, value
    ("length", "k dcmμn", ("m",), ("meter", "metre"), 1),
    ("mass", "k mμ", ("g",), ("gram", "gramme"), 1),
    ("volume", "h dcmμ", ("L", "l"), ("liter", "litre"), Fraction(1, 1000)),
    ("time", " mμn", ("s",), ("second",), 1),
    ("power", "TGMk mμ", ("W",), ("watt",), 1),
    ("energy", "GMk m", ("J",), ("joule",), 1),
    ("energy", "TGMk ", ("Wh",), ("watt hour", "watthour"), 3600),
    ("voltage", "Mk mμ", ("V",), ("volt",), 1),
    ("current", "k mμn", ("A",), ("ampere", "amp"), 1),
    ("charge", "k m", ("Ah",), ("amp hour",), 3600),
    ("resistance", "GMk m", ("Ω",), ("ohm",), 1),
    ("frequency", "TGMk ", ("Hz",), ("hertz",), 1),
    ("force", "Mk m", ("N",), ("newton",), 1),
    ("torque", "k ", ("Nm",), ("newton meter", "newton metre"), 1),
    ("pressure", "GMkh ", ("Pa",), ("pascal",), 1),
    ("pressure", " m", ("bar",), ("bar",), 100_000),
    ("data", _DATA_PREFIXES, ("B", "Bs"), ("byte",), 8),
    ("data", _DATA_PREFIXES, ("b", "bs", "bit", "bits"), ("bit",), 1),
    ("data rate", _DATA_PREFIXES, ("Bps",), ("byte per second", "bytes per second"), 8),
    ("data rate", _DATA_PREFIXES, ("bps",), ("bit per second", "bits per second"), 1),
    ("food energy", "k ", ("cal",), ("calorie",), 1),
    ("temperature", " ", ("K",), ("kelvin",), 1),
    ("celsius", " ", ("C", "°C"), ("celsius", "degree celsius", "degrees celsius", "degrees c", "deg c"), 1),
    (
        "fahrenheit",
        " ",
        ("F", "°F"),
        ("fahrenheit", "degree fahrenheit", "degrees fahrenheit", "degrees f", "deg f"),
        1,
    ),
)

_OTHERS = (
    # dimension, value, what it is called in lower case: of symbols that differ by case, what they mean without any
    ("percent", 1, "%", "percent", "per cent", "pct"),
    ("angle", 1, "°", "deg", "degree"),
    ("time", 1, "sec"),
    ("time", 60, "min", "minute"),
    ("time", 3600, "h", "hr", "hour"),
    ("time", 86_400, "day"),
    ("time", 604_800, "week"),
    ("year", 1, "year", "yr"),
    ("month", 1, "month"),
    ("mass", 1_000_000, "t", "tonne", "metric ton"),
    ("mass", Fraction(45359237, 100_000), "lb", "lbs", "pound"),
    ("mass", Fraction(45359237, 1_600_000), "oz", "ounce"),
    ("length", Fraction(254, 10_000), "in", "inch", "inches", '"'),
    ("length", Fraction(3048, 10_000), "ft", "foot", "feet", "'"),
    ("length", Fraction(9144, 10_000), "yd", "yard"),
    ("length", Fraction(1_609_344, 1000), "mi", "mile"),
    ("volume", Fraction(3_785_411_784, 10**12), "gal", "gallon"),
    ("speed", Fraction(1_609_344, 3_600_000), "mph"),
    ("speed", Fraction(1000, 3600), "kph", "kmh"),
    ("data", 8 * 1024, "kib"),
    ("data", 8 * 1024**2, "mib"),
    ("data", 8 * 1024**3, "gib"),
    ("data", 8_000, "kb"),
    ("data", 8_000_000, "mb"),
    ("data", 8_000_000_000, "gb"),
    ("data", 8_000_000_000_000, "tb"),
    ("data rate", 1, "bps"),
    ("data rate", 1_000, "kbps"),
    ("data rate", 1_000_000, "mbps"),
    ("data rate", 1_000_000_000, "gbps"),
    ("torque", 1, "nm"),  # in capitals: without any it is a length
    ("ordinal", 1, "st", "nd", "rd", "th"),
    ("dollar", 1, "$", "us$", "usd", "dollar", "us dollar"),
    ("dollar", Fraction(1, 100), "¢", "cent"),
    ("euro", 1, "€", "eur", "euro"),
    ("pound sterling", 1, "£", "gbp", "pound sterling", "pounds sterling"),
    ("yen", 1, "¥", "jpy", "yen", "円"),
    ("yuan", 1, "cny", "rmb", "yuan", "元"),
    ("rupee", 1, "₹", "rs", "rs.", "inr", "rupee"),
    ("franc", 1, "chf"),
    ("won", 1, "₩", "krw", "won"),
    ("year", 1, "年"),
)
CURRENCIES = ("us$", "$", "€", "£", "¥", "₹", "₩", "usd", "eur", "gbp", "jpy", "cny", "rmb", "inr", "chf", "rs.", "rs")
"""What may stand before a number."""

_QUOTIENTS = {"length/time": "speed", "data/time": "data rate"}
_POWERS = {"length^3": "volume"}
_POWER = re.compile(r"(.*?[^\W\d])\^?([23])")
_POWER_WORDS = re.compile(r"(square|sq\.?|cubic|cu\.?) (.+)", re.IGNORECASE)


def unit_of(text: str) -> Unit | None:
    """The unit that a plain text names, or None.

    Case tells mW from MW and KBps from Kbps, and is passed over where it tells nothing: in names, and in symbols that
    are all capitals or have none.

    Known are metric and the usual imperial units, currencies, percent, powers (`m^2`, "square metres") and one
    division (`km/h`, "metres per second").
    """
    above, *below = (_raised(part) for part in re.split(r"\s*/\s*|\s+per\s+", text))
    if above is None or not below:
        return above
    if len(below) > 1 or below[0] is None:
        return None
    dimension = f"{above.dimension}/{below[0].dimension}"
    return Unit(_QUOTIENTS.get(dimension, dimension), above.scale / below[0].scale)


def _raised(text: str) -> Unit | None:
    """A unit without a division, perhaps raised to the second or third power."""
    if unit := _simple(text):
        return unit
    if named := _POWER_WORDS.fullmatch(text):
        unit, power = _simple(named[2]), 2 if named[1].casefold().startswith("sq") else 3
    elif raised := _POWER.fullmatch(text):
        unit, power = _simple(raised[1]), int(raised[2])
    if unit is None or unit.dimension not in ("length", "time"):
        return None
    dimension = f"{unit.dimension}^{power}"
    return Unit(_POWERS.get(dimension, dimension), unit.scale**power)


def _simple(text: str) -> Unit | None:
    exact, folded, capitals = _tables()
    if text in exact or (len(text) == 1 and text.isupper()):
        return exact.get(text)
    called = text.casefold().rstrip(".")
    is_about_case = called in capitals and not (text.isupper() or text.islower())
    return None if is_about_case and text[0] not in capitals[called] else folded.get(called)


@lru_cache(maxsize=1)
def _tables() -> tuple[dict[str, Unit], dict[str, Unit], dict[str, set[str]]]:
    """Units by their symbols, and by anything that they are called in lower case; and which first letters tell.

    The last has the symbols in whose other writings case still tells: "Mpa" is the one that begins with M, "mPa" none.
    """
    symbols_of: dict[str, Unit] = {}
    folded: dict[str, Unit] = {}
    for dimension, prefixes, symbols, names, value in _METRIC:
        for prefix in map(str.strip, prefixes):
            name_of_prefix, factor = _PREFIXES[prefix]
            unit = Unit(dimension, factor * value)
            symbols_of.update({prefix + symbol: unit for symbol in symbols})
            folded.update({name_of_prefix + name + plural: unit for name in names for plural in ("", "s")})
    for dimension, value, *called in _OTHERS:
        folded.update({name + plural: Unit(dimension, Fraction(value)) for name in called for plural in ("", "s")})
    alike: dict[str, set[str]] = {}
    for symbol in symbols_of:
        alike.setdefault(symbol.casefold(), set()).add(symbol)
    capitals: dict[str, set[str]] = {}
    for called_alike, written in alike.items():
        units = {symbols_of[symbol] for symbol in written}
        if len(units) == 1:
            folded.setdefault(called_alike, *units)
        if len(units) > 1 or called_alike.startswith("m"):
            capitals[called_alike] = {symbol[0] for symbol in written} if len(units) == 1 else set()
    return symbols_of, folded, capitals
