"""Packages that only some uses need, each by the extra that installs it."""

from __future__ import annotations

import importlib
from typing import Any

from looktwice.errors import ConfigError


def require(module: str, *, extra: str, needed_by: str) -> Any:
    """The module. Raises ConfigError naming the extra when its package is not installed; `needed_by` says what for."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.split(".")[0]
        raise ConfigError(
            f'{package} is not installed, and {needed_by} needs it; run pip install "looktwice[{extra}]"'
        ) from error
