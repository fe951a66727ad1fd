"""Packages that only some uses need."""

from __future__ import annotations

import json

import pytest

from looktwice.errors import ConfigError
from looktwice.extras import require


def test_a_package_is_given_or_its_extra_is_named() -> None:
    assert require("json", extra="x", needed_by="a test") is json
    told = 'no_such_package is not installed, and a test needs it; run pip install "looktwice\\[x\\]"'
    with pytest.raises(ConfigError, match=told):
        require("no_such_package.part", extra="x", needed_by="a test")
