"""The HTML page: complete in one file, text escaped, boxes drawn where they are."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from looktwice.data.sample import Sample
from looktwice.geometry import Box, Size
from looktwice.messages import question_about
from looktwice.report.run_page import BOX_COLOUR, Curve, draw_boxes, make_card, read_curve, write_page
from looktwice.report.tables import Table
from looktwice.rollout.trajectory import ToolCall, Trajectory


def test_a_page_holds_tables_curves_and_cards_without_other_files(tmp_path: Path) -> None:
    Image.new("RGB", (80, 40), "blue").save(tmp_path / "a.png")
    call = ToolCall(requested=Box(8, 8, 24, 24), box=Box(8, 8, 24, 24), size=Size(32, 32), error=None)
    text = "<think>\nlook & see\n</think>\n\n<answer>3</answer>"
    trajectory = Trajectory(prompt_ids=[], text=text, calls=[call], image_size=Size(80, 40))
    sample = Sample(
        conversation=question_about("Which <b>digit</b>?", tmp_path / "a.png"),
        solution="3",
        where="a.jsonl:1",
        field="QnA[0].A3",
    )
    card = make_card(trajectory, sample, is_right=True)
    table = Table(title="Accuracy", header=("model", "right"), rows=(("tiny", "50 %"),))
    curve = Curve(title="loss", steps=(1, 2), values=(3.0, 1.0))
    write_page(tmp_path / "r.html", title="run", lead="lead", tables=[table], curves=[curve], cards=[card])
    html = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "Which &lt;b&gt;digit&lt;/b&gt;?" in html
    assert html.count("data:image/png;base64,") == 2
    assert "http" not in html
    assert "[8, 8, 24, 24]" in html


def test_a_curve_runs_from_the_top_left_for_falling_values() -> None:
    assert Curve(title="loss", steps=(1, 3), values=(2.0, 1.0)).points == "0.0,0.0 300.0,100.0"


def test_a_curve_of_one_value_is_a_point() -> None:
    assert Curve(title="loss", steps=(1,), values=(2.0,)).points == "0.0,100.0"


def test_steps_without_the_metric_are_left_out_of_a_curve(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2}\n{"step": 3, "loss": 1.0}\n')
    assert read_curve(tmp_path / "log.jsonl", "loss", "loss").steps == (1, 3)


def test_boxes_are_drawn_at_the_scale_of_the_page() -> None:
    shown = draw_boxes(Image.new("RGB", (720, 360)), [Box(100, 100, 300, 200)], None)
    assert shown.size == (360, 180)
    assert shown.getpixel((50, 75)) == BOX_COLOUR
