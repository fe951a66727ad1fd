"""The memory of the engine: keys and values in pages, of which a sequence holds as many as its tokens need.

Legend: N pages, K key heads, P tokens of a page, D head width, T tokens of a pass.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Iterable

from torch import Tensor

from looktwice.engine.state import Sequence, SharedPrompt

GROWTH = 1 / 10
"""The tensors grow by this share, so that what is held stays near what is used; each growth copies what is there."""
LEAST_GROWTH = 16


class Cache:
    """Pages of `page_size` tokens, at most `max_tokens` of them in all: it gives out pages, and takes them back.

    The lowest free page is given out first, so that the pages in use lie together. A page that several sequences hold
    is full, or of nobody any more: it is never written.
    """

    def __init__(self, num_layers: int, *, max_tokens: int, page_size: int = 16) -> None:
        self.page_size = page_size
        self.max_pages = max(1, max_tokens // page_size)
        self.holders: Counter[int] = Counter()
        self.num_pages = 0
        self._free: list[int] = []
        self.keys: list[Tensor | None] = [None] * num_layers
        self.values: list[Tensor | None] = [None] * num_layers

    @property
    def num_used(self) -> int:
        return len(self.holders)

    @property
    def num_available(self) -> int:
        """Pages that can still be given out."""
        return self.max_pages - self.num_used

    @property
    def num_bytes(self) -> int:
        """Bytes that are held, used or not."""
        return sum(tensor.nbytes for store in (self.keys, self.values) for tensor in store if tensor is not None)

    def pages_for(self, num_tokens: int) -> int:
        return math.ceil(num_tokens / self.page_size)

    def missing(self, sequence: Sequence, num_tokens: int) -> int:
        """Pages that a sequence lacks to hold so many tokens."""
        return max(0, self.pages_for(num_tokens) - len(sequence.pages))

    def reserve(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give a sequence the pages for so many tokens; False, and nothing given, when there are not enough."""
        count = self.missing(sequence, num_tokens)
        if count > self.num_available:
            return False
        sequence.pages += [self._take() for _ in range(count)]
        return True

    def release(self, sequence: Sequence) -> None:
        """Take back what a sequence holds; what others hold too stays theirs."""
        for page in sequence.pages:
            self.holders[page] -= 1
            if not self.holders[page]:
                del self.holders[page]
                heapq.heappush(self._free, page)
        sequence.forget()
        if not self.holders:
            self._drop()

    def fork(self, prompt: SharedPrompt, sequence: Sequence) -> bool:
        """Let a sequence go on after a computed prompt: full pages are shared, the rest is copied. False when full."""
        num_shared, rest = divmod(len(prompt.ids), self.page_size)
        if rest and not self.num_available:
            return False
        sequence.pages = prompt.pages[:num_shared]
        self.holders.update(sequence.pages)
        sequence.num_shared, sequence.num_cached = num_shared, len(prompt.ids)
        if rest:
            page = self._take()
            sequence.pages = [*sequence.pages, page]
            for store in (self.keys, self.values):
                for layer, tensor in enumerate(store):
                    if tensor is not None:
                        tensor = self._grown(store, layer, tensor)
                        tensor[page] = tensor[prompt.pages[num_shared]]
        return True

    def write(self, layer: int, key: Tensor, value: Tensor, pages: Tensor, offsets: Tensor) -> None:
        """Store keys and values [K, T, D] of a layer at `offsets` [T] of `pages` [T]."""
        for store, new in ((self.keys, key), (self.values, value)):
            old = store[layer]
            if old is None:
                old = _pages(new, 0, new.shape[0], self.page_size, new.shape[2])
            self._grown(store, layer, old)[pages, :, offsets] = new.transpose(0, 1)

    def _grown(self, store: list[Tensor | None], layer: int, tensor: Tensor) -> Tensor:
        """The tensor of a layer with room for all pages; a page that was never written is zero, never NaN."""
        if len(tensor) < self.num_pages:
            grown = _pages(tensor, self.num_pages, *tensor.shape[1:])
            grown[: len(tensor)] = tensor
            grown[len(tensor) :] = 0
            store[layer] = tensor = grown
        return tensor

    def used_tokens(self, sequences: Iterable[Sequence]) -> int:
        """Tokens in the cache, those of a shared prompt counted once."""
        return sum(sequence.num_cached - sequence.num_shared * self.page_size for sequence in sequences)

    def _take(self) -> int:
        if not self._free:
            grown = self.num_pages + max(LEAST_GROWTH, int(self.num_pages * GROWTH))
            grown = min(self.max_pages, grown)
            self._free = list(range(self.num_pages, grown))
            self.num_pages = grown
        page = heapq.heappop(self._free)
        self.holders[page] = 1
        return page

    def _drop(self) -> None:
        """Hold nothing while nothing is used."""
        self.num_pages, self._free = 0, []
        self.keys = [None] * len(self.keys)
        self.values = [None] * len(self.values)


def _pages(like: Tensor, count: int, num_keys: int, page_size: int, width: int) -> Tensor:
    """Pages [N, K, P, D] to be filled. On a GPU the heads of a token lie together, as torch's paged attention wants
    them; on a CPU the tokens of a head do, which SDPA reads three times as fast."""
    if like.is_cuda:
        return like.new_empty(count, page_size, num_keys, width).transpose(1, 2)
    return like.new_empty(count, num_keys, page_size, width)
