"""`looktwice report`: pages of runs, of their rollouts, and of evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from looktwice.cli.arguments import argument, read_command
from looktwice.config import Config
from looktwice.errors import ConfigError
from looktwice.metrics import LOG_FILE
from looktwice.paths import check_name, check_output_file, place

STEP_FILE = ".jsonl.zst"
Kind = Literal["run", "rollouts", "evaluation"]
MEANINGS: dict[Kind, str] = {
    "run": "a run",
    "rollouts": "rollouts of a run",
    "evaluation": "a result of looktwice eval",
}


def run(words: Sequence[str]) -> None:
    """A page of runs, of a run's trajectories, or of evaluations: looktwice report RUN|RESULT... --out page.html."""
    given, _ = read_command(
        run,
        "report",
        "RUN|RUN/trajectories|RESULT...",
        words,
        Config,
        argument(
            "places",
            metavar="RUN|RUN/trajectories|RESULT",
            nargs="+",
            type=place,
            help="folders of runs, which are compared; or trajectories of one; or results of `looktwice eval`",
        ),
        argument("--out", metavar="FILE", type=place, required=True, help="the page"),
    )
    places = runs_in(given["places"])
    kind = kind_of_all(places)
    check_output_file(given["out"], "--out", places)
    if kind == "run":
        from looktwice.report.run_page import write_run_page

        write_run_page(given["out"], places)
    elif kind == "rollouts":
        from looktwice.report.trajectory_page import write_trajectory_page

        write_trajectory_page(given["out"], places)
    else:
        from looktwice.report.evaluation_page import write_evaluation_page

        write_evaluation_page(given["out"], places)
    print(f"page: {given['out']}")


def runs_in(places: Sequence[Path]) -> list[Path]:
    """The places, a folder of runs, such as that of a demo, replaced by the runs in it."""
    found: list[Path] = []
    for one in places:
        inner = [] if (one / LOG_FILE).exists() or not one.is_dir() else sorted(one.glob(f"*/{LOG_FILE}"))
        found += [log.parent for log in inner] or [one]
    return found


def kind_of_all(places: Sequence[Path]) -> Kind:
    """The page that all places belong on. Raises ConfigError where one is on none, or two are on different ones."""
    kinds = {one: kind_of(one) for one in places}
    first, *others = kinds.items()
    for one, kind in others:
        if kind != first[1]:
            raise ConfigError(
                f"{first[0]} is {MEANINGS[first[1]]} and {one} is {MEANINGS[kind]}; give those of one kind, a page each"
            )
    return first[1]


def kind_of(one: Path) -> Kind:
    check_name(one, str(one))
    if one.is_dir():
        if (one / LOG_FILE).is_file():
            return "run"
        if any(one.glob(f"step-*{STEP_FILE}")):
            return "rollouts"
        raise ConfigError(
            f"{one}: neither a run folder (no {LOG_FILE}) nor one of trajectories (no step-N{STEP_FILE}); name another"
        )
    if not one.is_file():
        raise ConfigError(f"{one}: no such run folder or file; check the path")
    return "rollouts" if one.name.endswith(STEP_FILE) else "evaluation"
