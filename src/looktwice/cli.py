"""The `looktwice` command: `train`, `ask`, `data`, `export`, `demo`. Flags are derived from the config classes."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

from looktwice.config import (
    CheckConfig,
    Config,
    ConvertConfig,
    DataConfig,
    ExportConfig,
    GRPOConfig,
    InferenceConfig,
    ModelConfig,
    SFTConfig,
    ShowConfig,
    StageConfig,
    StatsConfig,
    flag_of,
)
from looktwice.errors import ConfigError, DataError, LooktwiceError, nearest

Command = Callable[[Sequence[str]], None]

FILE_FLAGS: dict[str, type[Config]] = {
    "model_config": ModelConfig,
    "data_config": DataConfig,
    "sft_config": SFTConfig,
    "grpo_config": GRPOConfig,
}
STAGE_1_ONLY = ("num_train_epochs", "learning_rate", "resume_from_checkpoint")
"""With `--stage both`, these flags without a `grpo_` prefix belong to stage 1 ..."""
GRPO_LEARNING_RATE_SHARE = 0.25
"""... but a learning rate given for stage 1 also sets stage 2's, at a quarter."""


class Parser(argparse.ArgumentParser):
    """Raises ConfigError instead of leaving; an unknown flag names the nearest one."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")

    def parse_strictly(self, arguments: Sequence[str]) -> dict[str, Any]:
        """The flags that were given; `--verify-with` is read as `--verify_with`."""
        written = [_with_underscores(argument) for argument in arguments]
        known, unknown = self.parse_known_args(written)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            raise ConfigError(f"unknown argument {unknown[0]}.{nearest(unknown[0].split('=')[0], flags)}")
        return vars(known)


def _with_underscores(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument.partition("=")
    start = "--no-" if flag.startswith("--no-") else "--"
    return f"{start}{flag.removeprefix(start).replace('-', '_')}{equals}{value}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and give its exit code: 0, 1 after an error a user can mend, 130 when interrupted."""
    # on a CPU it warns at import about a faster kernel that nothing here needs
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    commands = {"train": train, "ask": ask, "data": data, "export": export, "demo": demo}
    try:
        run_one("looktwice", commands, arguments)
    except LooktwiceError as error:
        print(f"looktwice: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("looktwice: interrupted", file=sys.stderr)
        return 130
    return 0


def run_one(program: str, commands: Mapping[str, Command], arguments: Sequence[str]) -> None:
    """Run the command that the first argument names, or say which there are."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: {program} {{{','.join(commands)}}} ...\n")
        width = max(map(len, commands))
        for name, command in commands.items():
            print(f"  {name:{width}} {(command.__doc__ or '').splitlines()[0]}")
        return
    if arguments[0] not in commands:
        raise ConfigError(f'unknown command "{arguments[0]}".{nearest(arguments[0], commands)}')
    commands[arguments[0]](arguments[1:])


def train(arguments: Sequence[str]) -> None:
    """Fine-tune: stage 1 (SFT), stage 2 (R-GRPO) or both."""
    stage, model, data, sft, grpo = train_configs(arguments)
    from looktwice.training.run import prepare_output, required

    required(data.train_data_path, "--train_data")
    if stage == "both":
        from looktwice.rewards import load_reward
        from looktwice.training.run import load_processor, load_sets

        # what stage 2 cannot use should not wait for stage 1 to end
        load_reward(grpo.reward)
        load_sets(data, load_processor(model.model_name, data), "prompt")
        prepare_output(grpo)
    if stage != "grpo":
        from looktwice.training.sft import train_sft

        final = train_sft(model, data, sft)
        print(f"stage 1 done: {final}")
        grpo = grpo.model_copy(update={"sft_checkpoint_path": final})
    if stage != "sft":
        from looktwice.training.grpo import train_grpo

        print(f"stage 2 done: {train_grpo(model, data, grpo)}")


def train_configs(arguments: Sequence[str]) -> tuple[str, ModelConfig, DataConfig, SFTConfig, GRPOConfig]:
    """Stage and settings of a `train` command: defaults, then config files, then flags."""
    parser = Parser(
        "looktwice train",
        usage="looktwice train [--stage STAGE] [options]",
        description=train.__doc__,
        allow_abbrev=False,
    )
    parser.add_argument("--stage", choices=["sft", "grpo", "both"], default="both", help="what to run (both)")
    for flag, config_class in FILE_FLAGS.items():
        parser.add_argument(f"--{flag}", metavar="FILE", help=f"{config_class.__name__} as JSON or YAML; flags win")
    shared = [name for name in StageConfig.model_fields if name != "output_dir"]
    for config_class in FILE_FLAGS.values():
        own = [name for name in config_class.model_fields if config_class is not GRPOConfig or name not in shared]
        add_flags(parser, config_class, own)
    add_flags(parser, GRPOConfig, shared, prefix="grpo_")
    flags = parser.parse_strictly(arguments)
    stage = flags["stage"]
    refuse_idle_flags(stage, flags, shared)
    values: dict[str, dict[str, Any]] = {}
    for file_flag, config_class in FILE_FLAGS.items():
        values[file_flag] = config_class.read(flags[file_flag]) if flags.get(file_flag) else {}
        for name in config_class.model_fields:
            flag = flag_of(config_class, name)
            is_for_stage_1 = config_class is GRPOConfig and stage == "both" and name in STAGE_1_ONLY
            if flag in flags and not is_for_stage_1:
                values[file_flag][name] = flags[flag]
    grpo_values = values["grpo_config"]
    if stage == "both" and "learning_rate" in flags and "learning_rate" not in grpo_values:
        grpo_values["learning_rate"] = GRPO_LEARNING_RATE_SHARE * number_of("learning_rate", flags["learning_rate"])
    for name in shared:
        if (flag := f"grpo_{flag_of(GRPOConfig, name)}") in flags:
            grpo_values[name] = flags[flag]
    model, data, sft, grpo = (config_class(**values[flag]) for flag, config_class in FILE_FLAGS.items())
    return stage, model, data, sft, grpo  # type: ignore[return-value]


def refuse_idle_flags(stage: str, flags: Mapping[str, Any], shared: Sequence[str]) -> None:
    """Raise ConfigError for a flag that the stage to run would not read; `shared` are the fields of both stages."""
    of_stage_2 = [flag_of(GRPOConfig, name) for name in GRPOConfig.model_fields if name not in shared]
    of_stage_2 += [f"grpo_{flag_of(GRPOConfig, name)}" for name in shared]
    idle = {
        "sft": dict.fromkeys(of_stage_2, "it belongs to stage 2"),
        "grpo": {"sft_output_dir": "it belongs to stage 1", "model_name": "stage 2 starts from --sft_checkpoint"},
        "both": {"sft_checkpoint": "stage 2 starts from the model of stage 1"},
    }[stage]
    for flag, reason in idle.items():
        if flag in flags:
            raise ConfigError(f"--{flag} does nothing with --stage {stage}: {reason}; leave it out")


def number_of(flag: str, value: str) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise ConfigError(f"--{flag} is {value!r}; it must be a number") from error


def ask(arguments: Sequence[str]) -> None:
    """Ask a model about a picture or a video: looktwice ask photo.jpg "What does the sign say?"."""
    parser = Parser(
        "looktwice ask", usage="looktwice ask PICTURE QUESTION [options]", description=ask.__doc__, allow_abbrev=False
    )
    parser.add_argument("image", nargs="?", help="picture or video to look at")
    parser.add_argument("text", nargs="?", metavar="question", help="what to ask about it")
    parser.add_argument("--image_path", help="the picture or video, as a flag")
    parser.add_argument("--question", help="the question, as a flag")
    parser.add_argument("--output_json", type=Path, help="also write the answer to this file")
    add_flags(parser, InferenceConfig, list(InferenceConfig.model_fields))
    flags = parser.parse_strictly(arguments)
    image, question = flags["image_path"] or flags["image"], flags["question"] or flags["text"]
    if not image or not question:
        raise ConfigError('a picture and a question are needed: looktwice ask photo.jpg "What does the sign say?"')
    config = InferenceConfig(**{name: flags[name] for name in InferenceConfig.model_fields if name in flags})
    from looktwice.processing.images import image_size
    from looktwice.processing.video import is_video_file, open_video

    # a missing picture or a bad path should not wait for the model
    if is_video_file(image):
        shown: dict[str, Any] = {"video": open_video(image, config.num_frames)}
    else:
        image_size(image)
        shown = {"image": image}
    prepare_file(flags["output_json"], "--output_json")
    from looktwice.inference import OvisInference

    result = OvisInference(config).generate(question=question, **shown)
    print_answer(result)
    if flags["output_json"]:
        record = {"image_path": image, "question": question, "model_path": config.model_path, **result}
        write_json(flags["output_json"], record)


def write_json(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def prepare_file(path: Path | None, flag: str) -> None:
    """Make sure that a result can be written there. Raises ConfigError when it cannot."""
    if path is None:
        return
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir() or not folder.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise ConfigError(f"{flag} {path}: cannot be written; give another path")


def print_answer(result: dict[str, Any]) -> None:
    if line := describe_sizes(result["picture"]):
        print(line)
    if thinking := result["parsed"]["think_content"]:
        print(f"thinking: {thinking}\n")
    for number, crop in enumerate(result["crops"], 1):
        print(f"crop {number}: {crop['box'] if crop['error'] is None else 'refused, ' + crop['error']}")
    print(f"answer: {result['parsed']['answer_content'] or result['response']}")
    if result["stop_reason"].startswith("max_"):
        print(f"(cut by --{'max_turns' if result['stop_reason'] == 'max_turns' else 'max_new_tokens'})")


def describe_sizes(picture: dict[str, Any] | None) -> str:
    """At which size the model saw the picture or video, where that is not the original one."""
    if picture is None or picture["original"] == picture["seen"]:
        return ""
    (width, height), (seen_width, seen_height) = picture["original"], picture["seen"]
    what = f"video: {picture['frames']} frames of" if "frames" in picture else "picture:"
    return f"{what} {width}x{height}, seen as {seen_width}x{seen_height}"


def data(arguments: Sequence[str]) -> None:
    """Work on data files: check, show, stats, convert."""
    commands = {"check": data_check, "show": data_show, "stats": data_stats, "convert": data_convert}
    run_one("looktwice data", commands, arguments)


def data_check(arguments: Sequence[str]) -> None:
    """Judge data files before training: looktwice data check FILE... --image_base_path FOLDER."""
    parser = Parser(
        "looktwice data check",
        usage="looktwice data check FILE... [options]",
        description=data_check.__doc__,
        allow_abbrev=False,
    )
    parser.add_argument("files", metavar="FILE", nargs="+", type=Path, help="training files to judge")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write what was found to this file")
    parser.add_argument("--fix", metavar="OUT", type=Path, help="write a copy without the rows that would fail")
    own = [name for name in CheckConfig.model_fields if name not in ("train_data_path", "length_policy")]
    add_flags(parser, CheckConfig, own)
    flags = parser.parse_strictly(arguments)
    names = {flag_of(CheckConfig, name): name for name in own}
    config = CheckConfig(**{names[flag]: value for flag, value in flags.items() if flag in names})
    if flags["fix"] and len(flags["files"]) > 1:
        raise ConfigError(f"--fix writes a copy of one file, {len(flags['files'])} are given; fix them one by one")
    prepare_file(flags["json"], "--json")
    from rich.console import Console

    from looktwice.data.check import judge
    from looktwice.data.fix import fix
    from looktwice.training.run import load_processor

    processor = load_processor(config.model_name, config) if config.model_name else None
    verdict = judge(flags["files"], config, processor)
    console = Console()
    for path, name in verdict.formats.items():
        console.print(f"{path}: format {name}", markup=False, highlight=False, soft_wrap=True)
    if verdict.counts:
        console.print(verdict.table())
    if verdict.unchecked:
        console.print(f"not checked without --model_name: {' and '.join(verdict.unchecked)}")
    if flags["json"]:
        write_json(flags["json"], verdict.as_json())
    if flags["fix"]:
        fixed = fix(flags["files"][0], flags["fix"], config, processor)
        console.print(str(fixed), markup=False, highlight=False, soft_wrap=True)
    if not verdict.would_train:
        raise DataError(str(verdict))
    console.print(str(verdict), highlight=False)


def data_show(arguments: Sequence[str]) -> None:
    """Show samples as the model will see them: looktwice data show FILE -n 3 --html samples.html."""
    parser = Parser(
        "looktwice data show",
        usage="looktwice data show FILE [options]",
        description=data_show.__doc__,
        allow_abbrev=False,
    )
    parser.add_argument("file", metavar="FILE", type=Path, help="training file to look into")
    parser.add_argument("--html", metavar="FILE", type=Path, help="also write a page with the pictures to this file")
    own = [name for name in ShowConfig.model_fields if name not in ("train_data_path", "val_data_path")]
    add_flags(parser, ShowConfig, own)
    parser.add_argument("-n", dest="num_samples", metavar="N", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    flags = parser.parse_strictly(arguments)
    names = {flag_of(ShowConfig, name): name for name in own}
    config = ShowConfig(**{names[flag]: value for flag, value in flags.items() if flag in names})
    prepare_file(flags["html"], "--html")
    from rich.console import Console

    from looktwice.data.records import SampleFile
    from looktwice.report.data_page import write_samples_page
    from looktwice.report.sample_view import view_file
    from looktwice.report.terminal import sample_lines
    from looktwice.training.run import load_processor

    file = SampleFile(
        flags["file"], config.image_base_path, data_format=config.source_format, answer_key=config.answer_key
    )
    processor = load_processor(config.model_name, config)
    found = f"format {file.format.name} ({file.format.description}), {len(file):,} rows"
    lead = f"{file.path}: {found}, as {config.model_name} sees them"
    console = Console()
    console.print(lead, markup=False, highlight=False, soft_wrap=True)
    views = []
    for view in view_file(file, processor, config):
        console.print()
        for line in sample_lines(view):
            console.print(line)
        if flags["html"]:
            views.append(view)
    if flags["html"]:
        write_samples_page(flags["html"], title=file.path.name, lead=lead, views=views)
        console.print(f"\npage: {flags['html']}", markup=False, highlight=False, soft_wrap=True)


def data_stats(arguments: Sequence[str]) -> None:
    """Measure data files: looktwice data stats FILE... --html stats.html."""
    parser = Parser(
        "looktwice data stats",
        usage="looktwice data stats FILE... [options]",
        description=data_stats.__doc__,
        allow_abbrev=False,
    )
    parser.add_argument("files", metavar="FILE", nargs="+", type=Path, help="training files to measure")
    parser.add_argument("--html", metavar="FILE", type=Path, help="also write a page with charts to this file")
    without = ("train_data_path", "val_data_path", "length_policy")
    own = [name for name in StatsConfig.model_fields if name not in without]
    add_flags(parser, StatsConfig, own)
    flags = parser.parse_strictly(arguments)
    names = {flag_of(StatsConfig, name): name for name in own}
    config = StatsConfig(**{names[flag]: value for flag, value in flags.items() if flag in names})
    prepare_file(flags["html"], "--html")
    from rich.console import Console
    from rich.progress import track

    from looktwice.data.records import SampleFile
    from looktwice.data.statistics import Statistics, rows_to_measure
    from looktwice.report.data_page import statistics_charts, write_statistics_page
    from looktwice.report.tables import statistics_tables
    from looktwice.report.terminal import titled
    from looktwice.training.run import load_processor

    processor = load_processor(config.model_name, config)
    statistics, console, notices = Statistics(), Console(), Console(stderr=True)
    leads = []
    for path in flags["files"]:
        file = SampleFile(path, config.image_base_path, data_format=config.source_format, answer_key=config.answer_key)
        rows = rows_to_measure(len(file), config.num_rows, config.seed)
        leads.append(f"{path}: format {file.format.name}, {len(rows):,} of {len(file):,} rows")
        console.print(leads[-1], markup=False, highlight=False, soft_wrap=True)
        statistics.read(file, track(rows, description="measuring", console=notices, transient=True), processor)
    tables = statistics_tables(statistics, config)
    for part in titled(tables):
        console.print(part)
    if not statistics.measures:
        raise DataError("no sample could be measured; see the table above and `looktwice data check`")
    if flags["html"]:
        title = ", ".join(path.name for path in flags["files"])
        lead = f"{'; '.join(leads)}. Tokens and pixels as {config.model_name} has them."
        write_statistics_page(
            flags["html"], title=title, lead=lead, tables=tables, charts=statistics_charts(statistics)
        )
        console.print(f"\npage: {flags['html']}", markup=False, highlight=False, soft_wrap=True)


def data_convert(arguments: Sequence[str]) -> None:
    """Write a data file in another format: looktwice data convert IN OUT --to messages."""
    parser = Parser(
        "looktwice data convert",
        usage="looktwice data convert IN OUT [options]",
        description=data_convert.__doc__,
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="IN", type=Path, help="file to read: JSONL, JSON or Parquet")
    parser.add_argument("target", metavar="OUT", type=Path, help="file to write; its name says which kind")
    add_flags(parser, ConvertConfig, list(ConvertConfig.model_fields))
    flags = parser.parse_strictly(arguments)
    names = {flag_of(ConvertConfig, name): name for name in ConvertConfig.model_fields}
    config = ConvertConfig(**{names[flag]: value for flag, value in flags.items() if flag in names})
    from looktwice.data.convert import convert

    print(convert(flags["source"], flags["target"], config))


def export(arguments: Sequence[str]) -> None:
    """Write a trained model or adapter as a released-layout folder, checked: looktwice export MODEL FOLDER."""
    parser = Parser(
        "looktwice export",
        usage="looktwice export MODEL FOLDER [options]",
        description=export.__doc__,
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="model or adapter folder, hub name, or tiny")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="folder to write; must be new or empty")
    add_flags(parser, ExportConfig, list(ExportConfig.model_fields))
    flags = parser.parse_strictly(arguments)
    config = ExportConfig(**{name: flags[name] for name in ExportConfig.model_fields if name in flags})
    from looktwice.export import describe, export_model

    print(describe(export_model(flags["model"], flags["folder"], config)))


def demo(arguments: Sequence[str]) -> None:
    """The whole pipeline on the built-in small world, in minutes on a CPU, with a report to look at."""
    parser = Parser("looktwice demo", description=demo.__doc__, allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"), help="run folder (outputs/demo)")
    parser.add_argument("--seed", type=int, default=0, help="seed of data, training and sampling (0)")
    flags = parser.parse_strictly(arguments)
    from looktwice.demo.pipeline import run_demo

    run_demo(flags["output_dir"], seed=flags["seed"])


def add_flags(
    parser: argparse.ArgumentParser, config_class: type[Config], names: Sequence[str], prefix: str = ""
) -> None:
    """One flag a field; only flags that are given appear in the parsed values."""
    title = (config_class.__doc__ or "").splitlines()[0]
    group = parser.add_argument_group("For stage 2 alone" if prefix else title.removesuffix("."))
    for name in names:
        field = config_class.model_fields[name]
        default = "" if field.default in (None, (), {}) else f" ({field.default})"
        help_text = f"{field.description}{default}".replace("%", "%%")
        flag = f"--{prefix}{flag_of(config_class, name)}"
        if field.annotation in (bool, bool | None):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=help_text)
        else:
            choices = [str(choice) for choice in get_args(field.annotation) if isinstance(choice, str)]
            metavar = "{" + ",".join(choices) + "}" if choices else name.upper().split("_")[-1]
            group.add_argument(flag, default=argparse.SUPPRESS, metavar=metavar, help=help_text)
