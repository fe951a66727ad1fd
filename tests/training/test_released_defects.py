"""Defects of the released trainer: each has a test that it is not here, and docs/method.md says which."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from looktwice.training.learner import Learner

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
NAMED = re.findall(r"\| `(tests/[\w/]+\.py): (test_\w+)` \|", PAGE)


def test_the_page_has_all_fourteen() -> None:
    assert len(NAMED) == 14


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_the_test_that_the_page_names_is_there(file, name) -> None:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_without_a_kl_term_there_is_no_reference(run, monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a reference was made")

    monkeypatch.setattr(Learner, "freeze_reference", refuse)
    run("without", max_steps=1)
    with pytest.raises(AssertionError, match="a reference was made"):
        run("with", max_steps=1, beta=0.1)


def test_a_step_writes_no_image(run, tmp_path) -> None:
    before = {*tmp_path.rglob("*")}
    run(max_steps=1)
    written = {path.suffix for path in {*tmp_path.rglob("*")} - before if path.is_file()}
    assert written and not written & {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
