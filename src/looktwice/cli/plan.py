"""`looktwice plan`: what a model takes of a GPU's memory, and settings that fit."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import yaml

from looktwice.cli.arguments import argument, read_command, write_json
from looktwice.config import PlanConfig, number_of_bytes
from looktwice.errors import ConfigError
from looktwice.model.location import CONFIG, locate
from looktwice.paths import check_output_file, expanded, place, write_result


def run(words: Sequence[str]) -> int:
    """Say what fits on a GPU before one is held: looktwice plan MODEL --gpu 24GB --out plan.yaml."""
    given, plan = read_command(
        run,
        "plan",
        "MODEL",
        words,
        PlanConfig,
        argument("model", metavar="MODEL", type=expanded, help="model folder, or a folder with its config.json alone"),
        argument("--out", metavar="FILE", type=place, help="write the settings that fit, for train --config FILE"),
        argument("--json", metavar="FILE", type=place, help="also write what was found to this file"),
    )
    if given["out"] and plan.gpu is None:
        raise ConfigError("--out writes settings that fit a GPU; add its memory, --gpu 24GB")
    check_output_file(given["out"], "--out")
    check_output_file(given["json"], "--json")
    if not (Path(given["model"]) / CONFIG).is_file():
        locate(given["model"])
    from looktwice.console import open_console
    from looktwice.planning.plan import Planner, Task, config_of, is_documented, load_of, processes
    from looktwice.report.memory_tables import documented_table, gigabytes, peaks_table, proposal_table
    from looktwice.report.terminal import titled

    config, folder = config_of(given["model"])
    console, notices = open_console(), open_console(stderr=True)
    num_bytes = None if plan.gpu is None else number_of_bytes(plan.gpu)
    executor = processes()
    with notices.status("rehearsing steps without memory"), executor or nullcontext():
        planner = Planner(config, load_of(plan, config, folder), executor)
        tables = [peaks_table(planner, num_bytes)]
        if is_documented(config):
            tables.append(documented_table(planner))
        stages: dict[str, list[Task]] = {"sft": ["sft"], "grpo": ["grpo"], "both": ["sft", "grpo"]}
        proposal = None if num_bytes is None else planner.proposal(stages[plan.stage], num_bytes)
    settings: dict[str, Any] = {}
    if proposal and num_bytes:
        tables.append(proposal_table(proposal, num_bytes))
        settings = proposal.settings
        settings["ModelConfig"]["model_name"] = given["model"]
        settings["DataConfig"] = data_settings(plan, settings)
    if given["out"] and proposal:
        write_result(given["out"], yaml.safe_dump(settings, sort_keys=False))
    if given["json"]:
        found = {
            f"{task} {method.name if method else ''}".strip(): peak.parts | {"all": peak.total}
            for (task, method, load), peak in planner.known.items()
            if load == planner.load
        }
        write_json(given["json"], {"bytes": found, "proposed": settings})
    for part in titled(tables):
        console.print(part, crop=False)
    if num_bytes is None:
        return 0
    if not proposal:
        console.out(
            f"nothing fits {gigabytes(num_bytes)} GB; what helps: a smaller --max_pixels or --max_tokens_per_row, a "
            "smaller model, or several GPUs (docs/scaling.md)",
            style="red",
        )
        return 1
    if given["out"]:
        console.out(f"\nsettings: {given['out']}; looktwice train --stage {plan.stage} --config {given['out']} ...")
    return 0


def data_settings(plan: PlanConfig, settings: dict[str, Any]) -> dict[str, Any]:
    """What data must keep to, or rows are longer than was measured: a sample longer than a row has one of its own."""
    longest = min(values["max_tokens_per_row"] for values in settings.values() if "max_tokens_per_row" in values)
    return {"max_length": longest} | ({} if plan.max_pixels is None else {"max_pixels": plan.max_pixels})
