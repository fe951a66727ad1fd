"""What is wrong with one sample: its boxes on the upright picture, its pictures, its answers."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from zlib import crc32

import pytest
from PIL import Image

from looktwice.config import Stage
from looktwice.data import image_files, problems
from looktwice.data.image_files import NUM_PROBED, SLOW_S, inspect_all, inspected
from looktwice.data.problems import Tally, View, refuse
from looktwice.data.sample import Sample
from looktwice.errors import DataError
from looktwice.geometry import Box, BoxFrame, PixelPolicy
from looktwice.messages import Conversation, assistant, user
from looktwice.processing.images import ImageHeader, read_header

ORIENTATION, ROTATED = 0x0112, 6


def sample(image_path: Path, *boxes: str, gold_box: Box | None = None, line: int = 1, solution: str = "a") -> Sample:
    calls = "".join(f"<tool_call>{box}</tool_call>" for box in boxes)
    return Sample(
        conversation=Conversation(messages=(user("q", image_path), assistant(f"{calls} <answer>a</answer>"))),
        solution=solution,
        gold_box=gold_box,
        where=f"d.jsonl:{line}",
        field="QnA[0].A3",
    )


def check(*samples: Sample, box_frame: BoxFrame = "original_px", factor: int = 16, stage: Stage = "sft") -> None:
    policy = PixelPolicy(image_min_pixels=0, image_max_pixels=20 * 4)
    refuse(samples, "d.jsonl", stage=stage, view=View(policy=policy, factor=factor, box_frame=box_frame), decode=True)


@pytest.fixture
def upright(tmp_path: Path) -> Path:
    """Stored 40 wide and 200 high, shown 200 wide and 40 high."""
    exif = Image.Exif()
    exif[ORIENTATION] = ROTATED
    Image.new("RGB", (40, 200)).save(tmp_path / "upright.jpg", exif=exif)
    return tmp_path / "upright.jpg"


def test_boxes_at_least_partly_inside_the_rotated_image_are_good(upright: Path) -> None:
    good = sample(upright, "[150, 5, 190, 20]", "[-50, -50, 5, 5]", gold_box=Box(190, 30, 400, 400))
    check(good, good)


def test_boxes_outside_the_rotated_image_are_named(upright: Path) -> None:
    with pytest.raises(DataError) as caught:
        check(sample(upright, "[1, 2, 30, 40]", "[0, 50, 30, 180]", gold_box=Box(200, 0, 300, 40)))
    head, call, gold = str(caught.value).splitlines()
    assert head == "2 problems in d.jsonl:"
    assert call == (
        "  d.jsonl:1: QnA[0].A3: call 2 <tool_call>[0, 50, 30, 180]</tool_call> read as original_px: "
        "the box lies outside the picture of 200x40; mend the box, or give --box_frame"
    )
    assert gold.startswith("  d.jsonl:1: QnA[0].box: [200, 0, 300, 40]: it lies outside the picture of 200x40; write")


def test_an_image_that_cannot_be_used_is_one_problem_of_all_its_rows(tmp_path: Path) -> None:
    lost = tmp_path / "absent.png"
    with pytest.raises(DataError) as caught:
        check(*(sample(lost, line=line) for line in (1, 1, 2, 3)), sample(tmp_path / "gone.png", line=9))
    head, first, second = str(caught.value).splitlines()
    assert head == "2 problems in d.jsonl:"
    assert first.startswith(f"  d.jsonl:1: picture: {lost}: ") and first.endswith(" (in 3 rows)")
    assert second.startswith("  d.jsonl:9: picture: ") and not second.endswith("rows)")


def test_a_tally_names_each_place_once_and_says_whether_there_are_more() -> None:
    one, other = Tally(), Tally()
    for where in "aab":
        one.add("x", where)
    assert one.lines() == ["3 x x (a, b)"]
    for where in "bbcde":
        other.add("x", where)
    other.add("y", "f")
    one.update(other)
    assert one.lines() == ["8 x x (a, b, c, ...)", "1 x y (f)"]


def test_too_thin_depends_on_the_smallest_crop(tmp_path: Path) -> None:
    Image.new("L", (1000, 50)).save(tmp_path / "wide.png")
    thin = sample(tmp_path / "wide.png", "[0, 10, 1000, 12]")
    check(thin)
    with pytest.raises(DataError, match="more than 100 times longer"):
        check(thin, factor=1)


def test_boxes_are_read_in_the_frame_of_the_model(upright: Path) -> None:
    check(sample(upright, "[0.5, 0.5, 0.9, 0.9]"), box_frame="unit")
    check(sample(upright, "[900, 900, 999, 999]"), box_frame="norm1000")
    check(sample(upright, "[18, 3, 20, 4]"), box_frame="resized_px", factor=1)
    with pytest.raises(DataError, match=r"\[18, 5, 20, 6\]</tool_call> read as resized_px"):
        check(sample(upright, "[18, 5, 20, 6]"), box_frame="resized_px", factor=1)


def test_images_that_cannot_be_used_are_named_with_the_cause(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("not a picture")
    (tmp_path / "empty.png").touch()
    # a header that promises 40,000 x 40,000 pixels, which is all that is read of it
    header = b"IHDR" + (40_000).to_bytes(4, "big") * 2 + b"\x08\x00\x00\x00\x00"
    chunk = b"\x00\x00\x00\r" + header + crc32(header).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + b"\x00\x00\x00\x04IDAT")
    causes = {
        "none.jpg": "no such picture; check the path",
        "text.jpg": "not a readable picture (a text); name the file of the picture",
        "empty.png": "not a readable picture (0 bytes)",
        "bomb.png": "Image size (1600000000 pixels) exceeds limit",
        ".": "not a readable picture (not a file)",
    }
    with pytest.raises(DataError) as caught:
        check(*(sample(tmp_path / name) for name in causes))
    head, *lines = str(caught.value).splitlines()
    assert head == "5 problems in d.jsonl:"
    for (name, cause), line in zip(causes.items(), lines, strict=True):
        assert line.startswith(f"  d.jsonl:1: picture: {tmp_path / name}: {cause}")


def test_headers_that_are_slow_to_come_are_waited_for_together(tmp_path: Path, monkeypatch) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(40)]
    for width, path in enumerate(paths, 1):
        Image.new("L", (width, 1)).save(path)
    together = threading.Barrier(4, timeout=30)  # never passed by one thread

    def slow(path: Path, *, is_doubted: bool = True) -> ImageHeader:
        if int(path.stem) >= NUM_PROBED:
            together.wait()
        time.sleep(2 * SLOW_S)
        return read_header(path)

    monkeypatch.setattr(image_files, "read_header", slow)
    facts = inspect_all(paths, inspected)
    assert [one.header.size.width for one in facts if one.header] == list(range(1, 41))


def test_an_image_that_is_decoded_anyway_is_decoded_once(upright: Path, monkeypatch) -> None:
    Image.new("RGB", (30, 20)).save(upright.with_name("a.bmp"))
    monkeypatch.setattr("looktwice.processing.images.open_image", None)
    refuse([sample(upright.with_name("a.bmp"))], "d", stage="sft", view=View(policy=PixelPolicy()))


def test_a_sample_without_a_gold_answer_can_be_trained_on_but_not_judged(upright: Path) -> None:
    check(sample(upright, solution=""))
    with pytest.raises(DataError, match=r"d\.jsonl:1: QnA\[0\]\.A3: no <answer> block and no field"):
        check(sample(upright, solution=""), stage="grpo")


@pytest.mark.parametrize(
    ("gold", "is_told"), [(r"\frac{\sqrt{2}}{2}", True), ("2x+1", True), ("1/2", False), ("B", False)]
)
@pytest.mark.parametrize("is_there", [True, False])
def test_a_gold_answer_that_takes_an_extra_is_told_where_that_is_missing(
    gold, is_told, is_there, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(problems, "is_installed", lambda: is_there)
    view = View(factor=16, policy=PixelPolicy())
    found = [
        problem.reason for problem in problems.gold_answer_problems(sample(tmp_path / "a.png", solution=gold), view)
    ]
    assert found == (["gold_mathematics"] if is_told and not is_there else [])
