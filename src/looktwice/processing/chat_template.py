"""Messages to token ids and who wrote each. ChatML as Ovis2.5 was trained on it; no default system prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from looktwice.errors import CheckpointError
from looktwice.messages import THINK_CLOSE, THINK_OPEN, Conversation, Message, Purpose, TextPart

EMPTY_THINK = f"{THINK_OPEN}\n\n{THINK_CLOSE}\n\n"
TURN_OPEN, TURN_CLOSE = "<|im_start|>", "<|im_end|>"
EARLY_STOP = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the thinking directly now."
    f"\n{THINK_CLOSE}\n\n"
)
"""Closes a thinking block that reached its budget; the text the released model was trained with."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """Consecutive ids by one writer, or, with `image_number`, the place of one picture (or the video)."""

    ids: list[int] = field(default_factory=list)
    is_trained: bool = False
    image_number: int | None = None


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A Span before its texts are tokenised: ids of the template and texts, in order."""

    pieces: tuple[int | str, ...] = ()
    is_trained: bool = False
    image_number: int | None = None


class ChatTemplate:
    """Writes conversations with one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.turn_open_id = self.token_id(TURN_OPEN)
        self.turn_close_id = self.token_id(TURN_CLOSE)

    def token_id(self, token: str) -> int:
        """Id of a token of the vocabulary. Raises CheckpointError when the tokenizer lacks it."""
        token_id = self.tokenizer.backend_tokenizer.token_to_id(token)
        if token_id is None:
            raise CheckpointError(f'the tokenizer has no token "{token}"; use the files of an Ovis2.5 checkpoint')
        return token_id

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text. Text that spells a special token stays text; think and tool tags are tokens."""
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def count(self, texts: Sequence[str]) -> list[int]:
        """How many ids `encode` gives for each text, all tokenised at once."""
        return [len(encoding) for encoding in self._encodings(texts)]

    def read_back(self, texts: Sequence[str]) -> list[str]:
        """What each text is after it was tokenised."""
        return self.tokenizer.batch_decode([encoding.ids for encoding in self._encodings(texts)])

    def _encodings(self, texts: Sequence[str]) -> list[Any]:
        backend = self.tokenizer.backend_tokenizer
        backend.encode_special_tokens = True
        backend.no_truncation()
        return backend.encode_batch_fast(list(texts), add_special_tokens=False)

    def spans(self, conversation: Conversation, *, purpose: Purpose, thinking: bool = True) -> list[Span]:
        """The conversation as spans; see `drafts`."""
        return [
            Span(
                ids=[token_id for piece in draft.pieces for token_id in self._ids(piece)],
                is_trained=draft.is_trained,
                image_number=draft.image_number,
            )
            for draft in self.drafts(conversation, purpose=purpose, thinking=thinking)
        ]

    def _ids(self, piece: int | str) -> list[int]:
        return [piece] if isinstance(piece, int) else self.encode(piece)

    def drafts(self, conversation: Conversation, *, purpose: Purpose, thinking: bool = True) -> list[Draft]:
        """What the conversation is written as: its spans, and what of each is text to tokenise as a whole.

        `train`: assistant texts and their closing `<|im_end|>` are trained unless their message says otherwise, nothing
        else is; a trained answer without a think block gets the empty one in front, untrained. `prompt`: ends where the
        assistant begins to write; with `thinking` off the empty think block is already written.
        """
        drafts: list[Draft] = []
        num_images = 0
        for message in conversation.messages:
            is_trained = purpose == "train" and message.role == "assistant" and message.is_trained
            written = self._message(message, num_images, is_trained=is_trained)
            num_images += sum(draft.image_number is not None for draft in written)
            drafts += written
        if purpose == "prompt":
            closed = () if thinking else (EMPTY_THINK,)
            drafts.append(Draft(pieces=(self.turn_open_id, "assistant\n", *closed)))
        elif conversation.messages and conversation.messages[-1].role == "assistant":
            drafts.pop()  # nothing follows the last answer, so its newline is not part of the input
        return drafts

    def _message(self, message: Message, first_image: int, *, is_trained: bool) -> list[Draft]:
        first, *rest = texts = _texts_between_images(message)
        drafts = [Draft(pieces=(self.turn_open_id,))]
        if message.role == "assistant":
            drafts.append(Draft(pieces=("assistant\n",)))
            if is_trained and not all(any(tag in text for text in texts) for tag in (THINK_OPEN, THINK_CLOSE)):
                drafts.append(Draft(pieces=(EMPTY_THINK,)))
            # a leading newline would merge with the newline before it into another token
            first = first.lstrip("\n")
        else:
            first = f"{message.role}\n{first}"
        drafts.append(Draft(pieces=(first,), is_trained=is_trained))
        for number, text in enumerate(rest, start=first_image):
            drafts += [Draft(image_number=number), Draft(pieces=(text,), is_trained=is_trained)]
        return [*drafts, Draft(pieces=(self.turn_close_id,), is_trained=is_trained), Draft(pieces=("\n",))]


def _texts_between_images(message: Message) -> list[str]:
    """One text more than pictures or videos: each is tokenised as a whole.

    Users' parts stand on lines of their own; an assistant's crop follows its call without a break.
    """
    glue = "" if message.role == "assistant" else "\n"
    texts = [""]
    for number, part in enumerate(message.parts):
        texts[-1] += glue if number else ""
        if isinstance(part, TextPart):
            texts[-1] += part.text
        else:
            texts.append("")
    return texts
