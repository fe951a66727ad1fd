"""`looktwice demo`: the whole pipeline on the built-in small world."""

from __future__ import annotations

from collections.abc import Sequence

from looktwice.cli.arguments import read_command
from looktwice.config import DemoConfig
from looktwice.console import outlasting_readers
from looktwice.paths import check_new_folder, check_run_folder
from looktwice.training.folder import check_free


def run(words: Sequence[str]) -> None:
    """The whole pipeline on the built-in small world, in minutes on a CPU, with a report to look at."""
    _, config = read_command(run, "demo", "", words, DemoConfig)
    check_run_folder(config.output_dir)
    check_free(config.output_dir)
    if not config.overwrite:
        check_new_folder(config.output_dir, otherwise=", or replace the demo in it: --overwrite")
    from looktwice.demo.pipeline import run_demo

    with outlasting_readers():
        run_demo(config.output_dir, seed=config.seed)
