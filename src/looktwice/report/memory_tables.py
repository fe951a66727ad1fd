"""What a model takes of a GPU's memory, as tables: by part, beside the documented figures, and what is proposed."""

from __future__ import annotations

from looktwice.planning.layers import Peak
from looktwice.planning.live_bytes import KINDS
from looktwice.planning.plan import DOCUMENTED, SMALL_LORA, Documented, Planner, Proposal, Task
from looktwice.report.tables import Table

TASKS: dict[Task, str] = {"inference": "inference", "sft": "SFT", "grpo": "R-GRPO"}


def gigabytes(count: int) -> str:
    """Bytes in units of 10^9; of few of them the first two digits."""
    return f"{count / 1e9:.1f}" if count >= 5e7 or not count else f"{count / 1e9:.2g}"


def peaks_table(planner: Planner, num_bytes: int | None) -> Table:
    """The peak of each way to run the model, by part."""
    rows = []
    for task, method, load in planner.begin_all():
        peak = planner.peak(task, method, load)
        verdict = "" if num_bytes is None else "fits" if peak.total <= num_bytes else "no"
        parts = (gigabytes(peak.parts[kind]) for kind in KINDS)
        rows.append((TASKS[task], method.name if method else "", *parts, gigabytes(peak.total), verdict))
    load = planner.load
    return Table(
        title="Memory at the peak, GB",
        header=("step", "method", *KINDS, "all", "" if num_bytes is None else f"in {gigabytes(num_bytes)}"),
        rows=tuple(rows),
        note=(
            f"Steps after the first, rows of {load.tokens:,} tokens, pictures of {load.image_tokens:,} visual tokens; "
            f"R-GRPO: {load.rollouts} rollouts of {load.rollout_tokens:,} tokens at a time. bfloat16, all layers "
            "recomputed; the parts are those of the fullest moment. CUDA and its allocator come on top."
        ),
    )


def documented_table(planner: Planner) -> Table:
    """The documented memory table beside what was counted."""
    rows = []
    for row in DOCUMENTED:
        peak = planner.peak(row.task, row.method)
        name = row.method.name if row.method else TASKS[row.task]
        wanted = f"{row.gigabytes} and more" if row.or_more else str(row.gigabytes)
        rows.append((name, wanted, gigabytes(peak.total), judged(planner, row, peak)))
    return Table(title="The documented table, GB", header=("", "documented", "counted", "verdict"), rows=tuple(rows))


def judged(planner: Planner, row: Documented, peak: Peak) -> str:
    """Whether a row is met, or what it is missed by and why."""
    limit = row.gigabytes * 10**9
    if row.or_more:
        held = gigabytes(peak.parts["weights"] + peak.parts["gradients"] + peak.parts["optimizer"])
        return f"more: float32 weights, gradients and AdamW are {held}; over several GPUs: --distributed fsdp"
    if peak.total <= limit:
        return "met"
    over = f"{gigabytes(peak.total - limit)} over: weights alone are {gigabytes(peak.parts['weights'])}"
    if row.method is None or row.method.given["lora_r"] != SMALL_LORA.given["lora_r"]:
        return over
    return f"{over}; with --optim adamw_8bit {gigabytes(planner.peak(row.task, SMALL_LORA).total)}"


def proposal_table(proposal: Proposal, num_bytes: int) -> Table:
    """What is set by a proposal, a stage a column."""
    stages = {name: values for name, values in proposal.settings.items() if name != "ModelConfig"}
    names = [*dict.fromkeys(name for values in stages.values() for name in values)]
    rows = [(name, *(str(values.get(name, "")) for values in stages.values())) for name in names]
    rows.append(("quantization", *[proposal.settings["ModelConfig"]["quantization"]] * len(stages)))
    rows.append(("peak, GB", *(gigabytes(peak.total) for peak in proposal.peaks.values())))
    return Table(
        title=f"Proposed for {gigabytes(num_bytes)} GB: {proposal.method.name}",
        header=("setting", *(TASKS[task] for task in proposal.peaks)),
        rows=tuple(rows),
    )
