"""What judging data files found: counts by reason, first places, and whether training would run."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from looktwice.data.problems import REASONS, Problem
from looktwice.data.tally import counted

PLACES_KEPT = 100


@dataclass(kw_only=True)
class Verdict:
    """What was found, counted by reason, with the first places of each; `unchecked`: by flag, what was not checked
    without it."""

    num_rows: int = 0
    num_samples: int = 0
    num_pictures: int = 0
    formats: dict[str, str] = field(default_factory=dict)
    unchecked: dict[str, str] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    first: defaultdict[str, list[Problem]] = field(default_factory=lambda: defaultdict(list))
    bad_rows: set[int] = field(default_factory=set)

    def add(self, problem: Problem) -> None:
        self.counts[problem.reason] += 1
        if len(self.first[problem.reason]) < PLACES_KEPT:
            self.first[problem.reason].append(problem)
        if problem.is_fatal:
            self.bad_rows.add(hash(problem.where))

    @property
    def would_train(self) -> bool:
        return not self.bad_rows

    @property
    def reasons(self) -> list[str]:
        """The reasons found, fatal ones first, then by count."""
        return sorted(self.counts, key=lambda reason: (not REASONS[reason].is_fatal, -self.counts[reason], reason))

    def __str__(self) -> str:
        """Whether training would run, in words."""
        rows = counted(self.num_rows, "row")
        if self.bad_rows:
            places, samples = counted(len(self.bad_rows), "place"), counted(self.num_samples, "readable sample")
            return f"training would stop: {places} to mend or leave out, in {rows} with {samples}"
        num_notes = sum(self.counts.values())
        notes = f", with {counted(num_notes, 'note')} to look at" if num_notes else ", and nothing was found"
        return f"training would run: {counted(self.num_samples, 'sample')} in {rows}{notes}"

    def as_json(self) -> dict[str, object]:
        """All that is known, for machines: each reason with its first 100 places."""
        return {
            "would_train": self.would_train,
            "rows": self.num_rows,
            "samples": self.num_samples,
            "pictures": self.num_pictures,
            "formats": self.formats,
            "unchecked": self.unchecked,
            "reasons": {
                reason: {
                    "count": self.counts[reason],
                    "is_fatal": REASONS[reason].is_fatal,
                    "meaning": REASONS[reason].meaning,
                    "mend": REASONS[reason].mend,
                    "first": [
                        {"where": one.where, "field": one.field, "what": one.what, "mend": one.mend}
                        for one in self.first[reason]
                    ],
                }
                for reason in self.reasons
            },
        }
