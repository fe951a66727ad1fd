"""Whether stage 2 learns, and for the right reason: arms of R-GRPO on the built-in task, controls, and ablations.

    python benchmarks/learning.py [--json FILE] [--task photographs] [--seeds 0,1,2] [--arms robust,paper]

All arms of a seed start from the same SFT model and see the same questions in the same order. Accuracies are of greedy
answers to 400 questions about pictures that no training saw. An arm that is finished stays in the folder, so that a
run which was stopped goes on. The picture of the curves is `learning.png` there. `--task photographs` asks about
handwriting on photographs instead of drawn boards (see `photographs.py`), by default without the ablations.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch
from measure import parser, publish

from looktwice.demo.pipeline import Demo
from looktwice.demo.task import DatasetFiles
from looktwice.evaluation.accuracy import evaluate
from looktwice.evaluation.controls import CONTROLS
from looktwice.formats.sample_file import read_samples
from looktwice.inference import OvisInference
from looktwice.processing.packing import pack
from looktwice.training import grpo

REWARDS = Path(__file__).with_name("learning_rewards.py")
EVAL_EVERY = 20
STEPS, SHORT_STEPS = 80, 40
"""Of the presets; of ablations, and of the `robust` that they are compared with."""
Results = dict[str, dict[int, dict[str, Any]]]
"""What was found, by arm and seed."""


class Arm(NamedTuple):
    """One way to train: what it changes in the demo's settings, and whether the ids of crops are trained too."""

    title: str
    settings: dict[str, Any]
    is_short: bool = True
    trains_crops: bool = False


ARMS = {
    "robust": Arm("R-GRPO, robust", {}, is_short=False),
    "paper": Arm("R-GRPO, paper", {"preset": "paper", "refill_batches": 0}, is_short=False),
    "code": Arm("R-GRPO, code", {"preset": "code", "refill_batches": 0}, is_short=False),
    "robust_short": Arm("robust, as short as its ablations", {}),
    "region_ungated": Arm("crops paid though the answer is wrong", {"reward": f"{REWARDS}:region_ungated"}),
    "no_region": Arm("crops not paid", {"reward": f"{REWARDS}:no_region"}),
    "phantom": Arm(
        "format and length paid though wrong, all-wrong groups kept",
        {"reward": f"{REWARDS}:shaping_ungated", "drop_constant_groups": False, "refill_batches": 0},
    ),
    "crops_trained": Arm("ids of crops trained as if sampled", {}, trains_crops=True),
    "boxes_as_text": Arm("boxes paid as text, cut or not", {"reward": f"{REWARDS}:boxes_as_text"}),
}
MORE_PIXELS = 49 * 16 * 16
"""49 visual tokens for a picture in place of 36 and a crop of 9."""
TASKS = {"boards": ",".join(ARMS), "photographs": "robust"}
"""The arms of each by default."""
GOALS = {"robust.accuracy.min": "at least 0.95", "robust.gain.min": "at least 0.15"}


def main() -> None:
    options = parser()
    options.add_argument("--task", choices=TASKS, default="boards")
    options.add_argument("--seeds", default="0,1,2")
    options.add_argument("--arms", help=f"of {','.join(ARMS)}")
    options.add_argument("--out", type=Path, help="folder of runs and results; default: outputs/learning/TASK")
    options.add_argument("--workers", type=int, default=2, help="runs at the same time, of one thread each")
    options.add_argument("--questions", type=int, default=400, help="asked in an evaluation")
    options.add_argument(
        "--steps", type=int, help=f"of each arm, for a quick look; default: {STEPS}, ablations {SHORT_STEPS}"
    )
    arguments = options.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    arms = (arguments.arms or TASKS[arguments.task]).split(",")
    out = arguments.out or Path("outputs/learning", arguments.task)
    started_from(arguments.task, out)  # pretrained once, before the workers ask for it
    work = partial(run, task=arguments.task, out=out, questions=arguments.questions, steps=arguments.steps)
    with ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn")) as pool:
        sft = dict(zip(seeds, pool.map(partial(work, arm="sft"), seeds)))
        jobs = [(seed, arm) for arm in arms for seed in seeds]
        done = pool.map(work, *zip(*jobs))
        results: Results = {"sft": sft}
        for (seed, arm), found in zip(jobs, done):
            results.setdefault(arm, {})[seed] = found
            print(f"{arm} of seed {seed}: {found['accuracy']:.3f}", flush=True)
    draw(results, out / "learning.png")
    publish(figures_of(results), arguments, GOALS)


def started_from(task: str, out: Path) -> dict[str, Any]:
    """What the demo of a task gets: nothing for `boards`; else its drawing and a model, pretrained once."""
    if task == "boards":
        return {}
    import photographs

    model = photographs.pretrained(out / "pretrained")
    return {"model": str(model), "draw": photographs.DRAW_TRAIN, "draw_eval": photographs.DRAW_EVAL}


def run(seed: int, arm: str, *, task: str, out: Path, questions: int, steps: int | None) -> dict[str, Any]:
    """Train one arm of one seed, or its SFT, and ask; what is found is kept, and taken from there the next time."""
    folder = out / f"seed-{seed}" / arm
    kept = folder / "found.json"
    if not kept.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "log.txt").open("w", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
            demo = Demo(folder, seed, **started_from(task, out))
            found = trained(demo, arm, questions=questions, steps=steps)
        kept.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return json.loads(kept.read_text(encoding="utf-8"))


def trained(demo: Demo, arm: str, *, questions: int, steps: int | None) -> dict[str, Any]:
    """The accuracy of an arm, its curve of (step, accuracy), and the controls where `arm` is `robust`."""
    folder, seed = demo.folder, demo.seed
    data, start = folder.parent / "data", folder.parent / "sft" / "sft" / "final_model"
    curve: list[tuple[int, float]] = []
    if arm == "sft":
        files = demo.data(data, num_eval=questions)
        model = demo.sft(files)
    else:
        files = DatasetFiles(train=data / "train.jsonl", rl=data / "rl.jsonl", eval=data / "eval.jsonl")
        chosen = ARMS[arm]
        with crops_trained() if chosen.trains_crops else nullcontext():
            settings = {
                "eval_steps": EVAL_EVERY,
                "eval_tool_gain": False,
                "max_steps": steps or (SHORT_STEPS if chosen.is_short else STEPS),
                **chosen.settings,
            }
            model = demo.grpo(files, start, overwrite=True, **settings)
        curve = evaluations_in(folder / "grpo" / "metrics.jsonl")
    samples = read_samples(files.eval, data)
    inference, evaluation = demo.ask(str(model), samples)
    found: dict[str, Any] = {
        "accuracy": evaluation.accuracy,
        "mean_iou": evaluation.mean_iou,
        "calls": evaluation.calls_per_answer,
        "curve": curve,
    }
    if arm == "robust":
        found |= {name: evaluate(inference, samples, control=name, seed=seed).accuracy for name in CONTROLS}
        larger = OvisInference(inference.config.model_copy(update={"max_pixels": MORE_PIXELS}))
        found["more_pixels"] = evaluate(larger, samples, control="no_crop", seed=seed).accuracy
    return found


@contextmanager
def crops_trained() -> Iterator[None]:
    """While it lasts what the tool put into an answer is trained like what the policy wrote: the mask is left out."""
    masked = grpo.roll_out

    def roll_out(learner: Any, *arguments: Any, **options: Any) -> Any:
        groups = masked(learner, *arguments, **options)
        for rollout in (rollout for group in groups for rollout in group):
            example, trajectory = rollout.example, rollout.trajectory
            length = len(trajectory.completion_ids)
            example.loss_mask[-length:] = trajectory.is_sampled[:] = [True] * length
            with torch.no_grad():
                scores = learner.score(pack([example]), temperature=learner.config.temperature)
            trajectory.sampling_logprobs[:] = scores.logprobs.tolist()
        return groups

    grpo.roll_out = roll_out
    try:
        yield
    finally:
        grpo.roll_out = masked


def evaluations_in(log: Path) -> list[tuple[int, float]]:
    """Step and accuracy of each evaluation in a run's metrics."""
    rows = map(json.loads, log.read_text(encoding="utf-8").splitlines())
    return [(row["step"], row["eval/accuracy"]) for row in rows if "eval/accuracy" in row]


def figures_of(results: Results) -> dict[str, float]:
    """Mean, standard deviation, least and most over the seeds of each arm and control, and each seed's own."""
    figures: dict[str, float] = {}
    rows = {arm: {seed: found["accuracy"] for seed, found in by_seed.items()} for arm, by_seed in results.items()}
    for control in (*CONTROLS, "more_pixels"):
        if values := {seed: found[control] for seed, found in results.get("robust", {}).items()}:
            rows[control] = values
    if "robust" in rows:
        rows["robust.gain"] = {seed: value - rows["sft"][seed] for seed, value in rows["robust"].items()}
    for name, by_seed in rows.items():
        values = list(by_seed.values())
        name = name if "." in name else f"{name}.accuracy"
        figures[f"{name}.mean"] = fmean(values)
        figures[f"{name}.std"] = stdev(values) if len(values) > 1 else 0.0
        figures |= {f"{name}.min": min(values), f"{name}.max": max(values)}
        figures |= {f"{name}.seed_{seed}": value for seed, value in by_seed.items()}
    return figures


def draw(results: Results, path: Path) -> None:
    """The accuracy on the held-out questions over the steps: the mean of the seeds, and their spread."""
    import matplotlib.pyplot as plt

    arms = [arm for arm in results if arm in ARMS]
    panels = {
        "presets": [arm for arm in arms if not ARMS[arm].is_short],
        "robust and its ablations, half as long": [arm for arm in arms if ARMS[arm].is_short],
    }
    panels = {title: found for title, found in panels.items() if found}
    width = 5 * len(panels)
    figure, axes = plt.subplots(1, len(panels), figsize=(width, 3.6), sharey=True, squeeze=False, layout="constrained")
    for axis, (title, arms) in zip(axes[0], panels.items()):
        for arm in arms:
            curves = [[(0, results["sft"][seed]["accuracy"]), *found["curve"]] for seed, found in results[arm].items()]
            steps = [step for step, _ in curves[0]]
            by_step = [[accuracy for _, accuracy in points] for points in zip(*curves)]
            means, lows, highs = ([pick(values) for values in by_step] for pick in (fmean, min, max))
            [line] = axis.plot(steps, means, marker="o", markersize=3, label=f"{ARMS[arm].title} ({len(curves)} seeds)")
            axis.fill_between(steps, lows, highs, alpha=0.15, color=line.get_color())
        axis.set(title=title, xlabel="step", ylim=(0, 1))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, loc="lower right")
    axes[0][0].set_ylabel("accuracy on held-out questions")
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
