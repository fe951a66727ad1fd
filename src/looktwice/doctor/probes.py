"""The conversations that all ways to compute are compared on, and which kind of token stands where in them."""

from __future__ import annotations

from itertools import chain, repeat
from typing import Any, Literal, get_args

from PIL import Image

from looktwice.messages import Conversation, ImagePart, Message, TextPart
from looktwice.model.configuration import Ovis2_5Config
from looktwice.processing.processor import Example, Ovis2_5Processor

TokenKind = Literal["text", "visual", "indicator", "crop"]
"""What the model reads at a place: text, an atom of a picture in the prompt, the mark at the beginning or end of a
picture, an atom of a crop."""
TOKEN_KINDS: tuple[TokenKind, ...] = get_args(TokenKind)
CALL, AFTER = "<think>\nI look. <tool_call>[0, 0, 40, 40]</tool_call>", "\nIt is red.\n</think>\n\nred"
Turn = dict[str, Any]
"""A message as Hugging Face writes it."""


def board(size: tuple[int, int] = (160, 120)) -> Image.Image:
    """A picture with something to see everywhere: two gradients, and stripes."""
    across = Image.linear_gradient("L").rotate(90).resize(size)
    stripes = Image.effect_mandelbrot(size, (-2, -1.2, 1, 1.2), 40)
    return Image.merge("RGB", (across, Image.linear_gradient("L").resize(size), stripes))


def probes() -> list[list[Turn]]:
    """Text alone; a picture; a picture, and a crop of it in the middle of the answer."""
    image = board()
    crop = image.crop((0, 0, 40, 40))
    return [
        [_turn("user", "Name a colour."), _turn("assistant", "Red is one of them.")],
        [_turn("user", image.rotate(90, expand=True), "What is in the picture?"), _turn("assistant", "Stripes.")],
        [_turn("user", image, "Which colour is at the left?"), _turn("assistant", CALL, crop, AFTER)],
    ]


def _turn(role: str, *parts: str | Image.Image) -> Turn:
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts]
    return {"role": role, "content": content}


def conversation_of(turns: list[Turn]) -> Conversation:
    """The same conversation as looktwice writes it."""
    return Conversation(
        messages=tuple(
            Message(
                role=turn["role"],
                parts=tuple(
                    TextPart(text=part["text"]) if part["type"] == "text" else ImagePart(source=part["image"])
                    for part in turn["content"]
                ),
            )
            for turn in turns
        )
    )


def examples_of(processor: Ovis2_5Processor) -> list[Example]:
    """The probes as training has them."""
    return [processor.encode(conversation_of(turns), purpose="train") for turns in probes()]


def prompts_of(processor: Ovis2_5Processor) -> list[Example]:
    """Their questions, to be answered."""
    prompts = [conversation_of(turns[:1]) for turns in probes()]
    return [processor.encode(prompt, purpose="prompt") for prompt in prompts]


def kinds_of(example: Example, config: Ovis2_5Config, *, num_prompt_images: int = 1) -> list[TokenKind]:
    """What each id of a sequence is; pictures after the first ones are crops."""
    sizes = [image.num_tokens for image in example.images]
    prompt, crops = sizes[:num_prompt_images], sizes[num_prompt_images:]
    kinds: list[TokenKind] = []
    of_atoms = chain(repeat("visual", sum(prompt)), repeat("crop", sum(crops)))
    for token in example.input_ids:
        if token == config.image_token_id:
            kinds.append(next(of_atoms))  # type: ignore[arg-type]
        else:
            kinds.append("indicator" if token in config.indicator_token_ids else "text")
    return kinds
