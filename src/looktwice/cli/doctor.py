"""`looktwice doctor`: what is installed and usable here, and whether all ways to compute agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from looktwice.cli.arguments import argument, read_command, write_json
from looktwice.config import DoctorConfig
from looktwice.model.location import locate
from looktwice.paths import check_output_file, place

STYLES = {"ok": "green", "note": "yellow", "problem": "red"}


def run(words: Sequence[str]) -> int:
    """Look at this machine, and with --parity at a model: looktwice doctor --parity tiny."""
    given, config = read_command(
        run,
        "doctor",
        "",
        words,
        DoctorConfig,
        argument("--json", metavar="FILE", type=place, help="also write what was found to this file"),
    )
    check_output_file(given["json"], "--json")
    if config.parity is not None:
        locate(config.parity)
    from looktwice.console import open_console, whole_line
    from looktwice.doctor.environment import report

    found: dict[str, Any] = report(config.output_dir)
    console = open_console()
    width = max(len(finding["name"]) for finding in found["findings"])
    for finding in found["findings"]:
        style = STYLES[finding["verdict"]]
        mend = f"; {finding['mend']}" if finding["mend"] else ""
        console.print(
            whole_line((f"{finding['verdict']:8}", style), f"{finding['name']:{width}}  {finding['found']}{mend}")
        )
    problems = [finding for finding in found["findings"] if finding["verdict"] == "problem"]
    broken = []
    if config.parity is not None:
        broken = show_parity(config, console, found)
    if given["json"]:
        write_json(given["json"], found)
    return 1 if problems or broken else 0


def show_parity(config: DoctorConfig, console: Any, found: dict[str, Any]) -> list[str]:
    """Compare, show, and note it in what is found; what is broken, a line each."""
    from dataclasses import asdict

    from looktwice.doctor.parity import compare, rows_of
    from looktwice.report.tables import Table
    from looktwice.report.terminal import titled

    assert config.parity is not None
    parity = compare(config.parity, device=config.device, is_bf16=config.bf16, vllm=config.vllm)
    precision = str(parity.dtype).removeprefix("torch.")
    table = Table(
        title=f"{config.parity} in {precision}: how far from training's forward",
        header=("way", "after reading", "tokens", "logits", "logprobs, mean", "worst", ""),
        rows=tuple(rows_of(parity.gaps, parity.dtype)),
        note="Logits: the largest difference, over the largest logit. Logprobs in nats, of ids that are no picture's.",
    )
    for part in titled([table]):
        console.print(part, crop=False)
    for name, value in parity.canaries.items():
        console.out(f"{name} {value:.2g} nats")
    for way, reason in parity.left_out.items():
        console.out(f"{way} was left out; {reason}")
    for line in parity.broken:
        console.out(line, style="red")
    found["parity"] = {
        "model": config.parity,
        "dtype": precision,
        "gaps": [asdict(gap) | {"is_kept": gap.is_kept(parity.dtype)} for gap in parity.gaps],
        "left_out": parity.left_out,
        "failed": parity.failed,
        "canaries": parity.canaries,
    }
    return parity.broken
