"""Look-twice rollouts: the engine against recomputing, and what its step, its cache and its logprobs cost and hold.

    python benchmarks/rollout.py [--json FILE] [--only tiny,vocab,body]

On a CPU seconds are those of the processor, on one thread. On a GPU they are those of the wall, and 2B and 9B are
measured too; that part has not been run yet. Every ratio is of measurements taken one after the other in this run.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence

import numpy as np
import torch
from measure import Clock, interleaved, median_ratio, parser, publish
from models import build, bytes_of_pass
from recomputing import one_at_a_time, turn_by_turn
from torch.profiler import ProfilerActivity, profile
from trajectories import GROUP, LONGEST, NUM_PROMPTS, Plan, Script, Work

from looktwice.engine.builtin import BuiltinEngine
from looktwice.engine.interface import Request
from looktwice.engine.sampling import Sampling
from looktwice.model.modeling import Ovis2_5ForConditionalGeneration
from looktwice.model.weights import TINY, locate
from looktwice.processing.packing import pack
from looktwice.processing.processor import Example, Ovis2_5Processor
from looktwice.rollout.episode import Episode, EpisodeRules, play

SMALL, LARGE = ("tiny", "vocab", "body"), ("2B", "9B")
GOALS = {
    "engine_vs_sequential": "at least 20 (tiny), 10",
    "engine_vs_generate": "at least 5",
    "long_row_cost": "at most 1.2",
    "sampling_share": "at most 0.15 (vocab)",
    "slots_used": "at least 0.9",
    "cache_bytes_vs_used": "at most 1.3",
    "vision_passes_per_distinct_picture": "exactly 1",
    "thinking_budget_overhead": "at most 1.02",
    "logprob_gap_fp32": "at most 1e-5",
    "logprob_gap_bf16": "at most 0.02",
}
REPEATS = {"tiny": 3}
"""Of the ways that recompute; one for larger models, where a single one takes a minute and is no less steady."""
NUM_PAIRS = {"tiny": 15, "vocab": 3, "body": 3}
"""Of runs with a thinking budget and without."""
EVERY = GROUP + 1
"""One trajectory of each prompt, another sibling each time: what the sequential way is measured on."""
NUM_ROWS = (1, 16, 64)
DECODE_LENGTH, EVEN_LENGTH, SHORT_LENGTH, LONG_LENGTH = 128, 312, 200, 2000
"""Tokens before the first sampled one. Fifteen short rows and a long one hold about as many as sixteen even ones."""
NUM_GROUPS, SHARED_LENGTH = 4, 1000
NUM_WARM_STEPS, NUM_STEPS = 3, 24
ENDLESS = 1000
"""Ids that a row may sample which is to live as long as its steps are measured."""
COPIED_BYTES, NUM_COPIES = 256 * 2**20, 10


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = SMALL if device == "cpu" else (*SMALL, *LARGE)
    options = parser()
    options.add_argument("--only", default=",".join(names), help=f"models, of {','.join(names)}")
    arguments = options.parse_args()
    chosen = arguments.only.split(",")
    if unknown := set(chosen) - set(names):
        options.error(f"--only: no model {', '.join(sorted(unknown))} on {device}; choose of {','.join(names)}")
    torch.set_num_threads(1)  # several would wait for each other in processor time
    figures: dict[str, float] = {}
    for name in chosen:
        print(f"measuring {name} on {device}", file=sys.stderr)
        model, clock = build(name, device), clock_of(device)
        found = decode_rates(model, clock) if name in LARGE else figures_of(name, model, clock)
        figures |= {f"{name}.{key}": value for key, value in found.items()}
    publish(figures, arguments, GOALS)


def clock_of(device: str) -> Clock:
    """Seconds of this process's processor time, or on a GPU, where that is the host's alone, of the wall."""
    if device == "cpu":
        return time.process_time

    def wall() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return wall


def figures_of(name: str, model: Ovis2_5ForConditionalGeneration, clock: Clock) -> dict[str, float]:
    work = Work(Ovis2_5Processor.from_pretrained(locate(TINY)))
    return {
        **against_recomputing(model, work, clock, repeats=REPEATS.get(name, 1)),
        "long_row_cost": long_row_cost(model, clock),
        "shared_prompt_gain": shared_prompt_gain(model, clock),
        # what stands empty is the schedule's doing, which is the same for all models
        **({"slots_used": slots_used(model, work)} if name == TINY else {}),
        "thinking_budget_overhead": thinking_budget_overhead(model, work, clock, num_pairs=NUM_PAIRS[name]),
        "logprob_gap_fp32": logprob_gap(model, work, is_bf16=False),
        "logprob_gap_bf16": logprob_gap(model, work, is_bf16=True),
        **decode_rates(model, clock),
    }


def roll_out(
    model: Ovis2_5ForConditionalGeneration,
    work: Work,
    plans: Sequence[Plan],
    scripts: Sequence[Script] | None = None,
    *,
    max_rows: int = NUM_PROMPTS * GROUP,
) -> BuiltinEngine:
    """The engine after its run. Without scripts they are those of the plans."""
    scripts = scripts or work.scripts(plans)
    engine = BuiltinEngine(model, max_rows=max_rows)
    engine.run(work.requests(plans, scripts))
    for script in scripts:
        script.check()
    return engine


def against_recomputing(
    model: Ovis2_5ForConditionalGeneration, work: Work, clock: Clock, *, repeats: int
) -> dict[str, float]:
    """All trajectories, and what the engine's own numbers say of these runs.

    The sequential way is measured on one trajectory of each prompt and taken times the tokens that all sample for one
    that these do.
    """
    part = work.plans[::EVERY]
    scale = sum(plan.num_sampled for plan in work.plans) / sum(plan.num_sampled for plan in part)
    engines: list[BuiltinEngine] = []
    ways = {
        "engine": lambda: engines.append(roll_out(model, work, work.plans)),
        "sequential": lambda: one_at_a_time(model, work.scripts(part)),
        "generate": lambda: turn_by_turn(model, work.scripts(work.plans)),
    }
    roll_out(model, work, work.plans[:GROUP])
    one_at_a_time(model, work.scripts(part[:1]))
    seconds = interleaved(ways, repeats=repeats, clock=clock)
    stats = engines[-1].stats
    shares = {phase: value / sum(stats.seconds.values()) for phase, value in stats.seconds.items()}
    return {
        "engine_s": statistics.median(seconds["engine"]),
        "engine_vs_sequential": scale * median_ratio(seconds["sequential"], seconds["engine"]),
        "engine_vs_generate": median_ratio(seconds["generate"], seconds["engine"]),
        **{f"{phase}_share": share for phase, share in shares.items()},
        "cache_bytes_vs_used": stats.cache_bytes_held_peak / stats.cache_bytes_used_at_peak,
        "vision_passes_per_distinct_picture": stats.num_images_encoded / work.num_distinct_pictures(work.plans),
    }


def slots_used(model: Ovis2_5ForConditionalGeneration, work: Work) -> float:
    """Share of 16 rows that decode while trajectories wait."""
    stats = roll_out(model, work, work.plans, max_rows=2 * GROUP).stats
    return stats.rows_used / stats.rows_offered


def thinking_budget_overhead(
    model: Ovis2_5ForConditionalGeneration, work: Work, clock: Clock, *, num_pairs: int
) -> float:
    """Groups of episodes with thinking budgets of several lengths, over the same ids without one: the budget ends just
    before the answer's own limit, so that it is counted all the way and decides once."""

    def play_groups(*, has_budget: bool) -> list[list[int]]:
        groups = [
            [
                Episode(prompt, [picture], work.processor, EpisodeRules(**limits(number, has_budget)))
                for _ in range(GROUP)
            ]
            for number, (prompt, picture) in enumerate(zip(work.prompts[:2], work.pictures))
        ]
        play(BuiltinEngine(model), groups, Sampling(), seeds=[0, 1])
        return [episode.trajectory.completion_ids for group in groups for episode in group]

    def limits(number: int, has_budget: bool) -> dict[str, int | None]:
        length = LONGEST - 30 * number
        return {"max_new_tokens": length, "thinking_budget": length - 1 if has_budget else None}

    assert play_groups(has_budget=True) == play_groups(has_budget=False)
    ways = {name: lambda has=name == "with": play_groups(has_budget=has) for name in ("with", "without")}
    seconds = interleaved(ways, repeats=num_pairs, clock=clock)
    return median_ratio(seconds["with"], seconds["without"])


def logprob_gap(model: Ovis2_5ForConditionalGeneration, work: Work, *, is_bf16: bool) -> float:
    """Mean distance, in nats, of the logprobs noted while sampling and those that training computes, over one group.

    In bfloat16 as the learner has it: float32 weights under autocast, on both sides. Many CPUs take several times as
    long for it.
    """
    plans = work.plans[:GROUP]
    scripts = work.scripts(plans)
    with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=is_bf16):
        roll_out(model, work, plans, scripts)
        batch = pack([script.example for script in scripts])
        trained = model(**batch.model_inputs(model.device)).logprobs
    sampled = torch.tensor([logprob for script in scripts for logprob in script.logprobs])
    return float((trained.cpu() - sampled).abs().mean())


class Decoding:
    """Rows past their prompts, which have these lengths and so many siblings each; a step gives each one id."""

    def __init__(self, model: Ovis2_5ForConditionalGeneration, lengths: Sequence[int], *, siblings: int = 1) -> None:
        random = np.random.default_rng(0)
        end = min(model.config.visual_token_ids)
        self.scripts: list[Script] = []
        self.engine = BuiltinEngine(model, max_rows=len(lengths) * siblings)
        for length in lengths:
            prompt = Example(input_ids=random.integers(end, size=length).tolist(), loss_mask=[False] * length)
            group = [Script(prompt, [ENDLESS], []) for _ in range(siblings)]
            self.engine.submit(Request(prompt=prompt, drivers=group, max_new_tokens=ENDLESS))
            self.scripts += group
        while not all(script.num_heard for script in self.scripts):
            self.step()
        for _ in range(NUM_WARM_STEPS):
            self.step()

    def step(self) -> None:
        self.engine.step()

    def mean_length(self) -> float:
        return statistics.mean(len(script.example) + script.num_heard for script in self.scripts)


def long_row_cost(model: Ovis2_5ForConditionalGeneration, clock: Clock) -> float:
    """A step with one row of 2,000 tokens among fifteen of 200, over one with the same tokens spread evenly."""
    long = Decoding(model, [LONG_LENGTH, *[SHORT_LENGTH] * 15])
    even = Decoding(model, [EVEN_LENGTH] * 16)
    seconds = interleaved({"long": long.step, "even": even.step}, repeats=NUM_STEPS, clock=clock)
    return median_ratio(seconds["long"], seconds["even"])


def shared_prompt_gain(model: Ovis2_5ForConditionalGeneration, clock: Clock) -> float:
    """A step of rows whose prompts are equal but their own, over one of as many siblings that share them."""
    lengths = [SHARED_LENGTH] * NUM_GROUPS
    apart = Decoding(model, [length for length in lengths for _ in range(GROUP)])
    together = Decoding(model, lengths, siblings=GROUP)
    seconds = interleaved({"apart": apart.step, "together": together.step}, repeats=NUM_STEPS, clock=clock)
    return median_ratio(seconds["apart"], seconds["together"])


def decode_rates(model: Ovis2_5ForConditionalGeneration, clock: Clock) -> dict[str, float]:
    """Tokens a second by number of rows, and their share of what the memory's bandwidth would allow.

    The bandwidth is that of copying, what is read and what is written counted, on the same device right before; the
    bytes are those of `models.py: bytes_of_pass`. A model that fits into a processor's cache may pass the bound.
    """
    bytes_per_s = copy_bandwidth(model.device, clock)
    figures = {"copy_gb_per_s": bytes_per_s / 1e9}
    for num_rows in NUM_ROWS:
        decoding = Decoding(model, [DECODE_LENGTH] * num_rows)
        seconds = statistics.median(interleaved({"step": decoding.step}, repeats=NUM_STEPS, clock=clock)["step"])
        bound = bytes_of_pass(model, num_rows, decoding.mean_length()) / bytes_per_s
        figures[f"decode_tokens_per_s_{num_rows}"] = num_rows / seconds
        figures[f"bandwidth_share_{num_rows}"] = bound / seconds
        if model.device.type == "cuda":
            figures[f"host_share_{num_rows}"] = 1 - kernel_seconds(decoding) / seconds
    return figures


def kernel_seconds(decoding: Decoding) -> float:
    """Seconds in which the GPU works on a step; the rest of the step it waits for the host. Not yet run."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(NUM_STEPS):
            decoding.step()
        torch.cuda.synchronize()
    microseconds = sum(event.self_device_time_total for event in profiled.key_averages())
    return microseconds / 1e6 / NUM_STEPS


def copy_bandwidth(device: torch.device, clock: Clock) -> float:
    """Bytes a second, read and written, of copying more than a processor's cache holds."""
    source, target = (torch.zeros(COPIED_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
    copies = {"copy": lambda: target.copy_(source)}
    interleaved(copies, repeats=1)
    return 2 * COPIED_BYTES / statistics.median(interleaved(copies, repeats=NUM_COPIES, clock=clock)["copy"])


if __name__ == "__main__":
    main()
