"""`looktwice export`: a trained model or adapter as a released-layout folder, checked."""

from __future__ import annotations

from collections.abc import Sequence

from looktwice.cli.arguments import argument, read_command
from looktwice.config import ExportConfig
from looktwice.model.location import locate
from looktwice.paths import check_new_folder, place


def run(words: Sequence[str]) -> None:
    """Write a trained model or adapter as a released-layout folder, checked: looktwice export MODEL FOLDER."""
    given, config = read_command(
        run,
        "export",
        "MODEL FOLDER",
        words,
        ExportConfig,
        argument("model", metavar="MODEL", help="model or adapter folder, hub name, or tiny"),
        argument("folder", metavar="FOLDER", type=place, help="folder to write; must be new or empty"),
    )
    locate(given["model"])
    check_new_folder(given["folder"])
    from looktwice.export import describe, export_model

    print(describe(export_model(given["model"], given["folder"], config)))
