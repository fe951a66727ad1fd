"""What torchrun tells each process it starts: its rank, and how many there are."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import NamedTuple

from looktwice.errors import ConfigError, LooktwiceError

OTHER_LAUNCHERS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
SECONDS_BEFORE_RANK_0 = 5.0
"""So long a process waits with an error that rank 0 most likely has too, and tells."""


class Launch(NamedTuple):
    """This process among all: `rank` of `size`, and `local_rank` of the `local_size` of its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def launched() -> Launch:
    """Who this process is, by the variables of torchrun; one by itself is rank 0 of 1.

    Raises ConfigError where they are incomplete, or another launcher has started several processes.
    """
    size = _number("WORLD_SIZE", 1)
    if size <= 1:
        for name in OTHER_LAUNCHERS:
            if (others := _number(name, 1)) > 1:
                raise ConfigError(f"started as one of {others} processes ({name}); start them with torchrun instead")
        return Launch()
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(
            f"started as one of {size} processes (WORLD_SIZE) without {', '.join(missing)}; start them with torchrun"
        )
    return Launch(_number("RANK", 0), size, _number("LOCAL_RANK", 0), _number("LOCAL_WORLD_SIZE", size))


def _number(name: str, default: int) -> int:
    """The number of a variable. Raises ConfigError for what is none."""
    try:
        return int(os.environ.get(name) or default)
    except ValueError as error:
        raise ConfigError(f"{name} is {os.environ[name]!r}; it must be a number, as torchrun sets it") from error


@contextmanager
def speaking_once() -> Iterator[None]:
    """Inside, only rank 0 writes to stdout, and an error that all processes have is told by rank 0 alone.

    An error of another rank waits a little: torchrun ends all processes once one has ended.
    """
    rank = launched().rank
    if rank == 0:
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        try:
            yield
        except LooktwiceError as error:
            if not isinstance(error, RankError):
                time.sleep(SECONDS_BEFORE_RANK_0)
                raise RankError(f"rank {rank}: {error}") from error
            raise
        except KeyboardInterrupt as interrupt:
            sys.exit(128 + getattr(interrupt, "number", signal.SIGINT))


class RankError(LooktwiceError):
    """An error that says which process had it."""
