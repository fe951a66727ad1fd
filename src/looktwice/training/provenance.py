"""What a run folder says of the run: its settings, its data, and on what it ran, once for each start."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
import yaml

from looktwice.config import DataConfig
from looktwice.drafts import file_draft
from looktwice.launch import launched
from looktwice.training.folder import CONFIG_FILE, RUN_FILE
from looktwice.training.record import Settings, fingerprint, plain

PACKAGES = (
    "looktwice",
    "torch",
    "transformers",
    "peft",
    "safetensors",
    "tokenizers",
    "numpy",
    "pillow",
    "bitsandbytes",
)
OF_ONE_START = ("resume_from_checkpoint", "overwrite", "allow_changes")
"""Settings that say how a run was started, not what it is."""


def write_provenance(
    settings: Settings, stage: str, sizes: Sequence[int], device: str, *, step: int, changed: Sequence[str] = ()
) -> dict[str, Any]:
    """Write the settings and the run file into the run folder, and give back what the latter says.

    `sizes` are the samples of each training file. A run that goes on in its folder keeps its id, and adds a start, with
    the settings that `changed`.
    """
    _, data, config = settings
    folder = config.output_dir
    before = read_run(folder) if step else {}
    run = {
        "id": before.get("id", uuid4().hex[:8]),
        "stage": stage,
        "data": data_facts(data, sizes),
        "starts": [*before.get("starts", []), {"step": step, "changed": [*changed], **environment(device)}],
    }
    with file_draft(folder / RUN_FILE) as draft:
        draft.write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
    write_config(folder / CONFIG_FILE, settings)
    return run


def read_run(folder: Path) -> dict[str, Any]:
    """What the run file says, nothing where it is not there or broken."""
    try:
        run = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return run if isinstance(run, dict) else {}


def write_config(path: Path, settings: Settings) -> None:
    """Write settings as YAML, each class under its name, without what belongs to one start alone."""
    kinds: Mapping[str, dict[str, Any]] = plain(settings)
    values = {
        kind: {name: value for name, value in fields.items() if name not in OF_ONE_START}
        for kind, fields in kinds.items()
    }
    with file_draft(path) as draft:
        draft.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")


def data_facts(data: DataConfig, sizes: Sequence[int]) -> dict[str, Any]:
    """The files of a run, each with its fingerprint; those of training with their samples and weights."""
    weights = data.train_weights or (1.0,) * len(sizes)
    train = [
        {"path": str(path), "fingerprint": fingerprint(path), "samples": size, "weight": weight}
        for path, size, weight in zip(data.train_data_path, sizes, weights)
    ]
    held_out = data.val_data_path
    facts = {"path": str(held_out), "fingerprint": fingerprint(held_out)} if held_out else None
    return {"train": train, "validation": facts}


def environment(device: str) -> dict[str, Any]:
    """On what this process runs: versions, machine, the commits of the code, and the command."""
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "folder": os.getcwd(),
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "system": platform.platform(),
        "device": device,
        "gpus": gpus,
        "threads": torch.get_num_threads(),
        "processes": launched().size,
        "git": {
            "looktwice": git_commit(Path(__file__).parent),
            "folder": git_commit(Path.cwd()),
        },
    }


def git_commit(folder: Path) -> str | None:
    """The commit that a folder is at, with `-dirty` where files differ from it; None where it is under no git."""
    git = shutil.which("git")
    if git is None:
        return None
    words = [git, "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
