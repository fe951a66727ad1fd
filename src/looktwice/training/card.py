"""The model card of a final model: from what it comes, on what it was trained, how, and how well."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from peft import PeftModel

from looktwice.config import flag_of
from looktwice.errors import counted
from looktwice.metrics import LOG_FILE, METRICS, four_digits, read_log
from looktwice.training.learner import Learner
from looktwice.training.overview import what_trains
from looktwice.training.provenance import read_run
from looktwice.training.record import Record

STAGES = {"sft": "stage 1, supervised fine-tuning", "grpo": "stage 2, R-GRPO"}
OF_THE_CARD = ("loss", "eval/", "reward/accuracy", "tool/valid_share", "tool/mean_iou")


def model_card(learner: Learner, record: Record) -> str:
    """The card as Markdown, with the fields that a hub reads in front."""
    run = read_run(learner.config.output_dir)
    base = str(learner.base.name_or_path)
    is_adapter = isinstance(learner.model, PeftModel)
    fields = {
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["looktwice", record.stage],
        **({"base_model": base} if "/" in base and not Path(base).exists() else {}),
    }
    policy = learner.processor.policy
    pixels = {name.replace("_", " "): f"{value:,}" for name, value in asdict(policy).items()}
    lines = [
        f"---\n{yaml.safe_dump(fields, sort_keys=False)}---",
        f"# {learner.config.output_dir.absolute().name}",
        f"Trained by {_trainer(run)}: {STAGES[record.stage]}, from `{base}`; {what_trains(learner.model)}.",
        "## Data\n\n" + "\n".join(_data_lines(run)),
        "## Recipe\n\n" + _table(("setting", "value"), dict(_recipe(learner, record))),
        "## Metrics\n\n" + _metrics(learner.config.output_dir / LOG_FILE),
        "## Pictures\n\n" + _table(("pixel policy", "value"), {**pixels, "box frame": learner.processor.box_frame}),
        'Ask it:\n\n```bash\nlooktwice ask photo.jpg "What does the sign say?" --model_path THIS_FOLDER\n```',
    ]
    return "\n\n".join(lines) + "\n"


def _trainer(run: Mapping[str, Any]) -> str:
    """looktwice in the version of the last start, and the commit of its code where it is known."""
    last = run["starts"][-1] if run.get("starts") else {"packages": {}, "git": {}}
    version, commit = last["packages"].get("looktwice"), last["git"].get("looktwice")
    return " ".join(filter(None, ["looktwice", version, f"(`{commit}`)" if commit else ""]))


def _data_lines(run: Mapping[str, Any]) -> Iterator[str]:
    data = run.get("data", {})
    for file in data.get("train", []):
        weight = f", {file['weight']:g} passes an epoch" if file["weight"] != 1 else ""
        samples = counted(file["samples"], "sample")
        yield f"- `{Path(file['path']).name}`: {samples}{weight}, fingerprint `{file['fingerprint']}`"
    if held_out := data.get("validation"):
        yield f"- validation: `{Path(held_out['path']).name}`, fingerprint `{held_out['fingerprint']}`"


def _recipe(learner: Learner, record: Record) -> Iterator[tuple[str, str]]:
    """The settings that were given, and what a step is."""
    config = learner.config
    yield "steps", f"{learner.step:,}"
    yield "samples a step", f"{config.train_batch_size} x {config.gradient_accumulation_steps}"
    yield "learning rate", f"{config.learning_rate:g}, {config.lr_scheduler_type}"
    yield "precision", "bfloat16" if config.bf16 else "float32"
    shown = {"train_batch_size", "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", "bf16"}
    shown |= {"output_dir", "resume_from_checkpoint", "overwrite", "sft_checkpoint_path"}
    for name in sorted(config.model_fields_set - shown):
        yield f"`--{flag_of(type(config), name)}`", str(getattr(config, name))


def _metrics(log: Path) -> str:
    """The last value of each metric that a card shows, and the best evaluation."""
    lines = read_log(log)
    last = {name: (line[name], line["step"]) for line in lines for name in line if name.startswith(OF_THE_CARD)}
    rows = {METRICS.get(name, name): f"{four_digits(value)} (step {step:,})" for name, (value, step) in last.items()}
    return _table(("metric", "last value"), rows) if rows else "None was logged."


def _table(head: tuple[str, str], rows: Mapping[str, object]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "| --- | --- |"]
    lines += [f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in rows.items()]
    return "\n".join(lines)
