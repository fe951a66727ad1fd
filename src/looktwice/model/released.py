"""The calls of the released model on ours: `preprocess_inputs`, `text_tokenizer`, and its form of `generate`.

A script written for the released Ovis2.5 (its model card) runs with only the model's name changed.

Legend: B rows, T tokens of a prompt, N new tokens, V vocabulary, P patches, I pictures.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from looktwice.errors import CheckpointError, ConfigError, DataError
from looktwice.geometry import PixelPolicy
from looktwice.messages import THINK_CLOSE, THINK_OPEN, Conversation, ImagePart, Message, Role, TextPart, VideoPart
from looktwice.model.configuration import Ovis2_5Config
from looktwice.model.files import check_base, weights_fingerprint
from looktwice.model.location import WEIGHT_FILES, adapter_base, local_adapter, locate
from looktwice.processing.chat_template import EARLY_STOP
from looktwice.processing.image_processor import HUB_ARGUMENTS, own_settings
from looktwice.processing.images import normalise
from looktwice.processing.processor import Ovis2_5Processor

RELEASED_ARGUMENTS = ("inputs", "grid_thws", "enable_thinking", "enable_thinking_budget", "thinking_budget")
"""Names by which a call of `generate` is known as the released model's."""
RELEASED_PIXELS = PixelPolicy(
    image_min_pixels=448**2, image_max_pixels=1792**2, video_min_pixels=448**2, video_max_pixels=1792**2
)
"""Bounds of the released `preprocess_inputs`, which does not tell pictures from frames."""
PLACEHOLDERS = ("<image>", "<video>")


class ReleasedCalls:
    """Mixed into the model's class, before transformers' GenerationMixin."""

    hub_arguments: Mapping[str, Any] = {}
    """What was said at loading of where the files come from, such as `revision`: the tokenizer comes from there too."""
    adapter_folder: str | None = None
    """Of the LoRA adapter on the model, if one was loaded: its tokenizer and pixel policy come before the base's."""
    weights_fingerprint: str | None = None
    """That of the files the network was loaded from, without an adapter; `model/files.py`."""

    @cached_property
    def processor(self: Any) -> Ovis2_5Processor:
        """That of the model's folder, read at first use and kept; another one may be put in its place.

        A released folder, which says nothing of pixels, gets the released bounds. Raises CheckpointError when the model
        comes from no folder, or the folder has no tokenizer.
        """
        name = self.name_or_path
        if self.adapter_folder and (Path(self.adapter_folder) / "tokenizer_config.json").is_file():
            name = self.adapter_folder
        if not name:
            raise CheckpointError(
                "this model comes from no folder, so it has no tokenizer; load it with from_pretrained, or set "
                "model.processor to an Ovis2_5Processor"
            )
        said = {} if name == self.adapter_folder else dict(self.hub_arguments)
        folder = name if said else locate(name)
        processor = Ovis2_5Processor.from_pretrained(folder, **said)
        if not own_settings(folder, **said):
            processor.policy = RELEASED_PIXELS
        return processor

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle is without the processor, which it reads anew, and without the hub's token."""
        state: Any = super().__getstate__()
        state.pop("processor", None)
        state["hub_arguments"] = {name: said for name, said in self.hub_arguments.items() if name != "token"}
        return state

    @property
    def text_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the model's folder."""
        return self.processor.tokenizer

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """transformers' own; of a LoRA adapter's folder it gives the base with the adapter in place.

        Told to trust the files of a folder, transformers gives a config of the class that stands there
        (`serving/configuration_ovis2_5.py`), which is read as ours. Raises CheckpointError for an adapter whose base is
        not where it says.
        """
        if isinstance(config, PretrainedConfig) and not isinstance(config, Ovis2_5Config):
            config = own_config(config)
        path = pretrained_model_name_or_path
        said = {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) and name != "force_download"}
        adapter = None if path is None or "subfolder" in said else local_adapter(path)
        if adapter is None or any((adapter / name).is_file() for name in WEIGHT_FILES):
            loaded = super().from_pretrained(path, *args, config=config, **kwargs)  # type: ignore[misc]
            (loaded[0] if isinstance(loaded, tuple) else loaded).hub_arguments = said
            return loaded
        # transformers takes a folder with a config.json for a whole model
        kwargs.pop("adapter_kwargs", None)
        base = locate(adapter_base(adapter))
        if Path(base).is_dir():
            check_base(adapter, weights_fingerprint(base))
        loaded = super().from_pretrained(base, *args, config=config, **kwargs)  # type: ignore[misc]
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.load_adapter(str(adapter))
        model.adapter_folder, model.name_or_path = os.path.abspath(adapter), base
        return loaded

    def preprocess_inputs(
        self: Any,
        messages: Sequence[Mapping[str, Any]],
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        add_generation_prompt: bool = True,
        enable_thinking: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """`input_ids` [1, T], `pixel_values` [P, C * p * p] in [-1, 1] and the model's dtype, `grid_thws` [I, 3].

        All on the CPU; the latter two are None for text alone. Visual ids are real ids of the vocabulary, not negative
        ones as in the released code. Bounds left out are the folder's, see `processor`; given ones hold for pictures
        and frames alike. Raises DataError for messages that the released template refuses, see `read_messages`.
        """
        bounds = {f"{kind}_min_pixels": min_pixels for kind in ("image", "video")}
        bounds |= {f"{kind}_max_pixels": max_pixels for kind in ("image", "video")}
        processor = self.processor.at(self.processor.policy.override(**bounds))
        conversation = read_messages(messages)
        spans = processor.template.spans(conversation, purpose="prompt", thinking=enable_thinking)
        if not add_generation_prompt:
            spans.pop()  # the assistant's opener
        example = processor.assemble(spans, processor.patch_all(conversation))
        input_ids = torch.tensor([example.input_ids], dtype=torch.long)
        if not example.images:
            return input_ids, None, None
        pixels = normalise(torch.cat([image.pixel_values for image in example.images]))
        return input_ids, pixels.to(self.dtype), torch.tensor([image.grid_thw for image in example.images])

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' own, or with one of RELEASED_ARGUMENTS by name the released call, see `_generate_released`."""
        if any(name in kwargs for name in RELEASED_ARGUMENTS):
            return self._generate_released(*args, **kwargs)
        return super().generate(*args, **kwargs)  # type: ignore[misc]

    def _generate_released(
        self: Any,
        inputs: Tensor | None = None,
        *,
        grid_thws: Tensor | None = None,
        enable_thinking: bool = False,
        enable_thinking_budget: bool = False,
        thinking_budget: int | None = 1024,
        streamer: Any = None,
        **options: Any,
    ) -> Any:
        """New ids [B, N] after the prompts `inputs` [B, T], whose pad ids are masked.

        `options` are transformers'. As in the released model generation_config.json is not applied: greedy, or with
        `do_sample` at temperature 1, top-k 50, top-p 1, until an end id. Thinking is limited in the same pass, row by
        row, see ThinkingBudget, when both `enable_thinking` and `enable_thinking_budget` are set.
        """
        ids = options.pop("input_ids", None) if inputs is None else inputs
        if ids is None:
            raise ConfigError("generate was given no prompt; give inputs=, the ids that preprocess_inputs returned")
        if (options.get("pixel_values") is None) != (grid_thws is None and "image_grid_thw" not in options):
            raise ConfigError("pixel_values and grid_thws go together; give both as preprocess_inputs returned them")
        if grid_thws is not None:
            options["image_grid_thw"] = grid_thws
        pad_id, end_ids = self.text_tokenizer.pad_token_id, self.processor.end_ids
        options.setdefault("attention_mask", ids.ne(pad_id).long())
        if enable_thinking and enable_thinking_budget:
            limit = self._thinking_limit(ids.shape[1], thinking_budget, options.get("max_new_tokens"))
            options["logits_processor"] = LogitsProcessorList([*(options.get("logits_processor") or ()), limit])
        # the same weights without the settings of generation_config.json, which would fill in what is not given
        plain = copy(self)
        plain.generation_config = GenerationConfig(eos_token_id=end_ids, pad_token_id=pad_id)
        written = super(ReleasedCalls, plain).generate(ids, streamer=streamer, **options)  # type: ignore[misc]
        if hasattr(streamer, "manual_end"):  # the model card's streamer does not end by itself
            streamer.manual_end()
        if isinstance(written, Tensor):
            return written[:, ids.shape[1] :]
        written.sequences = written.sequences[:, ids.shape[1] :]
        return written

    def _thinking_limit(self: Any, num_prompt: int, budget: int | None, max_new_tokens: int | None) -> ThinkingBudget:
        """Raises ConfigError unless an answer has room after the budget and the text that closes thinking."""
        template = self.processor.template
        closing_ids = template.encode(EARLY_STOP)
        if budget is None or budget < 1:
            raise ConfigError(f"thinking_budget is {budget}; it must be 1 or more, or leave enable_thinking_budget out")
        if max_new_tokens is None or max_new_tokens <= budget + len(closing_ids):
            raise ConfigError(
                f"max_new_tokens is {max_new_tokens}; an answer needs room after a thinking_budget of {budget} and the "
                f"{len(closing_ids)} ids that close thinking: give {budget + len(closing_ids) + 1} or more, or lower "
                "thinking_budget"
            )
        open_id, close_id = template.token_id(THINK_OPEN), template.token_id(THINK_CLOSE)
        return ThinkingBudget(num_prompt, budget, closing_ids, open_id, close_id)


class ThinkingBudget(LogitsProcessor):
    """Closes the thinking of each row that still thinks after `budget` new ids: the ids of EARLY_STOP are forced.

    A row thinks when it has written `<think>` and no `</think>`. The released code puts the text into an answer that
    never thought, too, which is a defect, and judges a batch by its first row; here, as in our own episodes, each row
    stands for itself. It keeps no state, so beams and candidates may come and go.
    """

    def __init__(self, num_prompt: int, budget: int, closing_ids: list[int], open_id: int, close_id: int) -> None:
        self.first, self.end = num_prompt, num_prompt + budget
        self.closing_ids = closing_ids
        self.open_id, self.close_id = open_id, close_id

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        """Ids so far [B, T + N] and scores of the next one [B, V] -> scores [B, V]."""
        place = input_ids.shape[1] - self.end
        if not 0 <= place < len(self.closing_ids):
            return scores
        # what a row writes after an end id is padding, whatever is forced
        thought = input_ids[:, self.first : self.end]
        is_thinking = (thought == self.open_id).any(-1) & ~(thought == self.close_id).any(-1)
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.closing_ids[place]] = 0.0
        return torch.where(is_thinking[:, None], forced, scores)


def read_messages(messages: Sequence[Mapping[str, Any]]) -> Conversation:
    """Messages of the released form, by the rules of its chat template.

    Content is a text, or a list of `{"type": "text", "text": ...}`, `{"type": "image", "image": picture or path}` and
    `{"type": "video", "video": frames or path}`; pictures come in lists alone. `<image>` and `<video>` are removed from
    texts, and so is what an assistant thought. An assistant's list of texts is kept, which the released template loses
    by a slip. Raises DataError that names the message, ConfigError for a video beside pictures.
    """
    return Conversation(messages=tuple(_message(f"messages[{n}]", written) for n, written in enumerate(messages)))


def _message(where: str, written: Mapping[str, Any]) -> Message:
    if not isinstance(written, Mapping) or written.get("role") not in get_args(Role):
        raise DataError(f'{where} is {written!r:.80}; give {{"role": "system", "user" or "assistant", "content": ...}}')
    role, content = written["role"], written.get("content")
    items = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(items, (list, tuple)):
        raise DataError(f"{where}: content is {content!r:.80}; give a text or a list of texts, images and a video")
    parts = tuple(_part(f"{where}.content[{n}]", item) for n, item in enumerate(items))
    if role != "assistant":
        return Message(role=role, parts=parts)
    texts = [part.text for part in parts if isinstance(part, TextPart)]
    if len(texts) < len(parts):
        raise DataError(f"{where}: an assistant's content is text alone; show pictures in a user's message")
    return Message(role=role, parts=(TextPart(text="".join(texts).split(THINK_CLOSE)[-1]),))


def _part(where: str, item: Any) -> TextPart | ImagePart | VideoPart:
    kind = item.get("type") if isinstance(item, Mapping) else None
    if kind not in ("text", "image", "video") or kind not in item:
        raise DataError(f'{where} is {item!r:.80}; give {{"type": "text", "text": ...}}, or image or video likewise')
    if kind != "text" and item[kind] is None:
        raise DataError(f"{where}: {kind} is None; give a picture, a path, or for a video its frames")
    if kind == "image":
        return ImagePart(source=item["image"])
    if kind == "video":
        return VideoPart(source=item["video"])
    text = item["text"]
    if not isinstance(text, str):
        raise DataError(f"{where}: text is {text!r:.80}; give a text")
    for placeholder in PLACEHOLDERS:
        text = text.replace(placeholder, "")
    return TextPart(text=text)


def own_config(config: PretrainedConfig) -> Ovis2_5Config:
    """A config of another class that holds the fields of config.json, as ours."""
    return Ovis2_5Config.from_dict(config.to_dict(), attn_implementation=config._attn_implementation)
