"""How the processes that torchrun started become a world, and how they end: all, once one of them does."""

from __future__ import annotations

import atexit
import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import count

import torch.distributed as dist

from looktwice.config import ModelConfig, StageConfig
from looktwice.errors import LooktwiceError, one_line
from looktwice.launch import Launch, RankError, speaking_once
from looktwice.model.weights import pick_device
from looktwice.training.distributed import DistributedError, Replicated, World
from looktwice.training.sharded import Sharded
from looktwice.training.start import check_processes
from looktwice.training.watchdog import Watchdog, told

KINDS: dict[str, type[Replicated]] = {"ddp": Replicated, "fsdp": Sharded}
LEAST_SECONDS = 3600.0
"""How long torch waits for a process at least; the watchdog names the one that is late before."""
_joins = count()


@contextmanager
def joined(model: ModelConfig, config: StageConfig) -> Iterator[World]:
    """The processes of this run, once all of them are here. An error of one ends all, and is told once.

    Raises ConfigError for what several processes cannot do, and DistributedError when one is gone.
    """
    launch = check_processes(model, config)
    if launch.size == 1:
        yield World()
        return
    with speaking_once(), warnings.catch_warnings():
        if launch.rank:
            logging.disable(logging.WARNING)
            warnings.simplefilter("ignore")
        store = rendezvous(launch, on_gpu=pick_device(model.device).startswith("cuda"), timeout=config.process_timeout)
        holds_store = launch.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        watchdog = Watchdog(store, launch.rank, launch.size, timeout=config.process_timeout, holds_store=holds_store)
        watchdog.start()
        try:
            yield KINDS[config.distributed](launch, watchdog)
        except BaseException as error:
            tell_once(error, watchdog)
            raise
        finally:
            watchdog.stop()
            logging.disable(logging.NOTSET)


def rendezvous(launch: Launch, *, on_gpu: bool, timeout: float) -> dist.Store:
    """Wait for all processes, and give a store of this run that all of them read and write."""
    if not dist.is_initialized():
        seconds = timedelta(seconds=max(LEAST_SECONDS, 2 * timeout))
        store, rank, size = next(dist.rendezvous("env://", launch.rank, launch.size, timeout=seconds))
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=seconds)
        atexit.register(dist.destroy_process_group)
    shared = dist.distributed_c10d._get_default_store()
    return dist.PrefixStore(f"looktwice/{next(_joins)}", shared)


def tell_once(error: BaseException, watchdog: Watchdog) -> None:
    """Of the errors that end several processes leave the first to be told, with its rank."""
    watchdog.is_done.set()  # or it would end this process before the error is told
    atexit.unregister(dist.destroy_process_group)  # it would wait for those that are gone
    if isinstance(error, KeyboardInterrupt | SystemExit):
        return
    try:
        is_first = watchdog.is_first_to_fail()
    except RuntimeError:  # the store is gone with the process that held it
        is_first = False
    if not is_first:
        raise SystemExit(1) from None
    if isinstance(error, LooktwiceError):
        raise RankError(f"rank {watchdog.rank}: {error}") from error
    if isinstance(error, dist.DistError) or "gloo" in str(error).lower():
        raise DistributedError(
            f"rank {watchdog.rank} {watchdog.place}: another process is gone or does not answer ({reason(error)}); "
            f"last seen: {told(watchdog.others())}"
        ) from error


def reason(error: BaseException) -> str:
    """What torch says of a connection, without where in its code and what else might be."""
    return one_line(re.sub(r"^\[\S+\] ", "", str(error)).split(". ")[0], 120)
