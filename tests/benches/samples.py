"""Two or three rows of each benchmark, in the public form of its files, about pictures of noise."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
from PIL import Image
from pyarrow import parquet

DIRECT = "Answer with the option's letter from the given choices directly."
RANDOM = np.random.default_rng(0)


def photo(size: tuple[int, int] = (160, 120)) -> Image.Image:
    return Image.fromarray(RANDOM.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def png(image: Image.Image | None = None) -> bytes:
    held = io.BytesIO()
    (image or photo()).save(held, "PNG")
    return held.getvalue()


def in_base64(image: Image.Image | None = None) -> str:
    return base64.b64encode(png(image)).decode()


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, [*rows[0]], delimiter="\t" if path.suffix == ".tsv" else ",", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(arrow.Table.from_pylist([dict(row) for row in rows]), path)


def save(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    photo().save(path)


def vstar(folder: Path) -> None:
    text = "What is the colour of the cup?\n(A) red\n(B) blue\n" + DIRECT
    row = {"image": "direct_attributes/sa_1.jpg", "text": text, "label": "B", "category": "direct_attributes"}
    other = {**row, "image": "relative_position/sa_2.jpg", "label": "A", "category": "relative_position"}
    write_jsonl(folder / "test_questions.jsonl", [{**row, "question_id": 0}, {**other, "question_id": 1}])
    save(folder / row["image"])
    save(folder / other["image"])
    sidecar = {"question": "?", "options": ["blue", "red"], "target_object": ["cup"], "bbox": [[10, 20, 30, 40]]}
    write_json(folder / "direct_attributes" / "sa_1.json", sidecar)


def hr_bench(folder: Path, size: str) -> None:
    """Two orders of one question, of which the second names the first for its picture, and another question."""
    image = in_base64()
    row = {"index": 0, "question": 'What says the "sign"?\nLook.', "A": "stop", "B": "go", "C": "wait", "D": "turn"}
    row |= {"answer": "A", "category": "single", "cycle_category": "1", "image": image}
    turned = {**row, "index": 1, "A": "turn", "B": "stop", "C": "go", "D": "wait", "answer": "B", "image": "0"}
    other = {**row, "index": 2, "category": "cross", "image": in_base64()}
    write_table(folder / f"HRBench{size}.tsv", [row, {**turned, "cycle_category": "2"}, other])


def mme_realworld(folder: Path, name: str) -> None:
    choices = ["(A) 1", "(B) 2", "(C) 3", "(D) 4", "(E) The image does not feature it."]
    row = {"Question_id": "p/1", "Image": "remote/a.png", "Text": "How many ships?", "Question Type": "Multiple Choice"}
    row |= {"Answer choices": choices, "Ground truth": "C", "Category": "count", "Subtask": "Remote Sensing"}
    rows = [{**row, "Task": "Perception"}, {**row, "Task": "Reasoning", "Subtask": "Monitoring", "Ground truth": "E"}]
    write_json(folder / name, rows)
    save(folder / "remote" / "a.png")


def zoom_bench(folder: Path) -> None:
    row = {"id": "1", "query": "What is written?\nA. one\nB. two", "response": "B", "image": {"bytes": png()}}
    crop = {"bytes": png(photo((40, 40)))}
    open_row = {**row, "id": "2", "query": "What is written?", "response": "two", "crop_image": crop}
    write_parquet(folder / "data" / "test-00000-of-00002.parquet", [{**row, "crop_image": crop}])
    write_parquet(folder / "data" / "test-00001-of-00002.parquet", [open_row])


def tree_bench(folder: Path) -> None:
    row = {"index": 0, "image": in_base64(), "question": "Which?", "A": "cat", "B": "dog", "answer": "B"}
    row |= {"category": "Perception/Attributes", "target_instances": "[[10, 10, 50, 50], [60, 60, 90, 90]]"}
    write_table(folder / "TreeBench.tsv", [row])


def text_vqa(folder: Path) -> None:
    data = [{"question_id": 1, "question": "what brand?", "image_id": "abc", "answers": ["nokia"] * 9 + ["phone"]}]
    write_json(folder / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": data})
    save(folder / "train_images" / "abc.jpg")


def doc_vqa(folder: Path) -> None:
    row = {"questionId": "1", "question": "What date?", "image": {"bytes": png(), "path": None}, "answers": ["1 May"]}
    write_parquet(folder / "validation-00000-of-00001.parquet", [row])


def infographic_vqa(folder: Path) -> None:
    data = [{"questionId": 1, "question": "How many?", "image_local_name": "7.jpeg", "answers": ["12 %", "12"]}]
    write_json(folder / "infographicVQA_val_v1.0.json", {"data": data})
    save(folder / "7.jpeg")


def chart_qa(folder: Path) -> None:
    write_json(folder / "test_human.json", [{"imgname": "png/1.png", "query": "How much?", "label": "40"}])
    save(folder / "png" / "1.png")


def science_qa(folder: Path) -> None:
    row = {
        "question": "Which is it?",
        "choices": ["a cat", "a dog"],
        "answer": 1,
        "hint": "Look.",
        "subject": "biology",
    }
    shown = {**row, "image": {"bytes": png(), "path": None}}
    write_parquet(folder / "test-00000-of-00001.parquet", [{**row, "image": None}, shown])


def math_vista(folder: Path) -> None:
    row = {"pid": "1", "question": "How long?", "query": "Hint: an integer.\nQuestion: How long?", "choices": None}
    row |= {"unit": None, "precision": None, "answer": "5", "question_type": "free_form", "answer_type": "integer"}
    row |= {"decoded_image": {"bytes": png()}, "image": "images/1.jpg", "metadata": {"task": "geometry"}}
    choice = {
        **row,
        "query": "Question: How long?\nChoices:\n(A) 3 cm\n(B) 5 cm",
        "choices": ["3 cm", "5 cm"],
        "answer": "5 cm",
        "question_type": "multi_choice",
        "answer_type": "text",
    }
    write_parquet(folder / "testmini-00000-of-00001.parquet", [row, choice])


def mmvp(folder: Path) -> None:
    row = {"Index": 1, "Question": "Are the wings up, or down?", "Options": "(a) Up (b) Down", "Correct Answer": "(a)"}
    write_table(folder / "Questions.csv", [row, {**row, "Index": 2, "Correct Answer": "(b)"}])
    save(folder / "MMVP Images" / "1.jpg")
    save(folder / "MMVP Images" / "2.jpg")


def cv_bench(folder: Path) -> None:
    row = {"idx": 0, "type": "2D", "task": "Count", "image": {"bytes": png()}, "question": "How many?", "answer": "(B)"}
    row |= {
        "choices": ["1", "2"],
        "prompt": "How many? Select from the following choices.\n(A) 1\n(B) 2",
        "source": "ADE20K",
    }
    write_parquet(folder / "test_2d.parquet", [row, {**row, "source": "COCO", "answer": "(A)"}])
    write_parquet(folder / "test_3d.parquet", [{**row, "type": "3D", "task": "Depth", "source": "Omni3D"}])


def ref_coco(folder: Path) -> None:
    row = {
        "question_id": "1",
        "image": {"bytes": png()},
        "answer": ["left cup", "the cup"],
        "bbox": [10.0, 20.0, 30.0, 40.0],
    }
    write_parquet(folder / "testA-00000-of-00001.parquet", [row])


def own(folder: Path) -> None:
    question = {"Q": "Which digit?", "A3": "<answer>7</answer>", "answer": "7", "box": [10, 20, 40, 60]}
    write_jsonl(
        folder / "eval.jsonl", [{"image_path": "a.png", "QnA": [question, {"Q": "Which?", "A3": "<answer>8</answer>"}]}]
    )
    save(folder / "a.png")


MAKERS = {
    "vstar": vstar,
    "hrbench4k": lambda folder: hr_bench(folder, "4K"),
    "hrbench8k": lambda folder: hr_bench(folder, "8K"),
    "mme_realworld": lambda folder: mme_realworld(folder, "MME_RealWorld.json"),
    "mme_realworld_lite": lambda folder: mme_realworld(folder, "MME-RealWorld-Lite.json"),
    "zoombench": zoom_bench,
    "zoombench_crop": zoom_bench,
    "treebench": tree_bench,
    "textvqa": text_vqa,
    "docvqa": doc_vqa,
    "infographicvqa": infographic_vqa,
    "chartqa": chart_qa,
    "scienceqa": science_qa,
    "mathvista": math_vista,
    "mmvp": mmvp,
    "cvbench": cv_bench,
    "refcoco": ref_coco,
    "refcoco_plus": ref_coco,
    "refcocog": ref_coco,
    "jsonl": own,
}


def make(folder: Path, *names: str) -> Path:
    """A data folder with a subfolder for each of these benchmarks."""
    for name in names:
        MAKERS[name](folder / name)
    return folder
