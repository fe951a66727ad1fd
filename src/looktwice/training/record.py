"""What a saved folder says of the run it comes from: its stage, what its step counts, its files and its settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from looktwice.config import DataConfig, ModelConfig, Stage, StageConfig
from looktwice.errors import CheckpointError, ConfigError

Settings = tuple[ModelConfig, DataConfig, StageConfig]
RECORD_FILE = "train_config.json"
HASHED_WHOLE = 256 * 2**20
BLOCK, NUM_BLOCKS = 2**16, 1024
OF_ONE_RUN = {"output_dir", "resume_from_checkpoint", "overwrite", "allow_changes", "max_steps", "num_train_epochs"}
OF_ONE_RUN |= {"logging_steps", "save_steps", "save_minutes", "save_total_limit", "keep_best", "eval_steps"}
OF_ONE_RUN |= {"num_workers", "report_to", "distributed", "process_timeout", "alarms", "stop_on_alarm"}
OF_ONE_RUN |= {"eval_tool_gain", "keep_trajectories", "rollout_page_steps"}
"""Settings that do not change what is learned, or that the order tells of."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One run. `order` is what the number of a step means: the data, how many samples a step takes, and their order.

    `files` are those of the folder it was read from, with their sizes in bytes.
    """

    stage: Stage
    order: dict[str, Any]
    settings: dict[str, dict[str, Any]]
    step: int = 0
    files: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, stage: Stage, settings: Settings, *, num_samples: int, total_steps: int) -> Record:
        """The record of a run of so many steps on so many samples of its training data."""
        _, data, config = settings
        order = {
            "train_data": ", ".join(map(fingerprint, data.train_data_path)),
            "train_weights": list(data.train_weights) or None,
            "samples": num_samples,
            "batch_size": config.train_batch_size,
            "gradient_accumulation_steps": config.gradient_accumulation_steps,
            "seed": config.seed,
            "steps": total_steps,
        }
        held_out = data.val_data_path
        files = {"Files": {"val_data": fingerprint(held_out)}} if held_out else {}
        return cls(stage=stage, order=order, settings={**plain(settings), **files})

    @classmethod
    def read(cls, folder: Path) -> Record:
        """The record in a folder of which all files are there, and whole but for JSON, which people edit.

        Raises CheckpointError when one is not.
        """
        path = folder / RECORD_FILE
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            run = fields.pop("run")
            record = cls(settings=fields, **{name: run[name] for name in ("stage", "order", "step", "files")})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: does not say what run it is of; resume from another checkpoint") from error
        for name, size in record.files.items():
            there = folder / name
            is_whole = there.is_file() and (there.suffix == ".json" or there.stat().st_size == size)
            if not is_whole:
                found = f"{there.stat().st_size:,} bytes" if there.is_file() else "missing"
                raise CheckpointError(
                    f"{there}: {found}, was saved with {size:,} bytes; copy the folder again, or resume from another"
                )
        return record

    def write(self, folder: Path, *, step: int) -> None:
        """Write the record of a folder that holds all its other files, saved after `step` steps."""
        # a model card is for people to write on
        files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.suffix != ".md"}
        run = {"stage": self.stage, "step": step, "order": self.order, "files": files}
        text = json.dumps({"run": run, **self.settings}, indent=2) + "\n"
        (folder / RECORD_FILE).write_text(text, encoding="utf-8")

    def check_goes_on(self, saved: Record, checkpoint: Path, *, allow_changes: bool) -> None:
        """Refuse a checkpoint that lies beyond the end of this run, or whose step number means other samples, or
        another learning rate, here.

        Raises ConfigError and CheckpointError; `allow_changes` accepts the latter.
        """
        if saved.stage != self.stage:
            raise CheckpointError(
                f"{checkpoint}: of stage {saved.stage}, this run is {self.stage}; resume from one of its own"
            )
        if saved.step >= self.order["steps"]:
            raise ConfigError(
                f"{checkpoint}: saved after step {saved.step:,}, and this run ends with step {self.order['steps']:,}, "
                "so nothing would be trained; raise --max_steps or --num_epochs, or leave the checkpoint out"
            )
        changed = {
            name: f"{name} was {saved.order.get(name)} and is {value}"
            for name, value in self.order.items()
            if saved.order.get(name) != value
        }
        if changed and not allow_changes:
            # which samples a step takes does not depend on how many steps there are
            schedule_alone = set(changed) == {"steps"}
            price = (
                "the learning rate goes on by another schedule" if schedule_alone else "samples are seen again or never"
            )
            raise CheckpointError(
                f"{checkpoint}: saved by another run than this: {'; '.join(changed.values())}. Go on with the same, or "
                f"accept with --allow_changes that {price}"
            )

    def changes_since(self, saved: Record) -> Iterator[str]:
        """The settings that are not as they were, each in a few words."""
        for kind, values in self.settings.items():
            was = saved.settings.get(kind, {})
            for name, value in values.items():
                if name in was and was[name] != value and name not in OF_ONE_RUN:
                    yield f"{name} {was[name]} -> {value}"


def plain(settings: Settings) -> dict[str, dict[str, Any]]:
    """Settings as JSON holds them, by the names of their classes."""
    return {type(config).__name__: config.model_dump(mode="json") for config in settings}


def fingerprint(path: Path) -> str:
    """Whether a file is still the same: a hash of its bytes, above 256 MiB of its size and 1,024 blocks all over it."""
    size = path.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=8)
    with path.open("rb") as file:
        if size <= HASHED_WHOLE:
            while block := file.read(2**20):
                digest.update(block)
        else:
            for number in range(NUM_BLOCKS):
                file.seek((size - BLOCK) * number // (NUM_BLOCKS - 1))
                digest.update(file.read(BLOCK))
    return digest.hexdigest()
