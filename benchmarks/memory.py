"""Memory that steps take at their peak: on the 9B shape without memory, and on real ones beside what the plan says.

    python benchmarks/memory.py [--json FILE]

`9b_lora`: a row of 2,048 tokens with a picture of 896 x 896 pixels, after another row; bfloat16 weights, float32
adapters, all layers recomputed, as the documented LoRA command runs on a GPU. `body`, 60M parameters in 16 layers, is
trained for real in a process of its own on two such rows: `measured` is the most that torch's CPU allocator had given
out, kernels' own memory included, `resident` how far the process grew above what it was before, `counted` the live
tensors of the same step without memory, and `ratio` counted over measured. What malloc adds is `resident` less
`measured`; neither that nor a GPU's context is in the counts.
"""

from __future__ import annotations

import multiprocessing
import re
from functools import partial
from pathlib import Path

import numpy as np
import torch
from measure import parser, publish
from models import config_of
from torch.profiler import ProfilerActivity, profile

from looktwice.config import ModelConfig, SFTConfig
from looktwice.planning.layers import peak_of
from looktwice.planning.plan import COMMON, lora
from looktwice.planning.rehearsal import Load, sft

RANKS = (128, 64, 32)
LOAD = Load(tokens=2048, image_tokens=784)
GOALS = {"r128_gigabytes": "at most 26", "r64_gigabytes": "at most 22.5", "r32_gigabytes": "at most 20"}
GOALS |= {"ratio": "0.9 to 1.1"}
REAL = {"full": SFTConfig(), "lora": SFTConfig(**dict(lora(64))), "recomputed": SFTConfig(gradient_checkpointing="all")}


def main() -> None:
    arguments = parser().parse_args()
    figures = {}
    config = config_of("9B")
    config.vit_config.patch_size, config.vit_config.num_patches = 16, -1
    for rank in RANKS:
        stage = SFTConfig(**COMMON, **dict(lora(rank)))
        peak = peak_of(config, partial(sft, model=ModelConfig(), stage=stage, load=LOAD))
        figures[f"9b_lora.r{rank}_gigabytes"] = peak.total / 1e9
    for name, stage in REAL.items():
        rehearse = partial(sft, model=ModelConfig(), stage=stage, load=LOAD, on="cpu")
        counted = peak_of(config_of("body"), rehearse).total
        measured, resident = apart(name)
        figures |= {
            f"body_{name}.counted_gigabytes": counted / 1e9,
            f"body_{name}.measured_gigabytes": measured / 1e9,
            f"body_{name}.resident_gigabytes": resident / 1e9,
            f"body_{name}.ratio": counted / measured,
        }
    publish(figures, arguments, GOALS)


def apart(name: str) -> tuple[int, int]:
    """What `real_peaks` says in a new process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(real_peaks, (name,))


def real_peaks(name: str) -> tuple[int, int]:
    """Bytes that the allocator had given out at the most, and by which this process grew, through model and steps."""
    torch.set_num_threads(1)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark begins anew
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        sft(config_of("body"), ModelConfig(), REAL[name], LOAD, "real")
    resident = status("VmHWM") - before
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    given_out = np.cumsum([event.nbytes() for event in sorted(events, key=lambda each: each.start_ns())])
    return int(given_out.max()), resident


def status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"{field}:\s+(\d+) kB", text)
    assert found
    return int(found[1]) * 1024


if __name__ == "__main__":
    main()
