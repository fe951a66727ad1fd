"""The demo: data, SFT, R-GRPO, evaluation with controls and a report, on the built-in small world."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from looktwice.asking.answer import answer_of
from looktwice.config import DataConfig, GRPOConfig, InferenceConfig, ModelConfig, SFTConfig
from looktwice.console import open_console
from looktwice.data.sample import Sample
from looktwice.demo.task import DatasetFiles, Draw, draw_board, make_dataset
from looktwice.errors import ConfigError
from looktwice.evaluation.accuracy import Evaluation, evaluate
from looktwice.evaluation.controls import CONTROLS
from looktwice.formats.sample_file import read_samples
from looktwice.geometry import Size
from looktwice.inference import OvisInference
from looktwice.model.location import TINY
from looktwice.processing.images import image_size
from looktwice.report.demo_page import ANSWERS_FILE, SUMMARY_FILE, demo_tables, write_demo_page
from looktwice.report.terminal import titled
from looktwice.training.folder import check_free, claimed, remove
from looktwice.training.grpo import train_grpo
from looktwice.training.sft import train_sft

CHANCE = 0.1
NUM_TRAIN, NUM_RL, NUM_EVAL = 200, 600, 400
SFT_EPOCHS, GRPO_STEPS = 2, 50
MAX_NEW_TOKENS = 96
WRITTEN = ("data", "sft", "grpo", SUMMARY_FILE, ANSWERS_FILE, "report.html")
MARK = ".demo"
"""In a folder that a demo has written: what stands there may be replaced."""


class Demo:
    """One run of the demo in a folder; phases fill `seconds`.

    `model`, `draw` and `draw_eval` put another look of the task in place of the built-in one (see `make_dataset`).
    """

    def __init__(
        self,
        folder: Path,
        seed: int,
        *,
        model: str | None = None,
        draw: Draw = draw_board,
        draw_eval: Draw | None = None,
    ) -> None:
        self.folder = folder
        self.seed = seed
        self.draw, self.draw_eval = draw, draw_eval
        self.console = open_console()
        self.seconds: dict[str, float] = {}
        self.model = ModelConfig(model_name=model or TINY, device="cpu")

    @contextmanager
    def phase(self, name: str, text: str) -> Iterator[None]:
        """Announce a phase, and say how long it took."""
        self.console.out(text, style="bold")
        started = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - started, 1)
        self.console.out(f"    {self.seconds[name]:.1f} s", style="dim")

    def data_config(self, train: Path, held_out: Path | None) -> DataConfig:
        return DataConfig(train_data_path=(train,), val_data_path=held_out, image_base_path=train.parent)

    def data(self, folder: Path, *, num_eval: int | None = None) -> DatasetFiles:
        """Draw the pictures of the demo and write its questions."""
        return make_dataset(
            folder,
            num_train=NUM_TRAIN,
            num_rl=NUM_RL,
            num_eval=num_eval or NUM_EVAL,
            seed=self.seed,
            show_progress=self.console.is_interactive,
            draw=self.draw,
            draw_eval=self.draw_eval,
        )

    def sft(self, files: DatasetFiles) -> Path:
        config = SFTConfig(
            output_dir=self.folder / "sft",
            num_train_epochs=SFT_EPOCHS,
            train_batch_size=16,
            learning_rate=1e-3,
            seed=self.seed,
        )
        return train_sft(self.model, self.data_config(files.train, None), config)

    def grpo(self, files: DatasetFiles, start: Path, **settings: Any) -> Path:
        """R-GRPO by the demo's settings, but for those given."""
        config = GRPOConfig(
            **{
                "output_dir": self.folder / "grpo",
                "sft_checkpoint_path": start,
                "max_steps": GRPO_STEPS,
                "train_batch_size": 16,
                "num_generations": 8,
                "learning_rate": 3e-4,
                # late steps settle what the early ones found: 0.99 in place of 0.85 where a constant rate did worst
                "lr_scheduler_type": "cosine",
                # early steps have many groups without signal; with others in their place fewer steps do more
                "refill_batches": 1,
                # sampling costs more than training here, so each batch is learned from in two updates
                "num_minibatches": 2,
                # a rollout that rambles on is a failure here, not a long thought
                "mask_truncated_completions": False,
                "max_new_tokens": MAX_NEW_TOKENS,
                "max_turns": 3,
                "rollout_batch_size": 128,
                "seed": self.seed,
                **settings,
            }
        )
        held_out = files.eval if "eval_steps" in settings else None
        return train_grpo(self.model, self.data_config(files.rl, held_out), config)

    def ask(self, model: str, samples: list[Sample]) -> tuple[OvisInference, Evaluation]:
        config = InferenceConfig(
            model_path=model, max_new_tokens=MAX_NEW_TOKENS, max_turns=3, batch_size=128, device="cpu", seed=self.seed
        )
        inference = OvisInference(config)
        return inference, evaluate(inference, samples)


def run_demo(folder: Path, *, seed: int = 0) -> dict[str, Any]:
    """Run everything, write `summary.json`, `answers.jsonl` and `report.html`, and give back the summary.

    An earlier demo in the folder is replaced. Raises ConfigError when another process is at work there, or what would
    be replaced is not a demo's.
    """
    with claimed(folder):
        there = [path for path in (folder / name for name in WRITTEN) if path.exists()]
        if there and not (folder / MARK).exists():
            raise ConfigError(f"{there[0]}: not written by a demo, so it is not removed; give another folder")
        (folder / MARK).touch()
        for path in there:
            check_free(path)
            remove(path)
        return run_phases(folder, seed=seed)


def run_phases(folder: Path, *, seed: int) -> dict[str, Any]:
    """The demo in a folder of its own."""
    demo, started = Demo(folder, seed), time.perf_counter()
    with demo.phase("data", f"1/5 Drawing {NUM_TRAIN + NUM_RL + NUM_EVAL} pictures with questions"):
        files = demo.data(folder / "data")
        samples = read_samples(files.eval, files.eval.parent)
    with demo.phase("eval_base", f"2/5 Asking the pretrained tiny model {len(samples)} questions"):
        _, base = demo.ask(TINY, samples)
        demo.console.out(f"accuracy {base.accuracy:.3f} (chance {CHANCE})")
    with demo.phase("sft", f"3/5 SFT on {NUM_TRAIN} rationales"):
        sft_model = demo.sft(files)
    with demo.phase("eval_sft", "    asking again"):
        _, sft = demo.ask(str(sft_model), samples)
        demo.console.out(f"accuracy {sft.accuracy:.3f}")
    with demo.phase("grpo", "4/5 R-GRPO: rollouts with crops, rewards, policy updates"):
        grpo_model = demo.grpo(files, sft_model)
    with demo.phase("eval_grpo", "5/5 Asking again, then with controls in place of the crop"):
        inference, grpo = demo.ask(str(grpo_model), samples)
        demo.console.out(f"accuracy {grpo.accuracy:.3f}")
        controls: dict[str, Evaluation] = {
            name: evaluate(inference, samples, control=name, seed=seed) for name in CONTROLS
        }
    demo.seconds["total"] = round(time.perf_counter() - started, 1)
    summary = {
        "accuracy": {"base": base.accuracy, "sft": sft.accuracy, "grpo": grpo.accuracy},
        "controls": {name: evaluation.accuracy for name, evaluation in controls.items()},
        "chance": CHANCE,
        "crop": {
            "valid_share": grpo.valid_share,
            "mean_iou": grpo.mean_iou,
            "calls_per_answer": grpo.calls_per_answer,
        },
        "n_eval": len(samples),
        "seed": seed,
        "seconds": demo.seconds,
    }
    (folder / SUMMARY_FILE).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    evaluations = {"base": base, "sft": sft, "grpo": grpo, **controls}
    write_answers(folder / ANSWERS_FILE, samples, evaluations, inference.processor.overview_size)
    page = write_demo_page(folder)
    for line in titled(demo_tables(folder)):
        demo.console.print(line, crop=False)
    places = f"\nreport: {page}\nfigures: {folder / SUMMARY_FILE}\nanswers: {folder / ANSWERS_FILE}"
    demo.console.out(places)
    return summary


def write_answers(
    path: Path, samples: Sequence[Sample], evaluations: Mapping[str, Evaluation], overview_size: Callable[[Size], Size]
) -> None:
    """A line of JSON a question: its picture, as a path from there, and the reply of each model and each control."""
    with path.open("w", encoding="utf-8") as file:
        for number, sample in enumerate(samples):
            image = sample.image_paths[0]
            line = {
                "image": Path(image).relative_to(path.parent).as_posix(),
                "seen": overview_size(image_size(image)),
                "question": sample.question,
                "solution": sample.solution,
                "gold_box": sample.gold_box,
                "replies": {
                    name: {"is_right": evaluation.is_right[number], **answer_of(evaluation.trajectories[number])}
                    for name, evaluation in evaluations.items()
                },
            }
            file.write(json.dumps(line) + "\n")
