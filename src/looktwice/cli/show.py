"""`looktwice data show`: samples as the model will see them, in the terminal or as a page."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from looktwice.cli.arguments import MODEL, argument, read_command
from looktwice.config import ShowConfig
from looktwice.model.location import locate
from looktwice.paths import check_data_file, check_image_folder, check_output_file, place


def run(words: Sequence[str]) -> None:
    """Show samples as the model will see them: looktwice data show FILE -n 3 --html samples.html."""
    given, config = read_command(
        run,
        "data show",
        "FILE",
        words,
        ShowConfig,
        argument("file", metavar="FILE", type=place, help="training file to look into"),
        argument("--html", metavar="FILE", type=place, help="also write a page with the pictures to this file"),
        argument("-n", dest="num_samples", metavar="N", default=argparse.SUPPRESS, help="short for --num_samples"),
        MODEL,
    )
    check_data_file(given["file"])
    check_image_folder(config.image_base_path)
    check_output_file(given["html"], "--html", [given["file"]])
    locate(config.model_name)
    from looktwice.console import open_console
    from looktwice.errors import counted
    from looktwice.formats.sample_file import SampleFile
    from looktwice.processing.processor import load_processor
    from looktwice.report.data_page import write_samples_page
    from looktwice.report.sample_view import view_file
    from looktwice.report.terminal import sample_lines

    file = SampleFile.of(given["file"], config)
    processor = load_processor(config.model_name, config)
    found = f"format {file.format.name} ({file.format.description}), {counted(len(file), 'row')}"
    lead = f"{file.path}: {found}, as {config.model_name} sees them"
    views = view_file(file, processor, config)
    if given["html"]:  # first: who reads what is printed may leave
        views = iter(shown := list(views))
        write_samples_page(given["html"], title=file.path.name, lead=lead, views=shown)
    console = open_console()
    console.out(lead)
    for view in views:
        console.print()
        for line in sample_lines(view):
            console.print(line, crop=False)
    if given["html"]:
        console.out(f"\npage: {given['html']}")
