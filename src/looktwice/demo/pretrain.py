"""Pretraining of the tiny model: a curriculum of single skills, so that the demo starts from a model that sees.

It learns to read a digit from a cut-out card, to list a board's tiles, to copy from a list, to look a colour up and to
give the box of a named cell; it never sees a whole rationale or a tool call. Run as
`python -m looktwice.demo.pretrain --seed 0 --out DIR`; each stage leaves a checkpoint in DIR/stages.

Legend: N trained tokens of a batch.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from looktwice.demo import task, tiny
from looktwice.geometry import Box, Size, crop_rectangle
from looktwice.model.modeling import Ovis2_5ForConditionalGeneration
from looktwice.processing.images import PatchedImage
from looktwice.processing.packing import pack
from looktwice.processing.processor import Example, Ovis2_5Processor
from looktwice.rollout.crop_tool import CropTool

Skill = Callable[["Teacher", np.random.Generator], Example]

MAX_SHIFT_PX = 4
WEIGHT_DECAY = 0.01
MAX_GRAD_NORM = 1.0
WARMUP_STEPS = 50
FINAL_LR_SHARE = 0.05
NUM_HELD_OUT = 48


class Teacher:
    """Writes dialogues about boards for the processor of the tiny model. Only the assistant's words are trained."""

    def __init__(self, processor: Ovis2_5Processor, draw: task.Draw = task.draw_board) -> None:
        self.processor = processor
        self.draw = draw
        self.tool = CropTool(processor)

    def ask(self, example: Example, question: str, image: PatchedImage | None = None) -> None:
        """Append a user's turn, up to where the assistant begins to write."""
        template = self.processor.template
        example.append([*self._newline(example), template.turn_open_id, *template.encode("user\n")], is_trained=False)
        if image is not None:
            self.processor.append_image(example, image)
            question = "\n" + question
        close = [template.turn_close_id, *template.encode("\n"), template.turn_open_id]
        example.append([*template.encode(question), *close, *template.encode("assistant\n")], is_trained=False)

    def answer(self, example: Example, text: str) -> None:
        template = self.processor.template
        example.append([*template.encode(text), template.turn_close_id], is_trained=True)

    def write(self, example: Example, text: str, *, is_trained: bool) -> None:
        example.append(self.processor.template.encode(text), is_trained=is_trained)

    def card(self, image: Image.Image, cell: int, rng: np.random.Generator) -> PatchedImage:
        """The crop around a digit card: half the time by the gold box, else by one a little off."""
        original = Size(*image.size)
        box = np.array(task.gold_box(original, cell))
        if rng.random() < 0.5:
            box = box + np.tile(rng.integers(-MAX_SHIFT_PX, MAX_SHIFT_PX + 1, 2), 2) + rng.integers(-2, 3, 4)
        rectangle = crop_rectangle(Box(*box.tolist()), original=original, min_side=self.processor.factor)
        patched = self.tool.cut(rectangle, image, None).image
        assert patched is not None
        return patched

    def _newline(self, example: Example) -> list[int]:
        return self.processor.template.encode("\n") if len(example) else []


def cards(teacher: Teacher, rng: np.random.Generator) -> Example:
    """Cut-out cards, one a turn; half the time the board came first."""
    example, board = Example(), task.sample_board(rng)
    image = teacher.draw(board, rng)
    if rng.random() < 0.3:
        teacher.ask(example, "List the tiles.", teacher.processor.patch_image(image))
        teacher.answer(example, task.list_tiles(board))
    for cell in rng.permutation(9)[:6].tolist():
        reading = task.reading(board.digits[cell])
        if rng.random() < 0.5:
            teacher.ask(example, "Which digit is this?", teacher.card(image, cell, rng))
            teacher.answer(example, reading)
        else:
            teacher.ask(example, "Which digit is this? Answer in tags.", teacher.card(image, cell, rng))
            teacher.answer(example, f"{reading}\n<answer>{board.digits[cell]}</answer>")
    return example


def reading(teacher: Teacher, rng: np.random.Generator) -> Example:
    """A dense drill: the nine cards of a board one after the other, each followed by what it says."""
    example, board = Example(), task.sample_board(rng)
    image = teacher.draw(board, rng)
    teacher.ask(example, "Which digits are these?")
    for cell in rng.permutation(9).tolist():
        teacher.processor.append_image(example, teacher.card(image, cell, rng))
        teacher.write(example, f"\n{task.reading(board.digits[cell])}", is_trained=True)
        teacher.write(example, "\n", is_trained=False)
    return example


def listing(teacher: Teacher, rng: np.random.Generator) -> Example:
    """A board, named tile by tile."""
    example, board = Example(), task.sample_board(rng)
    teacher.ask(example, "List the tiles.", teacher.processor.patch_image(teacher.draw(board, rng)))
    teacher.answer(example, task.list_tiles(board))
    return example


def copying(teacher: Teacher, rng: np.random.Generator) -> Example:
    """Text alone: two to nine colours with cells in any order, then 16 look-ups of which only the cell is trained.

    Short lists are what the skill starts from: with nine every time it takes many times longer to appear.
    """
    example = Example()
    num_tiles = int(rng.integers(2, 10))
    cells = rng.permutation(list(task.CELLS)).tolist()[:num_tiles]
    cell_of = dict(zip(rng.permutation(list(task.COLOURS)).tolist(), cells))
    teacher.ask(example, "List the tiles.")
    teacher.write(example, "I see " + ", ".join(f"{c} {cell}" for c, cell in cell_of.items()) + ".", is_trained=False)
    for colour in rng.choice(list(cell_of), 16).tolist():
        teacher.write(example, f" Look at {colour}", is_trained=False)
        teacher.write(example, f" {cell_of[colour]}", is_trained=True)
        teacher.write(example, ".", is_trained=False)
    return example


def looking_up(teacher: Teacher, rng: np.random.Generator) -> Example:
    """Where is the tile of a colour: the board is listed first, later questions are answered from the list."""
    example, board = Example(), task.sample_board(rng)
    image = teacher.processor.patch_image(teacher.draw(board, rng))
    for turn, colour in enumerate(rng.choice(board.colours, 4).tolist()):
        question = f"Where is the {colour} tile? {task.size_sentence(board.size)}"
        teacher.ask(example, question, None if turn else image)
        found = task.point_out(board, colour)
        teacher.answer(example, found if turn else f"{task.list_tiles(board)} {found}")
    return example


def boxes(teacher: Teacher, rng: np.random.Generator) -> Example:
    """The boxes of named cells in a picture of a given size; the cell is said again right before its box."""
    example, board = Example(), task.sample_board(rng)
    image = teacher.processor.patch_image(teacher.draw(board, rng)) if rng.random() < 0.3 else None
    for turn, cell in enumerate(rng.permutation(9)[:6].tolist()):
        question = f"Give the box of cell {task.CELLS[cell]}. {task.size_sentence(board.size)}"
        teacher.ask(example, question, None if turn else image)
        teacher.answer(example, f"{task.CELLS[cell]}. {task.box_text(task.gold_box(board.size, cell))}")
    return example


def finding(teacher: Teacher, rng: np.random.Generator) -> Example:
    """Look-ups, each followed by the box of the tile found. Size and cell stand earlier and are not said again.

    Without it the box is known only where size and cell stand right before it, and a rationale cannot build on it.
    """
    example, board = Example(), task.sample_board(rng)
    image = teacher.processor.patch_image(teacher.draw(board, rng))
    for turn, colour in enumerate(rng.permutation(board.colours)[:4].tolist()):
        where = f"Where is the {colour} tile?"
        found = task.point_out(board, colour)
        if turn == 0:
            where, found = f"{where} {task.size_sentence(board.size)}", f"{task.list_tiles(board)} {found}"
        teacher.ask(example, where, None if turn else image)
        teacher.answer(example, found)
        teacher.ask(example, "Give its box.")
        teacher.answer(example, task.box_text(board.box_of(colour)))
    return example


SKILLS: dict[str, Skill] = {
    "reading": reading,
    "cards": cards,
    "listing": listing,
    "copying": copying,
    "looking_up": looking_up,
    "boxes": boxes,
    "finding": finding,
}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """`dialogues` says how many of each skill a step holds.

    With `target` the stage runs at a constant learning rate and ends as soon as every skill is that accurate; without
    it the learning rate falls along a cosine to a twentieth at `max_steps`.
    """

    name: str
    max_steps: int
    learning_rate: float
    dialogues: dict[str, int]
    target: float | None = None


@dataclass(frozen=True, kw_only=True)
class TowerStage:
    """The tower and the visual table alone, with a throw-away classifier of digits on top; a step shows `num_boards`
    boards' cards. Behind the decoder they would learn as well, but only after many times as many cards."""

    name: str
    max_steps: int
    learning_rate: float
    num_boards: int
    target: float


CURRICULUM: tuple[Stage | TowerStage, ...] = (
    Stage(name="1_copying", max_steps=600, learning_rate=2e-3, target=0.99, dialogues={"copying": 16}),
    TowerStage(name="2_tower", max_steps=3000, learning_rate=1e-3, num_boards=10, target=0.98),
    Stage(name="3_cards", max_steps=600, learning_rate=1e-3, target=0.95, dialogues={"reading": 10, "copying": 2}),
    Stage(
        name="4_boards",
        max_steps=500,
        learning_rate=1e-3,
        target=0.9,
        dialogues={"listing": 14, "reading": 2, "copying": 1},
    ),
    Stage(
        name="5_together",
        max_steps=1200,
        learning_rate=1e-3,
        dialogues={"reading": 4, "cards": 2, "listing": 3, "copying": 2, "looking_up": 7, "boxes": 4},
    ),
    Stage(
        name="6_in_context",
        max_steps=300,
        learning_rate=5e-4,
        dialogues={"reading": 4, "cards": 2, "listing": 1, "copying": 1, "looking_up": 1, "boxes": 2, "finding": 8},
    ),
)


def pretrain(out: Path, *, seed: int, device: str, first_stage: int = 1) -> None:
    """Run the curriculum from `first_stage` on and write the model folder `out`."""
    tokenizer = tiny.build_tokenizer()
    config = tiny.build_config(tokenizer)
    processor = tiny.build_processor(tokenizer, config)
    model: Any = tiny.build_model(config, seed=seed)
    model.to(device)
    teacher = Teacher(processor)
    stages = out / "stages"
    stages.mkdir(parents=True, exist_ok=True)
    print(f"{sum(weight.numel() for weight in model.parameters()):,} parameters", flush=True)
    if first_stage > 1:
        model.load_state_dict(load_file(stages / f"{CURRICULUM[first_stage - 2].name}.safetensors"))
    for number, stage in enumerate(CURRICULUM[first_stage - 1 :], first_stage):
        rng = np.random.default_rng([seed, number])
        if isinstance(stage, TowerStage):
            train_tower(model, teacher, stage, rng)
        else:
            train_stage(model, teacher, stage, rng)
        save_file(model.state_dict(), stages / f"{stage.name}.safetensors")
    model.save_pretrained(out)
    processor.save_pretrained(out)
    weights = out / "model.safetensors"
    command = f"python -m looktwice.demo.pretrain --seed {seed}"
    save_file(load_file(weights), weights, metadata={"format": "pt", "command": command, "seed": str(seed)})


def train_tower(
    model: Ovis2_5ForConditionalGeneration, teacher: Teacher, stage: TowerStage, rng: np.random.Generator
) -> None:
    start, losses, shares = time.perf_counter(), [], []
    classifier = torch.nn.Linear(model.config.hidden_size, 10, device=model.device)
    visual = [*model.model.visual_tokenizer.parameters(), *model.model.vte.parameters()]
    optimizer = torch.optim.AdamW(
        [*visual, *classifier.parameters()], lr=stage.learning_rate, weight_decay=WEIGHT_DECAY
    )
    for step in range(stage.max_steps):
        images, digits = _cards(teacher, rng, stage.num_boards)
        pixels = torch.cat([image.pixel_values for image in images]).to(model.device)
        grids = torch.tensor([image.grid_thw for image in images])
        features = model.get_image_features(pixels, grids).split([image.num_tokens for image in images])
        scores = classifier(torch.stack([tokens.mean(0) for tokens in features]))
        targets = torch.tensor(digits, device=model.device)
        loss = torch.nn.functional.cross_entropy(scores, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        # every card is new, so the share of right ones before the update is a held-out accuracy
        shares.append((scores.argmax(-1) == targets).float().mean().item())
        if (step + 1) % 50 == 0:
            share, minutes = float(np.mean(shares[-20:])), (time.perf_counter() - start) / 60
            loss_text = f"loss {np.mean(losses[-50:]):.4f}"
            print(f"{stage.name} step {step + 1} {loss_text} digits {share:.3f} {minutes:.1f} min", flush=True)
            if share >= stage.target:
                return


def _cards(teacher: Teacher, rng: np.random.Generator, num_boards: int) -> tuple[list[PatchedImage], list[int]]:
    """The nine cards of each of some boards and what they say."""
    images: list[PatchedImage] = []
    digits: list[int] = []
    for _ in range(num_boards):
        board = task.sample_board(rng)
        image = teacher.draw(board, rng)
        images += [teacher.card(image, cell, rng) for cell in range(9)]
        digits += board.digits
    return images, digits


def train_stage(
    model: Ovis2_5ForConditionalGeneration, teacher: Teacher, stage: Stage, rng: np.random.Generator
) -> None:
    start, losses = time.perf_counter(), []
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    vectors = [weight for weight in model.parameters() if weight.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}],
        lr=stage.learning_rate,
        betas=(0.9, 0.98),
    )
    for step in range(stage.max_steps):
        examples = [SKILLS[name](teacher, rng) for name, count in stage.dialogues.items() for _ in range(count)]
        batch = pack(examples)
        for group in optimizer.param_groups:
            group["lr"] = stage.learning_rate * schedule(step, stage)
        loss = -model(**batch.model_inputs(model.device)).logprobs.mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 50 == 0 or step + 1 == stage.max_steps:
            right = {name: accuracy(model, teacher, SKILLS[name]) for name in stage.dialogues}
            text = " ".join(f"{name} {share:.3f}" for name, share in right.items())
            minutes = (time.perf_counter() - start) / 60
            print(f"{stage.name} step {step + 1} loss {np.mean(losses[-50:]):.4f} {text} {minutes:.1f} min", flush=True)
            if stage.target is not None and min(right.values()) >= stage.target:
                return


def schedule(step: int, stage: Stage) -> float:
    """Share of the learning rate: linear warmup, then constant or cosine, see Stage."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    if stage.target is not None:
        return 1.0
    progress = (step - WARMUP_STEPS) / max(1, stage.max_steps - WARMUP_STEPS)
    return FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def accuracy(model: Ovis2_5ForConditionalGeneration, teacher: Teacher, skill: Skill) -> float:
    """Share of held-out answers that the model would write exactly, greedily."""
    rng = np.random.default_rng(2**32)
    batch = pack([skill(teacher, rng) for _ in range(NUM_HELD_OUT)])
    inputs = batch.model_inputs(model.device)
    trained = inputs.pop("loss_mask")[0, 1:]
    right = model(**inputs).logits[0, :-1].argmax(-1) == inputs["input_ids"][0, 1:]
    return float(np.mean([right[span].all().item() for span in _spans(trained)]))


def _spans(marked: torch.Tensor) -> Iterator[slice]:
    """The runs of True in [T]."""
    edges = torch.cat([marked.new_zeros(1), marked, marked.new_zeros(1)]).int().diff()
    for start, end in zip((edges == 1).nonzero()[:, 0].tolist(), (edges == -1).nonzero()[:, 0].tolist()):
        yield slice(start, end)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--first-stage", type=int, default=1, help="go on after an earlier run's checkpoint, 1 to 6")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the tensors are too small to share
    pretrain(args.out, seed=args.seed, device=args.device, first_stage=args.first_stage)


if __name__ == "__main__":
    main()
