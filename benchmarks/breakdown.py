"""What a step is made of: its time by kind of operation, and by kind the bytes that are alive at its peak."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from looktwice.planning.live_bytes import LiveBytes
from looktwice.training.learner import Learner

KINDS_OF_TIME = {
    "matrix products": "mm addmm addmm_ bmm baddbmm linear",
    "attention": "_scaled_dot_product",
    "AdamW": "_fused_adamw_",
    "norm of the gradient": "linalg_vector_norm",
    "softmax and LayerNorm": "_softmax native_layer_norm _log_softmax",
    "activations of MLPs": "silu gelu",
    "copies and fills": "copy_ fill_ cat",
    "sums and products of elements": "add add_ sub sub_ mul mul_ div div_ neg pow exp_ rsqrt addcmul sum mean amax",
}
"""Beginnings of names of operations, or whole names, by what they are; all others only arrange tensors."""
KINDS_OF_BYTES = {
    "logprobs": "logits of a chunk, head's gradient",
    "visual_tokenizer": "visual words of a chunk, their gradients",
    "vision": "activations of the tower",
    "images": "activations of the tower",
    "modeling_qwen3": "activations of the layers",
    "attention": "activations of the layers",
    "modeling": "activations of the layers",
    "packing": "the row",
}
"""Files by what the tensors are that they make."""


def time_by_kind(step: Callable[[], object]) -> dict[str, float]:
    """Shares of the time of a step, after one that does not count."""
    step()
    started = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        step()
    total = time.perf_counter() - started
    seconds: Counter[str] = Counter()
    for event in seen.key_averages():
        seconds[kind_of_operation(event.key)] += event.self_cpu_time_total / 1e6
    seconds["Python between operations"] = max(0.0, total - sum(seconds.values()))
    return {kind: spent / sum(seconds.values()) for kind, spent in seconds.most_common()}


def kind_of_operation(name: str) -> str:
    if not name.startswith("aten::"):
        return "autograd and our own functions"
    name = name.removeprefix("aten::")
    for kind, names in KINDS_OF_TIME.items():
        if name in names.split() or any(name.startswith(each) for each in names.split() if len(each) >= 4):
            return kind
    return "views and memory"


def peak_by_kind(step: Callable[[], object], learner: Learner) -> dict[str, int]:
    """Bytes alive at the peak of a step that is the same each time."""
    with Census() as first:
        step()
    with Census(learner, stop_at=first.peak_operation) as second:
        step()
    return dict(second.found.most_common())


class Census(LiveBytes):
    """Live bytes with what made them; `found` are those after operation number `stop_at`."""

    def __init__(self, learner: Learner | None = None, stop_at: int | None = None) -> None:
        self.learner, self.stop_at = learner, stop_at
        self.operation = self.peak_operation = 0
        self.makers: dict[int, str] = {}
        self.found: Counter[str] = Counter()
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operation += 1
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if self.learner is not None and self.operation == self.stop_at:
            kinds = kept_by(self.learner)
            for key, size in self.sizes.items():
                self.found[kinds.get(key, self.makers.get(key, "others"))] += size
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        before, is_new = self.peak, storage._cdata not in self.sizes
        super()._see(storage)
        if is_new and self.operation:
            self.makers[storage._cdata] = maker()
        if self.peak > before:
            self.peak_operation = self.operation


def kept_by(learner: Learner) -> dict[int, str]:
    """What outlives a row, by its storage."""
    kinds = {weight.untyped_storage()._cdata: "weights" for weight in learner.model.parameters()}
    for moments in learner.optimizer.state.values():
        kinds |= {each.untyped_storage()._cdata: "moments of AdamW" for each in moments.values()}
    grads = [weight.grad for weight in learner.parameters if weight.grad is not None]
    return kinds | {grad.untyped_storage()._cdata: "gradients" for grad in grads}


def maker() -> str:
    """By the innermost of our or transformers' files that is being run."""
    frame = sys._getframe(1)
    while frame := frame.f_back:  # type: ignore[assignment]
        path = Path(frame.f_code.co_filename)
        is_known = "looktwice" in path.parts or path.stem == "modeling_qwen3"
        if is_known and path.stem in KINDS_OF_BYTES:
            return KINDS_OF_BYTES[path.stem]
        if path.stem == "graph":  # of torch.autograd: backward has no frames of ours
            return "gradients under way"
    return "others"
