"""Which answers are mathematics, and the process that compares them."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from looktwice.judging import mathematics
from looktwice.judging.mathematics import equal_in_mathematics, is_mathematics

pytest.importorskip("math_verify")


@pytest.mark.parametrize("text", ["2x+1", "x^2", "√2", "y = 3", "\\frac{a}{b}", "3π", "sqrt(2)", "x < 3", "2^{10}"])
def test_an_expression_is_mathematics(text: str) -> None:
    assert is_mathematics(text)


@pytest.mark.parametrize(
    "text",
    ["N/A", "B-52", "A+", "C++", "10-20", "12/24", "node.js", "1, 2, 3", "left/right", "a cup", "TCP/IP", "=", ""],
)
def test_what_only_has_signs_is_none(text: str) -> None:
    assert not is_mathematics(text)


def test_threads_may_ask_at_once() -> None:
    pairs = [(f"{n}+{n}x", f"{n}x+{n}") for n in range(2, 10)]
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda pair: equal_in_mathematics(*pair), pairs))


FIRST_NEVER_ENDS = """
import sys, time
for line in sys.stdin:
    if "never" in line:
        time.sleep(60)
    print("true", flush=True)
"""


def test_what_takes_for_ever_is_wrong_and_the_next_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mathematics, "LIMIT_S", 1.0)
    assert not equal_in_mathematics("9^{9^{9}}", "\\sqrt{2}")
    worker = mathematics._Worker([sys.executable, "-c", FIRST_NEVER_ENDS])
    with pytest.raises(TimeoutError, match="took too long"):
        worker.compare("never", "x")
    monkeypatch.undo()
    assert worker.compare("x", "x")


def test_without_the_extra_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mathematics, "is_installed", lambda: False)
    assert not equal_in_mathematics("5x+1", "1+5x")
