"""What a saved folder says of the run it comes from: its stage, what its step counts, its files and its settings."""

from __future__ import annotations

import hashlib
import json
import math
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

    `files` are those of the folder it was read from, each with its size in bytes and its `fingerprint`, which older
    ones lack. `step` is the one after which the folder was saved; of a run that is planned it is 0, or the last
    one where there is nothing left to train. `outcome` is what a run that has ended said of itself.
    """

    stage: Stage
    order: dict[str, Any]
    settings: dict[str, dict[str, Any]]
    step: int = 0
    files: dict[str, tuple[int, str | None]] = field(default_factory=dict)
    outcome: str | None = None

    @classmethod
    def of(
        cls, stage: Stage, settings: Settings, *, num_samples: int, total_steps: int, start: str | None = None
    ) -> Record:
        """The record of a run of so many steps on so many samples of its training data; `start` is the fingerprint of
        the weights that it starts from."""
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
        files = {"Files": {"start": start, **({"val_data": fingerprint(held_out)} if held_out else {})}}
        return cls(stage=stage, order=order, settings={**plain(settings), **files})

    @classmethod
    def read(cls, folder: Path) -> Record:
        """The record in a folder, whatever became of its other files. Raises CheckpointError when there is none."""
        path = folder / RECORD_FILE
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            run = fields.pop("run")
            files = {
                name: (facts, None) if isinstance(facts, int) else (facts["bytes"], facts["fingerprint"])
                for name, facts in run["files"].items()
            }
            told = {"outcome": run.get("outcome")}
            return cls(settings=fields, files=files, **told, **{name: run[name] for name in ("stage", "order", "step")})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: does not say what run it is of; resume from another checkpoint") from error

    @classmethod
    def of_whole(cls, folder: Path) -> Record:
        """The record in a folder of which all files are as they were saved. JSON has only to be JSON, since people
        edit it, and our own messages tell them to.

        Raises CheckpointError naming one that is not.
        """
        record = cls.read(folder)
        for name, (size, saved) in record.files.items():
            path = folder / name
            if found := _damage(path, size, saved):
                raise CheckpointError(f"{path}: {found}; copy the folder again, or resume from another")
        return record

    @property
    def start(self) -> str | None:
        """The fingerprint of the weights that the run started from; None where it is not known."""
        found = self.settings.get("Files", {}).get("start")
        return str(found) if found else None

    @property
    def is_over(self) -> bool:
        """Whether no step is left to train."""
        return bool(self.step == self.order["steps"])

    def write(self, folder: Path, *, step: int) -> None:
        """Write the record of a folder that holds all its other files, saved after `step` steps."""
        # a model card is for people to write on
        paths = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix != ".md")
        files = {path.name: {"bytes": path.stat().st_size, "fingerprint": fingerprint(path)} for path in paths}
        told = {"outcome": self.outcome} if self.outcome else {}
        run = {"stage": self.stage, "step": step, "order": self.order, **told, "files": files}
        text = json.dumps({"run": run, **self.settings}, indent=2) + "\n"
        (folder / RECORD_FILE).write_text(text, encoding="utf-8")

    def check_goes_on(self, saved: Record, checkpoint: Path, *, allow_changes: bool) -> None:
        """Refuse a checkpoint of another stage or start, one that lies beyond the end of this run, and one whose step
        number means other samples, or another learning rate, here.

        Raises ConfigError and CheckpointError; `allow_changes` accepts the latter.
        """
        if saved.stage != self.stage:
            raise CheckpointError(
                f"{checkpoint}: of stage {saved.stage}, this run is {self.stage}; resume from one of its own"
            )
        if None not in (saved.start, self.start) and saved.start != self.start:
            raise CheckpointError(
                f"{checkpoint}: its run started from another model; name that one to go on, or give another run folder"
            )
        changed = {
            name: f"{name} was {saved.order.get(name)} and is {value}"
            for name, value in self.order.items()
            if saved.order.get(name) != value
        }
        # which samples a step takes does not depend on how many steps there are
        schedule_alone = set(changed) == {"steps"}
        if changed and not allow_changes and not (schedule_alone and self._keeps_rate_of(saved)):
            price = (
                "the learning rate goes on by another schedule" if schedule_alone else "samples are seen again or never"
            )
            raise CheckpointError(
                f"{checkpoint}: saved by another run than this: {'; '.join(changed.values())}. Go on with the same, or "
                f"accept with --allow_changes that {price}"
            )
        if saved.step > self.order["steps"]:
            raise ConfigError(
                f"{checkpoint}: saved after step {saved.step:,}, and this run ends with step {self.order['steps']:,}, "
                "so nothing would be trained; raise --max_steps or --num_epochs, or leave the checkpoint out"
            )

    def _keeps_rate_of(self, saved: Record) -> bool:
        """Whether the learning rate goes on as it would have, were there as many steps as before: it is constant, and
        the warm-up is over by both counts."""
        for record in (self, saved):
            settings = record.settings.get(f"{record.stage.upper()}Config", {})
            warmup = math.ceil(settings.get("warmup_ratio", 1.0) * record.order["steps"])
            if settings.get("lr_scheduler_type") != "constant" or saved.step < warmup:
                return False
        return True

    def changes_since(self, saved: Record) -> Iterator[tuple[str, str]]:
        """The settings that are not as they were: their names, and in a few words what became of them."""
        for kind, values in self.settings.items():
            was = saved.settings.get(kind, {})
            for name, value in values.items():
                if name in was and was[name] != value and name not in OF_ONE_RUN:
                    yield name, f"{name} {was[name]} -> {value}"


def _damage(path: Path, size: int, saved: str | None) -> str | None:
    """What is wrong with a file that was saved with this size and fingerprint, if anything."""
    if not path.is_file():
        return f"missing, was saved with {size:,} bytes"
    if path.suffix == ".json":
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            return "no whole JSON any more"
    elif (there := path.stat().st_size) != size:
        return f"{there:,} bytes, was saved with {size:,} bytes"
    elif saved is not None and fingerprint(path) != saved:
        return "damaged: other bytes than were saved, though as many"
    return None


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
