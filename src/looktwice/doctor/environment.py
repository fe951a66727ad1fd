"""What looktwice finds on this machine: versions, devices, optional packages and what they enable, memory, threads."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch

from looktwice.model.attention import has_varlen, pick_attention

Verdict = Literal["ok", "note", "problem"]
REQUIRED = {"torch": "2.11", "transformers": "5.17", "accelerate": "1.10", "peft": "0.19", "pydantic": "2.10"}
"""Packages and their least versions, as pyproject.toml has them."""


@dataclass(frozen=True)
class Optional:
    """A package that may be missing: what it enables, and what installs it."""

    package: str
    enables: str
    install: str


OPTIONAL = (
    Optional("flash-attn", "flash-attention on GPUs of compute capability 8 or above", "looktwice[flash]"),
    Optional("bitsandbytes", "--quantization nf4 and int8, --optim adamw_8bit and paged ones", "looktwice[quant]"),
    Optional("av", "video files", "looktwice[video]"),
    Optional("pyarrow", "Parquet files", "looktwice[parquet]"),
    Optional("msgpack", "rollouts on vLLM servers, --vllm_servers", "looktwice[vllm]"),
    Optional("math-verify", "answers judged as mathematics", "looktwice[math]"),
    Optional("wandb", "--report_to wandb", "looktwice[wandb]"),
    Optional("trackio", "--report_to trackio", "looktwice[trackio]"),
    Optional("textual-image", "pictures shown in the terminal", "looktwice[pictures]"),
    Optional("trl", "TRL's trainers on our model (docs/transformers.md)", "trl"),
    Optional("statsmodels", "intervals and paired tests of evaluations", "statsmodels"),
    Optional("fastapi", "serving over HTTP", "fastapi"),
)
LEAST_DISK, LEAST_SHARED = 20 * 10**9, 64 * 2**20
"""Bytes: a checkpoint of the 9B model with its optimizer's state under LoRA; what NCCL wants of /dev/shm."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: how it is, what that means, and the mend where something is to be done."""

    name: str
    found: str
    verdict: Verdict = "ok"
    mend: str = ""


@dataclass(frozen=True)
class Device:
    """One that a model can be put on, with its memory in bytes, where that is known."""

    name: str
    title: str
    total: int | None = None
    free: int | None = None
    attention: str = ""
    """What `auto` chooses there for training in bfloat16, or in float32 where that is not computed."""


def report(folder: Path) -> dict[str, Any]:
    """Everything, as plain data: versions, devices, optional packages, findings. `folder` is where runs would write."""
    return {
        "looktwice": installed("looktwice"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": [asdict(device) for device in devices()],
        "optional": {each.package: installed(each.package) for each in OPTIONAL},
        "findings": [asdict(finding) for finding in findings(folder)],
    }


def findings(folder: Path) -> Iterator[Finding]:
    """What is judged, in the order in which it is told."""
    yield Finding("looktwice", installed("looktwice") or "run from its sources")
    yield Finding("python", f"{platform.python_version()} on {platform.machine()} {platform.system()}")
    for package, least in REQUIRED.items():
        yield required(package, installed(package), least)
    yield accelerator()
    for device in devices():
        memory = "" if device.total is None else f", {_gigabytes(device.free or 0)} of {_gigabytes(device.total)} free"
        yield Finding(device.name, f"{device.title}{memory}; attention auto is {device.attention}")
    yield threads(torch.get_num_threads(), usable_cores(), os.environ.get("OMP_NUM_THREADS"))
    for each in OPTIONAL:
        yield optional(each, installed(each.package))
    yield writable(folder)
    yield disk(folder, shutil.disk_usage(_there(folder)).free)
    yield shared_memory()


def installed(package: str) -> str | None:
    """Its version, None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def required(package: str, found: str | None, least: str) -> Finding:
    """Whether a package that looktwice needs is there and new enough."""
    if found is None:
        return Finding(package, "not installed", "problem", f"pip install '{package}>={least}'")
    if _numbers(found) < _numbers(least):
        return Finding(package, found, "problem", f"older than {least}; pip install '{package}>={least}'")
    return Finding(package, found)


def optional(each: Optional, found: str | None) -> Finding:
    """What an optional package enables, or would."""
    if found is None:
        return Finding(each.package, f"not installed; for {each.enables}", "note", f"pip install '{each.install}'")
    return Finding(each.package, f"{found}: {each.enables}")


def _numbers(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: 2.13.0+cpu is (2, 13, 0)."""
    parts = []
    for part in text.split("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        parts.append(int(digits))
    return tuple(parts)


def devices() -> list[Device]:
    """GPUs, then the CPU."""
    found = []
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(number)
        major, minor = torch.cuda.get_device_capability(number)
        title = f"{torch.cuda.get_device_name(number)}, compute capability {major}.{minor}"
        name = f"cuda:{number}"
        found.append(Device(name, title, total, free, pick_attention("auto", name, is_bf16=True)))
    if torch.backends.mps.is_available():
        found.append(Device("mps", "Apple GPU; not tried with looktwice", attention="sdpa"))
    page = os.sysconf("SC_PAGE_SIZE")
    total, free = (page * os.sysconf(f"SC_{which}") for which in ("PHYS_PAGES", "AVPHYS_PAGES"))
    title = f"{usable_cores()} cores, {torch.backends.cpu.get_cpu_capability()}"
    return [*found, Device("cpu", title, total, free, pick_attention("auto", "cpu", is_bf16=False))]


def accelerator() -> Finding:
    """Whether torch can use a GPU that the machine has."""
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    build = build if torch.version.cuda or torch.version.hip else "CPU alone"
    name, has_driver = "torch's build", Path("/proc/driver/nvidia/version").exists()
    if has_driver and not torch.cuda.is_available():
        mend = "install the torch build of the driver's CUDA version: see pytorch.org"
        return Finding(name, f"{build}, and an NVIDIA driver is there that it cannot use", "problem", mend)
    if torch.cuda.is_available() and not has_varlen() and installed("flash-attn") is None:
        return Finding(name, f"{build}, without varlen attention", "note", "pip install 'looktwice[flash]'")
    return Finding(name, build)


def usable_cores() -> int:
    """Cores that this process may use, by its affinity and the limit of its control group."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # no such file, or no limit
        return cores


def threads(number: int, cores: int, said: str | None) -> Finding:
    """Whether torch computes with as many threads as there are cores."""
    found = f"{number} of torch on {cores} cores, OMP_NUM_THREADS {said or 'not set'}"
    if number > cores:
        return Finding(
            "threads", found, "problem", f"more than cores, which is many times slower; OMP_NUM_THREADS={cores}"
        )
    if number < cores and said is not None:
        return Finding("threads", found, "note", f"cores are idle; OMP_NUM_THREADS={cores} for one process alone")
    return Finding("threads", found)


def writable(folder: Path) -> Finding:
    """Whether runs can write there."""
    place = _there(folder)
    try:
        with tempfile.TemporaryFile(dir=place):
            return Finding("run folders", f"{folder} can be written")
    except OSError as error:
        mend = "give runs another place: --output_dir"
        return Finding("run folders", f"{place} cannot be written ({error.strerror})", "problem", mend)


def disk(folder: Path, free: int) -> Finding:
    """Whether there is room for checkpoints."""
    found = f"{_gigabytes(free)} free at {folder}"
    if free < LEAST_DISK:
        mend = "little for checkpoints of the 9B model; give runs another place, or a smaller --save_total_limit"
        return Finding("disk", found, "note", mend)
    return Finding("disk", found)


def shared_memory(place: Path = Path("/dev/shm")) -> Finding:
    """Whether processes of one machine can tell each other gradients there; our own workers do not need it."""
    if not place.is_dir():
        return Finding("shared memory", f"no {place}; not needed")
    free = shutil.disk_usage(place).free
    if free < LEAST_SHARED:
        mend = "several GPUs may need more: docker run --shm-size 1g, or NCCL_SHM_DISABLE=1"
        return Finding("shared memory", f"{free / 1e6:.0f} MB at {place}", "note", mend)
    return Finding("shared memory", f"{_gigabytes(free)} free at {place}")


def _there(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    place = folder.absolute()
    return next(parent for parent in (place, *place.parents) if parent.is_dir())


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
