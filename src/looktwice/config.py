"""Every knob of a run, one line each with its default, unit and help; config files and flags fill the same fields."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from looktwice.errors import ConfigError, counted, nearest, short
from looktwice.geometry import BoxFrame
from looktwice.other_trainers import called_here
from looktwice.paths import expanded


def no_truth(value: Any) -> Any:
    """The value of a number as it is; `true` is none, though Python counts it as 1."""
    if isinstance(value, bool):
        raise PydanticCustomError("truth", "give a number")
    return value


Whole = Annotated[int, BeforeValidator(no_truth), Field(le=10**12)]
"""No count of anything is larger, and products of two must fit into 64 bits where torch takes them."""
Number = Annotated[float, BeforeValidator(no_truth), Field(allow_inf_nan=False)]
Positive = Annotated[Whole, Field(ge=1)]
NonNegativeInt = Annotated[Whole, Field(ge=0)]
Seed = Annotated[Whole, Field(ge=0, lt=2**32)]
Weight = Annotated[Number, Field(gt=0, le=1000)]
Share = Annotated[Number, Field(ge=0, le=1)]
NonNegative = Annotated[Number, Field(ge=0)]
Epochs = Annotated[Number, Field(ge=0, le=10**6)]
Place = Annotated[Path, BeforeValidator(expanded)]
NameOrPath = Annotated[str, BeforeValidator(expanded)]
Part = Literal["vit", "visual_head", "visual_table", "llm", "embeddings"]
WholePart = Literal["visual_head", "visual_table"]
VISION_PARTS: tuple[Part, ...] = ("vit", "visual_head", "visual_table")
AttnImplementation = Literal["auto", "sdpa", "flash_attention_2", "flex_attention", "eager"]
Quantization = Literal["none", "nf4", "int8"]
Optimizer = Literal["adamw_torch_fused", "adamw_torch", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"]
DataFormat = Literal["messages", "documented", "openai", "swift", "ovis", "sharegpt", "vlm_r3"]
TrackerName = Literal["tensorboard", "wandb", "trackio"]
Stage = Literal["sft", "grpo", "both"]
SourceFormat = Literal["auto", DataFormat]
BenchName = Literal[
    "vstar",
    "hrbench4k",
    "hrbench8k",
    "mme_realworld",
    "mme_realworld_lite",
    "zoombench",
    "zoombench_crop",
    "treebench",
    "textvqa",
    "docvqa",
    "infographicvqa",
    "chartqa",
    "scienceqa",
    "mathvista",
    "mmvp",
    "cvbench",
    "refcoco",
    "refcoco_plus",
    "refcocog",
    "jsonl",
]
BENCHES: tuple[str, ...] = get_args(BenchName)
Control = Literal[
    "no_crop",
    "random_crop",
    "blank_crop",
    "gold_crop",
    "call_without_result",
    "result_without_call",
    "more_pixels",
    "question_only",
    "text_only",
]
"""What an evaluation puts in the crop's place; see evaluation/conditions.py."""
ALL_CONTROLS: tuple[Control, ...] = get_args(Control)
PresetName = Literal["none", "ovis2.5-2b", "ovis2.5-9b"]
LengthPolicy = Literal["error", "drop", "shrink_images"]
DEFAULT_MODEL = "AIDC-AI/Ovis2.5-9B"
LENGTH_POLICY_HELP = "what to do with a longer sample: stop, leave it out, or shrink its pictures"
ATTENTION_HELP = "attention of both towers; auto: flash-attn or varlen if it can run, else sdpa"
DEVICE_HELP = "torch device; auto: spread over all; default: cuda if there is one, else cpu"


LORA_KNOBS = {"r": "lora_r", "alpha": "lora_alpha", "dropout": "lora_dropout", "targets": "lora_targets"} | {
    name: name for name in ("use_dora", "use_rslora", "modules_to_save")
}
"""The arguments of `add_lora` and the settings they come from."""


def split_commas(value: Any) -> Any:
    """`a,b` as the list it stands for; a list stays as it is."""
    return [item.strip() for item in value.split(",") if item.strip()] if isinstance(value, str) else value


def no_none(value: Any) -> Any:
    """Names with commas as a list, and `none` as an empty one."""
    return () if value == "none" else split_commas(value)


def one_or_several(value: Any) -> Any:
    """A single path as a list of one; a list stays as it is."""
    return [value] if isinstance(value, (str, Path)) else value


def split_pairs(value: Any) -> Any:
    """`a=1,b=2` as the mapping it stands for; a mapping stays as it is."""
    if not isinstance(value, str):
        return value
    pairs = {}
    for item in split_commas(value):
        name, sign, number = (word.strip() for word in re.split("([=:]|$)", item, maxsplit=1))
        if sign != "=":
            raise PydanticCustomError("pairs", "write {pair}", {"pair": f"{name}={number or 'NUMBER'}"})
        pairs[name] = number
    return pairs


def all_controls(value: Any) -> Any:
    """`all` as all controls; names with commas as a list."""
    return ALL_CONTROLS if value == "all" else split_commas(value)


def split_folders(value: Any) -> Any:
    """`a=FOLDER,b=FOLDER` as the mapping it stands for; a mapping stays as it is."""
    if not isinstance(value, str):
        return value
    pairs = [item.partition("=") for item in split_commas(value)]
    for name, sign, folder in pairs:
        if not (name and sign and folder):
            raise PydanticCustomError("folders", "write NAME=FOLDER, several with commas")
    return unique([(name.strip(), folder.strip()) for name, _, folder in pairs])


def all_or_none(value: Any) -> Any:
    """True as `all` and false as `none`, as other trainers write it; other values stay."""
    return {"true": "all", "false": "none"}.get(str(value).lower(), value)


def number_of_bytes(size: str) -> int:
    """A size of `check_file_size` in bytes, 1 KB being 1,000."""
    return int(float(size[:-2]) * {"KB": 10**3, "MB": 10**6, "GB": 10**9}[size[-2:]])


def check_file_size(value: str) -> str:
    """A size such as 500MB, as it is."""
    if not re.fullmatch(r"(?=.*[1-9])\d+(\.\d+)?(KB|MB|GB)", value):
        raise PydanticCustomError("file_size", "give a whole or decimal number of KB, MB or GB, such as 500MB or 5GB")
    return value


def knob(default: Any, help: str, *, flag: str | None = None, bare: str | None = None, several: bool = False) -> Any:
    """A field with its help; `flag` is its name on the command line when that is not the field's own.

    `bare` is the value of a flag that is given without one; the field's own name is then a flag too.
    `several` says that a flag takes several words.
    """
    given = (("flag", flag), ("bare", bare), ("several", several))
    extra: dict[str, Any] = {name: value for name, value in given if value}
    return Field(default, description=help, json_schema_extra=extra or None)


def unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """The object of these names and values. Raises ValueError for a name that stands twice: one would be lost."""
    values: dict[Any, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"{short(str(name))} stands twice; leave one out")
        values[name] = value
    return values


class UniqueKeys(yaml.SafeLoader):
    """Plain YAML in which no name stands twice in one object."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        unique([(key.value, None) for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
        return super().construct_mapping(node, deep)


RUN_CLASSES = ("ModelConfig", "DataConfig", "SFTConfig", "GRPOConfig")
"""What a file may hold the settings of, each under its name."""


class Config(BaseModel):
    """Base of all configs: frozen, and an unknown key is an error that names the nearest one."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    def __init__(self, **values: Any) -> None:
        """Validate values. Raises ConfigError naming each wrong field, what it got and what it takes."""
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(*(_explain(type(self), problem) for problem in error.errors())) from error

    @classmethod
    def read(cls, path: str | Path) -> dict[str, Any]:
        """Values of a JSON or YAML file, keys checked. Raises ConfigError with the file's name."""
        try:
            text = Path(expanded(path)).read_text(encoding="utf-8-sig")
            is_json = Path(path).suffix.lower() == ".json"
            values = json.loads(text, object_pairs_hook=unique) if is_json else yaml.load(text, UniqueKeys)
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise ConfigError(f"{path}: cannot be read as a config file ({' '.join(str(error).split())})") from error
        if isinstance(values, dict) and any(isinstance(values.get(name), dict) for name in RUN_CLASSES):
            values = values.get(cls.__name__, {})  # the file of a run or of a plan, with the settings of all classes
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: a config file holds one object of settings, got {type(values).__name__}")
        fields = {flag_of(cls, name): name for name in cls.model_fields}
        names = {str(key): fields.get(str(key), str(key)) for key in values}
        for key, name in names.items():
            if key != name and name in names:
                raise ConfigError(f"{path}: {key} and {name} are two names of one setting; leave one out")
        values = {names[str(key)]: value for key, value in values.items()}
        try:
            cls(**values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error.args[0]}", *error.args[1:]) from error
        return values


class ModelConfig(Config):
    """Which model, and how it computes."""

    model_name: NameOrPath = knob(DEFAULT_MODEL, "model folder or hub name; `tiny` is the built-in small model")
    attn_implementation: AttnImplementation = knob("auto", ATTENTION_HELP)
    quantization: Quantization = knob("none", "4 bits (nf4) or 8 for the language model; trains LoRA alone")
    device: str | None = knob(None, DEVICE_HELP)


class SampleConfig(Config):
    """How samples are read, and how pictures are sized. Pixel bounds left out come from the checkpoint."""

    source_format: SourceFormat = knob("auto", "format of the data files; auto: by their first rows", flag="from")
    image_base_path: Place = knob(Path("."), "folder that the paths of pictures are relative to")
    answer_key: str | None = knob(None, "field of a question that holds its answer (documented format); default: A3, A")
    min_pixels: Positive | None = knob(None, "fewest pixels of a resized picture")
    max_pixels: Positive | None = knob(None, "most pixels of a resized picture")
    crop_min_pixels: Positive | None = knob(None, "fewest pixels of a resized crop")
    crop_max_pixels: Positive | None = knob(None, "most pixels of a resized crop")
    box_frame: BoxFrame | None = knob(None, "frame of the boxes in calls; default: the checkpoint's (original_px)")
    max_length: Positive = knob(16384, "tokens of one sample, or of a prompt in stage 2")

    @model_validator(mode="after")
    def _check_pixels(self) -> SampleConfig:
        for low, high in (("min_pixels", "max_pixels"), ("crop_min_pixels", "crop_max_pixels")):
            fewest, most = getattr(self, low), getattr(self, high)
            if fewest and most and fewest > most:
                raise ValueError(f"{low} {fewest} is more than {high} {most}; swap them")
        return self

    @property
    def pixel_bounds(self) -> dict[str, int | None]:
        """The bounds as PixelPolicy.override takes them."""
        return {
            "image_min_pixels": self.min_pixels,
            "image_max_pixels": self.max_pixels,
            "crop_min_pixels": self.crop_min_pixels,
            "crop_max_pixels": self.crop_max_pixels,
        }


class DataConfig(SampleConfig):
    """Which data, and how pictures are sized. Pixel bounds left out come from the checkpoint."""

    train_data_path: Annotated[tuple[Place, ...], BeforeValidator(one_or_several)] = knob(
        (), "training data, one file or several: JSONL, JSON or Parquet", flag="train_data", several=True
    )
    train_weights: Annotated[tuple[Weight, ...], BeforeValidator(split_commas)] = knob(
        (), "passes over each file in an epoch, such as 2,0.5; default: one over each"
    )
    val_data_path: Place | None = knob(None, "validation data: loss (stage 1), accuracy (stage 2)", flag="val_data")
    length_policy: LengthPolicy = knob("error", LENGTH_POLICY_HELP)

    @model_validator(mode="after")
    def _check_weights(self) -> DataConfig:
        files, weights = len(self.train_data_path), len(self.train_weights)
        if weights and weights != files:
            raise ValueError(f"train_weights: {counted(weights, 'weight')} for {counted(files, 'file')}; give one each")
        return self


class CheckConfig(SampleConfig):
    """Judging data files before training."""

    val_data_path: Place | None = knob(None, "validation data, judged too and against the files", flag="val_data")
    length_policy: LengthPolicy = knob("error", LENGTH_POLICY_HELP)
    model_name: NameOrPath | None = knob(None, "model folder or hub name, for token lengths; `tiny` is the small model")
    stage: Stage = knob("sft", "what the files are for")
    num_workers: NonNegativeInt | None = knob(
        None, "processes that examine rows; default: one a core for 50,000 rows and more, else 0"
    )
    decode: bool = knob(False, "decode every picture to its end; default: headers and end marks alone")
    overwrite: bool = knob(False, "replace the file that --fix OUT names")


class ShowConfig(SampleConfig):
    """Showing samples as the model will see them."""

    length_policy: LengthPolicy = knob("error", LENGTH_POLICY_HELP)
    model_name: NameOrPath = knob(
        DEFAULT_MODEL, "model folder or hub name whose tokens and pixels are shown, or `tiny`"
    )
    stage: Literal["sft", "grpo"] = knob("sft", "sft: the sequence that is trained; grpo: the prompt of rollouts")
    num_samples: Positive = knob(3, "samples shown, from the first row on")
    row: Positive | None = knob(None, "show the samples of this row: the number behind the file in messages")
    seed: Seed | None = knob(None, "show rows picked at random by this seed")

    @model_validator(mode="after")
    def _check_choice(self) -> ShowConfig:
        if self.row is not None and self.seed is not None:
            raise ValueError("--row names a row and --seed picks at random; give one of them")
        return self


class StatsConfig(SampleConfig):
    """Measuring data files."""

    model_name: NameOrPath = knob(
        DEFAULT_MODEL, "model folder or hub name whose tokens and pixels are counted, or `tiny`"
    )
    num_rows: Positive | None = knob(None, "measure so many rows of each file, picked at random", flag="sample")
    train_batch_size: Positive = knob(4, "samples of a padded batch that packing is compared with", flag="batch_size")
    max_tokens_per_row: Positive = knob(16384, "tokens of one packed forward")
    seed: Seed = knob(42, "seed of what is picked and of the order in which samples are packed")


class PlanConfig(Config):
    """What a run is to fit, and what its steps have to bear. Measured are steps of these sizes, and longer ones."""

    gpu: Annotated[str, AfterValidator(check_file_size)] | None = knob(
        None, "memory of a GPU, such as 24GB: settings that fit are proposed"
    )
    stage: Stage = knob("both", "what is proposed for")
    max_tokens_per_row: Annotated[Whole, Field(ge=64)] = knob(2048, "fewest tokens of a row")
    max_pixels: Positive | None = knob(None, "pixels of each picture; default: the most that the model is shown")
    rollout_batch_size: Annotated[Whole, Field(ge=2)] = knob(16, "rollouts that advance together")
    rollout_tokens: Annotated[Whole, Field(ge=64)] = knob(3072, "tokens of a rollout with its prompt and pictures")


class DoctorConfig(Config):
    """What is looked at. Without --parity it is this machine alone."""

    parity: NameOrPath | None = knob(None, "compare all ways to compute with this model, or `tiny`")
    vllm: Annotated[tuple[str, ...], BeforeValidator(split_commas)] = knob(
        (), "addresses of vLLM servers that have this model, compared too"
    )
    device: str | None = knob(None, DEVICE_HELP)
    bf16: bool = knob(False, "compare in bfloat16")
    output_dir: Place = knob(Path("outputs"), "where runs would write")

    @model_validator(mode="after")
    def _check_parity(self) -> DoctorConfig:
        idle = [name for name in ("vllm", "device", "bf16") if name in self.model_fields_set]
        if idle and self.parity is None:
            raise ValueError(f"{', '.join(idle)}: nothing is computed without --parity MODEL; add it, or leave it out")
        return self


class StageConfig(Config):
    """What both stages share. A step is `train_batch_size` x `gradient_accumulation_steps` samples or prompts."""

    output_dir: Place = knob(Path("outputs"), "run folder")
    num_train_epochs: Epochs = knob(1.0, "passes over the training data", flag="num_epochs")
    max_steps: Positive | None = knob(None, "stop after this many optimizer steps, whatever the epochs")
    train_batch_size: Positive = knob(4, "samples (SFT) or prompts (R-GRPO) of one batch", flag="batch_size")
    gradient_accumulation_steps: Positive = knob(1, "batches per optimizer step")
    learning_rate: NonNegative = knob(2e-5, "peak learning rate")
    warmup_ratio: Share = knob(0.1, "share of the steps over which the learning rate rises")
    lr_scheduler_type: Literal["cosine", "constant"] = knob("cosine", "learning rate after the warm-up")
    weight_decay: NonNegative = knob(0.0, "AdamW weight decay of matrices")
    max_grad_norm: NonNegative = knob(1.0, "gradients are scaled down to this norm")
    skip_nonfinite: NonNegativeInt = knob(0, "updates in a row left out where loss or gradient is no number")
    optim: Optimizer = knob("adamw_torch_fused", "AdamW; 8bit and paged ones take less memory (bitsandbytes)")
    bf16: bool = knob(False, "compute in bfloat16")
    fp16: bool = knob(False, "compute in float16, the loss scaled; for GPUs without bfloat16")
    torch_compile: bool = knob(False, "compile the layers of the language model; slow to start")
    part_learning_rates: Annotated[dict[Part, NonNegative], BeforeValidator(split_pairs)] = knob(
        {}, "peak learning rates of single parts, such as vit=2e-6,visual_table=1e-4"
    )
    freeze: Annotated[tuple[Part, ...], BeforeValidator(split_commas)] = knob(
        (), "parts not trained, of vit,visual_head,visual_table,llm,embeddings"
    )
    freeze_vision: bool = knob(False, "short for --freeze vit,visual_head,visual_table")
    use_lora: bool = knob(False, "train LoRA adapters instead of all weights")
    lora_r: Positive = knob(128, "LoRA rank")
    lora_alpha: Positive = knob(256, "LoRA scale: updates count alpha / r")
    lora_dropout: Share = knob(0.0, "dropout before LoRA")
    lora_targets: str = knob("llm", "llm, llm+vit, all-linear-llm, or a regular expression of full names")
    use_dora: bool = knob(False, "DoRA: magnitude and direction apart")
    use_rslora: bool = knob(False, "rsLoRA: updates count alpha / sqrt(r)")
    modules_to_save: Annotated[tuple[WholePart, ...], BeforeValidator(split_commas)] = knob(
        (), "parts trained whole beside LoRA: visual_head, visual_table"
    )
    gradient_checkpointing: Annotated[Literal["auto", "none", "llm", "vit", "all"], BeforeValidator(all_or_none)] = (
        knob("auto", "layers recomputed in backward; auto: all on a GPU, none on a CPU")
    )
    offload_activations: bool = knob(False, "keep activations in host memory, for long rows; slower")
    vision_cache: Annotated[str, AfterValidator(check_file_size)] | None = knob(
        None, "keep what the frozen tower makes of pictures, up to 8GB or so; default: off"
    )
    vision_cache_dir: Place | None = knob(None, "folder to keep it in, for later runs too; default: in memory")
    memory_efficient: bool = knob(False, "all layers recomputed, one sample a row: slower, same result")
    max_tokens_per_row: Positive | None = knob(None, "tokens of one packed forward; default: by the memory at hand")
    logging_steps: Positive = knob(1, "steps between log lines; the first and the last have one always")
    eval_steps: Positive | None = knob(None, "steps between evaluations; default: at each epoch's end")
    save_steps: Positive | None = knob(None, "steps between checkpoints; default: at each epoch's end")
    save_minutes: Annotated[Number, Field(gt=0)] | None = knob(30.0, "minutes after which a checkpoint is due too")
    save_total_limit: NonNegativeInt = knob(3, "newest checkpoints kept; 0: none is written")
    keep_best: bool = knob(True, "save and keep the checkpoint of the best evaluation, however old")
    resume_from_checkpoint: Place | None = knob(
        None, "checkpoint-N or run folder to go on from; alone: this run's last", flag="resume", bare="latest"
    )
    allow_changes: bool = knob(False, "go on from a checkpoint of other data, batches or steps")
    overwrite: bool = knob(False, "remove the run that the run folder holds")
    seed: Seed = knob(42, "seed of order, sampling and new weights")
    report_to: Annotated[tuple[TrackerName, ...], BeforeValidator(no_none)] = knob(
        ("tensorboard",), "where metrics are shown: tensorboard,wandb,trackio, several or none"
    )
    deterministic: bool = knob(False, "same bits in each run on one machine; costs time on a GPU")
    distributed: Literal["ddp", "fsdp"] = knob("ddp", "each process of torchrun has the whole model, or a share (fsdp)")
    process_timeout: Annotated[Number, Field(gt=0)] = knob(600.0, "seconds to wait for a process that is late")

    @property
    def frozen_parts(self) -> tuple[Part, ...]:
        """`freeze`, with the three parts of `freeze_vision`."""
        return (*self.freeze, *(VISION_PARTS if self.freeze_vision else ()))

    @model_validator(mode="after")
    def _check_whole_parts(self) -> StageConfig:
        if both := [part for part in self.modules_to_save if part in self.frozen_parts]:
            raise ValueError(f"modules_to_save: {', '.join(both)} cannot be trained whole and frozen; leave one out")
        return self

    @model_validator(mode="after")
    def _check_precision(self) -> StageConfig:
        if self.bf16 and self.fp16:
            raise ValueError("bf16 and fp16 are two precisions; leave one out")
        return self

    @model_validator(mode="after")
    def _check_steps(self) -> StageConfig:
        if self.num_train_epochs == 0 and self.max_steps is None:
            raise ValueError("num_epochs is 0, so nothing would be trained; give more, or --max_steps")
        return self


class SFTConfig(StageConfig):
    """Stage 1: supervised fine-tuning."""

    output_dir: Place = knob(Path("outputs/sft"), "run folder", flag="sft_output_dir")
    num_workers: NonNegativeInt | None = knob(None, "processes preparing samples; default: up to 4 on a GPU, else 0")
    num_train_epochs: Epochs = knob(3.0, "passes over the training data", flag="num_epochs")


REWARDS = ("robust", "paper", "code", "accuracy")
TermName = Literal["curiosity", "redundancy", "necessity", "dual_iou", "overlong", "repetition", "misformat"]
"""Further terms of a reward, see `rewarding/terms.py`."""
AlarmName = Literal[
    "no_signal",
    "no_crops",
    "whole_picture",
    "blind_reward",
    "format_without_accuracy",
    "length_drift",
    "entropy_collapse",
    "engine_gap",
    "kl_runaway",
    "failing_rewards",
]


def check_reward(spec: str) -> None:
    """Raise ConfigError unless a reward is one of REWARDS or `path.py:function` of a file that is there."""
    path, separator, _ = spec.rpartition(":")
    if spec not in REWARDS and not separator:
        known = ", ".join(REWARDS)
        raise ConfigError(f'reward is "{spec}"; give one of {known}, or path.py:function.{nearest(spec, REWARDS)}')
    if separator and not Path(path).is_file():
        raise ConfigError(f"reward file {path} does not exist; give path.py:function, relative to {Path.cwd()}")


def check_rewards(config: GRPOConfig) -> None:
    """Raise ConfigError unless each reward is one of REWARDS or a function in a file that is there."""
    for spec in config.reward:
        check_reward(spec)


class GRPOConfig(StageConfig):
    """Stage 2: R-GRPO. `preset` fixes rewards and the algorithm's choices; a knob given here wins over it."""

    output_dir: Place = knob(Path("outputs/grpo"), "run folder", flag="grpo_output_dir")
    sft_checkpoint_path: Place = knob(
        Path("outputs/sft/final_model"), "policy to start from and KL reference", flag="sft_checkpoint"
    )
    learning_rate: NonNegative = knob(5e-6, "peak learning rate")
    lr_scheduler_type: Literal["cosine", "constant"] = knob("constant", "learning rate after the warm-up")
    preset: Literal["robust", "paper", "code"] = knob("robust", "ours, the paper's choices, or its released code's")
    reward: Annotated[tuple[NameOrPath, ...], BeforeValidator(one_or_several), Field(min_length=1)] = knob(
        ("robust",), "robust, paper, code, accuracy or path.py:function; one or several", several=True
    )
    reward_weights: Annotated[tuple[Number, ...], BeforeValidator(one_or_several)] = knob(
        (), "weights of several rewards, in their order; default: 1 each", several=True
    )
    reward_terms: Annotated[dict[TermName, Number], BeforeValidator(split_pairs)] = knob(
        {}, "weights of further terms, such as curiosity=0.5,dual_iou=1, see docs/method.md"
    )
    reward_seconds: Annotated[Number, Field(gt=0)] = knob(
        60.0, "what a reward function or judge may take for one rollout"
    )
    reward_retries: NonNegativeInt = knob(0, "times that a failed reward function or judge is asked again")
    reward_cache: NameOrPath | None = knob(None, "memory, or a file: what was paid for the same text and calls")
    judge_url: str | None = knob(None, "OpenAI-compatible server of a judge, such as http://host:8000/v1")
    judge_model: str | None = knob(None, "name of the judge's model there; needs --judge_url")
    judge_asked: Literal["undecided", "always"] = knob(
        "undecided", "judge what the rules cannot decide, or every answer"
    )
    judge_concurrency: Positive = knob(8, "questions to the judge at a time")
    num_generations: Annotated[Whole, Field(ge=2)] = knob(8, "rollouts per prompt; advantages are centred within them")
    num_iterations: Positive = knob(1, "updates per batch of rollouts")
    beta: NonNegative = knob(0.0, "weight of the KL to the starting policy; 0 loads no reference")
    epsilon: NonNegative | None = knob(None, "lower clip bound; default: 0.2 (ppo), 0.0003 (gspo), none (cispo)")
    epsilon_high: NonNegative | None = knob(None, "upper clip bound; default: 0.28 (ppo), 0.0004 (gspo), 5 (cispo)")
    surrogate: Literal["ppo", "gspo", "gspo_token", "cispo", "sapo", "reinforce"] = knob(
        "ppo", "how the ratio to the policy that sampled enters, see docs/method.md"
    )
    delta: Annotated[Number, Field(gt=1)] | None = knob(
        None, "ppo: most a ratio counts for a worse rollout; 3 is usual"
    )
    scale_rewards: Literal["std", "batch", "none", "leave_one_out", "per_term"] = knob(
        "std", "what centred rewards are divided by; per_term: each term by its own std"
    )
    loss_aggregation: Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "constant"] = knob(
        "token_mean", "how token losses are averaged; constant: by --max_new_tokens"
    )
    kl_estimator: Literal["k1", "k2", "k3"] = knob("k3", "how the KL to the starting policy is estimated")
    entropy_coef: NonNegative = knob(0.0, "weight of the policy's entropy, which the loss then raises")
    importance_correction: Literal["auto", "none", "truncate", "mask"] = knob(
        "auto", "weights where another distribution drew; auto: truncate there"
    )
    importance_cap: Annotated[Number, Field(gt=1)] = knob(2.0, "largest such weight; mask: and 1/cap the smallest")
    num_minibatches: Positive = knob(1, "optimizer steps that a batch of rollouts is shared out to")
    refill_batches: NonNegativeInt = knob(0, "batches of more prompts at most, in place of groups without signal")
    truncated_in_statistics: bool = knob(True, "rollouts cut by a limit count in their group's mean and std")
    drop_constant_groups: bool = knob(True, "leave out groups whose rollouts are all right or all wrong")
    mask_truncated_completions: bool = knob(True, "no loss on rollouts cut by a limit")
    temperature: Annotated[Number, Field(gt=0)] = knob(1.0, "sampling temperature of rollouts")
    top_p: Annotated[Number, Field(gt=0, le=1)] = knob(1.0, "sample from the smallest set of this probability")
    top_k: Annotated[Whole, Field(ge=0)] = knob(0, "sample from this many ids; 0 is off")
    max_new_tokens: Positive = knob(2048, "sampled tokens of a rollout")
    max_turns: Positive = knob(6, "completions of a rollout, the answer included")
    max_turn_tokens: Positive | None = knob(None, "sampled tokens of a completion")
    max_visual_tokens: Positive | None = knob(None, "visual tokens of all crops of a rollout")
    enable_thinking: bool = knob(True, "let rollouts think before they answer")
    thinking_budget: Positive | None = knob(None, "tokens of thinking before it is closed")
    rollout_batch_size: Positive = knob(16, "rollouts that advance together; more is faster and takes more memory")
    cache_tokens: Positive | None = knob(None, "tokens that rollouts hold in the cache; default: by the memory")
    vllm_servers: Annotated[tuple[str, ...], BeforeValidator(split_commas)] = knob(
        (), "addresses of vLLM servers that sample instead, see docs/vllm.md"
    )
    keep_trajectories: NonNegativeInt = knob(200, "steps whose rollouts stay in the run folder; 0: none is written")
    rollout_page_steps: NonNegativeInt = knob(50, "steps between pages of rollouts, first and last too; 0: none")
    eval_tool_gain: bool = knob(True, "evaluate without the crop tool too: what it gains, what it spoils")
    alarms: Annotated[dict[AlarmName, NonNegative | Literal["off"]], BeforeValidator(split_pairs)] = knob(
        {}, "thresholds of alarms, such as no_signal=5,length_drift=off, see docs/method.md"
    )
    stop_on_alarm: Annotated[tuple[AlarmName | Literal["all"], ...], BeforeValidator(split_commas)] = knob(
        (), "alarms that end the run, by name with commas, or all"
    )
    one_step_off: bool = knob(False, "make the next rollouts during the update, from the weights before it")
    exact: bool = knob(False, "logprobs of rollouts and training alike to the last bit; costs time")

    @model_validator(mode="after")
    def _check_alarms(self) -> GRPOConfig:
        if silent := [name for name in self.stop_on_alarm if name != "all" and self.alarms.get(name) == "off"]:
            raise ValueError(f"stop_on_alarm: {silent[0]} is off in alarms; give it a threshold, or leave it out here")
        return self

    @model_validator(mode="after")
    def _check_rewards(self) -> GRPOConfig:
        weights, rewards = self.reward_weights, self.reward
        if weights and len(weights) != len(rewards):
            raise ValueError(
                f"reward_weights: {counted(len(weights), 'weight')} for {counted(len(rewards), 'reward')}; give each"
            )
        if 0 in (*weights, *self.reward_terms.values()):
            raise ValueError("reward_weights, reward_terms: a weight of 0 pays nothing; leave that reward or term out")
        if (self.judge_url is None) != (self.judge_model is None):
            raise ValueError("judge_url, judge_model: a judge needs both, where it is and which model it is")
        if self.judge_url is not None:
            if not re.match(r"https?://\w", self.judge_url):
                raise ValueError(
                    f'judge_url: "{short(self.judge_url)}" is no address; begin it with http:// or https://'
                )
            if not set(rewards) & set(REWARDS):
                raise ValueError(f"judge_url: only {', '.join(REWARDS)} ask a judge; give one of them, or leave it out")
        return self

    @model_validator(mode="after")
    def _check_bounds(self) -> GRPOConfig:
        bounds = {"cispo": ("epsilon_high",), "sapo": (), "reinforce": ()}.get(
            self.surrogate, ("epsilon", "epsilon_high")
        )
        for name in ("epsilon", "epsilon_high"):
            if getattr(self, name) is not None and name not in bounds:
                raise ValueError(
                    f"{name}: {self.surrogate} has no such bound; leave it out or choose another surrogate"
                )
        if self.delta is not None and self.surrogate != "ppo":
            raise ValueError(f"delta: a bound of ppo, which {self.surrogate} has not; leave one of the two out")
        if self.refill_batches and not self.drop_constant_groups:
            raise ValueError(
                "refill_batches: with drop_constant_groups off no group is replaced; leave one of them out"
            )
        if self.vllm_servers and self.exact:
            raise ValueError("vllm_servers: vLLM has other kernels, so exact cannot hold; leave one of the two out")
        if self.one_step_off and self.exact:
            raise ValueError(
                "one_step_off: rollouts are one update older, so exact cannot hold; leave one of the two out"
            )
        if self.one_step_off and self.distributed == "fsdp" and not self.vllm_servers:
            raise ValueError(
                "one_step_off needs the whole model once more for sampling, which fsdp is to avoid; sample with "
                "--vllm_servers, or leave one of the two out"
            )
        if self.vllm_servers and (self.top_p < 1 or self.top_k > 0):
            raise ValueError(
                "vllm_servers: vLLM does not tell the plain logprobs that training needs under top_p or top_k; leave "
                "those out"
            )
        return self

    @property
    def correction(self) -> Literal["none", "truncate", "mask"]:
        """How tokens are weighted that another distribution drew than the trainer computes."""
        if self.importance_correction != "auto":
            return self.importance_correction
        is_other = bool(self.vllm_servers) or self.top_p < 1 or self.top_k > 0
        return "truncate" if is_other else "none"

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, values: Any) -> Any:
        return {**GRPO_PRESETS.get(str(values.get("preset")), {}), **values} if isinstance(values, dict) else values


GRPO_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"reward": "paper", "drop_constant_groups": False, "loss_aggregation": "seq_mean_token_mean"},
    "code": {
        "reward": "code",
        "drop_constant_groups": False,
        "loss_aggregation": "seq_mean_token_mean",
        "mask_truncated_completions": False,
        "num_generations": 5,
        "max_turns": 8,
    },
}
"""What `--preset` changes besides the defaults above (VLM-R3, arXiv 2505.16192, and its released trainer)."""


class AnswerConfig(Config):
    """How an answer is generated; `OvisInference.generate` takes these for one call too."""

    max_new_tokens: Positive = knob(3072, "sampled tokens of an answer")
    do_sample: bool | None = knob(None, "sample; off is greedy; default: sample where the temperature is above 0")
    temperature: NonNegative = knob(0.0, "0 is greedy; with do_sample alone it is 1")
    top_p: Annotated[Number, Field(gt=0, le=1)] = knob(1.0, "sample from the smallest set of this probability")
    top_k: Annotated[Whole, Field(ge=0)] = knob(0, "sample from this many ids; 0 is off")
    min_p: Annotated[Number, Field(ge=0, le=1)] = knob(0.0, "leave out ids below this share of the likeliest; 0 is off")
    repetition_penalty: Annotated[Number, Field(ge=0.01, le=100)] = knob(
        1.0, "divides logits of ids in prompt and answer; 1 is off"
    )
    presence_penalty: Number = knob(0.0, "taken from logits of ids in the answer; 0 is off")
    system: str | None = knob(None, "a system message to begin with, where a conversation has none")
    max_turns: Positive = knob(6, "completions of an answer, the answer included")
    max_crops: NonNegativeInt | None = knob(None, "crops of an answer; 0: none; default: by --max_turns", flag="crops")
    max_turn_tokens: Positive | None = knob(None, "sampled tokens of a completion")
    max_visual_tokens: Positive | None = knob(None, "visual tokens of all crops of an answer")
    max_seconds: Annotated[Number, Field(gt=0)] | None = knob(None, "seconds of an answer from when it is begun")
    stop_texts: Annotated[tuple[str, ...], BeforeValidator(split_commas)] = knob((), "texts that end an answer")
    enable_thinking: bool = knob(True, "let the model think before it answers")
    enable_thinking_budget: bool = knob(True, "close thinking when its budget is used up")
    thinking_budget: Positive | None = knob(2048, "tokens of thinking before it is closed")
    num_frames: Positive = knob(8, "frames seen of a video file, spread over it")
    seed: Seed | None = knob(None, "seed of sampling; default: each call draws anew")

    @model_validator(mode="after")
    def _check_temperature(self) -> AnswerConfig:
        if self.do_sample and self.temperature == 0 and "temperature" in self.model_fields_set:
            raise ValueError("temperature 0 is greedy and do_sample samples; leave one of them out")
        return self

    @property
    def sampling_temperature(self) -> float:
        """The temperature that is sampled at; 0 is greedy."""
        if self.do_sample is None:
            return self.temperature
        return (self.temperature or 1.0) if self.do_sample else 0.0

    @property
    def allowed_turns(self) -> int:
        """`max_turns`; where only crops are counted, room for all of them, a refusal and the answer."""
        if self.max_crops is None or "max_turns" in self.model_fields_set:
            return self.max_turns
        return max(self.max_turns, self.max_crops + 2)

    @property
    def enforced_budget(self) -> int | None:
        """Tokens of thinking before it is closed, None without a limit."""
        return self.thinking_budget if self.enable_thinking_budget else None


class InferenceConfig(AnswerConfig):
    """Asking a model."""

    model_path: NameOrPath = knob(
        "outputs/grpo/final_model", "model folder or hub name; `tiny` is the built-in small model"
    )
    max_pixels: Positive | None = knob(None, "most pixels of a resized picture; default: the checkpoint's")
    batch_size: Positive = knob(16, "answers that advance together")
    bf16: bool | None = knob(None, "load and compute in bfloat16; default: on a GPU, not on a CPU")
    attn_implementation: AttnImplementation = knob("auto", ATTENTION_HELP)
    quantization: Quantization = knob("none", "4 bits (nf4) or 8 for the language model")
    device: str | None = knob(None, DEVICE_HELP)

    def answer(self, **given: Any) -> AnswerConfig:
        """How one call answers: `given` first, then what was set here. Raises ConfigError as the class does."""
        for name in given.keys() & InferenceConfig.model_fields.keys() - AnswerConfig.model_fields.keys():
            raise ConfigError(f"{name} is set when the model is loaded: InferenceConfig({name}=...)")
        own = {name: getattr(self, name) for name in AnswerConfig.model_fields if name in self.model_fields_set}
        # what is given decides alone whether to sample
        if "temperature" in given:
            own.pop("do_sample", None)
        if given.get("do_sample") and not self.temperature:
            own.pop("temperature", None)
        return AnswerConfig(**{**own, **given})


def check_bench(value: str) -> str:
    """`NAME` or `NAME:FILE`, as it is."""
    name = value.partition(":")[0]
    if name not in BENCHES:
        hint = nearest(name, BENCHES) or f" There are {', '.join(BENCHES)}."
        raise PydanticCustomError("bench", "no benchmark is called so.{hint}", {"hint": hint})
    return value


def check_shard(value: str) -> str:
    """`i/n`, process i of n, as it is."""
    number, _, of_all = value.partition("/")
    if not (number.isdigit() and of_all.isdigit() and 1 <= int(number) <= int(of_all)):
        raise PydanticCustomError("shard", "write I/N, such as 1/4 for the first of four")
    return value


class EvalConfig(InferenceConfig):
    """Evaluating a model."""

    bench: Annotated[tuple[Annotated[str, AfterValidator(check_bench)], ...], BeforeValidator(split_commas)] = knob(
        (), f"benchmarks, each as NAME or NAME:FILE: {', '.join(BENCHES)}", several=True
    )
    data: Place = knob(Path("."), "folder of the benchmarks' files, in it perhaps one for each, or the one file")
    image_base_path: Place | None = knob(None, "folder that the pictures are relative to; default: that of the file")
    out: Place | None = knob(
        None, "file of the answers (JSON lines), with which a second run goes on; default: outputs/eval/MODEL.jsonl"
    )
    controls: Annotated[tuple[Control, ...], BeforeValidator(all_controls)] = knob(
        (), f"ask again with these in the crop's place: {', '.join(ALL_CONTROLS)}; alone: all", bare="all"
    )
    samples: Positive = knob(1, "answers to each question, told with their spread; needs a temperature")
    limit: Positive | None = knob(None, "rows of a benchmark, in fours spread over it; default: all")
    preset: PresetName = knob("none", "pixels, thinking and wording with which published scores were made")
    min_pixels: Positive | None = knob(None, "fewest pixels of a resized picture; default: the checkpoint's")
    suffix: str | None = knob(None, "a line that is added to each question")
    judge: str | None = knob(None, "address (.../v1) of a language model that judges what the rules leave open")
    judge_model: str | None = knob(None, "its name there")
    shard: Annotated[str, AfterValidator(check_shard)] | None = knob(
        None, "ask only the part I/N of the questions, for several processes; torchrun sets it by itself"
    )
    seed: Seed = knob(0, "seed of sampling and of the other places that crops are taken from")

    @model_validator(mode="after")
    def _check_samples(self) -> EvalConfig:
        if self.samples > 1 and not self.sampling_temperature:
            raise ValueError(f"samples is {self.samples} and answers are greedy, so all alike; give --temperature 1")
        if (self.judge is None) != (self.judge_model is None):
            raise ValueError("judge and judge_model belong together; give both, or none")
        return self


class ServeConfig(InferenceConfig):
    """Answering over HTTP."""

    model_path: NameOrPath = knob("tiny", "model folder or hub name; `tiny` is the built-in small model")
    batch_size: Positive = knob(64, "answers that advance together")
    host: str = knob("127.0.0.1", "address to listen on; 0.0.0.0: all of this machine's, for others too")
    port: Annotated[Whole, Field(ge=0, le=65535)] = knob(8000, "port to listen on; 0: a free one, which is said")
    served_model_name: str | None = knob(None, "name of the model in requests; default: that of its folder")
    adapters: Annotated[dict[str, NameOrPath], BeforeValidator(split_folders)] = knob(
        {}, "LoRA adapters of this model and their names in requests: a=FOLDER,b=FOLDER"
    )
    adapter_folder: Place | None = knob(None, "let requests load adapters from below this folder, and remove them")
    engine: Literal["builtin", "vllm"] = knob("builtin", "what samples: our engine, or vLLM servers")
    vllm_servers: Annotated[tuple[str, ...], BeforeValidator(split_commas)] = knob(
        (), "addresses of vLLM servers of this model, for --engine vllm"
    )
    api_key_file: Place | None = knob(None, "file of keys, one a line, one of which every request then needs")
    allow_http: bool = knob(False, "fetch pictures from public web addresses")
    image_folder: Place | None = knob(None, "let requests name picture files below this folder")
    allowed_hosts: Annotated[tuple[str, ...], BeforeValidator(split_commas)] = knob(
        (), "more names by which browsers may call this server; those of this machine always may"
    )
    allow_origins: Annotated[tuple[str, ...], BeforeValidator(split_commas)] = knob(
        (), "web pages that may call this server from a browser, such as https://example.org"
    )
    max_body: Annotated[str, AfterValidator(check_file_size)] = knob("32MB", "largest body of a request")
    max_images: Positive = knob(16, "pictures of a request")
    max_image_pixels: Positive = knob(33_554_432, "pixels of a picture as it is given, before it is decoded")
    max_prompt_tokens: Positive = knob(16384, "tokens of a prompt, those of its pictures included")
    max_answer_tokens: Positive = knob(8192, "tokens that a request may ask for")
    max_choices: Positive = knob(16, "answers to one request (`n`)")
    max_queue: NonNegativeInt = knob(256, "answers that wait for a place; more are refused with 429")
    request_seconds: Annotated[Number, Field(gt=0)] = knob(600.0, "seconds of a request, the waiting included")
    drain_seconds: Annotated[Number, Field(ge=0)] = knob(60.0, "seconds that SIGTERM leaves to what is running")

    @model_validator(mode="after")
    def _check_engine(self) -> ServeConfig:
        if (self.engine == "vllm") != bool(self.vllm_servers):
            raise ValueError("--engine vllm and --vllm_servers ADDRESS belong together; give both, or none")
        if self.engine == "vllm" and (self.adapters or self.adapter_folder):
            raise ValueError("adapters are for the built-in engine; start vLLM with the merged model instead")
        return self


class ConvertConfig(Config):
    """Writing a data file in another format."""

    target_format: DataFormat = knob("messages", "format to write", flag="to")
    source_format: SourceFormat = knob("auto", "format of the file; auto: by its first rows", flag="from")
    image_base_path: Place = knob(Path("."), "folder that the paths of pictures are relative to, in both files")
    answer_key: str | None = knob(None, "field of a question that holds its answer (documented format); default: A3, A")
    box_frame: BoxFrame | None = knob(None, "frame of the boxes in calls, where the file does not say")
    allow_loss: bool = knob(False, "write the file also without what the format cannot hold")
    overwrite: bool = knob(False, "replace the file that is there")


class DemoConfig(Config):
    """The small world's run."""

    output_dir: Place = knob(Path("outputs/demo"), "run folder")
    seed: Seed = knob(0, "seed of data, training and sampling")
    overwrite: bool = knob(False, "replace the demo that the run folder holds")


class ExportConfig(Config):
    """Writing a trained model in the released layout."""

    dtype: Literal["same", "float32", "bfloat16", "float16"] = knob("same", "dtype of the weights; same: as stored")
    max_shard_size: Annotated[str, AfterValidator(check_file_size)] = knob("5GB", "largest weight file: KB, MB or GB")
    verify: bool = knob(True, "read everything back and compare tensors and logits")
    verify_with: Literal["none", "vllm"] = knob("none", "also compare a greedy answer with another runtime's")
    vllm_python: Place | None = knob(None, "python of the environment that has vLLM; default: this one")
    device: str | None = knob(None, DEVICE_HELP)


def flag_of(config_class: type[Config], name: str) -> str:
    """The command-line name of a field, without dashes."""
    extra = config_class.model_fields[name].json_schema_extra
    return str(extra["flag"]) if isinstance(extra, dict) and "flag" in extra else name


def takes_several(config_class: type[Config], name: str) -> bool:
    """Whether the flag of a field takes several words."""
    extra = config_class.model_fields[name].json_schema_extra
    return isinstance(extra, dict) and "several" in extra


def bare_value(config_class: type[Config], name: str) -> str | None:
    """The value of a field whose flag is given without one, where it may be."""
    extra = config_class.model_fields[name].json_schema_extra
    return str(extra["bare"]) if isinstance(extra, dict) and "bare" in extra else None


def _explain(config_class: type[Config], problem: Any) -> str:
    name = ".".join(str(part) for part in problem["loc"])
    if not name:  # a check of settings against each other
        return str(problem["ctx"]["error"])
    if problem["type"] == "extra_forbidden":
        return f'unknown setting "{short(name)}" of {config_class.__name__}.{_where_it_is(config_class, name)}'
    hint = ""
    if problem["type"] == "literal_error":
        name = str(problem["loc"][0])  # which one of several is told by the value
        hint = nearest(str(problem["input"]), re.findall(r"'([^']*)'", problem["ctx"]["expected"]))
    if (flag := flag_of(config_class, name) if name in config_class.model_fields else name) != name:
        name = f"{name} (--{flag})"
    value, mend = _written(problem["input"]), f"{problem['msg'][:1].lower()}{problem['msg'][1:]}"
    return f"{name} is {value}: {mend}{hint and f'.{hint}'}"


def _where_it_is(config_class: type[Config], name: str) -> str:
    """A hint to what an unknown setting may be: one of another config, another trainer's, or a slip of the pen."""
    of_a_run = (ModelConfig, DataConfig, SFTConfig, GRPOConfig)
    if config_class in of_a_run:
        for other in of_a_run:
            if name in _names(other):
                return f" It is a setting of {other.__name__}."
    known = _names(config_class)
    return called_here(name, known) or nearest(name, known)


def _names(config_class: type[Config]) -> list[str]:
    """The names of the settings: those of the fields, and those of the flags."""
    flags = (flag_of(config_class, name) for name in config_class.model_fields)
    return list(dict.fromkeys([*config_class.model_fields, *flags]))


def _written(value: Any) -> str:
    """A value in one line."""
    try:
        return short(repr(value))
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return f"{type(value).__name__} of thousands of digits"
