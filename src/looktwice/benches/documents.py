"""Benchmarks of text in pictures: TextVQA, DocVQA, InfographicVQA, ChartQA."""

from __future__ import annotations

from looktwice.benches.item import Item
from looktwice.benches.reading import BRIEF, Fields
from looktwice.errors import DataError
from looktwice.messages import ImageSource


def text_vqa(row: Fields) -> list[Item]:
    """A row of TextVQA with the answers of ten people, of the hub's tables or of the original JSON, which names a
    picture by its id alone."""
    answers = row.texts("answers")
    if len(answers) != 10:
        raise DataError(f"{row.where}: {len(answers)} answers where ten people gave one each; use the validation set")
    if not row.has("image") and row.has("image_id"):
        row = row.given(image=f"train_images/{row.text('image_id')}.jpg")
    return [_brief(row, row.image("image", "image_path"), answers)]


def doc_vqa(row: Fields) -> list[Item]:
    """A row of DocVQA or InfographicVQA, of the hub's tables or of the original JSON."""
    return [_brief(row, row.image("image", "image_local_name"), row.texts("answers"))]


def chart_qa(row: Fields) -> list[Item]:
    """A row of ChartQA, of the hub's tables or of the original JSON; its category says who wrote the question."""
    answer = (row.text("answer", "label"),) if not isinstance(row.values.get("label"), list) else row.texts("label")
    return [
        _brief(row, row.image("image", "imgname"), answer, category=row.text("type", "human_or_machine", default=""))
    ]


def _brief(row: Fields, image: ImageSource, answers: tuple[str, ...], category: str = "") -> Item:
    about = row.text("question", "query")
    return Item(
        images=(image,),
        question=f"{about.strip()}\n{BRIEF}",
        about=about,
        gold=answers,
        category=category,
    )
