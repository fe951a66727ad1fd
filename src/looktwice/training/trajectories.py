"""The rollouts of each step in the run folder, `trajectories/step-N.jsonl.zst`: one line a rollout, crops as boxes.

What is written is enough to pay them anew and to compute the loss anew; see `training/replay.py`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from looktwice.drafts import file_draft
from looktwice.errors import ConfigError, DataError
from looktwice.formats.files import RowFile
from looktwice.geometry import Box, Size
from looktwice.rewards import Played, Reward
from looktwice.rollout.trajectory import ToolCall, Trajectory
from looktwice.training.rollouts import Rollout


@dataclass(kw_only=True)
class Recorded:
    """A rollout as it was written: its trajectory, what it was paid, and what it was trained on.

    `trainer_logprobs` are those of its sampled ids in each update, empty where it was left out; `reference_logprobs`
    those of the starting policy where there was a KL term, `old_logprobs` those before the step's first update where
    several corrected by importance. `images` are the pictures of its prompt as they were named.
    """

    played: Played
    reward: Reward
    advantage: float
    images: tuple[str, ...] = ()
    trainer_logprobs: list[list[float]] = field(default_factory=list)
    reference_logprobs: list[float] | None = None
    old_logprobs: list[float] | None = None

    @property
    def trajectory(self) -> Trajectory:
        return self.played.trajectory


def write_trajectories(folder: Path, step: int, groups: Sequence[Sequence[Rollout]], *, keep: int) -> None:
    """Write the rollouts of step `step` (counted from 1), whole or not at all; of all steps written the
    last `keep` stay.

    Raises ConfigError when there is no room.
    """
    lines = (
        json.dumps(_line(rollout, number), default=str) for number, group in enumerate(groups) for rollout in group
    )
    path = folder / f"step-{step}.jsonl.zst"
    try:
        folder.mkdir(exist_ok=True)
        packed = zstandard.compress("".join(f"{line}\n" for line in lines).encode(errors="backslashreplace"))
        with file_draft(path) as draft:
            draft.write_bytes(packed)
        for old in [*written_steps(folder).values()][:-keep]:
            old.unlink()
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be written ({error.strerror}); make room, or keep fewer: --keep_trajectories"
        ) from error


def written_steps(folder: Path) -> dict[int, Path]:
    """The files of a folder by their steps, in order."""
    found = ((re.fullmatch(r"step-(\d+)\.jsonl\.zst", path.name), path) for path in folder.glob("step-*"))
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def drop_later(folder: Path, last: int) -> None:
    """Remove the files of steps that a run which goes on after `last` takes anew."""
    for step, path in written_steps(folder).items():
        if step > last:
            path.unlink()


def read_trajectories(path: Path) -> list[list[Recorded]]:
    """The groups of a step. Raises DataError for a file that was not written here."""
    try:
        recorded = [_recorded(row.values) for row in RowFile(path)]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: no trajectories of a run ({type(error).__name__}: {error}); name another") from error
    return [list(group) for _, group in groupby(recorded, key=lambda one: one.played.group)]


def _line(rollout: Rollout, group: int) -> dict[str, Any]:
    trajectory, sample, reward = rollout.trajectory, rollout.sample, rollout.reward
    line: dict[str, Any] = {
        "where": sample.where,
        "field": sample.field,
        "group": group,
        "seed": rollout.seed,
        "version": rollout.version,
        "images": [source if isinstance(source, Path) else source[:200] for source in sample.image_paths],
        "question": sample.question,
        "solution": sample.solution,
        "gold_box": sample.gold_box,
        "more_gold_boxes": sample.more_gold_boxes,
        "text": trajectory.text,
        "calls": [asdict(call) for call in trajectory.calls],
        "stop_reason": trajectory.stop_reason,
        "error": trajectory.error,
        "reward": None if reward.error else reward.total,
        "parts": dict(reward.parts),
        "raw": dict(reward.raw),
        "reward_error": reward.error,
        "advantage": rollout.advantage,
        "num_turns": trajectory.num_turns,
        "num_visual_tokens": trajectory.num_visual_tokens,
        "image_sizes": trajectory.image_sizes,
        "prompt_ids": trajectory.prompt_ids,
        "completion_ids": trajectory.completion_ids,
        "sampled": [len(list(run)) for run in _runs(trajectory.is_sampled)],
        "sampling_logprobs": _short(trajectory.of_sampled(trajectory.sampling_logprobs)),
        "trainer_logprobs": [_short(logprobs) for logprobs in rollout.trainer_logprobs],
    }
    if trajectory.drawn_logprobs != trajectory.sampling_logprobs:
        line["drawn_logprobs"] = _short(trajectory.of_sampled(trajectory.drawn_logprobs))
    for name in ("reference_logprobs", "old_logprobs"):
        if (known := getattr(rollout, name)) is not None:
            line[name] = _short(known)
    return line


def _recorded(line: dict[str, Any]) -> Recorded:
    is_sampled = [place % 2 == 0 for place, count in enumerate(line["sampled"]) for _ in range(count)]
    sampling = _spread(_exact(line["sampling_logprobs"]), is_sampled)
    drawn = _spread(_exact(line["drawn_logprobs"]), is_sampled) if "drawn_logprobs" in line else [*sampling]
    trajectory = Trajectory(
        prompt_ids=line["prompt_ids"],
        image_sizes=tuple(Size(*size) for size in line["image_sizes"]),
        completion_ids=line["completion_ids"],
        is_sampled=is_sampled,
        sampling_logprobs=sampling,
        drawn_logprobs=drawn,
        text=line["text"],
        calls=[_call(call) for call in line["calls"]],
        stop_reason=line["stop_reason"],
        error=line["error"],
        num_turns=line["num_turns"],
        num_visual_tokens=line["num_visual_tokens"],
    )
    solution, error, total = line["solution"], line["reward_error"], line["reward"]
    boxes = (line["gold_box"], *line.get("more_gold_boxes", ()))
    played = Played(
        trajectory=trajectory,
        solution=solution if isinstance(solution, str) else tuple(solution),
        question=line.get("question", ""),
        gold_boxes=tuple(Box(*box) for box in boxes if box),
        group=line["group"],
        source=f"{line['where']} {line['field']}",
    )
    return Recorded(
        played=played,
        reward=Reward(
            total=math.nan if total is None else total, parts=line["parts"], raw=line.get("raw", {}), error=error
        ),
        advantage=line["advantage"],
        images=tuple(line.get("images", ())),
        trainer_logprobs=[_exact(logprobs) for logprobs in line["trainer_logprobs"]],
        **{name: _exact(line[name]) if name in line else None for name in ("reference_logprobs", "old_logprobs")},
    )


def _call(call: dict[str, Any]) -> ToolCall:
    boxes = {name: Box(*call[name]) if call[name] else None for name in ("requested", "box")}
    size = Size(*call["size"]) if call["size"] else None
    return ToolCall(**boxes, size=size, error=call["error"], image_number=call["image_number"])


def _runs(is_sampled: Sequence[bool]) -> Iterator[Iterator[bool]]:
    """Runs of equal marks, the first one sampled, though it be empty."""
    if is_sampled and not is_sampled[0]:
        yield iter(())
    for _, run in groupby(is_sampled):
        yield run


def _spread(logprobs: Sequence[float], is_sampled: Sequence[bool]) -> list[float]:
    each = iter(logprobs)
    return [next(each) if flag else 0.0 for flag in is_sampled]


def _short(logprobs: Sequence[float]) -> list[float]:
    """Numbers of float32 in the fewest digits that give them back to the last bit."""
    return [float(str(number)) for number in np.asarray(logprobs, dtype=np.float32)]


def _exact(logprobs: Sequence[float]) -> list[float]:
    """The numbers of float32 that `_short` wrote."""
    return np.asarray(logprobs, dtype=np.float32).tolist()  # type: ignore[no-any-return]
