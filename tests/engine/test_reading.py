"""Who reads what: every way of reading gives each row the attention over its own keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from looktwice.engine import reading
from looktwice.engine.attention import Reader
from looktwice.engine.cache import Cache
from looktwice.engine.reading import Reading, reading_order
from looktwice.engine.scheduler import Feed
from looktwice.engine.state import Sequence, SharedPrompt

NUM_HEADS, NUM_KEYS, WIDTH, PAGE = 4, 2, 8, 4
SCALING = WIDTH**-0.5


class World:
    """A prompt of three full pages and a bit with siblings, and rows of their own; all keys of each row at hand."""

    def __init__(self) -> None:
        self.random = torch.Generator().manual_seed(0)
        self.cache = Cache(1, max_tokens=1000, page_size=PAGE)
        self.keys: dict[Sequence, Tensor] = {}
        self.values: dict[Sequence, Tensor] = {}
        prompt = SharedPrompt(ids=[0] * 14)
        self.grow(prompt, 14)
        self.feeds = []
        for length, count in ((0, 1), (6, 1), (1, 3)):
            row = Sequence()
            assert self.cache.fork(prompt, row)
            self.keys[row], self.values[row] = self.keys[prompt], self.values[prompt]
            self.feeds.append(self.feed(row, length, count))
        for length, count in ((0, 1), (9, 1), (0, 5), (7, 2)):
            self.feeds.append(self.feed(Sequence(), length, count))
        self.feeds = reading_order(self.feeds)
        self.query = self.numbers(sum(feed.count for feed in self.feeds), NUM_HEADS)

    def numbers(self, *shape: int) -> Tensor:
        return torch.randn(*shape, WIDTH, generator=self.random)

    def grow(self, sequence: Sequence, count: int) -> None:
        """Keys and values of so many tokens more."""
        assert self.cache.reserve(sequence, sequence.num_cached + count)
        places = torch.arange(sequence.num_cached, sequence.num_cached + count)
        key, value = self.numbers(NUM_KEYS, count), self.numbers(NUM_KEYS, count)
        self.cache.write(0, key, value, torch.tensor(sequence.pages)[places // PAGE], places % PAGE)
        for known, new in ((self.keys, key), (self.values, value)):
            known[sequence] = torch.cat([known.get(sequence, new[:, :0]), new], 1)
        sequence.num_cached += count

    def feed(self, row: Sequence, length: int, count: int) -> Feed:
        """A row with so many ids of its own that feeds so many more, whose keys are stored as a pass stores them."""
        if length:
            self.grow(row, length)
        self.grow(row, count)
        row.num_cached -= count
        return Feed(row, count)

    def readers(self, dtype: torch.dtype = torch.float32) -> list[Reader]:
        return Reading(page_size=PAGE, num_keys=NUM_KEYS, device=torch.device("cpu")).readers(self.feeds, dtype)

    def read(self, readers: list[Reader]) -> Tensor:
        keys, values = self.cache.keys[0], self.cache.values[0]
        parts = [one.read(self.query[one.start : one.end], keys, values, SCALING) for one in readers]
        assert [one.start for one in readers[1:]] == [one.end for one in readers[:-1]]
        return torch.cat(parts)

    def expected(self) -> Tensor:
        """Each feed by itself over all keys of its row."""
        parts = []
        for feed, query in zip(self.feeds, self.query.split([feed.count for feed in self.feeds])):
            key, value = self.keys[feed.sequence], self.values[feed.sequence]
            seen = torch.ones(feed.count, key.shape[1], dtype=torch.bool).tril(key.shape[1] - feed.count)
            query = query.transpose(0, 1)
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=SCALING, enable_gqa=True)
            parts.append(out.transpose(0, 1))
        return torch.cat(parts)


@pytest.mark.parametrize("shared_tokens", [0, 10**9])
@pytest.mark.parametrize("padded_pages", [0, 64])
def test_each_row_reads_its_own_keys(shared_tokens, padded_pages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "SHARED_TOKENS", shared_tokens)
    monkeypatch.setattr(reading, "PADDED_PAGES", padded_pages)
    world = World()
    torch.testing.assert_close(world.read(world.readers()), world.expected())


def test_siblings_read_their_prompt_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "SHARED_TOKENS", 12)
    world = World()
    prompts = world.readers()[0].prompts
    # two of the three siblings feed one id, and three pages of the prompt are full
    assert (prompts.rows.tolist(), len(prompts.pages)) == ([0, 2], 3 * NUM_KEYS)
    monkeypatch.setattr(reading, "SHARED_TOKENS", 13)
    assert world.readers()[0].prompts is None


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: None,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: Tensor,
    block_table: Tensor,
) -> Tensor:
    """What torch's function is documented to do, in plain operations: causal from the end of the keys."""
    assert (cu_seq_q.dtype, seqused_k.dtype, block_table.dtype, cu_seq_k) == (*[torch.int32] * 3, None)
    assert window_size == (-1, 0) and enable_gqa and key.shape[1:] == (PAGE, NUM_KEYS, WIDTH)
    assert max_q == cu_seq_q.diff().max() and max_k == seqused_k.max()
    parts = []
    for one, used, pages in zip(query.split(cu_seq_q.diff().tolist()), seqused_k, block_table):
        k, v = (store[pages].flatten(0, 1)[:used].transpose(0, 1) for store in (key, value))
        seen = torch.ones(len(one), int(used), dtype=torch.bool).tril(int(used) - len(one))
        one = one.transpose(0, 1)
        out: Any = F.scaled_dot_product_attention(one, k, v, attn_mask=seen, scale=scale, enable_gqa=True)
        parts.append(out.transpose(0, 1))
    return torch.cat(parts)


def test_paged_attention_of_torch_is_asked_for_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    world = World()
    one = Reading(page_size=PAGE, num_keys=NUM_KEYS, device=torch.device("cpu"))
    torch.testing.assert_close(world.read([one._varlen(world.feeds)]), world.expected())


def test_feeds_of_one_id_come_first_and_the_longest_first_of_them() -> None:
    singles = World().feeds[:4]
    assert [feed.count for feed in singles] == [1] * 4
    assert [len(feed.sequence.pages) - feed.sequence.num_shared for feed in singles] == [3, 3, 1, 1]
