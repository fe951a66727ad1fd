"""A second look of the built-in task, from what others photographed and wrote: handwritten digits on photographs.

A board is a cut-out of a photograph (scikit-image's and scikit-learn's) with nine coloured tags, one in the middle of
each cell, and on each a handwritten digit (scikit-learn's, 8 x 8 pixels, 13 writers). Questions, boxes and rationales
are those of the task. Photographs and handwriting of the evaluation are others than those of all training. The tiny
model that comes with the package knows neither, so it is pretrained a little more, once.
"""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps
from skimage import data
from sklearn.datasets import load_digits, load_sample_images

from looktwice.demo import task
from looktwice.demo.pretrain import Stage, Teacher, TowerStage, train_stage, train_tower
from looktwice.geometry import Size
from looktwice.model.location import TINY, locate
from looktwice.model.modeling import Ovis2_5ForConditionalGeneration
from looktwice.processing.processor import Ovis2_5Processor

Part = Literal["train", "eval"]

TRAIN_PHOTOGRAPHS = ("astronaut", "coffee", "rocket", "hubble_deep_field", "immunohistochemistry")
EVAL_PHOTOGRAPHS = ("chelsea",)
"""Of scikit-image; the two of scikit-learn, a temple and a flower, are for the evaluation too."""
NUM_TRAIN_DIGITS = 1400
"""Of 1,797; the others are for the evaluation."""
PHOTOGRAPH_SIDE = 1024
"""Of its shorter side, in pixels: a board is cut out of it anywhere."""
TAG_SHARE = 0.5
"""Side of a tag as a share of the shorter side of its cell."""
HEIGHTS_PX = (18, 23)
MAX_TURN_DEGREES = 8
MAX_JITTER_PX = 3

CURRICULUM: tuple[Stage | TowerStage, ...] = (
    TowerStage(name="1_tower", max_steps=800, learning_rate=1e-3, num_boards=6, target=0.97),
    Stage(
        name="2_together",
        max_steps=300,
        learning_rate=1e-3,
        dialogues={"reading": 4, "cards": 2, "listing": 4, "looking_up": 1, "finding": 3},
    ),
)


def draw_board(board: task.Board, rng: np.random.Generator, *, part: Part) -> Image.Image:
    """The board on a photograph, at its own size. `rng` chooses photograph, cut-out, shades and handwriting."""
    image = cut_out(photographs(part), board.size, rng)
    side = int(min(board.size) / 3 * TAG_SHARE)
    for cell, (colour, digit) in enumerate(zip(board.colours, board.digits)):
        x, y = task.gold_box(board.size, cell)[:2]
        shade = np.clip(np.array(task.COLOURS[colour]) + rng.integers(-10, 11, 3), 0, 255)
        left, top = (x + (task.CARD_SIDE - side) // 2, y + (task.CARD_SIDE - side) // 2)
        image.paste(tuple(shade.tolist()), (left, top, left + side, top + side))
        image.paste(Image.fromarray(draw_card(handwriting(part, digit), rng)).convert("RGB"), (x, y))
    return image


def draw_card(digits: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A card, grey values [32, 32] uint8, with one of the digits [N, 8, 8] (ink), scaled, turned and moved."""
    height = int(rng.integers(*HEIGHTS_PX, endpoint=True))
    ink = Image.fromarray(digits[rng.integers(len(digits))]).resize((height, height), Image.Resampling.BICUBIC)
    ink = ink.rotate(rng.uniform(-MAX_TURN_DEGREES, MAX_TURN_DEGREES), Image.Resampling.BILINEAR)
    middle = (task.CARD_SIDE - height) // 2
    dx, dy = rng.integers(-MAX_JITTER_PX, MAX_JITTER_PX + 1, 2).tolist()
    page = Image.new("L", (task.CARD_SIDE, task.CARD_SIDE))
    page.paste(ink, (middle + dx, middle + dy))
    grey = rng.integers(190, 225) + rng.normal(0, 6, page.size) - rng.integers(120, 170) * np.asarray(page) / 255
    return np.clip(grey, 0, 255).astype(np.uint8)


def cut_out(pictures: list[np.ndarray], size: Size, rng: np.random.Generator) -> Image.Image:
    """A part of one of the photographs [H, W, 3], half the time mirrored."""
    picture = pictures[rng.integers(len(pictures))]
    top = int(rng.integers(picture.shape[0] - size.height + 1))
    left = int(rng.integers(picture.shape[1] - size.width + 1))
    image = Image.fromarray(picture[top : top + size.height, left : left + size.width])
    return ImageOps.mirror(image) if rng.random() < 0.5 else image


@cache
def photographs(part: Part) -> list[np.ndarray]:
    """The photographs of a part, RGB [H, W, 3] uint8, none of the sides shorter than PHOTOGRAPH_SIDE."""
    names = TRAIN_PHOTOGRAPHS if part == "train" else EVAL_PHOTOGRAPHS
    pictures = [getattr(data, name)() for name in names]
    if part == "eval":
        pictures += load_sample_images().images
    scaled = []
    for picture in map(Image.fromarray, pictures):
        scale = PHOTOGRAPH_SIDE / min(picture.size)
        scaled.append(np.asarray(picture.resize([round(side * scale) for side in picture.size])))
    return scaled


@cache
def handwriting(part: Part, digit: int) -> np.ndarray:
    """How a digit is written in a part, ink [N, 8, 8] uint8."""
    digits = load_digits()
    chosen = slice(None, NUM_TRAIN_DIGITS) if part == "train" else slice(NUM_TRAIN_DIGITS, None)
    images = digits.images[chosen][digits.target[chosen] == digit]
    return (images * (255 / 16)).astype(np.uint8)


DRAW_TRAIN, DRAW_EVAL = partial(draw_board, part="train"), partial(draw_board, part="eval")


def pretrained(folder: Path, *, max_steps: int | None = None) -> Path:
    """The tiny model after CURRICULUM on photographs and handwriting of the training part; kept in `folder`."""
    if not (folder / "config.json").exists():
        start = locate(TINY)
        model: Any = Ovis2_5ForConditionalGeneration.from_pretrained(start)
        processor = Ovis2_5Processor.from_pretrained(start)
        teacher = Teacher(processor, DRAW_TRAIN)
        for number, stage in enumerate(CURRICULUM):
            stage = stage if max_steps is None else type(stage)(**{**vars(stage), "max_steps": max_steps})
            train = train_tower if isinstance(stage, TowerStage) else train_stage
            train(model, teacher, stage, np.random.default_rng([0, number]))
        processor.save_pretrained(folder)
        model.save_pretrained(folder)
    return folder
