"""Each benchmark's files, in their public form, become the questions that are asked."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.benches import samples

from looktwice.benches.catalogue import CATALOGUE
from looktwice.benches.files import BenchFiles, find_files, image_folders
from looktwice.benches.item import Item, Said
from looktwice.benches.reading import Fields, without_letters
from looktwice.config import BENCHES
from looktwice.errors import DataError
from looktwice.geometry import Box, Size
from looktwice.processing.images import image_size


def opened(name: str, folder: Path) -> BenchFiles:
    paths = find_files(name, folder)
    return BenchFiles(name, paths, image_folders(paths[0], folder))


def items_of(name: str, folder: Path) -> list[Item]:
    samples.make(folder, name)
    files = opened(name, folder)
    return [item for row in range(len(files)) for item in files.items(row)]


def test_there_is_a_sample_of_every_benchmark() -> None:
    assert tuple(samples.MAKERS) == tuple(CATALOGUE) == BENCHES


@pytest.mark.parametrize("name", BENCHES)
def test_rows_become_items_whose_pictures_open_and_whose_gold_answer_is_right(name: str, tmp_path: Path) -> None:
    items = items_of(name, tmp_path)
    assert len({item.id for item in items}) == len(items) > 0
    for item in items:
        sizes = [image_size(source) for source in item.images]
        assert sizes and item.group and item.about in item.question
        text = f"<think>Hm.</think><answer>{item.gold[0]}</answer>"
        verdict = CATALOGUE[name].score(item, Said(text=text, image_size=sizes[0], seen_size=sizes[0]))
        assert verdict.score == 1.0, (item, verdict)
        wrong = CATALOGUE[name].score(item, Said(text="<answer>?</answer>", image_size=sizes[0], seen_size=sizes[0]))
        assert wrong.score == 0.0 or name == "mathvista"  # which takes the nearest option
        if item.options:
            assert item.gold[0] in (item.options if name == "mathvista" else item.letters)
            assert all(option in item.question for option in item.options)


def test_vstar_keeps_the_order_of_the_file_and_reads_the_boxes_beside_the_picture(tmp_path: Path) -> None:
    first, second = items_of("vstar", tmp_path)
    assert (first.options, first.gold, first.category) == (("red", "blue"), ("B",), "direct_attributes")
    assert first.gold_boxes == (Box(10, 20, 40, 60),) and second.gold_boxes == ()
    assert first.question.endswith("Answer with the option's letter from the given choices directly.")


def test_the_orders_of_one_question_are_one_group_and_share_the_picture_that_a_row_names(tmp_path: Path) -> None:
    first, turned, other = items_of("hrbench4k", tmp_path)
    assert first.images == turned.images != other.images
    assert first.group == turned.group != other.group
    assert first.about == 'What says the "sign"?\nLook.'
    lines = [{"facts": dict(one.facts), "score": score} for one, score in [(first, 1.0), (turned, 0.0), (other, 0.0)]]
    assert CATALOGUE["hrbench4k"].figures(lines) == {"cycle 1": 0.5, "cycle 2": 0.0, "mean over cycles": 0.25}


def test_mme_realworld_reports_both_tasks_and_their_mean(tmp_path: Path) -> None:
    first, second = items_of("mme_realworld", tmp_path)
    assert (first.category, second.category) == ("Perception/Remote Sensing", "Reasoning/Monitoring")
    lines = [{"category": first.category, "score": 1.0}] * 3 + [{"category": "Perception/OCR", "score": 0.0}]
    lines.append({"category": second.category, "score": 0.0})
    figures = CATALOGUE["mme_realworld"].figures(lines)
    assert figures["Perception"] == 0.75 and figures["Perception, mean over subtasks"] == 0.5
    assert figures["mean of the tasks"] == 0.375


def test_zoom_bench_has_two_views_of_one_question(tmp_path: Path) -> None:
    whole, crop = items_of("zoombench", tmp_path / "a"), items_of("zoombench_crop", tmp_path / "b")
    assert [one.question for one in whole] == [one.question for one in crop]
    assert [image_size(one.images[0]) for one in crop] == [Size(40, 40)] * 2
    assert all(one.gold_image is not None for one in whole) and all(one.gold_image is None for one in crop)
    assert (whole[0].gold, whole[1].gold, whole[1].options) == (("B",), ("two",), ())


def test_a_pair_of_mmvp_is_right_when_both_are(tmp_path: Path) -> None:
    first, second = items_of("mmvp", tmp_path)
    assert first.group == second.group == "pair 1" and first.options == ("Up", "Down")
    lines = [{"group": "pair 1", "sample": 0, "score": 1.0}, {"group": "pair 1", "sample": 0, "score": 0.0}]
    lines += [{"group": "pair 2", "sample": 0, "score": 1.0}] * 2
    assert CATALOGUE["mmvp"].figures(lines) == {"pairs": 0.5}


def test_cv_bench_is_the_mean_of_sources_then_of_kinds(tmp_path: Path) -> None:
    items = items_of("cvbench", tmp_path)
    lines = [{"facts": dict(item.facts), "score": score} for item, score in zip(items, [1.0, 0.0, 1.0])]
    assert CATALOGUE["cvbench"].figures(lines) == {"2D": 0.5, "3D": 1.0, "mean of 2D and 3D": 0.75}


def test_science_qa_asks_only_what_has_a_picture_with_its_context(tmp_path: Path) -> None:
    [item] = items_of("scienceqa", tmp_path)
    assert item.question.startswith("Context: Look.\nWhich is it?\n(A) a cat\n(B) a dog\n") and item.id == "2"


def test_each_phrase_of_refcoco_is_a_question_for_one_box(tmp_path: Path) -> None:
    first, second = items_of("refcoco", tmp_path)
    assert (first.id, second.id, first.category) == ("1.1", "1.2", "testA")
    assert first.gold_boxes == (Box(10, 20, 40, 60),) and "<ref>left cup</ref>" in first.question


def test_ones_own_rows_may_hold_several_questions(tmp_path: Path) -> None:
    first, second = items_of("jsonl", tmp_path)
    assert (first.gold, first.gold_boxes, second.gold) == (("7",), (Box(10, 20, 40, 60),), ("8",))


def test_a_folder_without_its_file_names_where_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file of V\*Bench \(test_questions.jsonl\); download craigwu/vstar_bench"):
        find_files("vstar", tmp_path)
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).touch()
    with pytest.raises(DataError, match="2 files; name one: --bench jsonl:a.jsonl"):
        find_files("jsonl", tmp_path)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"label": "7"}, 'the gold answer is "7", no letter of an option'),
        ({"text": None}, "there is no text; it is no row of this benchmark"),
        ({"image": ""}, "there is no picture as image"),
    ],
)
def test_a_row_that_is_none_says_so(change: dict[str, object], problem: str, tmp_path: Path) -> None:
    row = {"image": "a.png", "text": "Q\n(A) a\n(B) b", "label": "A", "category": "x", **change}
    samples.write_jsonl(tmp_path / "test_questions.jsonl", [row])
    files = opened("vstar", tmp_path)
    with pytest.raises(DataError, match=problem):
        files.items(0)


@pytest.mark.parametrize("written", ["[[1, 2, 3]]", "[1, 2, 'x', 4]", "[[5, 5, 1, 1]]", [[1, None, 3, 4]]])
def test_what_is_no_box_is_told_with_its_row(written: object, tmp_path: Path) -> None:
    row = Fields({"bbox": written}, "a.tsv:2", tmp_path)
    with pytest.raises(DataError, match="a.tsv:2: bbox holds no box"):
        row.boxes("bbox")


def test_options_keep_their_letters_where_one_stands_twice_or_is_missing() -> None:
    assert without_letters(["(A) a", "(B) b", "(D) d", "(D) again", "(E) e"]) == ("a", "b", "", "d", "e")
    assert without_letters(["one", "two"]) == ("one", "two")


def test_a_list_may_be_a_text_of_json_of_python_or_of_lines(tmp_path: Path) -> None:
    texts = ['["a", "b"]', "['a', 'b']", "a\nb\n"]
    assert {Fields({"answers": text}, "", tmp_path).texts("answers") for text in texts} == {("a", "b")}
