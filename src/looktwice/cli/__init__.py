"""The `looktwice` command, a file a verb. Nothing heavy is imported before a verb has judged its arguments."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from io import TextIOWrapper

from looktwice import __version__
from looktwice.cli import ask, chat, data, demo, doctor, evaluate, export, plan, report, serve, train
from looktwice.cli.arguments import run_one
from looktwice.errors import LooktwiceError, short
from looktwice.training.stopping import Interrupted

VERBS = {
    "train": train.run,
    "ask": ask.run,
    "chat": chat.run,
    "eval": evaluate.run,
    "report": report.run,
    "serve": serve.run,
    "data": data.run,
    "export": export.run,
    "plan": plan.run,
    "doctor": doctor.run,
    "demo": demo.run,
}
NOBODY_READS = 141
"""What a shell says of a program that wrote into a closed pipe: 128 + SIGPIPE."""


def main(words: Sequence[str] | None = None) -> int:
    """Run one command and give its exit code.

    0; 1 after an error a user can mend; 130 when interrupted, 143 when a run is terminated; 141 when what
    reads the output has left.
    """
    if sys.stderr is None or not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # in a log the bars of other libraries are rubbish
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            # a terminal may lack a letter, and a file name be no text; in a log the lines of both stand in order
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        try:
            return _run(list(sys.argv[1:] if words is None else words))
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # or Python does so at its end, and complains by itself
    except BrokenPipeError:
        code, message = NOBODY_READS, ""
    except OSError as error:  # the disk is full, or a right is missing
        reason = error.strerror or str(error)
        of_output = f"the output cannot be written ({reason}); make room, or send it elsewhere"
        code, message = 1, f"{short(str(error.filename))}: {reason}" if error.filename else of_output
    except LooktwiceError as error:
        code, message = 1, str(error)
    except KeyboardInterrupt as interrupt:
        number = interrupt.number if isinstance(interrupt, Interrupted) else signal.SIGINT
        told = "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
        code, message = 128 + number, "; ".join([told, *map(str, interrupt.args)])
    return _end(code, message)


def _run(words: list[str]) -> int:
    if words == ["--version"]:
        print(f"looktwice {__version__}")
        return 0
    try:
        return run_one("looktwice", VERBS, words, also=", or looktwice --version")
    except SystemExit as end:
        before = end.__context__
        while before is not None and not isinstance(before, BrokenPipeError):
            before = before.__context__
        raise before or end from None  # so rich ends when nobody reads


def _end(code: int, message: str) -> int:
    """Say what is left to say, if anybody still reads, and give back the exit code."""
    try:
        if message:
            from looktwice.console import say

            say(f"looktwice: {message}", stderr=True)
    except OSError:
        pass
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:  # what cannot be written goes nowhere, or Python tries again at its end and complains by itself
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return code
