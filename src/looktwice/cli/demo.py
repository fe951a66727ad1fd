"""`looktwice demo`: the whole pipeline on the built-in small world."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from looktwice.cli.arguments import Parser
from looktwice.paths import check_new_folder, check_run_folder
from looktwice.training.folder import check_free


def run(words: Sequence[str]) -> None:
    """The whole pipeline on the built-in small world, in minutes on a CPU, with a report to look at."""
    parser = Parser("looktwice demo", description=run.__doc__, allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"), help="run folder (outputs/demo)")
    parser.add_argument("--seed", type=int, default=0, help="seed of data, training and sampling (0)")
    parser.add_argument("--overwrite", action="store_true", help="replace the demo that the run folder holds")
    flags = parser.parse_strictly(words)
    check_run_folder(flags["output_dir"])
    check_free(flags["output_dir"])
    if not flags["overwrite"]:
        check_new_folder(flags["output_dir"], otherwise=", or replace the demo in it: --overwrite")
    from looktwice.demo.pipeline import run_demo

    run_demo(flags["output_dir"], seed=flags["seed"])
