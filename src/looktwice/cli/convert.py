"""`looktwice data convert`: a data file in another format."""

from __future__ import annotations

from collections.abc import Sequence

from looktwice.cli.arguments import argument, read_command
from looktwice.config import ConvertConfig
from looktwice.paths import check_data_file, check_target, place


def run(words: Sequence[str]) -> None:
    """Write a data file in another format: looktwice data convert IN OUT --to messages."""
    given, config = read_command(
        run,
        "data convert",
        "IN OUT",
        words,
        ConvertConfig,
        argument("source", metavar="IN", type=place, help="file to read: JSONL, JSON or Parquet"),
        argument("target", metavar="OUT", type=place, help="file to write; its name says which kind"),
    )
    check_data_file(given["source"])
    check_target(given["target"], given["source"], overwrite=config.overwrite)
    from looktwice.formats.convert import convert_file

    print(convert_file(given["source"], given["target"], config))
