"""Two processes that run the same script, as torchrun would start them, and what they leave behind."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

import looktwice
from looktwice.metrics import LOG_FILE


class Ended(NamedTuple):
    """How the two processes ended: exit codes and what each said, by rank."""

    folder: Path
    codes: list[int]
    errors: list[str]
    seconds: float


def run_two(script: Path, folder: Path, *, timeout: float = 240) -> Ended:
    """Run `script FOLDER` in two processes, rank 0 and 1 of one world."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    shared["PYTHONPATH"] = str(Path(looktwice.__file__).parents[1])
    started = time.perf_counter()
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(folder)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=timeout)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return Ended(folder, [process.returncode for process in processes], errors, time.perf_counter() - started)


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a saved model or adapter."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_same_weights(folder: Path, expected: Path, *, within: float = 1e-5) -> None:
    found, wanted = tensors(folder), tensors(expected)
    assert found.keys() == wanted.keys() and found
    for name, tensor in found.items():
        # what a key bias adds is the same for all keys: its gradient is rounding, which Adam makes a whole step of
        if not name.endswith("k_proj.bias"):
            assert torch.linalg.norm(tensor - wanted[name]) <= within * torch.linalg.norm(wanted[name]), name


def logged(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / LOG_FILE).read_text().splitlines()]
