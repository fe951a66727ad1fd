"""The optimizer's state in a checkpoint: whole, or in shares of processes (torch's distributed checkpoint)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from looktwice.errors import CheckpointError
from looktwice.model.placement import placed_as


def write_moments(optimizer: torch.optim.Optimizer, names: Sequence[str], folder: Path) -> None:
    """Write the share of this process by `NAME/KEY`; `names` are those of the parameters, in the optimizer's order.

    Every process calls this at the same time.
    """
    state = optimizer.state_dict()["state"]
    named = {f"{names[number]}/{key}": value for number, values in state.items() for key, value in values.items()}
    dcp.save(named, checkpoint_id=folder)


def read_moments(folder: Path, optimizer: torch.optim.Optimizer, names: Sequence[str]) -> dict[str, Any]:
    """The state that any number of processes wrote, as this process holds its parameters.

    Raises CheckpointError when it cannot be read.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    by_name = dict(zip(names, parameters, strict=True))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.distributed is .*")  # one process reads by itself
            stored = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
            found = {name: like(entry, by_name[name.rpartition("/")[0]]) for name, entry in stored.items()}
            dcp.load(found, checkpoint_id=folder)
    except (OSError, KeyError, dcp.api.CheckpointException) as error:
        raise CheckpointError(f"{folder}: its optimizer state cannot be read ({error}); resume from another") from error
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in found.items():
        parameter, _, key = name.rpartition("/")
        state.setdefault(names.index(parameter), {})[key] = value
    return {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}


def like(stored: Any, parameter: Tensor) -> Tensor:
    """An empty tensor for what is stored: as the parameter is placed where it has its shape, else whole."""
    assert isinstance(stored, TensorStorageMetadata)
    if stored.size == parameter.shape:
        return torch.empty_like(parameter, dtype=stored.properties.dtype)
    return torch.empty(stored.size, dtype=stored.properties.dtype)


def placed_moments(moments: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A whole optimizer's state as this process holds its parameters."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        number: {
            key: placed_as(value, parameters[number]) if _is_like(value, parameters[number]) else value
            for key, value in values.items()
        }
        for number, values in moments["state"].items()
    }
    return {**moments, "state": state}


def _is_like(value: object, parameter: Tensor) -> bool:
    """Whether it is a moment of the parameter, and not a count of steps, or what bitsandbytes keeps of blocks."""
    return isinstance(value, Tensor) and value.shape == parameter.shape
