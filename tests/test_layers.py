"""The order of the house: a module imports only from its own layer or one below."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "looktwice"

# one layer an entry, the lowest first; a name stands for itself and for all below it
LAYERS = (
    (
        "errors",
        "drafts",
        "launch",
        "neighbours",
        "paths",
        "geometry",
        "extras",
        "console",
        "trackers",
        "metrics",
        "other_trainers",
        "serving",
    ),
    ("config", "messages", "calls", "model.configuration", "model.location"),
    ("processing",),
    ("model", "serving.modeling_ovis2_5"),
    ("engine", "rollout", "judging", "answers", "grounding", "rewards", "custom_reward", "rewarding"),
    ("data",),
    ("formats",),
    ("checking", "benches"),
    ("training", "asking", "inference", "export", "evaluation", "planning", "doctor", "report", "demo", "server"),
    ("cli", "__init__", "__main__"),
)
DRAWERS = ("utils", "common", "helpers", "misc")


def name_of(path: Path) -> str:
    """`model/vision.py` is `model.vision`; the package itself is `__init__`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def layer_of(module: str) -> int | None:
    """The number of the layer whose entry fits best, None when the module has no place."""
    fits = [
        (len(entry), number)
        for number, layer in enumerate(LAYERS)
        for entry in layer
        if module == entry or module.startswith(f"{entry}.")
    ]
    return max(fits)[1] if fits else None


def imports_of(tree: ast.AST) -> Iterator[str]:
    """The looktwice modules that a module names, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (_module(alias.name) for alias in node.names if alias.name.split(".")[0] == "looktwice")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import; name the module in full"
            if node.module and node.module.split(".")[0] == "looktwice":
                yield from (_module(f"{node.module}.{alias.name}") for alias in node.names)


def names_in(tree: ast.AST) -> Iterator[str]:
    """All identifiers, those inside f-strings too, which `tokenize` passes over before Python 3.12."""
    for node in ast.walk(tree):
        for field in ("id", "attr", "arg", "name", "asname", "module"):
            if isinstance(name := getattr(node, field, None), str):
                yield name


def _module(dotted: str) -> str:
    """The longest beginning of a dotted name that is one of our modules."""
    parts = dotted.split(".")[1:]
    while parts and ".".join(parts) not in MODULES:
        parts.pop()
    return ".".join(parts) or "__init__"


IMPORTS = {module: set(imports_of(ast.parse(path.read_text(encoding="utf-8")))) for module, path in MODULES.items()}


def test_the_package_is_found() -> None:
    assert {"geometry", "model.vision", "processing.images", "cli", "__init__"} <= MODULES.keys()
    assert "processing.images" in IMPORTS["data.problems"]


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_a_layer(module: str) -> None:
    assert layer_of(module) is not None, f"{module} has no place in LAYERS"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_nothing_from_above(module: str) -> None:
    own = layer_of(module)
    assert own is not None
    above = {name for name in IMPORTS[module] if (layer_of(name) or 0) > own}
    assert not above, f"{module} (layer {own}) imports {above} from above"


def test_no_module_imports_itself_in_a_circle() -> None:
    TopologicalSorter(IMPORTS).prepare()


@pytest.mark.parametrize("module", MODULES)
def test_no_module_is_a_drawer_for_what_nobody_placed(module: str) -> None:
    assert not set(module.split(".")) & set(DRAWERS)


@pytest.mark.parametrize("module", MODULES)
def test_an_image_has_one_name_in_identifiers(module: str) -> None:
    """Code says image, as its field does; what people read says picture."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    assert not {name for name in [module, *names_in(tree)] if "picture" in name.lower()}


def test_folders_are_at_most_two_levels_deep() -> None:
    assert [module for module in MODULES if module.count(".") > 1] == []


@pytest.mark.parametrize("room", [path.parent.name for path in sorted(PACKAGE.glob("*/__init__.py"))])
def test_the_map_says_of_a_room_what_the_room_says_of_itself(room: str) -> None:
    purpose = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8")))
    page = (PACKAGE.parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert f"`{room}/` | {purpose} |" in page


def test_every_file_that_the_map_names_is_there() -> None:
    page = (PACKAGE.parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = {name for name in re.findall(r"`(\w+/\w+\.py)", page) if not name.startswith(("tests/", "benchmarks/"))}
    assert len(named) > 20
    assert {name for name in named if not (PACKAGE / name).exists()} == set()
