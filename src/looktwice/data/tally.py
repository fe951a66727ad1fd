"""Things that happen to many rows, counted by what happened, with the first few places of each."""

from __future__ import annotations

from collections import defaultdict

PLACES_SHOWN = 3


def counted(number: int, noun: str) -> str:
    """A number with its noun: `1 row`, `2,000 rows`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


class Tally:
    """How often each thing happened, and where first."""

    def __init__(self) -> None:
        self.counts: defaultdict[str, int] = defaultdict(int)
        self.places: defaultdict[str, list[str]] = defaultdict(list)

    def __bool__(self) -> bool:
        return bool(self.counts)

    def add(self, what: str, where: str) -> None:
        self.counts[what] += 1
        if len(self.places[what]) < PLACES_SHOWN:
            self.places[what].append(where)

    def update(self, other: Tally) -> None:
        """Add what another one counted later."""
        for what, count in other.counts.items():
            self.counts[what] += count
            self.places[what] += other.places[what][: PLACES_SHOWN - len(self.places[what])]

    def lines(self) -> list[str]:
        """One line for each thing, the most frequent first: `3 x an untrained turn (a.jsonl:1, a.jsonl:4, ...)`."""
        return [
            f"{count} x {what} ({', '.join(self.places[what])}{', ...' if count > PLACES_SHOWN else ''})"
            for what, count in sorted(self.counts.items(), key=lambda item: -item[1])
        ]
