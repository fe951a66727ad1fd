"""`looktwice eval`: a model on benchmarks with its controls, and two results against each other."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from looktwice.cli.arguments import argument, read_command, run_one
from looktwice.cli.ask import THINKING
from looktwice.config import Config, EvalConfig
from looktwice.errors import ConfigError, DataError, counted
from looktwice.launch import Launch, launched, speaking_once
from looktwice.model.location import locate
from looktwice.paths import check_output_file, place

if TYPE_CHECKING:
    from looktwice.benches.files import BenchFiles
    from looktwice.evaluation.result import Result
    from looktwice.evaluation.run import Share


def run(words: Sequence[str]) -> int:
    """Evaluate a model: looktwice eval MODEL --bench NAME... --data DIR; or: looktwice eval compare A B."""
    if words and words[0] == "compare":
        return run_one("looktwice eval", {"compare": compare}, words)
    own = (argument("model", metavar="MODEL", help="model or adapter folder, hub name, or tiny"), THINKING)
    given, config = read_command(run, "eval", "MODEL", words, EvalConfig, *own)
    if "model_path" in config.model_fields_set:
        raise ConfigError("the model is named twice, with --model_path too; leave the flag out")
    config = config.model_copy(update={"model_path": given["model"]})
    if not config.bench:
        raise ConfigError("--bench names no benchmark; give one or more, such as --bench vstar")
    out = config.out or _place_of(config.model_path)
    check_output_file(out, "--out", [config.data])
    if not config.data.exists():
        raise ConfigError(f"--data {config.data}: no such folder or file; name the folder of the benchmarks' files")
    locate(config.model_path)
    launch = launched()
    with speaking_once():
        return _evaluate(config, out, launch)


def _place_of(model: str) -> Path:
    """Where the answers of a model go by default."""
    return Path("outputs", "eval", re.sub(r"[^\w.-]+", "-", model).strip("-.") + ".jsonl")


def _evaluate(config: EvalConfig, out: Path, launch: Launch) -> int:
    """Ask, then tell; 1 where some questions failed."""
    benches = _opened(config)
    from looktwice.cli.ask import load
    from looktwice.evaluation.presets import with_preset
    from looktwice.evaluation.run import Evaluation

    config = with_preset(config)
    if launch.size > 1 and config.device is None:
        config = config.model_copy(update={"device": _device(launch)})
    share = _share(config, launch)
    inference = load(config)
    inference.processor.policy = inference.processor.policy.override(image_min_pixels=config.min_pixels)
    evaluation = Evaluation(config, inference, benches, out, share)
    evaluation.run()
    if launch.size == 1 and share.count > 1:
        print(f"{share.path(out)}: {counted(len(evaluation.result.answers), 'answer')} of part {config.shard}")
        return 1 if evaluation.result.failed else 0
    if launch.size > 1:
        _wait_for_all()
        if launch.rank > 0:
            return 0
        evaluation = Evaluation(config, inference, benches, out)
        evaluation.run()
    return tell(evaluation.result, out)


def _opened(config: EvalConfig) -> dict[str, BenchFiles]:
    """The benchmarks with their files. Raises DataError for one without a file."""
    from looktwice.benches.files import BenchFiles, find_files, image_folders

    benches: dict[str, BenchFiles] = {}
    for word in config.bench:
        name, _, file = word.partition(":")
        if name in benches:
            raise ConfigError(f"--bench names {name} twice; name it once, and other files of it in another run")
        found = find_files(name, config.data / file if file else config.data)
        folders = [config.image_base_path] if config.image_base_path else image_folders(found[0], config.data)
        benches[name] = BenchFiles(name, found, folders)
    return benches


def _share(config: EvalConfig, launch: Launch) -> Share:
    from looktwice.evaluation.run import Share

    if launch.size > 1:
        if config.shard:
            raise ConfigError("--shard under torchrun, which deals the questions out by itself; leave it out")
        return Share(index=launch.rank, count=launch.size)
    if config.shard is None:
        return Share()
    number, count = map(int, config.shard.split("/"))
    return Share(index=number - 1, count=count)


def _device(launch: Launch) -> str | None:
    import torch

    return f"cuda:{launch.local_rank}" if torch.cuda.is_available() else None


def _wait_for_all() -> None:
    """Wait until every process of torchrun has asked its part."""
    from datetime import timedelta

    import torch.distributed as distributed

    distributed.init_process_group("gloo", timeout=timedelta(days=7))
    distributed.barrier()
    distributed.destroy_process_group()


def tell(result: Result, out: Path) -> int:
    """Print what a result says; 1 where some questions failed. Raises DataError where none was answered."""
    from looktwice.console import open_console
    from looktwice.evaluation.summary import summary_of
    from looktwice.report.evaluation_tables import finding, summary_tables
    from looktwice.report.terminal import titled

    console = open_console()
    summaries = [summary for bench in result.recipe["benches"] if (summary := summary_of(result, bench))]
    if not summaries:
        reasons = [str(line["error"]) for line in result.failed.values()]
        raise DataError(f"{out}: no question was answered, so nothing was evaluated", *reasons[:5])
    for summary in summaries:
        for part in titled(summary_tables(summary)):
            console.print(part, crop=False)
    console.out("")
    for summary in summaries:
        console.out(finding(summary), style="bold")
    console.out(f"result: {out}")
    if result.failed:
        print(f"{counted(len(result.failed), 'question')} failed; the same command asks them again", file=sys.stderr)
    return 1 if result.failed else 0


def compare(words: Sequence[str]) -> int:
    """Compare two results question by question: looktwice eval compare A.jsonl B.jsonl."""
    given, _ = read_command(
        compare,
        "eval compare",
        "A B",
        words,
        Config,
        argument("first", metavar="A", type=place, help="result file"),
        argument("second", metavar="B", type=place, help="result file that is compared with it"),
    )
    from looktwice.console import open_console
    from looktwice.evaluation.compare import compare as compared
    from looktwice.evaluation.result import read_result
    from looktwice.report.evaluation_tables import comparison_tables, verdict_of
    from looktwice.report.terminal import titled

    paths = (given["first"], given["second"])
    comparison = compared(*map(read_result, paths))
    names = _names(paths)
    console = open_console()
    for part in titled(comparison_tables(comparison, *names)):
        console.print(part, crop=False)
    console.out("")
    for line in verdict_of(comparison, *names):
        console.out(line)
    return 0


def _names(paths: tuple[Path, Path]) -> tuple[str, str]:
    """Short names of two files that tell them apart."""
    first, second = (path.stem for path in paths)
    return (first, second) if first != second else (str(paths[0]), str(paths[1]))
