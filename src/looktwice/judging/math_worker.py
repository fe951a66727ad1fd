"""The process that compares expressions: a line of JSON `[said, wanted]` in, `true` or `false` out.

The one place that imports math-verify. Its time limits, which need signals, are off: who asks ends this process.
"""

from __future__ import annotations

import json
import logging
import signal
import sys

from math_verify import LatexExtractionConfig, parse, verify

DIGITS = 12
"""After the point, up to which numbers must agree: 3.141593 is not pi."""

ORPHAN_LIMIT_S = 60


def are_equal(said: str, wanted: str) -> bool:
    """Whether two expressions in LaTeX are equal. What cannot be read is equal to nothing."""
    gold, answer = (_expression(text) for text in (wanted, said))
    # an expression that cannot be read comes back as the text alone
    return len(gold) > 1 and len(answer) > 1 and verify(gold, answer, float_rounding=DIGITS, timeout_seconds=None)


def _expression(latex: str) -> list[object]:
    return parse(f"${latex}$", extraction_config=[LatexExtractionConfig()], parsing_timeout=None)


def main() -> None:
    logging.disable()
    for line in sys.stdin:
        if hasattr(signal, "alarm"):  # ends an orphan: who asked may be gone, and with it the limit
            signal.alarm(ORPHAN_LIMIT_S)
        try:
            verdict = bool(line.strip()) and are_equal(*json.loads(line))
        except Exception:  # whatever the library meets in an expression: then it is not equal
            verdict = False
        if hasattr(signal, "alarm"):
            signal.alarm(0)
        print(json.dumps(verdict), flush=True)


if __name__ == "__main__":
    main()
