"""Where the metrics of a run are shown: TensorBoard, Weights & Biases, trackio, each behind the same three calls."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from looktwice.errors import ConfigError

TENSORBOARD = "tensorboard"
PROJECT = "looktwice"
INSTALLED_BY = {TENSORBOARD: "looktwice", "wandb": "looktwice[wandb]", "trackio": "looktwice[trackio]"}


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """A run as trackers know it: its id stays when it goes on, after `start` steps."""

    folder: Path
    id: str
    settings: Mapping[str, Any]
    start: int = 0

    @property
    def name(self) -> str:
        return f"{self.folder.absolute().name}-{self.id}"


class Tracker(Protocol):
    """What shows metrics."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Event files in the folder of the run. A run that goes on hides what was written of later steps."""

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only a run needs it

        self.board = SummaryWriter(str(run.folder / TENSORBOARD), purge_step=run.start + 1 if run.start else None)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self.board.add_scalar(name, value, step)

    def flush(self) -> None:
        self.board.flush()

    def close(self) -> None:
        self.board.close()


class Wandb:
    """A run of Weights & Biases; its own variables hold, WANDB_PROJECT and WANDB_MODE among them."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        project = os.environ.get("WANDB_PROJECT", PROJECT)
        settings = dict(run.settings)
        self.run = wandb.init(
            project=project, name=run.name, id=run.id, dir=str(run.folder), config=settings, resume="allow"
        )
        # its own count of steps never goes back, as that of a run that goes on does
        self.run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.run.log({"step": step, **metrics})

    def flush(self) -> None:
        """It sends as it goes."""

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """A run of trackio."""

    def __init__(self, run: TrackedRun) -> None:
        import trackio

        self.run = trackio.init(project=PROJECT, name=run.name, config=dict(run.settings), resume="allow")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.run.log(dict(metrics), step=step)

    def flush(self) -> None:
        """It writes as it goes."""

    def close(self) -> None:
        self.run.finish()


TRACKERS: dict[str, type[TensorBoard] | type[Wandb] | type[Trackio]] = {
    TENSORBOARD: TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
}


def check_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError for a tracker that is not installed. Nothing is imported."""
    for name in names:
        if find_spec(name) is None:
            raise ConfigError(f"report_to {name}: not installed; pip install '{INSTALLED_BY[name]}', or leave it out")


def open_trackers(names: Sequence[str], run: TrackedRun) -> list[Tracker]:
    """The trackers of these names. Raises ConfigError naming one that cannot be opened."""
    opened: list[Tracker] = []
    for name in names:
        try:
            opened.append(TRACKERS[name](run))
        except Exception as error:  # a login is missing, or its server
            for tracker in opened:
                tracker.close()
            raise ConfigError(f"report_to {name}: cannot be opened ({error}); mend it, or leave it out") from error
    return opened
