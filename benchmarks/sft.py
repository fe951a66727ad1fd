"""Stage 1 as shipped against the same padded, the documented recipe and TRL's SFTTrainer, on samples of mixed kinds.

    python benchmarks/sft.py [--json FILE] [--only tiny,large,large_lora,body] [--profile]

`tiny` is the built-in model, `large` has 65M parameters in the real vocabularies, `body` 60M in the layers. Seconds are
those of the processor, on one thread; every ratio is of measurements taken one after the other in this run. Bytes are
those of all live tensors, weights and optimizer included. TRL is measured where it is installed. With `--profile` it
says instead what our step is made of, and that of the documented recipe.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from breakdown import peak_by_kind, time_by_kind
from flops import counted_flops
from measure import interleaved, median_ratio, parser, publish
from models import REAL_VOCABULARY, config_of
from torch import Tensor

from looktwice.config import ModelConfig, SFTConfig
from looktwice.geometry import Size
from looktwice.model.configuration import IGNORE_INDEX, Ovis2_5Config
from looktwice.model.modeling import Ovis2_5ForConditionalGeneration
from looktwice.model.vision_cache import VisionCache
from looktwice.model.weights import TINY, locate, save_model
from looktwice.planning.live_bytes import peak_bytes
from looktwice.processing.images import PatchedImage
from looktwice.processing.packing import pack, pack_rows
from looktwice.processing.processor import Example, Ovis2_5Processor
from looktwice.training.learner import Learner
from looktwice.training.sft import train_step

GOALS = {
    "packed_vs_documented": "at least 1.5 (tiny), 1.6 (large), 3 (large_lora)",
    "packed_vs_padded": "at least 1.5",
    "packed_vs_trl": "at least 1.3 (tiny), 2 (large)",
    "flops_vs_needed": "at most 1.1",
    "matmul_rate_share": "at least 0.6 (body)",
    "second_epoch_vs_first": "at least 1.35 (large_lora)",
    "peak_memory_vs_documented": "at most 0.7 (tiny), 0.5 (large)",
    "max_loss_difference": "at most 1e-5",
    "max_gradient_difference": "at most 1e-5",
}
NUM_STEPS, BATCH = 2, 4
REPEATS = {"tiny": 7, "body": 1}
ROW_SIZES = {"tiny": (1, 256, 512, 1024, 2048), "body": (1, 512, 1024)}
LORA = {"use_lora": True, "lora_r": 16, "lora_alpha": 32, "freeze_vision": True}


class Case(NamedTuple):
    """A model by its name in models.py, and the settings of its training."""

    model: str
    settings: dict[str, Any]


CASES = {
    "tiny": Case(TINY, {}),
    "large": Case("vocab", {}),
    "large_lora": Case("vocab", LORA),
    "body": Case("body", {}),
}


def main() -> None:
    options = parser()
    options.add_argument("--only", default=",".join(CASES), help=f"cases, of {','.join(CASES)}")
    options.add_argument("--profile", action="store_true", help="where time and memory go, in place of the ratios")
    arguments = options.parse_args()
    torch.set_num_threads(1)  # several would wait for each other in processor time
    figures: dict[str, float] = {}
    for name in arguments.only.split(","):
        print(f"measuring {name}", file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            ways = Ways(CASES[name], Path(folder))
            found = taken_apart(ways) if arguments.profile else figures_of(name, ways)
        figures |= {f"{name}.{key}": value for key, value in found.items()}
        if arguments.json:  # a long run: what is done is kept
            arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    publish(figures, arguments, GOALS)


def taken_apart(ways: Ways) -> dict[str, float]:
    """Shares of the time, and megabytes at the peak, of a step as shipped and of the documented recipe's."""
    figures: dict[str, float] = {}
    for way, step in {"packed": ways.packed, "documented": ways.documented}.items():
        step()
        figures |= {f"{way}.time: {kind}": share for kind, share in time_by_kind(step).items()}
        figures |= {f"{way}.MB: {kind}": size / 1e6 for kind, size in peak_by_kind(step, ways.learner).items()}
    return figures


def figures_of(name: str, ways: Ways) -> dict[str, float]:
    steps: dict[str, Callable[[], object]] = {"packed": ways.packed}
    if name != "body":
        steps |= {"padded": ways.padded, "documented": ways.documented}
    for step in steps.values():
        step()
    seconds = interleaved(steps, repeats=REPEATS.get(name, 1), clock=time.process_time)
    packed = statistics.median(seconds["packed"])
    needed = sum(map(ways.needed_flops, ways.batches))
    figures = {
        "trained_tokens_per_s": ways.num_trained / packed,
        "flops_vs_needed": counted_flops(ways.packed) / needed,
        "matmul_rate_share": needed / packed / matmul_rate(),
    }
    if name in ROW_SIZES:
        figures |= rows_of_sizes(ways)
    if name == "body":
        return figures
    if name == "large_lora":
        figures["second_epoch_vs_first"] = ways.epochs()
    figures |= {f"packed_vs_{other}": median_ratio(seconds[other], seconds["packed"]) for other in list(steps)[1:]}
    figures |= ways.differences()
    peaks = {way: peak_bytes(step) for way, step in steps.items()}
    figures["peak_memory_vs_documented"] = peaks["packed"] / peaks["documented"]
    figures["peak_gigabytes"] = peaks["packed"] / 1e9
    if (trl := ways.trl()) is not None:
        started = time.process_time()
        ways.packed_step(ways.batches[-1])
        figures["packed_vs_trl"] = trl / (time.process_time() - started)
    return figures


def rows_of_sizes(ways: Ways) -> dict[str, float]:
    """How fast rows of at most so many tokens are, and what they hold at the peak, over one sample a row."""

    def by(size: int) -> Callable[[], None]:
        def steps() -> None:
            for batch in ways.batches:
                train_step(ways.learner, pack_rows(batch, size))

        return steps

    ways_of = {str(size): by(size) for size in ROW_SIZES[ways.name]}
    seconds = interleaved(ways_of, repeats=REPEATS.get(ways.name, 1), clock=time.process_time)
    peaks = {size: peak_bytes(steps) for size, steps in ways_of.items()}
    alone = seconds.pop("1")
    speeds = {f"speed_of_rows_{size}": median_ratio(alone, found) for size, found in seconds.items()}
    return speeds | {f"peak_of_rows_{size}": peaks[size] / peaks["1"] for size in seconds}


class Ways:
    """The ways to take NUM_STEPS optimizer steps on the same batches."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.name = case.model
        config = config_of(case.model) if case.model != TINY else Ovis2_5Config.from_pretrained(locate(TINY))
        config.llm_config.max_position_embeddings = 4096
        if config.visual_vocab_size > 1000:
            config.vit_config.patch_size = 16  # as released: a visual token is 32 x 32 pixels
        name = TINY
        if case.model != TINY:
            torch.manual_seed(0)
            name = str(folder / "model")
            save_model(Ovis2_5ForConditionalGeneration._from_config(config), Path(name))
        settings = SFTConfig(output_dir=folder, warmup_ratio=0, max_grad_norm=0, learning_rate=0, **case.settings)
        processor = Ovis2_5Processor.from_pretrained(locate(TINY))
        self.learner = Learner.load(name, ModelConfig(device="cpu"), settings, processor, total_steps=10**6)
        self.folder = folder
        self.config = config
        examples = make_examples(config, NUM_STEPS * BATCH)
        self.batches = [examples[first : first + BATCH] for first in range(0, len(examples), BATCH)]
        self.num_trained = sum(sum(example.loss_mask) for example in examples)

    def packed(self) -> None:
        """(a) As shipped."""
        for batch in self.batches:
            self.packed_step(batch)

    def packed_step(self, batch: Sequence[Example]) -> None:
        train_step(self.learner, self.learner.rows(batch))

    def epochs(self) -> float:
        """Processor seconds of an epoch that fills the vision cache, over those of one that reads it."""
        self.learner.vision_cache = VisionCache(self.learner.base, max_bytes=10**10)
        seconds = interleaved({"epoch": self.packed}, repeats=3, clock=time.process_time)["epoch"]
        self.learner.vision_cache = None
        return seconds[0] / statistics.median(seconds[1:])

    def padded(self) -> None:
        """(b) The same head and optimizer over a batch padded to its longest sample."""
        for batch in self.batches:
            self._step([partial(self._padded_loss, batch)])

    def documented(self) -> None:
        """(c) The document's recipe: one sample at a time, all its logits, gradients accumulated over the batch."""
        for batch in self.batches:
            num_trained = sum(sum(example.loss_mask) for example in batch)
            self._step([partial(self._plain_loss, example, num_trained) for example in batch])

    def _step(self, losses: Sequence[Callable[[], Tensor]]) -> float:
        self.learner.model.train()
        self.learner.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for loss in losses:
            value = loss()
            value.backward()
            total += value.item()
        self.learner.optimizer.step()
        return total

    def _padded_loss(self, batch: Sequence[Example]) -> Tensor:
        return self.learner.model(**padded_inputs(batch, with_labels=True)).loss

    def _plain_loss(self, example: Example, num_trained: int) -> Tensor:
        inputs = padded_inputs([example], with_labels=True)
        labels = inputs.pop("labels")
        logits = self.learner.model(**inputs, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits[0, :-1].float(), labels[0, 1:], ignore_index=IGNORE_INDEX, reduction="sum"
        )
        return loss / num_trained

    def differences(self) -> dict[str, float]:
        """Largest differences of loss and gradients between (a) and (c), relative to loss and norm of each gradient."""
        batch = self.batches[0]
        num_trained = sum(sum(example.loss_mask) for example in batch)
        parameters = self.learner.parameters
        loss = train_step(self.learner, self.learner.rows(batch))["loss"]
        ours = [None if each.grad is None else each.grad.clone() for each in parameters]
        wanted_loss = self._step([partial(self._plain_loss, example, num_trained) for example in batch])
        differences = [
            float((mine - each.grad).norm() / each.grad.norm().clamp(min=1e-30))
            for mine, each in zip(ours, parameters)
            if mine is not None and each.grad is not None and each.grad.norm() > 0
        ]
        return {
            "max_loss_difference": abs(loss - wanted_loss) / abs(wanted_loss),
            "max_gradient_difference": max(differences),
        }

    def trl(self) -> float | None:
        """(d) Processor seconds of the last batch's step by TRL's SFTTrainer; those before it warm it up."""
        try:
            import datasets
            import trl
        except ImportError:
            return None
        examples = [example for batch in self.batches for example in batch]
        clock = Clock()
        arguments = trl.SFTConfig(
            self.folder / "trl",
            per_device_train_batch_size=BATCH,
            max_steps=NUM_STEPS,
            learning_rate=0.0,
            max_grad_norm=0.0,
            remove_unused_columns=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            train_sampling_strategy="sequential",
        )
        trainer = trl.SFTTrainer(
            self.learner.model,
            arguments,
            data_collator=lambda rows: padded_inputs([examples[row["number"]] for row in rows], True),
            train_dataset=datasets.Dataset.from_dict({"number": range(len(examples))}),
            processing_class=self.learner.processor,
            callbacks=[clock],
        )
        trainer.train()
        return clock.ends[-1] - clock.ends[-2]

    def needed_flops(self, batch: Sequence[Example]) -> float:
        """What one step cannot do without, multiplications and additions counted apart.

        A matrix of a trained part is met three times (its product, the gradients of its input and of itself), that of a
        frozen one under adapters twice, that of a frozen tower once; attention of n tokens takes 4 * n^2 * width, and
        backward twice that (the kernels, and the count, take 2.5 times: they compute the scores once more). Logits of
        trained tokens alone. Elementwise work counts as nothing.
        """
        is_lora = self.learner.config.use_lora
        llm, vit = self.config.llm_config, self.config.vit_config
        base = self.learner.base.model
        num_tokens, num_trained = sum(map(len, batch)), sum(sum(example.loss_mask) for example in batch)
        frames = [len(image.pixel_values) for example in batch for image in example.images]
        num_patches, num_atoms = sum(frames), sum(frames) // vit.hidden_stride**2
        layers = {name: weight for name, weight in base.language_model.layers.named_parameters() if weight.ndim == 2}
        adapters = sum(weight.numel() for name, weight in layers.items() if "lora_" in name)
        plain = sum(weight.numel() for name, weight in layers.items() if "lora_" not in name)
        often, seen = (2, 1) if is_lora else (3, 3)
        width = llm.num_attention_heads * llm.head_dim
        text = 2 * num_tokens * (often * plain + 3 * adapters)
        text += 3 * llm.num_hidden_layers * 4 * width * sum(len(example) ** 2 for example in batch)
        head = 2 * num_trained * often * llm.hidden_size * llm.vocab_size
        tower = sum(weight.numel() for weight in base.visual_tokenizer.vit.encoder.parameters() if weight.ndim == 2)
        patches = base.visual_tokenizer.vit.embeddings.patch_embedding.weight.numel()
        images = 2 * num_patches * (seen * tower + min(seen, 2) * patches)
        images += seen * vit.num_hidden_layers * 4 * vit.hidden_size * sum(n * n for n in frames)
        features = vit.hidden_size * vit.hidden_stride**2
        images += 2 * num_atoms * seen * (self.config.visual_vocab_size - 4) * (features + llm.hidden_size)
        return text + head + images


def Clock() -> Any:
    """A callback of transformers' Trainer that notes when steps end."""
    from transformers import TrainerCallback

    class Ends(TrainerCallback):
        ends: list[float] = []

        def on_step_end(self, *given: Any, **more: Any) -> None:
            self.ends.append(time.process_time())

    return Ends()


def make_examples(config: Ovis2_5Config, count: int) -> list[Example]:
    """Every fourth a text alone, else a picture of 224 to 896 pixels a side and 0 to 3 crops of it, half as large."""
    rng = np.random.default_rng(0)
    examples = []
    for number in range(count):
        example = Example()
        example.append(words(rng, config, 20, 60), is_trained=False)
        if number % 4:
            show(example, config, picture(rng, config, 1))
            example.append(words(rng, config, 15, 40), is_trained=False)
            for _ in range(int(rng.integers(0, 4))):
                example.append(words(rng, config, 15, 40), is_trained=True)
                show(example, config, picture(rng, config, 2))
        example.append(words(rng, config, 20, 60), is_trained=True)
        examples.append(example)
    return examples


def words(rng: np.random.Generator, config: Ovis2_5Config, fewest: int, most: int) -> list[int]:
    highest = min(config.visual_token_ids)
    return [int(each) for each in rng.integers(0, highest, int(rng.integers(fewest, most)))]


def picture(rng: np.random.Generator, config: Ovis2_5Config, part: int) -> PatchedImage:
    """Noise; the tiny model sees it at a quarter of the size, since its patches are small."""
    vit = config.vit_config
    side = vit.patch_size * vit.hidden_stride
    scale = part if config.visual_vocab_size > 1000 else 8 * part
    width, height = (int(n) // scale // side or 1 for n in rng.integers(224, 897, 2))
    grid = (1, height * vit.hidden_stride, width * vit.hidden_stride)
    pixels = rng.integers(0, 256, (grid[1] * grid[2], 3 * vit.patch_size**2), dtype=np.uint8)
    size = Size(width * side, height * side)
    return PatchedImage(
        pixel_values=torch.from_numpy(pixels), grid_thw=grid, size=size, num_tokens=width * height, is_video=False
    )


def show(example: Example, config: Ovis2_5Config, image: PatchedImage) -> None:
    ids = [config.image_start_token_id, *[config.image_token_id] * image.num_tokens, config.image_end_token_id]
    example.append(ids, is_trained=False)
    example.images.append(image)


def padded_inputs(examples: Sequence[Example], with_labels: bool) -> dict[str, Tensor]:
    longest = max(map(len, examples))
    ids = torch.zeros(len(examples), longest, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE_INDEX)
    for row, example in enumerate(examples):
        tokens, trained = torch.tensor(example.input_ids), torch.tensor(example.loss_mask)
        ids[row, : len(example)], mask[row, : len(example)] = tokens, 1
        labels[row, : len(example)] = tokens.masked_fill(~trained, IGNORE_INDEX)
    inputs = {"input_ids": ids, "attention_mask": mask} | ({"labels": labels} if with_labels else {})
    if any(example.images for example in examples):
        batch = pack(examples)
        inputs |= {"pixel_values": batch.pixel_values, "image_grid_thw": batch.image_grid_thw}
    return inputs


def matmul_rate() -> float:
    """The best rate of a matrix product here, in operations a second of the processor."""
    best = 0.0
    for rows, inner, outer in ((1024, 1024, 1024), (512, 512, 4096), (256, 128, REAL_VOCABULARY)):
        left, right = torch.randn(rows, inner), torch.randn(inner, outer)
        out = torch.empty(rows, outer)
        for _ in range(6):
            started = time.process_time()
            torch.mm(left, right, out=out)
            best = max(best, 2 * rows * inner * outer / (time.process_time() - started))
    return best


if __name__ == "__main__":
    main()
