"""`looktwice data stats`: tokens, pictures, crops and turns of data files in numbers."""

from __future__ import annotations

from collections.abc import Sequence

from looktwice.cli.arguments import MODEL, argument, read_command
from looktwice.config import StatsConfig
from looktwice.errors import DataError
from looktwice.model.location import locate
from looktwice.paths import check_data_file, check_image_folder, check_output_file, place


def run(words: Sequence[str]) -> int:
    """Measure data files: looktwice data stats FILE... --html stats.html."""
    given, config = read_command(
        run,
        "data stats",
        "FILE...",
        words,
        StatsConfig,
        argument("files", metavar="FILE", nargs="+", type=place, help="training files to measure"),
        argument("--html", metavar="FILE", type=place, help="also write a page with charts to this file"),
        MODEL,
    )
    for path in given["files"]:
        check_data_file(path)
    check_image_folder(config.image_base_path)
    check_output_file(given["html"], "--html", given["files"])
    locate(config.model_name)
    from rich.progress import track

    from looktwice.checking.statistics import Statistics, rows_to_measure
    from looktwice.console import open_console
    from looktwice.errors import counted
    from looktwice.formats.sample_file import SampleFile
    from looktwice.processing.processor import load_processor
    from looktwice.report.data_page import statistics_charts, write_statistics_page
    from looktwice.report.tables import statistics_tables
    from looktwice.report.terminal import titled

    processor = load_processor(config.model_name, config)
    statistics, console, notices = Statistics(), open_console(), open_console(stderr=True)
    leads = []
    for path in given["files"]:
        file = SampleFile.of(path, config)
        rows = rows_to_measure(len(file), config.num_rows, config.seed)
        num_before = statistics.num_whole_rows
        bar = track(rows, "measuring", console=notices, transient=True, disable=not notices.is_interactive)
        statistics.read(file, bar, processor)
        measured = f"{statistics.num_whole_rows - num_before:,} of {counted(len(rows), 'row')} measured"
        picked = f", picked from {len(file):,}" if len(rows) < len(file) else ""
        leads.append(f"{path}: format {file.format.name}, {measured}{picked}")
    tables = statistics_tables(statistics, config)
    if given["html"] and statistics.measures:  # first: who reads what is printed may leave
        title = ", ".join(path.name for path in given["files"])
        lead = f"{'; '.join(leads)}. Tokens and pixels as {config.model_name} has them."
        charts = statistics_charts(statistics)
        write_statistics_page(given["html"], title=title, lead=lead, tables=tables, charts=charts)
    for lead in leads:
        console.out(lead)
    for part in titled(tables):
        console.print(part, crop=False)
    if not statistics.measures:
        raise DataError("no sample could be measured; see the table above and `looktwice data check`")
    if given["html"]:
        console.out(f"\npage: {given['html']}")
    if num_broken := statistics.num_rows - statistics.num_whole_rows:
        of_all = f"{num_broken:,} of {counted(statistics.num_rows, 'row')} could not be measured"
        console.out(f"\n{of_all}; `looktwice data check` says what is wrong with each", style="red")
    return 1 if num_broken else 0
