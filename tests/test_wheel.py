"""The package as it is shipped: a wheel that answers without the source tree."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
PARTS = {"starlette", "pydantic_core", "markupsafe", "tokenizers"}
"""Packages that come with pydantic, jinja2 and transformers."""
BUILT_FROM = ("pyproject.toml", "README.md", "LICENSE")


def run(*words: str | Path, cwd: Path) -> str:
    # what pip says of its own age is no failure, and nothing may be fetched
    quiet = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INDEX": "1", "PYTHONPATH": "", "COLUMNS": "200"}
    done = subprocess.run(list(map(str, words)), cwd=cwd, env={**os.environ, **quiet}, capture_output=True, text=True)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment that holds the wheel and, of what is installed here, all but looktwice."""
    folder = tmp_path_factory.mktemp("shipped")
    source = folder / "source"
    source.mkdir()
    for name in BUILT_FROM:
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    pip = (sys.executable, "-m", "pip", "--quiet")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source, cwd=folder)
    shutil.rmtree(source)
    venv.create(folder / "venv", with_pip=False)
    programs = folder / "venv" / "bin"
    [wheel] = folder.glob("looktwice-*.whl")
    run(*pip, "--python", programs / "python", "install", "--no-deps", wheel, cwd=folder)
    # a plain path: the editable looktwice in there is found by a .pth file of its own, which is not read then
    [site] = (folder / "venv").glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    return programs


def test_the_wheel_names_every_package_that_it_imports(environment: Path) -> None:
    # the environment borrows what is installed here, so a name that is missing would not be missed
    [metadata] = environment.parent.glob("lib/python*/site-packages/looktwice-*.dist-info/METADATA")
    named = re.findall(r"^Requires-Dist: ([\w-]+)", metadata.read_text(encoding="utf-8"), re.MULTILINE)
    imported = {
        name.split(".")[0]
        for path in (ROOT / "src").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for name in names_imported(node)
    }
    third_party = imported - sys.stdlib_module_names - {"looktwice", "vllm"}  # vllm: another environment's
    homes = packages_distributions() | {"flash_attn": ["flash-attn"], "wandb": ["wandb"], "trackio": ["trackio"]}
    missing = {
        name for name in third_party if not {canonical(home) for home in homes[name]} & set(map(canonical, named))
    }
    assert len(third_party) > 10 and missing <= PARTS


def names_imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) and node.module else []


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_tiny_model_answers_from_the_wheel(environment: Path, tmp_path: Path) -> None:
    home = run(environment / "python", "-c", "import looktwice; print(looktwice.__file__)", cwd=tmp_path)
    assert Path(home.strip()).is_relative_to(environment.parent)
    Image.new("RGB", (160, 120), "red").save(tmp_path / "a.png")
    question = ("ask", "a.png", "What digit is on the red tile?", "--model_path", "tiny", "--device", "cpu")
    answer = run(environment / "looktwice", *question, "--max_new_tokens", "8", cwd=tmp_path)
    assert answer.splitlines()[0] == "picture: 160x120, seen as 96x80" and "answer: " in answer


def test_pages_and_templates_are_in_the_wheel(environment: Path, tmp_path: Path) -> None:
    Image.new("RGB", (160, 120), "red").save(tmp_path / "a.png")
    (tmp_path / "d.jsonl").write_text('{"image_path": "a.png", "QnA": [{"Q": "Q?", "A3": "<answer>a</answer>"}]}\n')
    for verb in ("show", "stats"):
        command = ("data", verb, "d.jsonl", "--model_name", "tiny", "--html", f"{verb}.html")
        run(environment / "looktwice", *command, cwd=tmp_path)
        assert (tmp_path / f"{verb}.html").stat().st_size > 1000
