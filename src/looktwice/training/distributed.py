"""The processes that train one model together: who this one is, what they tell each other, how gradients are summed.

`World` is one process by itself, in which each of these is nothing to do. `Replicated` are several with the whole model
each; `training/sharded.py` has those that hold a share of it.
"""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from looktwice.data.order import balanced
from looktwice.errors import ConfigError, counted
from looktwice.launch import Launch, RankError
from looktwice.model.adapters import trained_parameters
from looktwice.model.placement import whole
from looktwice.model.weights import pick_device, written_whole
from looktwice.processing.packing import PackedBatch
from looktwice.training.watchdog import Watchdog

T = TypeVar("T")
BUCKET_BYTES = 64 * 2**20
"""Gradients that are summed over the processes at once."""


class DistributedError(RankError):
    """The processes of a run differ in what must be alike, or one of them is gone."""


class World:
    """This process alone."""

    rank, size, kind = 0, 1, "alone"
    can_repeat = True
    """Whether this process can take rows again when its memory runs out."""
    waited = 0.0
    """Seconds of waiting for the others, wherever they tell each other something and before gradients are summed, which
    nobody has taken account of yet."""

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes, logs and shows."""
        return self.rank == 0

    def at(self, phase: str, step: int) -> None:
        """Say what phase of which step this process begins. All begin the same ones in the same order."""

    def sum(self, *values: float) -> list[float]:
        """Each value summed over all processes."""
        return list(values)

    def gather(self, items: Sequence[T]) -> list[T]:
        """The items of all processes, by rank."""
        return list(items)

    def from_main(self, function: Callable[[], T]) -> T:
        """What the function gives in rank 0, which alone calls it."""
        return function()

    def wait_for_all(self) -> None:
        """Go on when every process has come here."""

    def check_alike(self, name: str, fact: Callable[[], object]) -> None:
        """Raise DistributedError where a fact, asked for in each process, differs from that of rank 0."""

    def share(self, costs: Sequence[float]) -> list[int]:
        """Places of the costs that fall to this process, in order; all processes together have each once."""
        return list(range(len(costs)))

    def device(self, named: str | None) -> str:
        """The device this process computes on. Raises ConfigError for one that is not there."""
        return pick_device(named)

    def loads_on(self, device: str) -> str:
        """The device a model is loaded on."""
        return device

    def prepared(self, model: nn.Module, device: str) -> nn.Module:
        """The model, whose trained weights are the same in all processes, as they hold it."""
        return model

    @contextmanager
    def whole_model(self, model: nn.Module) -> Iterator[None]:
        """While it lasts this process has all weights of the model, and runs it as often as it likes, without the
        others. All of them enter and leave it at the same time; inside another block it does nothing."""
        yield

    def even(self, rows: Sequence[PackedBatch], step: int) -> Iterable[PackedBatch]:
        """The rows of this process, and rows without weight where the way it holds the model asks for them."""
        return rows

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace each gradient by its sum over all processes. One that no process has stays None."""

    def clip(self, parameters: Sequence[nn.Parameter], max_norm: float) -> float:
        """Scale the summed gradients down to a norm, 0 for no limit, and give the norm they had."""
        return float(whole(nn.utils.clip_grad_norm_(parameters, max_norm or math.inf)))

    def weights(self, model: nn.Module) -> dict[str, Tensor] | None:
        """Weights to save in place of the model's own, where those are in shares; None where they are whole."""
        return None

    @contextmanager
    def written_whole(self, folder: Path) -> Iterator[Path]:
        """`model.weights.written_whole` in rank 0, with its draft for all to write into."""
        with written_whole(folder) as draft:
            yield draft

    def moments(self, optimizer: torch.optim.Optimizer, names: Sequence[str], draft: Path) -> dict[str, Any] | None:
        """The optimizer's state as rank 0 saves it; None where each process has written its share into the draft."""
        return optimizer.state_dict()


class Replicated(World):
    """One of several processes, each with the whole model. The rows they train may differ in number and kind: each goes
    backward by itself, and gradients are summed once a step, in buckets, after the last row."""

    kind = "each with the whole model (ddp)"

    def __init__(self, launch: Launch, watchdog: Watchdog) -> None:
        self.rank, self.size, self.local_rank, _ = launch
        self.watchdog = watchdog

    def at(self, phase: str, step: int) -> None:
        self.watchdog.at(phase, step)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Something that is over when the others have come to the same place, which takes them as long as it does."""
        self.watchdog.arrive()
        started = time.perf_counter()
        yield
        self.waited += time.perf_counter() - started

    def sum(self, *values: float) -> list[float]:
        total = torch.tensor(values, dtype=torch.float64)
        with self.waiting():
            dist.all_reduce(total)
        return total.tolist()

    def gather(self, items: Sequence[T]) -> list[T]:
        everyone: list[list[T]] = [[] for _ in range(self.size)]
        with self.waiting():
            dist.all_gather_object(everyone, list(items))
        return [item for each in everyone for item in each]

    def from_main(self, function: Callable[[], T]) -> T:
        result: list[Any] = [function() if self.is_main else None]
        with self.waiting():
            dist.broadcast_object_list(result, src=0, device=torch.device("cpu"))
        return cast(T, result[0])

    def wait_for_all(self) -> None:
        self.sum(0)

    def check_alike(self, name: str, fact: Callable[[], object]) -> None:
        own = fact()
        if (value := self.from_main(lambda: own)) != own:
            raise DistributedError(
                f"{name} of rank {self.rank} ({socket.gethostname()}) is not that of rank 0 ({own}, not {value}); give "
                "every machine the same files and flags"
            )

    def share(self, costs: Sequence[float]) -> list[int]:
        return balanced(costs, self.size)[self.rank]

    def device(self, named: str | None) -> str:
        device = pick_device(named)
        if device != "cuda":
            return device
        if self.local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"process {self.local_rank + 1} of this machine finds {counted(torch.cuda.device_count(), 'GPU')}; "
                "start one process a GPU: --nproc_per_node"
            )
        torch.cuda.set_device(self.local_rank)
        return f"cuda:{self.local_rank}"

    def prepared(self, model: nn.Module, device: str) -> nn.Module:
        for _, parameter in trained_parameters(model):
            dist.broadcast(parameter.data, src=0)
        return model

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        has_one = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.int32)
        with self.waiting():
            dist.all_reduce(has_one)
        gradients = []
        for parameter, number in zip(parameters, has_one.tolist()):
            if number:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
        for bucket in buckets(gradients):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            dist.all_reduce(flat)
            for gradient, total in zip(bucket, flat.split([gradient.numel() for gradient in bucket])):
                gradient.copy_(total.view_as(gradient))

    @contextmanager
    def written_whole(self, folder: Path) -> Iterator[Path]:
        with ExitStack() as stack:
            draft = self.from_main(lambda: stack.enter_context(written_whole(folder)))
            yield draft
            self.wait_for_all()
        self.wait_for_all()


def buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients in groups of one dtype and at most BUCKET_BYTES, in order; a larger one is a group by itself."""
    bucket: list[Tensor] = []
    size = 0
    for gradient in gradients:
        if bucket and (size + gradient.nbytes > BUCKET_BYTES or gradient.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.nbytes
    if bucket:
        yield bucket
