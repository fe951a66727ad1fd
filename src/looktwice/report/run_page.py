"""The HTML page of training runs: curves side by side, alarms, settings, and on what each ran.

All of it is read from the run folders, so a run that is still going on has a page too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from looktwice.errors import DataError
from looktwice.metrics import LOG_FILE, METRICS, four_digits, read_log
from looktwice.report.charts import Chart, Line, curves
from looktwice.report.html import CHARTS, PLOTLY, write_html
from looktwice.report.tables import Table
from looktwice.training.alarms import ALARMS
from looktwice.training.folder import CONFIG_FILE
from looktwice.training.provenance import read_run

STAGES = {"sft": "SFT", "grpo": "R-GRPO"}
LONGEST_CELL = 300


class Curves(NamedTuple):
    """Metrics that belong on one chart; a star in a name stands for any word."""

    title: str
    y_name: str
    metrics: tuple[str, ...]
    kind: Literal["plain", "share", "log", "stacked"] = "plain"


CURVES = (
    Curves("Loss", "per trained token", ("loss", "eval/loss")),
    Curves(
        "Right answers",
        "share",
        ("rollout/right", "eval/accuracy", "rollout/right_with_crop", "rollout/right_without_crop"),
        "share",
    ),
    Curves(
        "Reward by term",
        "mean, as paid",
        ("reward/total", "reward/accuracy", "reward/format", "reward/length", "reward/region", "reward/own/*"),
    ),
    Curves("Reward of right and wrong answers", "mean", ("reward/total_right", "reward/total_wrong")),
    Curves("Crop calls", "per answer", ("tool/calls", "eval/calls")),
    Curves("Crops", "share", ("tool/crop_share", "tool/valid_share", "tool/mean_iou", "tool/whole_share"), "share"),
    Curves("Refused calls", "share of the calls", ("tool/refused/*",)),
    Curves(
        "Lengths",
        "tokens per rollout",
        (
            "rollout/num_tokens",
            "rollout/num_tokens_right",
            "rollout/num_tokens_wrong",
            "rollout/trained_tokens",
            "rollout/visual_tokens",
        ),
    ),
    Curves("How rollouts end", "share", ("rollout/truncated", "rollout/stop/*"), "share"),
    Curves("Groups without signal", "share", ("group/all_right", "group/all_wrong", "group/dropped"), "share"),
    Curves("Gap of trainer and engine", "nats", ("gap/mean", "gap/max"), "log"),
    Curves("Policy", "nats", ("policy/entropy", "kl/reference", "kl/sampling")),
    Curves("Clipped tokens", "share", ("clip/low", "clip/high", "importance/left_out")),
    Curves("Gradient norm", "before clipping", ("optim/grad_norm",)),
    Curves("Learning rate", "", ("optim/lr",)),
    Curves(
        "Time by phase",
        "seconds",
        (
            "time/data_s",
            "time/rollout_s",
            "time/reward_s",
            "time/reference_s",
            "time/update_s",
            "time/eval_s",
            "time/saving_s",
            "time/waiting_s",
        ),
        "stacked",
    ),
    Curves("Seconds of a step", "seconds", ("time/step_s",)),
    Curves("Idle and waiting", "share", ("time/idle_share", "time/data_wait_share"), "share"),
    Curves(
        "Speed", "tokens per second", ("perf/tokens_per_s", "perf/sampled_tokens_per_s", "perf/trained_tokens_per_s")
    ),
)
UNDRAWN = ("step", "alarm/*", "epoch", "optim/updates", "group/number")


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run folder says: its log, a mapping a step, its settings by dotted names, and its starts."""

    name: str
    folder: Path
    stage: str
    lines: Sequence[Mapping[str, float]]
    settings: Mapping[str, str]
    starts: Sequence[Mapping[str, Any]]

    def line(self, metric: str) -> Line:
        """A metric at the steps that have it."""
        found = [(int(line["step"]), float(line[metric])) for line in self.lines if metric in line]
        steps, values = zip(*found) if found else ((), ())
        return Line(name=self.name, steps=steps, values=values)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The runs of one stage, drawn into the same charts."""

    name: str
    runs: tuple[Run, ...]
    charts: tuple[Chart, ...]


def write_run_page(path: Path, folders: Sequence[Path]) -> None:
    """Write the page of one run, or of several that are compared. Raises DataError for a folder without a log."""
    order = [*STAGES]
    runs = sorted(read_runs(folders), key=lambda run: order.index(run.stage) if run.stage in order else len(order))
    names = dict.fromkeys(run.stage for run in runs)
    stages = [stage_of(name, [run for run in runs if run.stage == name]) for name in names]
    write_html(
        path,
        "run.html.jinja",
        scripts=(PLOTLY, CHARTS),
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        lead=", ".join(str(run.folder) for run in runs),
        overview=overview_table(runs),
        stages=stages,
        alarms=[alarm_table(run.lines, title=run.name) for run in runs if run.stage != "sft"],
        settings=value_tables("Settings", {run.name: run.settings for run in runs}),
        environment=value_tables("Environment", {run.name: environment_of(run) for run in runs}),
        glossary=glossary(runs),
    )


def read_runs(folders: Sequence[Path]) -> list[Run]:
    return [read_one(folder, name) for folder, name in zip(folders, short_names(folders))]


def read_one(folder: Path, name: str) -> Run:
    lines = read_log(folder / LOG_FILE)
    if not lines:
        raise DataError(f"{folder}: no step in its {LOG_FILE}; name the folder of a run that has taken one")
    try:
        values = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        values = None
    run = read_run(folder)
    starts = run.get("starts")
    return Run(
        name=name,
        folder=folder,
        stage=str(run.get("stage", "grpo" if any("reward/total" in line for line in lines) else "sft")),
        lines=lines,
        settings=dict(flat(values if isinstance(values, dict) else {})),
        starts=[start for start in starts if isinstance(start, dict)] if isinstance(starts, list) else [],
    )


def short_names(paths: Sequence[Path]) -> list[str]:
    """As many last parts of each path as tell them apart, without those at the end that are the same in all.

    Example: short_names([Path("a/seed-0/grpo"), Path("a/seed-1/grpo")]) == ["seed-0", "seed-1"]
    """
    absolute = [path.absolute().parts for path in paths]
    for count in range(1, max(map(len, absolute)) + 1):
        tails = [parts[-count:] for parts in absolute]
        if len({*tails}) == len(tails):
            while len(tails) > 1 and len({tail[-1] for tail in tails}) == 1:
                tails = [tail[:-1] for tail in tails]
            return ["/".join(tail) for tail in tails]
    return [f"{number}. {path}" for number, path in enumerate(paths, 1)]


def stage_of(name: str, runs: Sequence[Run]) -> Stage:
    return Stage(name=STAGES.get(name, name), runs=tuple(runs), charts=tuple(charts_of(runs)))


def charts_of(runs: Sequence[Run]) -> Iterator[Chart]:
    """The curves of a run, those that belong together on one chart; of several runs a chart a metric, a line a run."""
    logged = [*dict.fromkeys(name for run in runs for line in run.lines for name in line)]
    drawn = {*_matching(UNDRAWN, logged)}
    for group in CURVES:
        metrics = _matching(group.metrics, logged)
        drawn |= {*metrics}
        yield from _charts(group, metrics, runs)
    for metric in logged:
        if metric not in drawn:
            yield from _charts(Curves(metric, "", (metric,)), [metric], runs)


def _charts(group: Curves, metrics: Sequence[str], runs: Sequence[Run]) -> Iterator[Chart]:
    options = {"is_share": group.kind == "share", "is_log": group.kind == "log"}
    if not metrics:
        return
    if len(runs) == 1:
        names = dict(zip(metrics, _without_area(metrics)))
        lines = [replace(runs[0].line(metric), name=name) for metric, name in names.items()]
        yield curves(lines, title=group.title, y_name=group.y_name, stacked=group.kind == "stacked", **options)
        return
    for metric in metrics:
        title = group.title if len(metrics) == 1 else f"{group.title}: {metric}"
        yield curves([run.line(metric) for run in runs], title=title, y_name=group.y_name, **options)


def _without_area(metrics: Sequence[str]) -> list[str]:
    """Names without the area before the stroke, where they all have the same one."""
    areas = {metric.partition("/")[0] for metric in metrics}
    return [metric.partition("/")[2] or metric for metric in metrics] if len(areas) == 1 else [*metrics]


def _matching(patterns: Sequence[str], names: Sequence[str]) -> list[str]:
    return [*dict.fromkeys(name for pattern in patterns for name in names if fnmatchcase(name, pattern))]


def overview_table(runs: Sequence[Run]) -> Table:
    """A row a run: how far it came and where it stands, each metric at the last step that has it."""
    shown = {
        "loss": "loss",
        "rollout/right": "right",
        "reward/total": "reward",
        "tool/calls": "calls",
        "eval/accuracy": "validation",
        "rollout/num_tokens": "tokens",
    }
    present = [metric for metric in shown if any(metric in line for run in runs for line in run.lines)]
    rows = []
    for run in runs:
        last = {name: value for line in run.lines for name, value in line.items()}
        seconds = sum(line.get("time/step_s", 0.0) for line in run.lines)
        cells = [four_digits(last[metric]) if metric in last else "" for metric in present]
        started = str(run.starts[0].get("time", ""))[:16].replace("T", " ") if run.starts else ""
        rows.append(
            (run.name, STAGES.get(run.stage, run.stage), f"{last['step']:.0f}", _minutes(seconds), *cells, started)
        )
    header = ("run", "stage", "steps", "minutes", *(shown[metric] for metric in present), "started")
    return Table(title="Where it stands", header=header, rows=tuple(rows), note="Of each metric its last value.")


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f}" if seconds else ""


def alarm_table(lines: Sequence[Mapping[str, float]], *, title: str) -> Table:
    """The alarms of a run of stage 2 that were on at any step: at which, what that means, and what helps."""
    found: dict[str, list[int]] = {}
    for line in lines:
        for name in (name for name, value in line.items() if name.startswith("alarm/") and value):
            found.setdefault(name, []).append(int(line["step"]))
    rows = [
        (
            f"{name.removeprefix('alarm/')}: {METRICS.get(name, '').removeprefix('is 1 ')}",
            f"{len(steps)}",
            f"{min(steps)} to {max(steps)}",
            _mend(name.removeprefix("alarm/")),
        )
        for name, steps in found.items()
    ]
    return Table(
        title=title,
        header=("", "steps", "from to", "what helps") if rows else (),
        rows=tuple(rows),
        note="" if rows else "None was on at any step.",
    )


def _mend(name: str) -> str:
    return next((alarm.mend for known, alarm in ALARMS.items() if known == name), "")


def environment_of(run: Run) -> dict[str, str]:
    """On what a run ran, by its last start, and at which steps it was started."""
    if not run.starts:
        return {}
    facts = dict(flat({name: value for name, value in run.starts[-1].items() if name not in ("step", "changed")}))
    return {"started at step": ", ".join(str(start.get("step", "?")) for start in run.starts), **facts}


def value_tables(title: str, named: Mapping[str, Mapping[str, str]]) -> list[Table]:
    """Values by name, a column a run: of several runs first those in which they differ, then all."""
    names = [*dict.fromkeys(name for values in named.values() for name in values)]
    rows = [(name, *(_cell(values.get(name, "")) for values in named.values())) for name in names]
    header = ("", *named) if len(named) > 1 else ()
    tables = []
    if len(named) > 1:
        differing = tuple(row for row in rows if len({*row[1:]}) > 1)
        note = "" if differing else "They are the same in all runs."
        tables.append(Table(title=f"{title} that differ", header=header, rows=differing, note=note))
    note = "" if rows else "The run folder does not say."
    return [*tables, Table(title=title, header=header, rows=tuple(rows), note=note)]


def _cell(value: str) -> str:
    return value if len(value) <= LONGEST_CELL else f"{value[:LONGEST_CELL]}..."


def glossary(runs: Sequence[Run]) -> Table:
    """What the logged metrics mean."""
    logged = [*dict.fromkeys(name for run in runs for line in run.lines for name in line if name != "step")]
    meanings = {name: next((METRICS[known] for known in METRICS if fnmatchcase(name, known)), "") for name in logged}
    return Table(title="What the metrics mean", header=(), rows=tuple(meanings.items()))


def flat(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested values as texts by dotted names, those that are not set left out."""
    for name, value in values.items():
        dotted = f"{prefix}{name}"
        if isinstance(value, dict):
            yield from flat(value, f"{dotted}.")
        elif isinstance(value, list):
            yield dotted, " ".join(map(str, value))
        elif value is not None:
            yield dotted, str(value)
