"""Tables, their cells already written as text: the same ones in the terminal and on pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from looktwice.checking.statistics import Packing, Statistics, percentile, simulate_packing
from looktwice.config import StatsConfig
from looktwice.errors import counted
from looktwice.report.sample_view import SampleView

SHARES = {"min": 0.0, "50 %": 0.5, "90 %": 0.9, "99 %": 0.99, "max": 1.0}


@dataclass(frozen=True, kw_only=True)
class Table:
    """A titled table; `rows` are cells already written as text."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def token_table(view: SampleView) -> Table:
    """Tokens of each turn of a sample by kind, and how many of them are trained."""
    counts = [
        (turn.num_text_tokens, turn.num_image_tokens, turn.num_crop_tokens, turn.num_tokens, turn.num_trained)
        for turn in view.turns
    ]
    names = [*(turn.role for turn in view.turns), "all"]
    totals = tuple(map(sum, zip(*counts)))
    return Table(
        title="Tokens",
        header=("turn", "text", "pictures", "crops", "all", "trained"),
        rows=tuple((name, *(f"{count:,}" for count in row)) for name, row in zip(names, [*counts, totals])),
        note=f"{share_text(view.trained_share)} of the tokens are trained. Pictures and crops with their two marks.",
    )


def statistics_tables(statistics: Statistics, config: StatsConfig) -> list[Table]:
    """What a sample has, from the smallest to the largest, and what the set as a whole comes to."""
    tables = [_spread_table(statistics), _whole_table(statistics, config)] if statistics.measures else []
    if statistics.unmeasured:
        rows = tuple((line,) for line in statistics.unmeasured.lines())
        note = "Left out of all figures; `looktwice data check` says what is wrong with each."
        tables.append(Table(title="Not measured", header=("what, and the first places",), rows=rows, note=note))
    return tables


def _spread_table(statistics: Statistics) -> Table:
    measures, sizes = statistics.measures, statistics.image_sizes
    values: dict[str, Sequence[float]] = {
        "turns": [one.num_turns for one in measures],
        "pictures": [len(one.image_sizes) for one in measures],
        "crops of an answer": statistics.crops_per_answer,
        "picture width": [size.width for size in sizes],
        "picture height": [size.height for size in sizes],
        "text tokens": [one.num_text_tokens for one in measures],
        "visual tokens": [one.num_visual_tokens for one in measures],
        "trained tokens": [one.num_trained_tokens for one in measures],
        "length in tokens": statistics.lengths,
    }
    rows = [(name, *(f"{percentile(of, share):,.0f}" for share in SHARES.values())) for name, of in values.items()]
    sums = ["" if name.startswith("picture ") else f"{sum(of):,}" for name, of in values.items()]
    note = "At most this in so many of the samples, answers or pictures; pixels as in the files, upright."
    return Table(
        title="What a sample has",
        header=("", *SHARES, "sum"),
        rows=tuple((*row, total) for row, total in zip(rows, sums)),
        note=note,
    )


def _whole_table(statistics: Statistics, config: StatsConfig) -> Table:
    lengths = statistics.lengths
    fitting = [length for length in lengths if length <= config.max_length]
    num_trained = sum(one.num_trained_tokens for one in statistics.measures)
    packing = packing_of(statistics, config)
    filled = packing.num_tokens / max(1, packing.num_packed_rows * config.max_tokens_per_row)
    rows = (
        ("rows measured", f"{statistics.num_whole_rows:,}"),
        ("samples", f"{len(lengths):,}"),
        ("trained share of the tokens", share_text(num_trained / max(1, sum(lengths)))),
        (f"longer than max_length {config.max_length:,}", _count_of(len(lengths) - len(fitting), len(lengths))),
        (f"padded batches of {config.train_batch_size}", f"{packing.num_padded:,} tokens"),
        (f"packed rows of at most {config.max_tokens_per_row:,}", f"{packing.num_tokens:,} tokens in "
         f"{counted(packing.num_packed_rows, 'row')}, {share_text(filled)} full"),
        ("padding saved by packing", share_text(packing.padding_share)),
    )  # fmt: skip
    note = (
        "As in one epoch of training in its own order, without samples longer than max_length. A step packs its own "
        "samples, so rows are fuller with larger batches."
    )
    return Table(title="The whole set", header=("", ""), rows=rows, note=note)


def packing_of(statistics: Statistics, config: StatsConfig) -> Packing:
    """Padding and packing of the samples that are not too long."""
    return simulate_packing(
        [length for length in statistics.lengths if length <= config.max_length],
        batch_size=config.train_batch_size,
        max_tokens_per_row=config.max_tokens_per_row,
        seed=config.seed,
    )


def share_text(share: float) -> str:
    return f"{100 * share:.1f} %"


def _count_of(count: int, total: int) -> str:
    return f"{count:,} ({share_text(count / max(1, total))})"
