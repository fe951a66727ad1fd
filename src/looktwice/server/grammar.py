"""Answers that are JSON by a schema: which ids may come next, once thinking and crops are done.

The schema is read and followed by llguidance; what is ours is when it holds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from threading import Lock
from typing import Any, Literal

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
from torch import Tensor

from looktwice.calls import TOOL_CALL_CLOSE, TOOL_CALL_OPEN, TOOL_RESPONSE_OPEN
from looktwice.config import AnswerConfig
from looktwice.messages import THINK_CLOSE, THINK_OPEN
from looktwice.processing.processor import Ovis2_5Processor
from looktwice.server.refusal import Refusal

MOST_BYTES = 100_000
"""Of a schema: a larger one could take minutes to read."""
LONGEST_CALL = 64
"""Ids of a call in place of the JSON before it is closed; a box with its words is half of that."""
BLANKS: Any = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
"""Where blanks may stand in the JSON. If anywhere, a model that may not write what it would writes nothing else."""
State = Literal["opening", "thinking", "ready", "calling", "answering"]


class JsonMask:
    """Follows one answer. It opens its thinking, if it is to think; it thinks and calls as it likes, but does not end
    its turn in there; and from then on each id is one that a JSON text of the schema can go on with.

    Of an answer without thinking a call may come in place of the first id of the JSON, where crops are on, until one
    was refused. (A model that has thought has looked: offered the JSON or a call it would call, since it wants to write
    neither, but the tag of an answer.)
    """

    def __init__(self, matcher: LLMatcher, processor: Ovis2_5Processor, *, thinks: bool, crops: bool) -> None:
        template = processor.template
        self.matcher = matcher
        self.num_ids = processor.config.vocab_size
        self.end_ids = [*processor.end_ids]
        self.think_open, self.think_close = template.token_id(THINK_OPEN), template.token_id(THINK_CLOSE)
        self.call_open, self.call_close = template.token_id(TOOL_CALL_OPEN), template.token_id(TOOL_CALL_CLOSE)
        self.refusal_start = template.encode(TOOL_RESPONSE_OPEN)[0]
        self.may_call = crops and not thinks
        self.num_called = 0
        self.state: State = "opening" if thinks else "ready"
        self.bits = allocate_token_bitmask(1, self.num_ids)

    def allowed(self) -> Tensor | None:
        if self.state == "opening":
            return self._only([self.think_open])
        if self.state == "thinking":
            return ~self._only(self.end_ids)
        if self.state == "calling":
            is_long = self.num_called >= LONGEST_CALL
            tags = [*self.end_ids, self.think_open, self.think_close, self.call_open]
            return self._only([self.call_close]) if is_long else ~self._only(tags)
        fill_next_token_bitmask(self.matcher, self.bits)
        if error := self.matcher.get_error():
            raise ValueError(f"the schema cannot be followed: {error}")
        allowed = torch.from_numpy(np.unpackbits(self.bits[0].view(np.uint8), bitorder="little")[: self.num_ids]).bool()
        if self.state == "ready" and self.may_call:
            allowed[self.call_open] = True
        return allowed

    def take(self, token: int) -> None:
        if self.state == "opening":
            self.state = "thinking"
        elif self.state == "thinking":
            self.state = "ready" if token == self.think_close else "thinking"
        elif self.state == "ready" and token == self.call_open and self.may_call:
            self.state, self.num_called = "calling", 0
        elif self.state == "calling":
            self.num_called += 1
        else:
            self.state = "answering"
            if token not in self.end_ids:
                self.matcher.consume_token(token)

    def put_in(self, ids: Sequence[int]) -> None:
        if self.refusal_start in ids:
            self.may_call = False
        if self.state == "calling" or self.think_close in ids:
            self.state = "ready"

    def _only(self, ids: Sequence[int]) -> Tensor:
        allowed = torch.zeros(self.num_ids, dtype=torch.bool)
        allowed[list(ids)] = True
        return allowed


class Grammars:
    """Reads schemas for the tokenizers that it has seen; from any thread."""

    def __init__(self) -> None:
        self._tokenizers: dict[int, LLTokenizer] = {}
        self._lock = Lock()

    def mask(self, schema: dict[str, Any] | bool, processor: Ovis2_5Processor, generation: AnswerConfig) -> JsonMask:
        """What one answer may be. Raises Refusal for a schema that cannot be followed."""
        text = json.dumps({"type": "object"} if schema is True else schema)
        if len(text) > MOST_BYTES:
            raise Refusal(f"the schema is longer than {MOST_BYTES:,} letters", param="response_format")
        try:
            grammar = LLMatcher.grammar_from_json_schema(text, overrides=BLANKS)
            tokenizer = self._tokenizer(processor)
            matcher = LLMatcher(tokenizer, grammar)
            error = matcher.get_error()
        except ValueError as failure:
            error = str(failure)
        if error:
            raise Refusal(
                f"the schema cannot be followed: {error}", param="response_format", code="invalid_json_schema"
            )
        crops = generation.max_crops != 0
        return JsonMask(matcher, processor, thinks=generation.enable_thinking, crops=crops)

    def _tokenizer(self, processor: Ovis2_5Processor) -> LLTokenizer:
        key = id(processor.tokenizer)
        with self._lock:  # it takes a second for a large vocabulary
            if key not in self._tokenizers:
                end = processor.template.turn_close_id
                size = processor.config.vocab_size
                self._tokenizers[key] = from_tokenizer(processor.tokenizer, n_vocab=size, eos_token=end)
            return self._tokenizers[key]
