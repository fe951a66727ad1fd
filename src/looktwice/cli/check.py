"""`looktwice data check`: data files judged before a GPU is held, and the cleaned copy of one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from looktwice.cli.arguments import MODEL, argument, read_command, write_json
from looktwice.config import CheckConfig
from looktwice.errors import ConfigError
from looktwice.model.location import locate
from looktwice.paths import check_image_folder, check_output_file, check_target, place


def run(words: Sequence[str]) -> int:
    """Judge data files before training: looktwice data check FILE... --image_base_path FOLDER."""
    given, config = read_command(
        run,
        "data check",
        "FILE...",
        words,
        CheckConfig,
        argument("files", metavar="FILE", nargs="+", type=place, help="training files to judge"),
        argument("--json", metavar="FILE", type=place, help="also write what was found to this file"),
        argument("--fix", metavar="OUT", type=place, help="write a copy without the rows that would fail"),
        MODEL,
    )
    files, target = given["files"], given["fix"]
    if target and len(files) > 1:
        raise ConfigError(f"--fix writes a copy of one file, {len(files)} are given; fix them one by one")
    inputs = [*files, config.val_data_path]
    check_output_file(given["json"], "--json", inputs)
    check_output_file(target, "--fix", inputs)
    check_image_folder(config.image_base_path)
    if target:
        check_target(target, files[0], overwrite=config.overwrite)
    if config.model_name:
        locate(config.model_name)
    from looktwice.checking.check import Judge
    from looktwice.checking.fix import check_outputs, fix
    from looktwice.console import open_console
    from looktwice.data.problems import Problem
    from looktwice.processing.processor import load_processor
    from looktwice.report.terminal import verdict_lines

    if target:
        check_outputs(files[0], target, overwrite=config.overwrite)
    processor = load_processor(config.model_name, config) if config.model_name else None
    judge = Judge(config, processor)
    fatal: defaultdict[str, list[Problem]] = defaultdict(list)
    verdict = judge.judge(files, fatal if target else None)
    if given["json"]:  # first: who reads what is printed may leave
        write_json(given["json"], verdict.as_json())
    fixed = fix(judge, fatal, target) if target else None
    console = open_console()
    for path, name in verdict.formats.items():
        console.out(f"{path}: format {name}")
    for line in verdict_lines(verdict):
        console.print(line, crop=False)
    for flag, unchecked in verdict.unchecked.items():
        console.print(f"not checked without {flag}: {unchecked}")
    if fixed:
        console.out(str(fixed))
    console.out(str(verdict), style=None if verdict.would_train else "red")
    return 0 if verdict.would_train else 1
