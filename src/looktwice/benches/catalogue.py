"""The benchmarks there are: their files, what reads a row, what scores an answer, and the figures they report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from looktwice.benches import documents, high_resolution, reasoning, referring, scorers
from looktwice.benches.item import Item, Said, Verdict
from looktwice.benches.reading import Fields

Figures = Callable[[Sequence[Mapping[str, Any]]], dict[str, float]]
"""Further figures of lines of a result, by name."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One benchmark. `files` are patterns of file names below the data folder, of which the first that fits is read
    (all files that fit it); `read` is None for one's own set. `is_judged` says that a judge may decide what the rules
    leave open."""

    title: str
    source: str
    files: tuple[str, ...]
    read: Callable[[Fields], list[Item]] | None
    score: Callable[[Item, Said], Verdict]
    figures: Figures | None = None
    is_judged: bool = False


_REF: dict[str, Any] = dict(files=("*.parquet", "*.json*", "*.tsv"), read=referring.ref_coco, score=scorers.boxes)
_MME: dict[str, Any] = dict(
    read=high_resolution.mme_realworld, score=scorers.first_letter, figures=high_resolution.by_task
)
_HR: dict[str, Any] = dict(
    read=high_resolution.hr_bench, score=scorers.only_letter, figures=high_resolution.by_cycle, is_judged=True
)
_ZOOM: dict[str, Any] = dict(
    source="inclusionAI/ZoomBench", files=("*.parquet", "*zoom*.json*"), score=scorers.letter_or_text, is_judged=True
)
_DOC: dict[str, Any] = dict(read=documents.doc_vqa, score=scorers.anls)
CATALOGUE: dict[str, Bench] = {
    "vstar": Bench(
        title="V*Bench",
        source="craigwu/vstar_bench",
        files=("test_questions.jsonl",),
        read=high_resolution.vstar,
        score=scorers.letter,
        is_judged=True,
    ),
    "hrbench4k": Bench(title="HR-Bench 4K", source="DreamMr/HR-Bench", files=("*4[kK]*.tsv", "*4[kK]*.parquet"), **_HR),
    "hrbench8k": Bench(title="HR-Bench 8K", source="DreamMr/HR-Bench", files=("*8[kK]*.tsv", "*8[kK]*.parquet"), **_HR),
    "mme_realworld": Bench(
        title="MME-RealWorld",
        source="yifanzhang114/MME-RealWorld",
        files=("MME_RealWorld.json", "MME-RealWorld.tsv", "*.parquet"),
        **_MME,
    ),
    "mme_realworld_lite": Bench(
        title="MME-RealWorld-Lite",
        source="yifanzhang114/MME-RealWorld-Lite",
        files=("MME-RealWorld-Lite.json", "MME-RealWorld-Lite.tsv", "*.parquet"),
        **_MME,
    ),
    "zoombench": Bench(title="ZoomBench", read=high_resolution.zoom_bench, **_ZOOM),
    "zoombench_crop": Bench(title="ZoomBench, gold crop alone", read=high_resolution.zoom_bench_crop, **_ZOOM),
    "treebench": Bench(
        title="TreeBench",
        source="HaochenWang/TreeBench",
        files=("TreeBench.tsv", "TreeBench*.json*", "*.parquet"),
        read=high_resolution.tree_bench,
        score=scorers.letter_and_boxes,
        is_judged=True,
    ),
    "textvqa": Bench(
        title="TextVQA",
        source="lmms-lab/textvqa",
        files=("TextVQA*val*.json", "validation*.parquet", "*.parquet"),
        read=documents.text_vqa,
        score=scorers.of_ten,
    ),
    "docvqa": Bench(
        title="DocVQA", source="lmms-lab/DocVQA", files=("val*.json", "validation*.parquet", "*.parquet"), **_DOC
    ),
    "infographicvqa": Bench(
        title="InfographicVQA",
        source="lmms-lab/DocVQA",
        files=("infographic*val*.json", "validation*.parquet", "*.parquet"),
        **_DOC,
    ),
    "chartqa": Bench(
        title="ChartQA",
        source="lmms-lab/ChartQA",
        files=("test*.json", "test*.parquet", "*.parquet"),
        read=documents.chart_qa,
        score=scorers.relaxed,
    ),
    "scienceqa": Bench(
        title="ScienceQA-IMG",
        source="lmms-lab/ScienceQA",
        files=("test*.parquet", "*.parquet", "*.json*"),
        read=reasoning.science_qa,
        score=scorers.starting_letter,
    ),
    "mathvista": Bench(
        title="MathVista testmini",
        source="AI4Math/MathVista",
        files=("testmini*.parquet", "*.parquet", "*.json*"),
        read=reasoning.math_vista,
        score=scorers.mathvista,
        is_judged=True,
    ),
    "mmvp": Bench(
        title="MMVP",
        source="MMVP/MMVP",
        files=("Questions.csv", "*.csv", "*.tsv"),
        read=reasoning.mmvp,
        score=scorers.letter,
        figures=reasoning.by_pair,
        is_judged=True,
    ),
    "cvbench": Bench(
        title="CV-Bench",
        source="nyu-visionx/CV-Bench",
        files=("test_*.jsonl", "test_*.parquet", "test*.parquet"),
        read=reasoning.cv_bench,
        score=scorers.letter,
        figures=reasoning.by_source,
        is_judged=True,
    ),
    "refcoco": Bench(title="RefCOCO", source="lmms-lab/RefCOCO", **_REF),
    "refcoco_plus": Bench(title="RefCOCO+", source="lmms-lab/RefCOCOplus", **_REF),
    "refcocog": Bench(title="RefCOCOg", source="lmms-lab/RefCOCOg", **_REF),
    "jsonl": Bench(
        title="one's own set",
        source="a file in a format of docs/data.md",
        files=("eval.jsonl", "*.jsonl"),
        read=None,
        score=scorers.text,
        is_judged=True,
    ),
}
