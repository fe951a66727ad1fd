"""The synthetic task: boards of coloured tiles with one small digit each, their questions, rationales and files.

A board is a real picture of one of a few sizes. Seen whole at the tiny model's pixel limit a digit is about two
pixels high and cannot be read; cut out by the gold box it can. Boxes are whole pixels of the original picture.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.progress import track

from looktwice.geometry import PixelPolicy, Size

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (240, 220, 60),
    "green": (50, 150, 60),
    "cyan": (70, 205, 215),
    "blue": (45, 75, 200),
    "purple": (125, 50, 150),
    "pink": (245, 140, 190),
    "brown": (115, 75, 45),
}
CELLS = "ABCDEFGHI"
"""Names of the nine cells in reading order."""

SIZES = (Size(768, 768), Size(672, 672), Size(896, 640), Size(640, 896), Size(832, 704), Size(704, 832))
PIXEL_POLICY = PixelPolicy(
    image_min_pixels=64 * 64, image_max_pixels=96 * 96, crop_min_pixels=48 * 48, crop_max_pixels=56 * 56
)
"""30 to 36 visual tokens for a board, 9 for a crop whose sides differ by less than a seventh."""

CARD_SIDE = 32
TILE_INSET = 0.06
FONT_SIZES = (16, 17, 18)
MAX_JITTER_PX = 7


@dataclass(frozen=True, kw_only=True)
class Board:
    """What a picture shows: nine colours and nine digits in reading order."""

    size: Size
    colours: tuple[str, ...]
    digits: tuple[int, ...]

    def cell_of(self, colour: str) -> int:
        return self.colours.index(colour)

    def digit_of(self, colour: str) -> int:
        return self.digits[self.cell_of(colour)]

    def box_of(self, colour: str) -> tuple[int, int, int, int]:
        return gold_box(self.size, self.cell_of(colour))


@dataclass(frozen=True, kw_only=True)
class DatasetFiles:
    """The JSONL files of one dataset; the pictures they name lie beside them."""

    train: Path
    rl: Path
    eval: Path


Draw = Callable[[Board, np.random.Generator], Image.Image]
"""Shows a board: `draw_board`, or another look of the same task, with a digit in each `gold_box`."""


def sample_board(rng: np.random.Generator) -> Board:
    return Board(
        size=SIZES[rng.integers(len(SIZES))],
        colours=tuple(str(colour) for colour in rng.permutation(list(COLOURS))),
        digits=tuple(int(digit) for digit in rng.integers(10, size=9)),
    )


def gold_box(size: Size, cell: int) -> tuple[int, int, int, int]:
    """The digit card of a cell, x1, y1, x2, y2 in original pixels, the same for every board of that size."""
    row, column = divmod(cell, 3)
    x1 = size.width * (2 * column + 1) // 6 - CARD_SIDE // 2
    y1 = size.height * (2 * row + 1) // 6 - CARD_SIDE // 2
    return x1, y1, x1 + CARD_SIDE, y1 + CARD_SIDE


def draw_board(board: Board, rng: np.random.Generator) -> Image.Image:
    """The board at its own size. `rng` chooses shades, contrast, texture and where on its card each digit stands."""
    width, height = board.size
    image = Image.new("RGB", board.size, _shade((85, 85, 85), 25, rng))
    inset_x, inset_y = int(width / 3 * TILE_INSET), int(height / 3 * TILE_INSET)
    for cell, (colour, digit) in enumerate(zip(board.colours, board.digits)):
        row, column = divmod(cell, 3)
        top, bottom = height * row // 3 + inset_y, height * (row + 1) // 3 - inset_y
        left, right = width * column // 3 + inset_x, width * (column + 1) // 3 - inset_x
        image.paste(_shade(COLOURS[colour], 10, rng), (left, top, right, bottom))
        card = Image.fromarray(draw_card(digit, rng)).convert("RGB")
        image.paste(card, gold_box(board.size, cell)[:2])
    return image


def draw_card(digit: int, rng: np.random.Generator) -> np.ndarray:
    """One card, grey values [32, 32] uint8: a dark digit on light paper.

    The paper's blotches are nearly as wide as a pixel of the overview, so that they hide the digit there and not in
    a crop.
    """
    blotches = rng.normal(0, 26, (6, 6)).astype(np.float32)
    paper = np.asarray(Image.fromarray(blotches).resize((CARD_SIDE, CARD_SIDE), Image.Resampling.BICUBIC))
    ink = _glyph(digit, FONT_SIZES[rng.integers(len(FONT_SIZES))])
    dx, dy = rng.integers(-MAX_JITTER_PX, MAX_JITTER_PX + 1, 2)
    ink = np.roll(ink, (int(dy), int(dx)), axis=(0, 1))
    grain = rng.normal(0, 4, (CARD_SIDE, CARD_SIDE))
    grey = rng.integers(190, 215) + paper + grain - rng.integers(100, 160) * ink
    return np.clip(grey, 0, 255).astype(np.uint8)


def question(board: Board, colour: str) -> str:
    return f"Which digit is on the {colour} tile? {size_sentence(board.size)}"


def size_sentence(size: Size) -> str:
    """Told in the question because boxes are pixels of the original, of which the model sees a resized copy."""
    return f"The picture is {size.width} x {size.height}."


def list_tiles(board: Board) -> str:
    """`I see red A, blue B, ... pink I.`: each colour with its cell, in reading order."""
    return "I see " + ", ".join(f"{colour} {cell}" for colour, cell in zip(board.colours, CELLS)) + "."


def point_out(board: Board, colour: str) -> str:
    """The look-up. The colour right before its cell, as in the list: that is what a small decoder can copy."""
    return f"Look at {colour} {CELLS[board.cell_of(colour)]}."


def box_text(box: tuple[int, int, int, int]) -> str:
    return f"[{', '.join(str(side) for side in box)}]"


def reading(digit: int) -> str:
    return f"It says {digit}."


def rationale(board: Board, colour: str) -> str:
    """The answer to `question` with its crop command, in the documented form."""
    digit = board.digit_of(colour)
    command = f"{{Crop {colour} tile {box_text(board.box_of(colour))}}}"
    thought = f"{list_tiles(board)} {point_out(board, colour)} {command}\n{reading(digit)}"
    return f"<think>\n{thought}\n</think>\n\n<answer>{digit}</answer>"


def make_dataset(
    folder: Path,
    *,
    num_train: int = 400,
    num_rl: int = 800,
    num_eval: int = 400,
    seed: int = 0,
    show_progress: bool = False,
    draw: Draw = draw_board,
    draw_eval: Draw | None = None,
) -> DatasetFiles:
    """Write `train.jsonl`, `rl.jsonl`, `eval.jsonl` and their PNG files, one question a picture.

    No two pictures show the same board, so nothing asked in `eval` was ever seen in training. `draw_eval` draws the
    pictures of `eval` where they are made of other material; `draw` draws all others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    seen: set[Board] = set()
    files = DatasetFiles(train=folder / "train.jsonl", rl=folder / "rl.jsonl", eval=folder / "eval.jsonl")
    counts = ((files.train, num_train, draw), (files.rl, num_rl, draw), (files.eval, num_eval, draw_eval or draw))
    for path, count, drawn in counts:
        with path.open("w", encoding="utf-8") as out:
            for _ in track(range(count), description=f"drawing {path.name}", transient=True, disable=not show_progress):
                board = _new_board(rng, seen)
                name = f"{len(seen):04d}.png"
                drawn(board, rng).save(folder / name, compress_level=1)
                out.write(json.dumps(_row(board, str(rng.choice(board.colours)), name)) + "\n")
    return files


def _row(board: Board, colour: str, image_path: str) -> dict[str, object]:
    qna = {
        "Q": question(board, colour),
        "A3": rationale(board, colour),
        "answer": str(board.digit_of(colour)),
        "box": list(board.box_of(colour)),
    }
    return {"image_path": image_path, "QnA": [qna]}


def _new_board(rng: np.random.Generator, seen: set[Board]) -> Board:
    board = sample_board(rng)
    while board in seen:
        board = sample_board(rng)
    seen.add(board)
    return board


def _shade(colour: tuple[int, int, int], spread: int, rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = np.clip(np.array(colour) + rng.integers(-spread, spread + 1, 3), 0, 255).tolist()
    return red, green, blue


@cache
def _glyph(digit: int, font_size: int) -> np.ndarray:
    """How much ink each pixel of a card has, 0 to 1 [32, 32], the digit centred."""
    mask = Image.new("L", (CARD_SIDE, CARD_SIDE))
    middle, font = (CARD_SIDE / 2, CARD_SIDE / 2), ImageFont.load_default(font_size)
    ImageDraw.Draw(mask).text(middle, str(digit), font=font, fill=255, anchor="mm", stroke_width=0.3)
    return np.asarray(mask, dtype=np.float32) / 255
