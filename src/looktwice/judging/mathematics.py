"""Mathematics: which gold answers are, and whether two expressions are equal, asked of a process of its own.

Symbolic work can take for ever (`9^{9^{9}}`), and math-verify guards itself by signals, which threads do not have. So
`judging/math_worker.py` runs beside this process, answers line by line, and is ended where it takes too long.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from functools import lru_cache
from threading import Lock, Timer

MAX_CHARS = 200
"""Of an expression; a longer one is equal to nothing but itself."""
LIMIT_S = 5.0
"""For one comparison."""
START_LIMIT_S = 120.0

_COMMAND = re.compile(r"\\[a-zA-Z]+|\\[{}|]")
_FUNCTIONS = {"sin", "cos", "tan", "log", "ln", "exp", "sqrt", "pi"}
_PLAIN_EXPRESSION = re.compile(r"[A-Za-z0-9 .,+\-*/^=(){}<>≤≥√π×·]+")
_LETTERS = re.compile(r"[A-Za-z]+")
_NAMED_VALUE = re.compile(r"\s*[A-Za-z]\s*=\s*(?=[^=]+$)")
_MARKS = re.compile(
    r"[%$€£¥₹°\"']|(?<![A-Za-z\\])[A-Za-z]+|\\(?:Gamma|Delta|Theta|Lambda|Xi|Pi|Sigma|Upsilon|Phi|Psi|Omega)(?![A-Za-z])"
)
"""Names, units, currencies, words and capitals, of which math-verify would pass over some, or over their case."""
_SET = re.compile(r"(?:.*= ?)?\\\{[^|:]*\\\}")
_TUPLE = re.compile(r"(?:.*= ?)?[(\[].*[)\]]")
_TO_LATEX = (
    (re.compile(r"sqrt\s*\(([^()]*)\)|√\s*\(([^()]*)\)|√\s*(\w)"), r"\\sqrt{\1\2\3}"),
    (re.compile(r"(?<![\\A-Za-z])(sin|cos|tan|log|ln|exp|pi)(?![A-Za-z])"), r"\\\1 "),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"\^\(([^()]*)\)"), r"^{\1}"),
    (re.compile(r"\^(-?\d{2,}|-\w)"), r"^{\1}"),
    (re.compile(r"[*·×]"), r"\\cdot "),
    (re.compile("π"), r"\\pi "),
    (re.compile("≤"), r"\\leq "),
    (re.compile("≥"), r"\\geq "),
)


def is_mathematics(text: str) -> bool:
    """Whether a plain text is LaTeX or an expression such as 2x+1, x^2, √2, y = 3 or 3π.

    "N/A", "B-52", "A+" and "10-20" are none.
    """
    if _COMMAND.search(text):
        return True
    if not _PLAIN_EXPRESSION.fullmatch(text) or text[-1] in "+-*/^=<>√" or re.search(r"\+\+|--|[.,] ", text):
        return False
    if any(len(run) > 1 and run not in _FUNCTIONS for run in _LETTERS.findall(text)) and "^" not in text:
        return False
    has_variable = re.search(r"(?<![A-Za-z])[a-z](?![A-Za-z])", text) is not None
    return bool(re.search(r"[\^√π*=]|sqrt|\bpi\b", text) or (has_variable and re.search(r"[+\-/<>≤≥]", text)))


def without_spaces(text: str) -> str:
    return re.sub(r"\s+", "", text)


def equal_in_mathematics(prediction: str, gold: str) -> bool:
    """Whether two plain texts are equal expressions, by the extra `math`; False where it is not installed.

    A name before the value (x = 3) may be left out by one of them; units, currencies and words must be the same.
    """
    if _NAMED_VALUE.match(prediction) and not _NAMED_VALUE.match(gold):
        prediction = _NAMED_VALUE.sub("", prediction, count=1)
    elif _NAMED_VALUE.match(gold) and not _NAMED_VALUE.match(prediction):
        gold = _NAMED_VALUE.sub("", gold, count=1)
    if max(len(prediction), len(gold)) > MAX_CHARS or not is_installed():
        return False
    said, wanted = _latex(prediction), _latex(gold)
    if _is_set_and_tuple(said, wanted) or _is_set_and_tuple(wanted, said):
        return False
    return set(_MARKS.findall(said)) == set(_MARKS.findall(wanted)) and _compare(said, wanted)


def _is_set_and_tuple(one: str, other: str) -> bool:
    """Whether one lists the members of a set and the other is a point or an interval, alike to math-verify."""
    return _SET.fullmatch(one) is not None and _TUPLE.fullmatch(other) is not None


@lru_cache(maxsize=1)
def is_installed() -> bool:
    """Whether the extra `math` is there."""
    return importlib.util.find_spec("math_verify") is not None


def _latex(text: str) -> str:
    for plain, latex in _TO_LATEX:
        text = plain.sub(latex, text)
    return text


def _compare(said: str, wanted: str) -> bool:
    try:
        return _answered(said, wanted)
    except TimeoutError:  # not kept: it may be the machine that was busy
        return False


@lru_cache(maxsize=4096)
def _answered(said: str, wanted: str) -> bool:
    return _WORKER.compare(said, wanted)


class _Worker:
    """The process that compares, started with the first question and anew after one that took too long."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self._lock = Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0

    def compare(self, said: str, wanted: str) -> bool:
        """Raises TimeoutError when there is no answer."""
        with self._lock:
            if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
                self._start()
            answer = self._ask(json.dumps([said, wanted]), LIMIT_S)
            if not answer:
                raise TimeoutError("the comparison took too long, or its process ended")
            return answer == "true"

    def _start(self) -> None:
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._owner = os.getpid()
        self._ask("", START_LIMIT_S)

    def _ask(self, line: str, limit_s: float) -> str:
        """What the process answers to a line, "" where it ended before it did."""
        assert self._process and self._process.stdin and self._process.stdout
        timer = Timer(limit_s, self._process.kill)
        timer.start()
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except OSError:
            answer = ""
        finally:
            timer.cancel()
        if not answer:
            self._process.kill()
            self._process.wait()
        return answer.strip()


_WORKER = _Worker([sys.executable, "-m", "looktwice.judging.math_worker"])
