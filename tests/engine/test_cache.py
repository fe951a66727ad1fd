"""Pages: given out lowest first, under a budget, shared without being written, and taken back."""

from __future__ import annotations

import torch

from looktwice.engine.cache import Cache
from looktwice.engine.state import Sequence, SharedPrompt


def written(cache: Cache, sequence: Sequence, ids: list[int]) -> None:
    """Put ids where keys belong, and their negatives where values do."""
    assert cache.reserve(sequence, sequence.num_cached + len(ids))
    places = range(sequence.num_cached, sequence.num_cached + len(ids))
    pages = torch.tensor([sequence.pages[place // cache.page_size] for place in places])
    offsets = torch.tensor([place % cache.page_size for place in places])
    keys = torch.tensor(ids, dtype=torch.float32)[None, :, None]
    cache.write(0, keys, -keys, pages, offsets)
    sequence.num_cached += len(ids)


def read(cache: Cache, sequence: Sequence) -> list[int]:
    keys, values = (store[0][sequence.pages].flatten()[: sequence.num_cached] for store in (cache.keys, cache.values))
    assert torch.equal(keys, -values)
    return keys.int().tolist()


def test_a_sequence_has_as_many_pages_as_its_tokens_need() -> None:
    cache, sequence = Cache(1, max_tokens=12, page_size=4), Sequence()
    assert [cache.reserve(sequence, count) and len(sequence.pages) for count in (1, 4, 5, 12, 13)] == [
        1,
        1,
        2,
        3,
        False,
    ]
    assert (sequence.pages, cache.num_available) == ([0, 1, 2], 0)


def test_nothing_is_given_when_there_is_not_enough() -> None:
    cache, first, second = Cache(1, max_tokens=12, page_size=4), Sequence(), Sequence()
    assert cache.reserve(first, 8) and not cache.reserve(second, 8)
    assert (second.pages, cache.num_available) == ([], 1)


def test_the_lowest_free_page_is_given_first() -> None:
    cache = Cache(1, max_tokens=100, page_size=1)
    first, second, third = Sequence(), Sequence(), Sequence()
    for sequence in (first, second):
        cache.reserve(sequence, 3)
    cache.release(first)
    cache.reserve(third, 4)
    assert third.pages == [0, 1, 2, 6]


def test_a_fork_shares_full_pages_and_copies_the_rest() -> None:
    cache, prompt, row = Cache(1, max_tokens=100, page_size=4), SharedPrompt(ids=list(range(1, 7))), Sequence()
    written(cache, prompt, prompt.ids)
    assert cache.fork(prompt, row)
    assert (row.num_shared, row.num_cached, row.pages[0]) == (1, 6, prompt.pages[0])
    assert row.pages[1] != prompt.pages[1]
    written(cache, row, [70, 80, 90])
    assert read(cache, row) == [1, 2, 3, 4, 5, 6, 70, 80, 90]
    assert read(cache, prompt) == [1, 2, 3, 4, 5, 6]
    assert cache.used_tokens([prompt, row]) == 6 + 5


def test_a_shared_page_is_free_when_its_last_holder_lets_go() -> None:
    cache, prompt, row = Cache(1, max_tokens=100, page_size=2), SharedPrompt(ids=[1, 2, 3, 4]), Sequence()
    written(cache, prompt, prompt.ids)
    cache.fork(prompt, row)
    cache.release(prompt)
    assert (cache.num_used, read(cache, row)) == (2, [1, 2, 3, 4])
    cache.release(row)
    assert (cache.num_used, cache.num_bytes) == (0, 0)


def test_what_is_held_grows_with_what_is_used_and_never_beyond_the_budget() -> None:
    cache, sequence = Cache(2, max_tokens=1000, page_size=10), Sequence()
    for count in range(1, 101):
        assert cache.reserve(sequence, count * 10)
        held = cache.num_pages
        assert count <= held <= max(16, count + 16, count * 1.1) and held <= 100
    assert not cache.reserve(sequence, 1001)


def test_a_grown_cache_keeps_what_was_there() -> None:
    cache, sequence = Cache(1, max_tokens=1000, page_size=1), Sequence()
    for token in range(200):
        written(cache, sequence, [token])
    assert read(cache, sequence) == list(range(200))
