"""The synthetic task: what is drawn, asked and answered agrees, and nothing asked at the end was seen before."""

import json

import numpy as np
import pytest
from PIL import Image

from looktwice.demo import task
from looktwice.geometry import Size, num_visual_tokens, smart_resize


def board_of(size: Size, seed: int = 0) -> task.Board:
    drawn = task.sample_board(np.random.default_rng(seed))
    return task.Board(size=size, colours=drawn.colours, digits=drawn.digits)


@pytest.mark.parametrize("size", task.SIZES)
def test_each_cell_has_its_own_gold_box_inside_the_image(size: Size) -> None:
    boxes = [task.gold_box(size, cell) for cell in range(9)]
    assert len(set(boxes)) == 9
    for x1, y1, x2, y2 in boxes:
        assert 0 <= x1 < x2 <= size.width and 0 <= y1 < y2 <= size.height
        assert x2 - x1 == y2 - y1 == task.CARD_SIDE


@pytest.mark.parametrize("size", task.SIZES)
def test_a_tile_has_its_colour_and_its_card_lies_in_the_gold_box(size: Size) -> None:
    board = board_of(size)
    pixels = np.asarray(task.draw_board(board, np.random.default_rng(1))).astype(int)
    for cell, colour in enumerate(board.colours):
        x1, y1, x2, y2 = task.gold_box(size, cell)
        beside = pixels[y1:y2, x1 - 6 : x1 - 2].mean((0, 1))
        nearest = min(task.COLOURS, key=lambda name: float(np.abs(np.array(task.COLOURS[name]) - beside).sum()))
        assert nearest == colour
        card = pixels[y1:y2, x1:x2]
        assert (card.max(-1) == card.min(-1)).all()
        assert card.mean() > 120 and card.min() < 110


def test_ink_never_leaves_its_card() -> None:
    for digit in range(10):
        for font_size in task.FONT_SIZES:
            ink = task._glyph(digit, font_size)
            margin = task.MAX_JITTER_PX
            assert ink.sum() > 20
            assert ink[margin:-margin, margin:-margin].sum() == pytest.approx(ink.sum())


def test_rationale_lists_the_board_points_out_the_tile_and_reads_it() -> None:
    board = task.Board(
        size=Size(768, 768),
        colours=("red", "blue", "green", "orange", "yellow", "cyan", "purple", "pink", "brown"),
        digits=(1, 2, 7, 4, 5, 6, 7, 8, 9),
    )
    assert task.question(board, "green") == "Which digit is on the green tile? The picture is 768 x 768."
    assert task.rationale(board, "green") == (
        "<think>\nI see red A, blue B, green C, orange D, yellow E, cyan F, purple G, pink H, brown I. "
        "Look at green C. {Crop green tile [624, 112, 656, 144]}\nIt says 7.\n</think>\n\n<answer>7</answer>"
    )


def test_overviews_and_crops_have_few_visual_tokens() -> None:
    policy = task.PIXEL_POLICY
    for size in task.SIZES:
        seen = smart_resize(size, factor=16, min_pixels=policy.image_min_pixels, max_pixels=policy.image_max_pixels)
        assert 30 <= num_visual_tokens(seen, factor=16) <= 36


def test_dataset_is_the_same_for_the_same_seed_and_another_for_another(tmp_path) -> None:
    counts = {"num_train": 3, "num_rl": 2, "num_eval": 2}
    first = task.make_dataset(tmp_path / "a", **counts, seed=3)
    again = task.make_dataset(tmp_path / "b", **counts, seed=3)
    other = task.make_dataset(tmp_path / "c", **counts, seed=4)
    assert first.train.read_text() == again.train.read_text() != other.train.read_text()
    for name in ("0001.png", "0007.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_rows_are_in_the_documented_form_and_agree_with_themselves(tmp_path) -> None:
    files = task.make_dataset(tmp_path, num_train=4, num_rl=2, num_eval=2, seed=0)
    rows = [json.loads(line) for path in (files.train, files.rl, files.eval) for line in path.open()]
    assert [row["image_path"] for row in rows] == [f"{number:04d}.png" for number in range(1, 9)]
    for row in rows:
        (qna,) = row["QnA"]
        with Image.open(tmp_path / row["image_path"]) as image:
            assert f"The picture is {image.width} x {image.height}." in qna["Q"]
        colour = qna["Q"].split(" tile?")[0].split()[-1]
        assert f"{{Crop {colour} tile {task.box_text(tuple(qna['box']))}}}" in qna["A3"]
        assert qna["A3"].endswith(f"It says {qna['answer']}.\n</think>\n\n<answer>{qna['answer']}</answer>")


def test_pictures_of_the_evaluation_may_be_drawn_otherwise(tmp_path) -> None:
    white, black = (lambda board, rng, shade=shade: Image.new("L", (8, 8), shade) for shade in (255, 0))
    task.make_dataset(tmp_path, num_train=1, num_rl=1, num_eval=1, draw=white, draw_eval=black)
    shades = [Image.open(tmp_path / f"{number:04d}.png").getpixel((0, 0)) for number in range(1, 4)]
    assert shades == [255, 255, 0]  # train, rl, eval


def test_no_board_is_drawn_twice(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = [board_of(Size(672, 672), seed) for seed in range(6)]
    drawn: list[task.Board] = []
    monkeypatch.setattr(task, "sample_board", lambda rng: few[rng.integers(6)])

    def draw(board: task.Board, rng: np.random.Generator) -> Image.Image:
        drawn.append(board)
        return Image.new("RGB", (8, 8))

    task.make_dataset(tmp_path, num_train=2, num_rl=2, num_eval=2, seed=0, draw=draw)
    assert len(drawn) == len(set(drawn)) == 6
