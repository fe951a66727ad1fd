"""`looktwice data`: the commands for data files."""

from __future__ import annotations

from collections.abc import Sequence

from looktwice.cli import check, convert, show, stats
from looktwice.cli.arguments import run_one

VERBS = {"check": check.run, "show": show.run, "stats": stats.run, "convert": convert.run}


def run(words: Sequence[str]) -> int:
    """Work on data files: check, show, stats, convert."""
    return run_one("looktwice data", VERBS, words)
