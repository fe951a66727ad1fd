"""Stage 2: the update with prompts shared against packed rows and one rollout at a time, and a whole step of each.

    python benchmarks/grpo.py [--json FILE] [--only body,vocab] [--before CHECKOUT]

One group of 8 rollouts about a picture of 1,024 visual tokens, 100 sampled tokens each and a crop of 64 visual tokens
in the whole step; vision frozen. `body` has 60M parameters in the layers; figures of `vocab`, which has the real
vocabularies, begin with its name. Seconds are those of the processor, on one thread; ratios are of measurements taken
one after the other in this run, those named `flops_` of the arithmetic alone. Bytes are those of all live tensors,
weights and optimizer included. `--before` times stage 2 of the demo here and in another checkout of this repository.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from flops import counted_flops
from measure import interleaved, median_ratio, parser, publish
from models import LONGEST, config_of
from recomputing import one_at_a_time
from torch import Tensor
from trajectories import Inserted, Script

from looktwice.config import GRPOConfig, ModelConfig
from looktwice.engine.builtin import BuiltinEngine
from looktwice.engine.interface import Request
from looktwice.geometry import Size
from looktwice.model.modeling import Ovis2_5ForConditionalGeneration
from looktwice.model.vision_cache import encoder
from looktwice.model.weights import TINY, locate, save_model
from looktwice.planning.live_bytes import peak_bytes
from looktwice.processing.images import PatchedImage
from looktwice.processing.packing import PackedBatch, pack
from looktwice.processing.processor import Example, Ovis2_5Processor
from looktwice.training.learner import Learner, Reference, Scores

MODELS = ("body", "vocab")
GOALS = {
    "update_shared_vs_packed": "at least 4 (body)",
    "update_shared_vs_one_by_one": "at least 8 (body)",
    "step_vs_vlm_r3": "at least 8 (body)",
    "peak_memory_vs_packed": "at most 0.3 (body)",
    "vision_passes_per_distinct_picture": "exactly 1",
    "max_gradient_difference": "at most 1e-5",
    "demo_rl_seconds_vs_before": "at most 0.5",
}
GROUP, NUM_SAMPLED, BEFORE_CROP = 8, 100, 40
SIDE, CROP_SIDE = 32, 8
"""Visual tokens along a side of the picture and of a crop."""
REPEATS = 2
DEMO = """
import sys, time, torch
from pathlib import Path
from looktwice.demo.pipeline import NUM_EVAL, NUM_RL, NUM_TRAIN, Demo
from looktwice.demo.task import make_dataset
torch.set_num_threads(1)
demo = Demo(Path(sys.argv[1]), 0)
sizes = {"num_train": NUM_TRAIN, "num_rl": NUM_RL, "num_eval": NUM_EVAL}
files = make_dataset(demo.folder / "data", seed=0, show_progress=False, **sizes)
start = demo.sft(files)
started = time.process_time()
demo.grpo(files, start)
print(time.process_time() - started)
"""


def main() -> None:
    options = parser()
    options.add_argument("--only", default=",".join(MODELS), help=f"models, of {','.join(MODELS)}")
    options.add_argument("--before", type=Path, help="checkout of an earlier commit, to compare the demo with")
    arguments = options.parse_args()
    torch.set_num_threads(1)  # several would wait for each other in processor time
    figures: dict[str, float] = {}
    if arguments.before is not None:
        print("measuring the demo", file=sys.stderr)
        here = Path(__file__).parents[1]
        now, before = demo_seconds([here, arguments.before])
        figures |= {"demo_rl_seconds": now, "demo_rl_seconds_vs_before": now / before}
    for name in filter(None, arguments.only.split(",")):
        print(f"measuring {name}", file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            found = Step(name, Path(folder)).figures()
        prefix = "" if name == MODELS[0] else f"{name}."
        figures |= {f"{prefix}{key}": value for key, value in found.items()}
    publish(figures, arguments, GOALS)


def demo_seconds(checkouts: Sequence[Path]) -> list[float]:
    """Processor seconds that stage 2 of the demo takes in each checkout, all at the same time, on one thread each."""
    with tempfile.TemporaryDirectory() as folder:
        runs = [
            subprocess.Popen(
                [sys.executable, "-c", DEMO, f"{folder}/{number}"],
                env={**os.environ, "PYTHONPATH": str((checkout / "src").resolve()), "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for number, checkout in enumerate(checkouts)
        ]
        told = [run.communicate() for run in runs]
    for checkout, run, (_, errors) in zip(checkouts, runs, told):
        if run.returncode:
            sys.exit(f"the demo of {checkout} failed:\n{errors}")
    return [float(printed.splitlines()[-1]) for printed, _ in told]


class Step:
    """One step of stage 2 in each way, on a model with random weights."""

    def __init__(self, name: str, folder: Path) -> None:
        torch.manual_seed(0)
        config = config_of(name)
        save_model(Ovis2_5ForConditionalGeneration._from_config(config), folder / "model")
        settings = GRPOConfig(output_dir=folder, warmup_ratio=0, max_grad_norm=0, learning_rate=0, freeze_vision=True)
        processor = Ovis2_5Processor.from_pretrained(locate(TINY))
        source = str(folder / "model")
        self.learner = Learner.load(source, ModelConfig(device="cpu"), settings, processor, total_steps=10**6)
        self.learner.base.config.llm_config.max_position_embeddings = LONGEST
        self.random = np.random.default_rng(0)
        self.prompt = Example()
        self.prompt.append(self.words(10), is_trained=False)
        ids, images = self.shown(SIDE)
        self.prompt.append(ids, is_trained=False)
        self.prompt.images += images
        self.prompt.append(self.words(20), is_trained=False)
        self.advantages = torch.linspace(-1, 1, GROUP)
        self.siblings = [self.prompt.sibling() for _ in range(GROUP)]
        for one in self.siblings:
            one.append(self.words(NUM_SAMPLED), is_trained=True)

    def words(self, count: int) -> list[int]:
        return self.random.integers(min(self.learner.base.config.visual_token_ids), size=count).tolist()

    def shown(self, side: int) -> Inserted:
        """Ids and pixels of a picture of noise with so many visual tokens along its sides."""
        config = self.learner.base.config
        rows = side * config.vit_config.hidden_stride
        pixels = self.random.integers(0, 256, (rows**2, 3 * config.vit_config.patch_size**2), dtype=np.uint8)
        image = PatchedImage(
            pixel_values=torch.from_numpy(pixels),
            grid_thw=(1, rows, rows),
            size=Size(rows * config.vit_config.patch_size, rows * config.vit_config.patch_size),
            num_tokens=side**2,
        )
        ids = [config.image_start_token_id, *[config.image_token_id] * side**2, config.image_end_token_id]
        return ids, [image]

    def figures(self) -> dict[str, float]:
        packed = [pack(self.siblings)]
        updates: dict[str, Callable[[], object]] = {
            "shared": lambda: self.update(self.learner.rows(self.siblings)),
            "packed": lambda: self.update(packed),
            "one_by_one": lambda: self.one_by_one(self.siblings),
        }
        updates["shared"]()
        seconds = interleaved(updates, repeats=REPEATS, clock=time.process_time)
        flops = {name: counted_flops(update) for name, update in updates.items()}
        peaks = {name: peak_bytes(updates[name]) for name in ("shared", "packed")}
        reference = self.learner.freeze_reference()
        whole: dict[str, Callable[[], object]] = {
            "ours": self.ours,
            "with_reference": lambda: self.ours(reference),
            "vlm_r3": self.vlm_r3,
        }
        steps = interleaved(whole, repeats=1, clock=time.process_time)
        return {
            "update_shared_s": min(seconds["shared"]),
            "update_shared_vs_packed": median_ratio(seconds["packed"], seconds["shared"]),
            "update_shared_vs_one_by_one": median_ratio(seconds["one_by_one"], seconds["shared"]),
            "flops_packed_vs_shared": flops["packed"] / flops["shared"],
            "flops_one_by_one_vs_shared": flops["one_by_one"] / flops["shared"],
            "step_vs_vlm_r3": median_ratio(steps["vlm_r3"], steps["ours"]),
            "step_with_reference_vs_without": median_ratio(steps["with_reference"], steps["ours"]),
            "flops_vlm_r3_vs_ours": counted_flops(self.vlm_r3) / counted_flops(self.ours),
            "peak_memory_vs_packed": peaks["shared"] / peaks["packed"],
            "peak_gigabytes": peaks["shared"] / 1e9,
            "vision_passes_per_distinct_picture": self.vision_passes(reference),
            "max_gradient_difference": self.gradient_difference(packed),
        }

    def update(self, rows: Sequence[PackedBatch]) -> None:
        def loss(scores: Scores, row: PackedBatch) -> Tensor:
            return -(scores.logprobs * self.advantages[row.loss_sequence()]).sum() / (GROUP * NUM_SAMPLED)

        self.learner.update(rows, loss, with_entropy=True)

    def one_by_one(self, examples: Sequence[Example]) -> None:
        """Each rollout by itself with all its logits, gradients accumulated, as VLM-R3's released code does."""
        model = self.learner.model
        model.train()
        self.learner.optimizer.zero_grad(set_to_none=True)
        for example, advantage in zip(examples, self.advantages):
            inputs = pack([example]).model_inputs()
            is_trained = inputs.pop("loss_mask")[0, 1:]
            logprobs = model(**inputs).logits[0, :-1].log_softmax(-1)
            chosen = logprobs.gather(1, inputs["input_ids"][0, 1:, None])[:, 0][is_trained]
            (-(chosen * advantage).sum() / (GROUP * NUM_SAMPLED)).backward()
        self.learner.optimizer.step()

    def scripts(self) -> list[Script]:
        """Rollouts that look at a crop of their own in between."""
        turns = [BEFORE_CROP, NUM_SAMPLED - BEFORE_CROP]
        return [Script(self.prompt, turns, [partial(self.shown, CROP_SIDE)]) for _ in range(GROUP)]

    def ours(self, reference: Reference | None = None) -> list[Example]:
        """A whole step as shipped: rollouts together, the logprobs of the reference if there is one, and the update."""
        scripts = self.scripts()
        with self.learner.images_kept():
            engine = BuiltinEngine(self.learner.base, encode=encoder(self.learner.base, self.learner.vision_cache))
            engine.run([Request(prompt=self.prompt, drivers=scripts, max_new_tokens=BEFORE_CROP)])
            for script in scripts:
                script.check()
            examples = [script.example for script in scripts]
            rows = self.learner.rows(examples)
            if reference is not None:
                with reference.active():
                    self.learner.logprobs(rows, temperature=1.0)
            self.update(rows)
        return examples

    def vlm_r3(self) -> None:
        """One trajectory at a time, all encoded again at each turn, and the update one by one."""
        scripts = self.scripts()
        self.learner.base.eval()
        one_at_a_time(self.learner.base, scripts)
        self.one_by_one([script.example for script in scripts])

    def vision_passes(self, reference: Reference) -> float:
        """Pictures that the tower sees in a whole step of ours with a reference, over those that are different."""
        seen: list[int] = []
        tower = self.learner.base.model.visual_tokenizer.vit
        hook = tower.register_forward_hook(lambda module, given, out: seen.append(len(given[1])))
        examples = self.ours(reference)
        hook.remove()
        return sum(seen) / len({image.key for example in examples for image in example.images})

    def gradient_difference(self, packed: Sequence[PackedBatch]) -> float:
        """Largest difference of a gradient with prompts shared and without, relative to its norm."""
        found: list[list[Tensor | None]] = []
        for rows in (packed, self.learner.rows(self.siblings)):
            self.update(rows)
            found.append([None if each.grad is None else each.grad.clone() for each in self.learner.parameters])
        pairs = [(plain, shared) for plain, shared in zip(*found) if plain is not None and shared is not None]
        largest = max(float(plain.norm()) for plain, _ in pairs)
        # a gradient that is zero but for rounding has no relative difference
        kept = [(plain, shared) for plain, shared in pairs if plain.norm() > 1e-6 * largest]
        return max(float((plain - shared).norm() / plain.norm()) for plain, shared in kept)


if __name__ == "__main__":
    main()
