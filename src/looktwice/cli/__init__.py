"""The `looktwice` command, a file a verb. Nothing heavy is imported before a verb has judged its arguments."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper

from looktwice import __version__
from looktwice.cli import ask, data, demo, export, train
from looktwice.cli.arguments import run_one
from looktwice.errors import LooktwiceError

VERBS = {"train": train.run, "ask": ask.run, "data": data.run, "export": export.run, "demo": demo.run}


def main(words: Sequence[str] | None = None) -> int:
    """Run one command and give its exit code: 0, 1 after an error a user can mend, 130 when interrupted."""
    words = list(sys.argv[1:] if words is None else words)
    if sys.stderr is None or not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # in a log the bars of other libraries are rubbish
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # so that a log has it in order with stderr
    if words == ["--version"]:
        print(f"looktwice {__version__}")
        return 0
    try:
        return run_one("looktwice", VERBS, words, also=", or looktwice --version")
    except LooktwiceError as error:
        print(f"looktwice: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        print("looktwice: interrupted", *interrupt.args, sep="; ", file=sys.stderr)
        return 130
