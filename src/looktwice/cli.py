"""The `looktwice` command: `train`, `ask`, `data`, `export`, `demo`. Flags are derived from the config classes."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from looktwice.config import (
    Config,
    DataConfig,
    ExportConfig,
    GRPOConfig,
    InferenceConfig,
    ModelConfig,
    SFTConfig,
    StageConfig,
    flag_of,
)
from looktwice.data_cli import data
from looktwice.errors import ConfigError, LooktwiceError
from looktwice.flags import Parser, add_flags, argument, prepare_file, read_command, run_one, write_json

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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and give its exit code: 0, 1 after an error a user can mend, 130 when interrupted."""
    # on a CPU it warns at import about a faster kernel that nothing here needs
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    commands = {"train": train, "ask": ask, "data": data, "export": export, "demo": demo}
    try:
        return run_one("looktwice", commands, arguments)
    except LooktwiceError as error:
        print(f"looktwice: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("looktwice: interrupted", file=sys.stderr)
        return 130


def train(arguments: Sequence[str]) -> None:
    """Fine-tune: stage 1 (SFT), stage 2 (R-GRPO) or both."""
    stage, model, data, sft, grpo = train_configs(arguments)
    from looktwice.training.run import prepare_output, required

    required(data.train_data_path, "--train_data")
    if stage == "both":
        from looktwice.processing.processor import load_processor
        from looktwice.rewards import load_reward
        from looktwice.training.run import load_sets

        # what stage 2 cannot use should not wait for stage 1 to end
        load_reward(grpo.reward)
        load_sets(data, load_processor(model.model_name, data), "grpo")
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
    add_flags(parser, GRPOConfig, shared, prefix="grpo_", title="For stage 2 alone")
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
    given, config = read_command(
        ask,
        "ask",
        "PICTURE QUESTION",
        arguments,
        InferenceConfig,
        argument("image", nargs="?", help="picture or video to look at"),
        argument("text", nargs="?", metavar="question", help="what to ask about it"),
        argument("--image_path", help="the picture or video, as a flag"),
        argument("--question", help="the question, as a flag"),
        argument("--output_json", type=Path, help="also write the answer to this file"),
    )
    image, question = given["image_path"] or given["image"], given["question"] or given["text"]
    if not image or not question:
        raise ConfigError('a picture and a question are needed: looktwice ask photo.jpg "What does the sign say?"')
    from looktwice.processing.images import image_size
    from looktwice.processing.video import is_video_file, open_video

    # a missing picture or a bad path should not wait for the model
    if is_video_file(image):
        shown: dict[str, Any] = {"video": open_video(image, config.num_frames)}
    else:
        image_size(image)
        shown = {"image": image}
    prepare_file(given["output_json"], "--output_json")
    from looktwice.inference import OvisInference

    result = OvisInference(config).generate(question=question, **shown)
    print_answer(result)
    if given["output_json"]:
        record = {"image_path": image, "question": question, "model_path": config.model_path, **result}
        write_json(given["output_json"], record)


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


def export(arguments: Sequence[str]) -> None:
    """Write a trained model or adapter as a released-layout folder, checked: looktwice export MODEL FOLDER."""
    given, config = read_command(
        export,
        "export",
        "MODEL FOLDER",
        arguments,
        ExportConfig,
        argument("model", metavar="MODEL", help="model or adapter folder, hub name, or tiny"),
        argument("folder", metavar="FOLDER", type=Path, help="folder to write; must be new or empty"),
    )
    from looktwice.export import describe, export_model

    print(describe(export_model(given["model"], given["folder"], config)))


def demo(arguments: Sequence[str]) -> None:
    """The whole pipeline on the built-in small world, in minutes on a CPU, with a report to look at."""
    parser = Parser("looktwice demo", description=demo.__doc__, allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"), help="run folder (outputs/demo)")
    parser.add_argument("--seed", type=int, default=0, help="seed of data, training and sampling (0)")
    flags = parser.parse_strictly(arguments)
    from looktwice.demo.pipeline import run_demo

    run_demo(flags["output_dir"], seed=flags["seed"])
