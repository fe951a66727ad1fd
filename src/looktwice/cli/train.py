"""`looktwice train`: stage 1 (SFT), stage 2 (R-GRPO) or both; settings from defaults, files and flags."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from looktwice.cli.arguments import Parser, add_flags
from looktwice.config import Config, DataConfig, GRPOConfig, ModelConfig, SFTConfig, StageConfig, check_rewards, flag_of
from looktwice.console import outlasting_readers
from looktwice.errors import CheckpointError, ConfigError
from looktwice.launch import launched, speaking_once
from looktwice.paths import place
from looktwice.training.folder import (
    FINAL_MODEL,
    LATEST,
    check_place,
    checkpoint_of,
    checkpoints,
    holds_steps,
    settle_start,
)
from looktwice.training.start import check_processes, check_request
from looktwice.training.stopping import Interrupted

FILE_FLAGS: dict[str, type[Config]] = {
    "model_config": ModelConfig,
    "data_config": DataConfig,
    "sft_config": SFTConfig,
    "grpo_config": GRPOConfig,
}
SHARED = [name for name in StageConfig.model_fields if name != "output_dir"]
"""Settings of both stages that one flag sets."""
STAGE_1_ONLY = ("num_train_epochs", "learning_rate", "resume_from_checkpoint")
"""With `--stage both`, these flags without a `grpo_` prefix belong to stage 1 ..."""
GRPO_LEARNING_RATE_SHARE = 0.25
"""... but a learning rate given for stage 1 also sets stage 2's, at a quarter, and `--resume` alone is for both."""
HOW_A_START_BEGAN = ("overwrite", "resume", "resume_from_checkpoint")
REPLAYED = (
    *("preset", "reward", "reward_weights", "reward_terms", "reward_seconds", "reward_retries", "reward_cache"),
    *(
        "judge_url",
        "judge_model",
        "judge_asked",
        "judge_concurrency",
        "scale_rewards",
        "surrogate",
        "epsilon",
        "epsilon_high",
    ),
    *("delta", "beta", "kl_estimator", "importance_correction", "importance_cap", "loss_aggregation"),
    *("drop_constant_groups", "mask_truncated_completions", "truncated_in_statistics"),
)
"""Settings that --replay takes in place of those of the run."""
DOCUMENTED_PATHS = {
    "train_data_path": Path("data/train.jsonl"),
    "val_data_path": Path("data/val.jsonl"),
    "image_base_path": Path("data/images"),
}
BOTH_STAGES = {"": "sft_config", "grpo_": "grpo_config"}
"""The config files of both stages, by the prefix of the flags that set a knob for that one alone."""
DOCUMENTED_BATCH = {"train_batch_size": 1, "gradient_accumulation_steps": 8}
NO_STAGE_1 = "no such model folder; run stage 1 first, or name the model to start from with --sft_checkpoint"
PATHS_MEND = "put it there, or name your data: --train_data FILE --image_base_path FOLDER, and --val_data FILE if any"


@speaking_once()
def run(words: Sequence[str]) -> None:
    """Fine-tune: stage 1 (SFT), stage 2 (R-GRPO) or both."""
    configs = train_configs(words)
    if path := train_parser().parse_strictly(words)["replay"]:
        return show_replay(path, configs[-1])
    with outlasting_readers():
        run_stages(*configs, go_on=command_of(words))


def run_stages(
    stage: str, model: ModelConfig, data: DataConfig, sft: SFTConfig, grpo: GRPOConfig, *, go_on: str
) -> None:
    """Run one stage or both; `go_on` is the command that starts the same again."""
    settle_start(grpo.sft_checkpoint_path if stage == "grpo" else place(model.model_name))
    if stage == "grpo":
        if "sft_checkpoint_path" not in grpo.model_fields_set and not grpo.sft_checkpoint_path.exists():
            raise CheckpointError(f"{grpo.sft_checkpoint_path}: {NO_STAGE_1}")
        check_request(str(grpo.sft_checkpoint_path), model, data, grpo)
    else:
        check_request(model.model_name, model, data, sft)
    if stage == "both":
        grpo = grpo.model_copy(update={"sft_checkpoint_path": sft.output_dir / FINAL_MODEL})
        check_stage_2(model, data, sft, grpo)
    if stage != "grpo":
        from looktwice.training.sft import train_sft

        with told_when_interrupted(sft, go_on=go_on, is_last=stage == "sft"):
            train_sft(model, data, sft)
    if stage != "sft":
        from looktwice.training.grpo import train_grpo

        with told_when_interrupted(grpo, go_on=go_on, before=grpo.sft_checkpoint_path if stage == "both" else None):
            train_grpo(model, data, grpo)


def show_replay(path: Path, config: GRPOConfig) -> None:
    """Show what the written rollouts of a run would be paid, and its loss, under the settings given here."""
    if "reward" in config.model_fields_set:
        check_rewards(config)
    from looktwice.console import open_console
    from looktwice.report.terminal import titled
    from looktwice.training.replay import replay_config, replay_table, replayed, run_of

    run = run_of(path)
    table = replay_table([*replayed(run, replay_config(run, config))])
    console = open_console()
    for line in titled([table]):
        console.print(line, crop=False)


def check_stage_2(model: ModelConfig, data: DataConfig, sft: SFTConfig, grpo: GRPOConfig) -> None:
    """Refuse what stage 2 cannot use, which should not wait for stage 1 to end."""
    launch = check_processes(model, grpo)
    check_rewards(grpo)
    if grpo.output_dir.absolute() == sft.output_dir.absolute():
        raise ConfigError(f"{grpo.output_dir}: the run folder of both stages; give each its own")
    if launch.rank == 0:  # which alone writes there
        check_place(grpo, str(grpo.sft_checkpoint_path))
    if (checkpoint := checkpoint_of(grpo)) and not grpo.sft_checkpoint_path.exists():
        raise ConfigError(
            f"{checkpoint}: of a stage 2 that began from another model, as stage 1 is not done in {sft.output_dir}; "
            "give stage 2 another folder (--grpo_output_dir)"
        )
    from looktwice.processing.processor import load_processor
    from looktwice.rewarding.paying import load_rewards
    from looktwice.training.sets import load_sets

    load_rewards(grpo)
    load_sets(data, load_processor(model.model_name, data), "grpo")


@contextmanager
def told_when_interrupted(
    config: StageConfig, *, go_on: str, before: Path | None = None, is_last: bool = True
) -> Iterator[None]:
    """Let a run that is stopped say what is kept, and the command that goes on: the one it was started with, and
    `--resume` where there is something to go on from.

    `before` is the model of the stage before, if there was one, and `is_last` says that no stage comes after.
    """
    try:
        yield
    except KeyboardInterrupt as interrupt:
        found = checkpoints(config.output_dir)
        kept = found[max(found)] if found else before
        if isinstance(interrupt, Interrupted) and interrupt.is_done:
            told = f"{config.output_dir / FINAL_MODEL} is done" + ("" if is_last else f"; go on with: {go_on} --resume")
        elif kept:
            told = f"{kept} is kept; go on with: {go_on} --resume"
        else:
            anew = f"{go_on}{' --overwrite' * holds_steps(config.output_dir)}"
            told = f"nothing is kept, as {config.output_dir} holds no checkpoint yet; start anew with: {anew}"
        interrupt.args = (told,)
        raise


def command_of(words: Sequence[str]) -> str:
    """The command of these words, as a shell takes it, without what said how that one start began."""
    kept: list[str] = []
    is_left_out = False
    for word in words:
        if word.startswith("--"):
            flag = word[2:].partition("=")[0].replace("-", "_").removeprefix("grpo_")
            is_left_out = flag in HOW_A_START_BEGAN
        if not is_left_out:
            kept.append(word)
    start = ["looktwice"]
    if (here := launched()).size > 1:
        start = ["torchrun", "--nproc_per_node", str(here.local_size), "-m", "looktwice"]
    return shlex.join([*start, "train", *kept])


def train_configs(words: Sequence[str]) -> tuple[str, ModelConfig, DataConfig, SFTConfig, GRPOConfig]:
    """Stage and settings of a `train` command: defaults, then config files, then flags."""
    flags = train_parser().parse_strictly(words)
    stage = flags["stage"]
    refuse_idle_flags(stage, flags)
    values = {flag: given_values(flag, stage, flags) for flag in FILE_FLAGS}
    grpo_values = values["grpo_config"]
    if stage == "both" and "learning_rate" in flags and "learning_rate" not in grpo_values:
        grpo_values["learning_rate"] = GRPO_LEARNING_RATE_SHARE * number_of("learning_rate", flags["learning_rate"])
    if stage == "both" and str(values["sft_config"].get("resume_from_checkpoint")) == LATEST:
        grpo_values.setdefault("resume_from_checkpoint", LATEST)
    for name in SHARED:
        if (flag := f"grpo_{flag_of(GRPOConfig, name)}") in flags:
            grpo_values[name] = flags[flag]
    if flags["as_documented"]:
        values = {flag: {**defaults, **values[flag]} for flag, defaults in documented_defaults(stage, values).items()}
    model, data, sft, grpo = (config_class(**values[flag]) for flag, config_class in FILE_FLAGS.items())
    return stage, model, data, sft, grpo  # type: ignore[return-value]


def train_parser() -> Parser:
    parser = Parser(
        "looktwice train",
        usage="looktwice train [--stage STAGE] [options]",
        description=run.__doc__,
        allow_abbrev=False,
    )
    parser.add_argument("--stage", choices=["sft", "grpo", "both"], default="both", help="what to run (both)")
    parser.add_argument("--replay", metavar="RUN", type=place, help="pay the written rollouts of a run anew, and stop")
    parser.add_argument("--as_documented", action="store_true", help="the defaults of train_ovis25.py, see README.md")
    parser.add_argument("--config", metavar="FILE", help="settings of all classes, as plan writes them; others win")
    for flag, config_class in FILE_FLAGS.items():
        parser.add_argument(f"--{flag}", metavar="FILE", help=f"{config_class.__name__} as JSON or YAML; flags win")
    for config_class in FILE_FLAGS.values():
        own = [name for name in config_class.model_fields if config_class is not GRPOConfig or name not in SHARED]
        add_flags(parser, config_class, own)
    add_flags(parser, GRPOConfig, SHARED, prefix="grpo_", title="For stage 2 alone")
    return parser


def given_values(file_flag: str, stage: str, flags: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of one config class that the files and the flags give, the later ones winning."""
    config_class = FILE_FLAGS[file_flag]
    values: dict[str, Any] = {}
    for file in filter(None, (flags.get("config"), flags.get(file_flag))):
        values |= config_class.read(file)
    for name in config_class.model_fields:
        flag = flag_of(config_class, name)
        is_for_stage_1 = config_class is GRPOConfig and stage == "both" and name in STAGE_1_ONLY
        if flag in flags and not is_for_stage_1:
            values[name] = flags[flag]
    return values


def documented_defaults(stage: str, values: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The defaults of the documented scripts for what `values` leave open, by config file; those used are printed.

    The data paths belong together: none is taken beside training data of one's own. Raises ConfigError for one that is
    not there.
    """
    paths = {} if "train_data_path" in values["data_config"] else dict(DOCUMENTED_PATHS)
    shown: dict[str, object] = {}
    for name in sorted(paths.keys() - values["data_config"].keys(), key=list(paths).index):
        shown[flag_of(DataConfig, name)] = paths[name]
        if not paths[name].exists():
            flag = flag_of(DataConfig, name)
            raise ConfigError(f"{paths[name]}: not there, and it is the documented default of --{flag}; {PATHS_MEND}")
    for prefix, file_flag in {"sft": {"": "sft_config"}, "grpo": {"": "grpo_config"}}.get(stage, BOTH_STAGES).items():
        for name, size in DOCUMENTED_BATCH.items():
            flag = flag_of(SFTConfig, name)
            if name not in values[file_flag] and flag not in shown:
                shown[f"{prefix}{flag}"] = size
    if shown:
        print("documented defaults:", " ".join(f"--{flag} {value}" for flag, value in shown.items()))
    return {"model_config": {}, "data_config": paths, "sft_config": DOCUMENTED_BATCH, "grpo_config": DOCUMENTED_BATCH}


def refuse_idle_flags(stage: str, flags: Mapping[str, Any]) -> None:
    """Raise ConfigError for a flag that the stage to run would not read."""
    of_stage_2 = [flag_of(GRPOConfig, name) for name in GRPOConfig.model_fields if name not in SHARED]
    of_stage_2 += [f"grpo_{flag_of(GRPOConfig, name)}" for name in SHARED]
    idle = {
        "sft": dict.fromkeys(of_stage_2, "it belongs to stage 2"),
        "grpo": {"sft_output_dir": "it belongs to stage 1", "model_name": "stage 2 starts from --sft_checkpoint"},
        "both": {"sft_checkpoint": "stage 2 starts from the model of stage 1"},
    }[stage]
    for flag, reason in idle.items():
        if flag in flags:
            raise ConfigError(f"--{flag} does nothing with --stage {stage}: {reason}; leave it out")
    if flags["replay"]:
        if stage != "grpo":
            raise ConfigError("--replay pays rollouts of stage 2 anew; add --stage grpo")
        of_a_run = {flag_of(kind, name) for kind in FILE_FLAGS.values() for name in kind.model_fields}
        of_a_run |= {f"grpo_{flag_of(GRPOConfig, name)}" for name in SHARED}
        for flag in flags:
            if flag in of_a_run and flag not in REPLAYED:
                known = ", ".join(REPLAYED)
                raise ConfigError(f"--{flag} does nothing with --replay, which takes {known}; leave it out")


def number_of(flag: str, value: str) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise ConfigError(f"--{flag} is {value!r}; it must be a number") from error
