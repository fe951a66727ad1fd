"""Settings: what is refused and how it is named, files and flags, presets, and the list of flags itself."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import pytest

from looktwice import cli
from looktwice.cli.arguments import Parser, _kinds_of
from looktwice.cli.train import train_configs
from looktwice.config import (
    CheckConfig,
    Config,
    ConvertConfig,
    DataConfig,
    DemoConfig,
    EvalConfig,
    ExportConfig,
    GRPOConfig,
    InferenceConfig,
    ModelConfig,
    SFTConfig,
    ShowConfig,
    StatsConfig,
)
from looktwice.errors import ConfigError


def refusal(config_class: type[Config], **values: object) -> str:
    with pytest.raises(ConfigError) as caught:
        config_class(**values)
    return str(caught.value)


def write(path: Path, text: object) -> Path:
    path.write_text(text if isinstance(text, str) else json.dumps(text), encoding="utf-8")
    return path


# -- values


@pytest.mark.parametrize(
    ("config_class", "key", "hint"),
    [
        (SFTConfig, "learning_rat", "learning_rate"),
        (GRPOConfig, "num_generation", "num_generations"),
        (GRPOConfig, "sft_chekpoint", "sft_checkpoint"),
        (DataConfig, "train_date", "train_data"),
        (ModelConfig, "model_nam", "model_name"),
        (InferenceConfig, "max_tokens", "max_new_tokens"),
    ],
)
def test_an_unknown_key_names_the_nearest_one(config_class, key, hint) -> None:
    expected = f'unknown setting "{key}" of {config_class.__name__}. Did you mean "{hint}"?'
    assert refusal(config_class, **{key: 1}) == expected


def test_settings_that_contradict_each_other_are_refused() -> None:
    assert refusal(GRPOConfig, surrogate="cispo", epsilon=0.2).startswith("epsilon: cispo has no such bound")
    silent = {"alarms": "no_signal=off", "stop_on_alarm": "no_signal"}
    assert refusal(GRPOConfig, **silent).startswith("stop_on_alarm: no_signal is off in alarms")
    assert "one update older, so exact cannot hold" in refusal(GRPOConfig, one_step_off=True, exact=True)
    sharded = {"one_step_off": True, "distributed": "fsdp"}
    assert refusal(GRPOConfig, **sharded).startswith("one_step_off needs the whole model once more for sampling")
    assert GRPOConfig(**sharded, vllm_servers="http://a:1").one_step_off


@pytest.mark.parametrize("key", ["zzz", "deepseed", "cache", "reference"])
def test_a_key_like_no_other_is_refused_without_a_hint(key) -> None:
    assert refusal(SFTConfig, **{key: 1}) == f'unknown setting "{key}" of SFTConfig.'


def test_a_key_of_another_config_is_told_so() -> None:
    assert refusal(SFTConfig, model_name="tiny").endswith("It is a setting of ModelConfig.")
    assert refusal(DataConfig, num_generations=4).endswith("It is a setting of GRPOConfig.")


def test_a_key_of_another_trainer_is_told_what_does_it_here() -> None:
    assert refusal(SFTConfig, per_device_train_batch_size=4).endswith("Here it is batch_size.")
    assert refusal(SFTConfig, wandb_project="mine").endswith(
        "There is none here: metrics go to metrics.jsonl in the run folder and where --report_to says, a project by "
        "WANDB_PROJECT."
    )


CONFIGS = [ModelConfig, DataConfig, SFTConfig, GRPOConfig, InferenceConfig, EvalConfig, ConvertConfig, ExportConfig]
CONFIGS += [CheckConfig, ShowConfig, StatsConfig, DemoConfig]


def knobs_of(kind: type) -> list[tuple[type[Config], str]]:
    """The knobs that take this kind of value, by itself or beside others."""
    fields = [(config, name, field) for config in CONFIGS for name, field in config.model_fields.items()]
    return [(config, name) for config, name, field in fields if kind in _kinds_of(field.annotation)]


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, "inf", "Infinity", "nan", 10**400, "1e999", True])
def test_a_number_is_finite_and_no_truth(value) -> None:
    assert len(knobs_of(float)) > 15
    for config_class, name in knobs_of(float):
        assert refusal(config_class, **{name: value}).startswith(name)
    message = refusal(SFTConfig, part_learning_rates={"vit": value})
    assert message.startswith("part_learning_rates.vit is ")


@pytest.mark.parametrize(
    "value",
    [10**400, "9" * 5000, 10**5000, -(10**400), math.inf, math.nan, 1e300, True, False, "true", "1e3"],
    ids=lambda value: type(value).__name__,
)
def test_a_count_is_a_whole_number_that_fits(value) -> None:
    assert len(knobs_of(int)) > 40
    for config_class, name in knobs_of(int):
        message = refusal(config_class, **{name: value})
        assert message.startswith(name) and len(message) < 250


@pytest.mark.parametrize("value", [-1, 2**32, 2**63, 2**64, 1.5])
def test_a_seed_is_one_that_every_generator_takes(value) -> None:
    for config_class, name in knobs_of(int):
        if name == "seed":
            assert refusal(config_class, seed=value).startswith("seed is ")
    assert SFTConfig(seed=2**32 - 1).seed == 2**32 - 1


def test_the_home_of_the_user_is_known_wherever_a_path_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    assert len(knobs_of(Path)) > 10
    for config_class, name in knobs_of(Path):
        assert getattr(config_class(**{name: "~/x"}), name) == Path("/home/ada/x")
    assert (
        InferenceConfig(model_path=Path("~/m")).model_path == ModelConfig(model_name="~/m").model_name == "/home/ada/m"
    )
    assert GRPOConfig(reward=["paper", "~/r.py:score"]).reward == ("paper", "/home/ada/r.py:score")
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "sft.json", {"seed": 7})
    assert SFTConfig.read("~/sft.json") == {"seed": 7}


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"train_batch_size": "four"}, "train_batch_size (--batch_size) is 'four': input should be a valid integer"),
        ({"train_batch_size": 2.5}, "train_batch_size (--batch_size) is 2.5: input should be a valid integer"),
        ({"train_batch_size": 0}, "train_batch_size (--batch_size) is 0: input should be greater than or equal to 1"),
        ({"learning_rate": -1}, "learning_rate is -1: input should be greater than or equal to 0"),
        ({"learning_rate": math.nan}, "learning_rate is nan: input should be"),
        ({"learning_rate": None}, "learning_rate is None: input should be a valid number"),
        ({"warmup_ratio": 1.5}, "warmup_ratio is 1.5: input should be less than or equal to 1"),
        ({"bf16": "maybe"}, "bf16 is 'maybe': input should be a valid boolean"),
        ({"lr_scheduler_type": "linear"}, "lr_scheduler_type is 'linear': input should be 'cosine' or 'constant'"),
        ({"num_generations": 1}, "num_generations is 1: input should be greater than or equal to 2"),
        ({"temperature": 0}, "temperature is 0: input should be greater than 0"),
        ({"preset": "papr"}, "preset is 'papr': input should be 'robust', 'paper' or 'code'"),
        ({"preset": ["paper"]}, "preset is ['paper']: input should be"),
    ],
)
def test_a_wrong_value_is_named_with_what_it_takes(values, problem) -> None:
    assert refusal(GRPOConfig, **values).startswith(problem)


def test_parts_are_given_as_a_list_or_with_commas() -> None:
    assert SFTConfig(freeze="vit, embeddings").freeze == SFTConfig(freeze=["vit", "embeddings"]).freeze


def test_rates_of_parts_are_given_as_a_mapping_or_as_pairs() -> None:
    assert SFTConfig(part_learning_rates="vit=2e-6, llm=1e-5").part_learning_rates == {"vit": 2e-6, "llm": 1e-5}
    assert SFTConfig(part_learning_rates={"vit": 2e-6}).part_learning_rates == {"vit": 2e-6}


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"freeze": "vit,head"}, "freeze is 'head': input should be 'vit', 'visual_head', 'visual_table'"),
        ({"freeze": "vitt"}, "freeze is 'vitt': input should be 'vit', 'visual_head', 'visual_table', 'llm' or "),
        ({"part_learning_rates": "vit"}, "part_learning_rates is 'vit': write vit=NUMBER"),
        ({"part_learning_rates": "llm=1, vit: 1e-3"}, "part_learning_rates is 'llm=1, vit: 1e-3': write vit=1e-3"),
        ({"part_learning_rates": "vit="}, "part_learning_rates.vit is '': input should be a valid number"),
        ({"part_learning_rates": "tower=1"}, "part_learning_rates is 'tower': input should be 'vit'"),
        ({"part_learning_rates": "vit=-1"}, "part_learning_rates.vit is '-1': input should be greater than or equal"),
        ({"modules_to_save": "vit"}, "modules_to_save is 'vit': input should be 'visual_head' or 'visual_table'"),
    ],
)
def test_a_wrong_part_is_named(values, problem) -> None:
    assert refusal(SFTConfig, **values).startswith(problem)


@pytest.mark.parametrize(
    ("values", "near"),
    [
        ({"freeze": "vitt"}, "vit"),
        ({"preset": "papr"}, "paper"),
        ({"part_learning_rates": "visual_hed=1"}, "visual_head"),
    ],
)
def test_the_nearest_of_the_names_a_setting_takes_is_suggested(values, near) -> None:
    assert refusal(GRPOConfig, **values).endswith(f'. Did you mean "{near}"?')


@pytest.mark.parametrize("frozen", [{"freeze": "visual_table,llm"}, {"freeze_vision": True}])
def test_a_part_is_not_frozen_and_trained_whole(frozen) -> None:
    message = "modules_to_save: visual_table cannot be trained whole and frozen; leave one out"
    assert refusal(SFTConfig, modules_to_save="visual_table", **frozen) == message


def test_freezing_vision_is_short_for_its_three_parts() -> None:
    assert SFTConfig(freeze_vision=True, freeze="llm").frozen_parts == ("llm", "vit", "visual_head", "visual_table")


def test_all_problems_are_named_at_once() -> None:
    message = refusal(SFTConfig, seeed=1, lora_r=0, bf16="maybe")
    assert sorted(line.split()[0] for line in message.splitlines()) == ["bf16", "lora_r", "unknown"]


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        SFTConfig().seed = 1


@pytest.mark.parametrize(
    "config_class", [ModelConfig, DataConfig, SFTConfig, GRPOConfig, InferenceConfig, ExportConfig]
)
def test_every_knob_has_a_help_of_one_line(config_class) -> None:
    for name, field in config_class.model_fields.items():
        assert field.description and "\n" not in field.description and len(field.description) < 80, name


# -- presets


def test_each_preset_sets_what_it_stands_for() -> None:
    changed = ("reward", "drop_constant_groups", "loss_aggregation", "mask_truncated_completions", "num_generations")
    seen = {
        preset: tuple(getattr(GRPOConfig(preset=preset), name) for name in changed)
        for preset in ("robust", "paper", "code")
    }
    assert seen == {
        "robust": (("robust",), True, "token_mean", True, 8),
        "paper": (("paper",), False, "seq_mean_token_mean", True, 8),
        "code": (("code",), False, "seq_mean_token_mean", False, 5),
    }
    assert (GRPOConfig(preset="code").max_turns, GRPOConfig().max_turns) == (8, 6)


def test_an_explicit_knob_wins_over_the_preset() -> None:
    config = GRPOConfig(preset="code", num_generations=3, reward="robust")
    assert (config.num_generations, config.reward, config.loss_aggregation) == (3, ("robust",), "seq_mean_token_mean")


def test_a_flag_wins_over_the_preset_of_a_file(tmp_path) -> None:
    path = write(tmp_path / "grpo.json", {"preset": "code", "max_turns": 2})
    *_, config = train_configs(["--grpo_config", str(path), "--num_generations", "6"])
    assert (config.num_generations, config.max_turns, config.reward) == (6, 2, ("code",))


# -- files


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("sft.json", '{"learning_rate": 1e-3, "num_train_epochs": 2, "bf16": true, "output_dir": "run"}'),
        ("sft.json", '\ufeff{"learning_rate": "1e-3", "num_epochs": 2, "bf16": true, "sft_output_dir": "run"}'),
        ("sft.yaml", "learning_rate: 1e-3\nnum_epochs: 2\nbf16: yes\noutput_dir: run\n"),
        ("sft.yml", "{learning_rate: 0.001, num_train_epochs: 2, bf16: true, sft_output_dir: run}"),
    ],
)
def test_json_and_yaml_files_take_field_and_flag_names(name, text, tmp_path) -> None:
    config = SFTConfig(**SFTConfig.read(write(tmp_path / name, text)))
    assert config == SFTConfig(learning_rate=1e-3, num_train_epochs=2, bf16=True, output_dir=Path("run"))


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("c.json", "", "cannot be read as a config file"),
        ("c.json", '{"seed": 1,}', "cannot be read as a config file"),
        ("c.json", "[1]", "a config file holds one object of settings, got list"),
        ("c.yaml", "", "a config file holds one object of settings, got NoneType"),
        ("c.yaml", "seed: [", "cannot be read as a config file"),
        ("c.yaml", "sed: 1", 'unknown setting "sed" of SFTConfig. Did you mean "seed"?'),
        ("c.yaml", "1: 2", 'unknown setting "1" of SFTConfig.'),
        ("c.json", '{"seed": "x"}', "seed is 'x': input should be a valid integer"),
        ("c.json", '{"seed": 1, "lora_r": 2, "seed": 3}', "cannot be read as a config file (seed stands twice"),
        ("c.yaml", "seed: 1\nlora_r: 2\nseed: 3", "cannot be read as a config file (seed stands twice"),
        ("c.yaml", "part_learning_rates: {vit: 1, vit: 2}", "cannot be read as a config file (vit stands twice"),
        ("c.JSON", '{"num_epochs": 1, "num_train_epochs": 2}', "num_epochs and num_train_epochs are two names of one"),
        ("c.yaml", "output_dir: a\nsft_output_dir: b", "sft_output_dir and output_dir are two names of one setting"),
        ("c.json", '{"num_epochs": Infinity}', "num_train_epochs (--num_epochs) is inf: input should be a finite"),
        ("c.yaml", "learning_rate: .nan", "learning_rate is nan: input should be a finite number"),
        ("c.yaml", "num_epochs: yes", "num_train_epochs (--num_epochs) is True: give a number"),
        ("c.json", "[" * 100_000, "cannot be read as a config file (maximum recursion depth"),
        ("c.yaml", "a: [b\nc: d", "cannot be read as a config file (while parsing a flow sequence in"),
        ("c.json", '{"seed": ' + "9" * 5000 + "}", "cannot be read as a config file (Exceeds the limit"),
    ],
)
def test_a_bad_file_is_named_with_its_problem(name, text, problem, tmp_path) -> None:
    path = write(tmp_path / name, text)
    with pytest.raises(ConfigError) as caught:
        SFTConfig.read(path)
    assert str(caught.value).startswith(f"{path}: {problem}") and len(str(caught.value).splitlines()) == 1


def test_a_missing_file_is_named(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"none\.json: cannot be read as a config file .*No such file"):
        SFTConfig.read(tmp_path / "none.json")


# -- flags


def test_flags_win_over_files_and_files_over_defaults(tmp_path) -> None:
    sft_file = write(tmp_path / "sft.json", {"learning_rate": 3e-5, "lora_r": 4})
    data_file = write(tmp_path / "data.yaml", "train_data: a.jsonl\nmax_pixels: 1000\n")
    files = ["--sft_config", str(sft_file), "--data_config", str(data_file)]
    _, _, data, sft, _ = train_configs([*files, "--lora_r", "8", "--train_data=b.jsonl"])
    assert (sft.learning_rate, sft.lora_r, sft.lora_alpha) == (3e-5, 8, 256)
    assert (data.train_data_path, data.max_pixels, data.min_pixels) == ((Path("b.jsonl"),), 1000, None)


def test_a_switch_is_turned_off_by_its_no_form(tmp_path) -> None:
    path = write(tmp_path / "sft.json", {"use_lora": True, "bf16": True})
    *_, sft, _ = train_configs(["--sft_config", str(path), "--no-bf16"])
    assert (sft.use_lora, sft.bf16) == (True, False)


@pytest.mark.parametrize(
    ("arguments", "sft_rate", "grpo_rate"),
    [
        ([], 2e-5, 5e-6),
        (["--learning_rate", "4e-5"], 4e-5, 1e-5),
        (["--stage", "both", "--learning_rate", "4e-5", "--grpo_learning_rate", "3e-6"], 4e-5, 3e-6),
        (["--grpo_learning_rate", "3e-6"], 2e-5, 3e-6),
        (["--stage", "grpo", "--learning_rate", "4e-6"], 4e-6, 4e-6),
    ],
)
def test_a_learning_rate_for_both_stages_is_a_quarter_in_the_second(arguments, sft_rate, grpo_rate) -> None:
    *_, sft, grpo = train_configs(arguments)
    assert (sft.learning_rate, grpo.learning_rate) == pytest.approx((sft_rate, grpo_rate))


def test_a_rate_in_the_file_of_stage_2_wins_over_the_quarter(tmp_path) -> None:
    path = write(tmp_path / "grpo.json", {"learning_rate": 7e-6})
    *_, grpo = train_configs(["--learning_rate", "4e-5", "--grpo_config", str(path)])
    assert grpo.learning_rate == 7e-6


def test_epochs_belong_to_the_first_of_both_stages_and_all_else_to_both() -> None:
    shared = ["--num_epochs", "5", "--max_steps", "9", "--batch_size", "2", "--use_lora", "--seed", "1"]
    *_, sft, grpo = train_configs(shared)
    assert (sft.num_train_epochs, sft.max_steps, sft.train_batch_size, sft.use_lora, sft.seed) == (5, 9, 2, True, 1)
    assert (grpo.num_train_epochs, grpo.max_steps) == (1, 9)
    assert (grpo.train_batch_size, grpo.use_lora, grpo.seed) == (2, True, 1)
    *_, grpo = train_configs(["--stage", "grpo", *shared])
    assert (grpo.num_train_epochs, grpo.max_steps) == (5, 9)


def test_a_flag_with_the_prefix_sets_stage_2_alone() -> None:
    *_, sft, grpo = train_configs(["--batch_size", "2", "--grpo_batch_size", "6", "--grpo_max_steps", "3"])
    assert (sft.train_batch_size, grpo.train_batch_size, sft.max_steps, grpo.max_steps) == (2, 6, None, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning_rte", "1"], 'unknown argument --learning_rte. Did you mean "--learning_rate"?'),
        (["--num_train_epochs=2"], "unknown argument --num_train_epochs. Here it is --num_epochs."),
        (["--learn", "1"], "unknown argument --learn."),
        (["--learning_rate", "fast"], "--learning_rate is 'fast'; it must be a number"),
        (["--train_data"], "argument --train_data: expected at least one argument; see looktwice train --help"),
        (["--stage", "rl"], "argument --stage: invalid choice: 'rl'"),
        (["--lora_r", "big"], "lora_r is 'big': input should be a valid integer"),
    ],
)
def test_a_bad_flag_is_named(arguments, message) -> None:
    with pytest.raises(ConfigError) as caught:
        train_configs(arguments)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("stage", "flag", "reason"),
    [
        ("sft", "beta", "it belongs to stage 2"),
        ("sft", "grpo_learning_rate", "it belongs to stage 2"),
        ("sft", "grpo_output_dir", "it belongs to stage 2"),
        ("sft", "sft_checkpoint", "it belongs to stage 2"),
        ("grpo", "sft_output_dir", "it belongs to stage 1"),
        ("grpo", "model_name", "stage 2 starts from --sft_checkpoint"),
        ("both", "sft_checkpoint", "stage 2 starts from the model of stage 1"),
    ],
)
def test_a_flag_that_the_stage_does_not_read_is_refused(stage, flag, reason) -> None:
    with pytest.raises(ConfigError) as caught:
        train_configs(["--stage", stage, f"--{flag}", "1"])
    assert str(caught.value) == f"--{flag} does nothing with --stage {stage}: {reason}; leave it out"


def test_files_for_a_stage_that_does_not_run_are_allowed(tmp_path) -> None:
    sft_file, grpo_file = write(tmp_path / "sft.json", {"seed": 1}), write(tmp_path / "grpo.json", {"beta": 0.1})
    for stage in ("sft", "grpo"):
        *_, sft, grpo = train_configs(
            ["--stage", stage, "--sft_config", str(sft_file), "--grpo_config", str(grpo_file)]
        )
        assert (sft.seed, grpo.beta) == (1, 0.1)


def test_the_flags_are_these(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new flag is a decision: it belongs in these lists, in the documentation, and to some user."""
    seen: dict[str, list[str]] = {}

    def note(parser: argparse.ArgumentParser, arguments: object) -> dict:
        flags = (flag for action in parser._actions for flag in action.option_strings)
        seen[parser.prog] = sorted(flag for flag in flags if not flag.startswith("--no-") and flag not in HELP)
        raise ConfigError("seen")

    monkeypatch.setattr(Parser, "parse_strictly", note)
    for command in (
        "train",
        "ask",
        "chat",
        "data check",
        "data show",
        "data stats",
        "data convert",
        "export",
        "plan",
        "doctor",
        "demo",
    ):
        cli.main(command.split())
    assert seen == {
        "looktwice train": TRAIN_FLAGS,
        "looktwice ask": ASK_FLAGS,
        "looktwice chat": CHAT_FLAGS,
        "looktwice data check": CHECK_FLAGS,
        "looktwice data show": SHOW_FLAGS,
        "looktwice data stats": STATS_FLAGS,
        "looktwice data convert": CONVERT_FLAGS,
        "looktwice export": EXPORT_FLAGS,
        "looktwice plan": PLAN_FLAGS,
        "looktwice doctor": DOCTOR_FLAGS,
        "looktwice demo": DEMO_FLAGS,
    }


HELP = ("-h", "--help")
CHECK_FLAGS = [
    "--answer_key",
    "--box_frame",
    "--crop_max_pixels",
    "--crop_min_pixels",
    "--decode",
    "--fix",
    "--from",
    "--image_base_path",
    "--json",
    "--length_policy",
    "--max_length",
    "--max_pixels",
    "--min_pixels",
    "--model",
    "--model_name",
    "--num_workers",
    "--overwrite",
    "--stage",
    "--val_data",
]
SHOW_FLAGS = [
    "--answer_key",
    "--box_frame",
    "--crop_max_pixels",
    "--crop_min_pixels",
    "--from",
    "--html",
    "--image_base_path",
    "--length_policy",
    "--max_length",
    "--max_pixels",
    "--min_pixels",
    "--model",
    "--model_name",
    "--num_samples",
    "--row",
    "--seed",
    "--stage",
    "-n",
]
STATS_FLAGS = [
    "--answer_key",
    "--batch_size",
    "--box_frame",
    "--crop_max_pixels",
    "--crop_min_pixels",
    "--from",
    "--html",
    "--image_base_path",
    "--max_length",
    "--max_pixels",
    "--max_tokens_per_row",
    "--min_pixels",
    "--model",
    "--model_name",
    "--sample",
    "--seed",
]
CONVERT_FLAGS = [
    "--allow_loss",
    "--answer_key",
    "--box_frame",
    "--from",
    "--image_base_path",
    "--overwrite",
    "--to",
]
TRAIN_FLAGS = [
    "--alarms",
    "--allow_changes",
    "--answer_key",
    "--as_documented",
    "--attn_implementation",
    "--batch_size",
    "--beta",
    "--bf16",
    "--box_frame",
    "--cache_tokens",
    "--config",
    "--crop_max_pixels",
    "--crop_min_pixels",
    "--data_config",
    "--delta",
    "--deterministic",
    "--device",
    "--distributed",
    "--drop_constant_groups",
    "--enable_thinking",
    "--entropy_coef",
    "--epsilon",
    "--epsilon_high",
    "--eval_steps",
    "--eval_tool_gain",
    "--exact",
    "--fp16",
    "--freeze",
    "--freeze_vision",
    "--from",
    "--gradient_accumulation_steps",
    "--gradient_checkpointing",
    "--grpo_allow_changes",
    "--grpo_batch_size",
    "--grpo_bf16",
    "--grpo_config",
    "--grpo_deterministic",
    "--grpo_distributed",
    "--grpo_eval_steps",
    "--grpo_fp16",
    "--grpo_freeze",
    "--grpo_freeze_vision",
    "--grpo_gradient_accumulation_steps",
    "--grpo_gradient_checkpointing",
    "--grpo_keep_best",
    "--grpo_learning_rate",
    "--grpo_logging_steps",
    "--grpo_lora_alpha",
    "--grpo_lora_dropout",
    "--grpo_lora_r",
    "--grpo_lora_targets",
    "--grpo_lr_scheduler_type",
    "--grpo_max_grad_norm",
    "--grpo_max_steps",
    "--grpo_max_tokens_per_row",
    "--grpo_memory_efficient",
    "--grpo_modules_to_save",
    "--grpo_num_epochs",
    "--grpo_offload_activations",
    "--grpo_optim",
    "--grpo_output_dir",
    "--grpo_overwrite",
    "--grpo_part_learning_rates",
    "--grpo_process_timeout",
    "--grpo_report_to",
    "--grpo_resume",
    "--grpo_resume_from_checkpoint",
    "--grpo_save_minutes",
    "--grpo_save_steps",
    "--grpo_save_total_limit",
    "--grpo_seed",
    "--grpo_skip_nonfinite",
    "--grpo_torch_compile",
    "--grpo_use_dora",
    "--grpo_use_lora",
    "--grpo_use_rslora",
    "--grpo_vision_cache",
    "--grpo_vision_cache_dir",
    "--grpo_warmup_ratio",
    "--grpo_weight_decay",
    "--image_base_path",
    "--importance_cap",
    "--importance_correction",
    "--judge_asked",
    "--judge_concurrency",
    "--judge_model",
    "--judge_url",
    "--keep_best",
    "--keep_trajectories",
    "--kl_estimator",
    "--learning_rate",
    "--length_policy",
    "--logging_steps",
    "--lora_alpha",
    "--lora_dropout",
    "--lora_r",
    "--lora_targets",
    "--loss_aggregation",
    "--lr_scheduler_type",
    "--mask_truncated_completions",
    "--max_grad_norm",
    "--max_length",
    "--max_new_tokens",
    "--max_pixels",
    "--max_steps",
    "--max_tokens_per_row",
    "--max_turn_tokens",
    "--max_turns",
    "--max_visual_tokens",
    "--memory_efficient",
    "--min_pixels",
    "--model_config",
    "--model_name",
    "--modules_to_save",
    "--num_epochs",
    "--num_generations",
    "--num_iterations",
    "--num_minibatches",
    "--num_workers",
    "--offload_activations",
    "--one_step_off",
    "--optim",
    "--overwrite",
    "--part_learning_rates",
    "--preset",
    "--process_timeout",
    "--quantization",
    "--refill_batches",
    "--replay",
    "--report_to",
    "--resume",
    "--resume_from_checkpoint",
    "--reward",
    "--reward_cache",
    "--reward_retries",
    "--reward_seconds",
    "--reward_terms",
    "--reward_weights",
    "--rollout_batch_size",
    "--rollout_page_steps",
    "--save_minutes",
    "--save_steps",
    "--save_total_limit",
    "--scale_rewards",
    "--seed",
    "--sft_checkpoint",
    "--sft_config",
    "--sft_output_dir",
    "--skip_nonfinite",
    "--stage",
    "--stop_on_alarm",
    "--surrogate",
    "--temperature",
    "--thinking_budget",
    "--top_k",
    "--top_p",
    "--torch_compile",
    "--train_data",
    "--train_weights",
    "--truncated_in_statistics",
    "--use_dora",
    "--use_lora",
    "--use_rslora",
    "--val_data",
    "--vision_cache",
    "--vision_cache_dir",
    "--vllm_servers",
    "--warmup_ratio",
    "--weight_decay",
]
ASK_FLAGS = [
    "--attn_implementation",
    "--batch",
    "--batch_size",
    "--bf16",
    "--crops",
    "--device",
    "--do_sample",
    "--enable_thinking",
    "--enable_thinking_budget",
    "--image_base_path",
    "--image_path",
    "--max_new_tokens",
    "--max_pixels",
    "--max_seconds",
    "--max_turn_tokens",
    "--max_turns",
    "--max_visual_tokens",
    "--min_p",
    "--model_path",
    "--num_frames",
    "--out",
    "--output_json",
    "--presence_penalty",
    "--quantization",
    "--question",
    "--repetition_penalty",
    "--save",
    "--seed",
    "--stop_texts",
    "--system",
    "--temperature",
    "--thinking",
    "--thinking_budget",
    "--top_k",
    "--top_p",
]
CHAT_FLAGS = sorted(
    {*ASK_FLAGS} - {"--batch", "--image_base_path", "--image_path", "--out", "--output_json", "--question", "--save"}
)
EXPORT_FLAGS = [
    "--device",
    "--dtype",
    "--max_shard_size",
    "--verify",
    "--verify_with",
    "--vllm_python",
]
PLAN_FLAGS = [
    "--gpu",
    "--json",
    "--max_pixels",
    "--max_tokens_per_row",
    "--out",
    "--rollout_batch_size",
    "--rollout_tokens",
    "--stage",
]
DOCTOR_FLAGS = ["--bf16", "--device", "--json", "--output_dir", "--parity", "--vllm"]
DEMO_FLAGS = [
    "--output_dir",
    "--overwrite",
    "--seed",
]


def test_help_says_what_a_flag_takes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for shown in (
        "--max_tokens_per_row N ",
        "--min_pixels N ",
        "several or none (tensorboard)",
        "--box_frame {original_px,resized_px,unit,norm1000} ",
        "--lr_scheduler_type {cosine,constant} ",
        "--part_learning_rates RATES ",
        "--image_base_path PATH ",
        "Of a flag that is given twice the last one holds.",
    ):
        assert shown in text


def test_training_data_are_one_file_or_several() -> None:
    one, several = DataConfig(train_data_path="a"), DataConfig(train_data_path=["a", "b"], train_weights="2,0.5")
    assert (one.train_data_path, several.train_data_path) == ((Path("a"),), (Path("a"), Path("b")))
    assert several.train_weights == (2.0, 0.5)
    with pytest.raises(ConfigError, match="train_weights: 1 weight for 2 files; give one each"):
        DataConfig(train_data_path=["a", "b"], train_weights=[1])


def test_several_files_follow_one_flag() -> None:
    _, _, data, _, _ = train_configs(["--train_data", "a", "b", "--train_weights", "2,1", "--stage", "sft"])
    assert (data.train_data_path, data.train_weights) == ((Path("a"), Path("b")), (2, 1))


@pytest.mark.parametrize(
    ("given", "towers"), [(True, "all"), ("True", "all"), (False, "none"), ("false", "none"), ("llm", "llm")]
)
def test_gradient_checkpointing_may_be_yes_or_no(given, towers) -> None:
    assert SFTConfig(gradient_checkpointing=given).gradient_checkpointing == towers
