"""The `looktwice data` commands: check, show, stats, convert."""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from looktwice.config import CheckConfig, ConvertConfig, ShowConfig, StatsConfig
from looktwice.errors import ConfigError, DataError
from looktwice.flags import argument, prepare_file, read_command, run_one, write_json

_MODEL = argument("--model", dest="model_name", default=argparse.SUPPRESS, help="short for --model_name")


def data(words: Sequence[str]) -> int:
    """Work on data files: check, show, stats, convert."""
    return run_one("looktwice data", {"check": check, "show": show, "stats": stats, "convert": convert}, words)


def check(words: Sequence[str]) -> int:
    """Judge data files before training: looktwice data check FILE... --image_base_path FOLDER."""
    given, config = read_command(
        check,
        "data check",
        "FILE...",
        words,
        CheckConfig,
        argument("files", metavar="FILE", nargs="+", type=Path, help="training files to judge"),
        argument("--json", metavar="FILE", type=Path, help="also write what was found to this file"),
        argument("--fix", metavar="OUT", type=Path, help="write a copy without the rows that would fail"),
        _MODEL,
    )
    files, target = given["files"], given["fix"]
    if target and len(files) > 1:
        raise ConfigError(f"--fix writes a copy of one file, {len(files)} are given; fix them one by one")
    inputs = [*files, config.val_data_path]
    prepare_file(given["json"], "--json", inputs)
    prepare_file(target, "--fix", inputs)
    from rich.console import Console

    from looktwice.checking.check import Judge
    from looktwice.checking.fix import check_outputs, fix
    from looktwice.data.problems import Problem
    from looktwice.processing.processor import load_processor
    from looktwice.report.terminal import verdict_table

    if target:
        check_outputs(files[0], target)
    processor = load_processor(config.model_name, config) if config.model_name else None
    judge = Judge(config, processor)
    fatal: defaultdict[str, list[Problem]] = defaultdict(list)
    verdict = judge.judge(files, fatal if target else None)
    console = Console()
    for path, name in verdict.formats.items():
        console.print(f"{path}: format {name}", markup=False, highlight=False, soft_wrap=True)
    if verdict.counts:
        console.print(verdict_table(verdict))
    for flag, unchecked in verdict.unchecked.items():
        console.print(f"not checked without {flag}: {unchecked}", highlight=False)
    if given["json"]:
        write_json(given["json"], verdict.as_json())
    if target:
        console.print(str(fix(judge, fatal, target)), markup=False, highlight=False, soft_wrap=True)
    console.print(str(verdict), style=None if verdict.would_train else "red", highlight=False, soft_wrap=True)
    return 0 if verdict.would_train else 1


def show(words: Sequence[str]) -> None:
    """Show samples as the model will see them: looktwice data show FILE -n 3 --html samples.html."""
    given, config = read_command(
        show,
        "data show",
        "FILE",
        words,
        ShowConfig,
        argument("file", metavar="FILE", type=Path, help="training file to look into"),
        argument("--html", metavar="FILE", type=Path, help="also write a page with the pictures to this file"),
        argument("-n", dest="num_samples", metavar="N", default=argparse.SUPPRESS, help="short for --num_samples"),
        _MODEL,
    )
    prepare_file(given["html"], "--html", [given["file"]])
    from rich.console import Console

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
    console = Console()
    console.print(lead, markup=False, highlight=False, soft_wrap=True)
    views = []
    for view in view_file(file, processor, config):
        console.print()
        for line in sample_lines(view):
            console.print(line)
        if given["html"]:
            views.append(view)
    if given["html"]:
        write_samples_page(given["html"], title=file.path.name, lead=lead, views=views)
        console.print(f"\npage: {given['html']}", markup=False, highlight=False, soft_wrap=True)


def stats(words: Sequence[str]) -> None:
    """Measure data files: looktwice data stats FILE... --html stats.html."""
    given, config = read_command(
        stats,
        "data stats",
        "FILE...",
        words,
        StatsConfig,
        argument("files", metavar="FILE", nargs="+", type=Path, help="training files to measure"),
        argument("--html", metavar="FILE", type=Path, help="also write a page with charts to this file"),
        _MODEL,
    )
    prepare_file(given["html"], "--html", given["files"])
    from rich.console import Console
    from rich.progress import track

    from looktwice.checking.statistics import Statistics, rows_to_measure
    from looktwice.errors import counted
    from looktwice.formats.sample_file import SampleFile
    from looktwice.processing.processor import load_processor
    from looktwice.report.data_page import statistics_charts, write_statistics_page
    from looktwice.report.tables import statistics_tables
    from looktwice.report.terminal import titled

    processor = load_processor(config.model_name, config)
    statistics, console, notices = Statistics(), Console(), Console(stderr=True)
    leads = []
    for path in given["files"]:
        file = SampleFile.of(path, config)
        rows = rows_to_measure(len(file), config.num_rows, config.seed)
        leads.append(f"{path}: format {file.format.name}, {len(rows):,} of {counted(len(file), 'row')}")
        console.print(leads[-1], markup=False, highlight=False, soft_wrap=True)
        statistics.read(file, track(rows, description="measuring", console=notices, transient=True), processor)
    tables = statistics_tables(statistics, config)
    for part in titled(tables):
        console.print(part)
    if not statistics.measures:
        raise DataError("no sample could be measured; see the table above and `looktwice data check`")
    if given["html"]:
        title = ", ".join(path.name for path in given["files"])
        lead = f"{'; '.join(leads)}. Tokens and pixels as {config.model_name} has them."
        charts = statistics_charts(statistics)
        write_statistics_page(given["html"], title=title, lead=lead, tables=tables, charts=charts)
        console.print(f"\npage: {given['html']}", markup=False, highlight=False, soft_wrap=True)


def convert(words: Sequence[str]) -> None:
    """Write a data file in another format: looktwice data convert IN OUT --to messages."""
    given, config = read_command(
        convert,
        "data convert",
        "IN OUT",
        words,
        ConvertConfig,
        argument("source", metavar="IN", type=Path, help="file to read: JSONL, JSON or Parquet"),
        argument("target", metavar="OUT", type=Path, help="file to write; its name says which kind"),
    )
    from looktwice.formats.convert import convert_file

    print(convert_file(given["source"], given["target"], config))
