"""The benchmark of learning: that its runs go through and are kept, and what its second task draws. No figure of it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from looktwice.demo import pipeline, task

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks are scripts beside each other."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, model_folder: Path) -> None:
    """A random model and a handful of questions."""
    sizes = {"NUM_TRAIN": 4, "NUM_RL": 4, "SFT_EPOCHS": 1, "MAX_NEW_TOKENS": 8, "TINY": str(model_folder)}
    for name, value in sizes.items():
        monkeypatch.setattr(pipeline, name, value)


def test_an_arm_is_trained_asked_with_controls_and_kept(small: None, tmp_path: Path) -> None:
    import learning

    def run(arm: str) -> dict[str, object]:
        return learning.run(0, arm, task="boards", out=tmp_path, questions=4, steps=1)

    sft, robust = run("sft"), run("robust")
    controls = {"no_crop", "random_crop", "blank_crop", "gold_crop", "more_pixels"}
    assert robust.keys() - sft.keys() == controls
    kept = tmp_path / "seed-0" / "robust" / "found.json"
    kept.write_text(json.dumps({"accuracy": 0.5}))
    assert run("robust") == {"accuracy": 0.5}  # what is finished is not trained again


@pytest.mark.parametrize("arm", ["crops_trained", "region_ungated", "no_region", "phantom", "boxes_as_text"])
def test_an_ablation_trains_also_where_groups_are_replaced(arm: str, small: None, tmp_path: Path) -> None:
    import learning

    for one in ("sft", arm):  # a random model is right nowhere, so that every group is replaced
        found = learning.run(0, one, task="boards", out=tmp_path, questions=2, steps=1)
    assert found["accuracy"] == 0.0


def test_figures_are_of_seeds_and_gain_is_over_the_sft_of_the_same_seed() -> None:
    import learning

    results = {"sft": {0: {"accuracy": 0.5}, 1: {"accuracy": 0.7}}, "robust": {}}
    for seed, accuracy in ((0, 0.9), (1, 0.8)):
        controls = dict.fromkeys((*learning.CONTROLS, "more_pixels"), 0.1)
        results["robust"][seed] = {"accuracy": accuracy, **controls}
    figures = learning.figures_of(results)
    assert figures["robust.accuracy.mean"] == pytest.approx(0.85)
    assert figures["robust.gain.min"] == pytest.approx(0.1)
    assert figures["no_crop.accuracy.max"] == 0.1


def test_the_picture_has_a_panel_for_presets_and_one_for_ablations(tmp_path: Path) -> None:
    import learning

    arm = {0: {"accuracy": 0.9, "curve": [(20, 0.7), (40, 0.9)]}}
    widths = []
    for results in ({"sft": arm, "robust": arm}, {"sft": arm, "robust": arm, "phantom": arm}):
        learning.draw(results, tmp_path / "learning.png")
        widths.append(Image.open(tmp_path / "learning.png").width)
    assert widths == [550, 1100]


def test_a_goal_stands_beside_the_figure_of_its_whole_name(capsys: pytest.CaptureFixture[str]) -> None:
    import measure

    figures = {"robust.gain.min": 0.2, "paper.gain.min": 0.1}
    measure.publish(figures, SimpleNamespace(json=None), {"robust.gain.min": "at least 0.15"})  # type: ignore[arg-type]
    lines = capsys.readouterr().out.splitlines()
    assert [line.endswith("at least 0.15") for line in lines] == [True, False]


def test_photographs_show_a_digit_in_each_gold_box_and_colour_around_it() -> None:
    import photographs

    rng = np.random.default_rng(0)
    board = task.sample_board(rng)
    image = np.asarray(photographs.draw_board(board, rng, part="train")).astype(int)
    assert image.shape[:2] == (board.size.height, board.size.width)
    for colour in board.colours:
        x1, y1, x2, y2 = board.box_of(colour)
        card, beside = image[y1:y2, x1:x2], image[(y1 + y2) // 2, x1 - 3]
        assert np.ptp(card, axis=-1).max() == 0  # grey
        assert card.max() - card.min() > 80  # with ink on it
        assert np.abs(beside - task.COLOURS[colour]).max() <= 10


def test_handwriting_and_photographs_of_the_evaluation_are_not_those_of_training() -> None:
    import photographs

    train, held_out = (photographs.handwriting(part, 3) for part in ("train", "eval"))
    assert len(train) > len(held_out) > 30
    assert not {digit.tobytes() for digit in train} & {digit.tobytes() for digit in held_out}
    assert not set(photographs.TRAIN_PHOTOGRAPHS) & set(photographs.EVAL_PHOTOGRAPHS)


def test_the_model_pretrained_on_photographs_is_kept(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import photographs

    monkeypatch.setattr(photographs, "TINY", str(model_folder))
    monkeypatch.setattr("looktwice.demo.pretrain.NUM_HELD_OUT", 1)
    folder = photographs.pretrained(tmp_path / "model", max_steps=1)
    weights = (folder / "model.safetensors").read_bytes()
    assert weights != (model_folder / "model.safetensors").read_bytes()
    monkeypatch.setattr(photographs, "CURRICULUM", None)  # it is not read again
    assert photographs.pretrained(folder) == folder
