"""Ovis2.5 as a transformers model: vision tower, visual tokens, transformers' own Qwen3.

Legend: B rows, T tokens of a row, S packed sequences, P patches, I pictures, D language-model width.
Released checkpoints load by renaming keys, and saving writes the released names back.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.conversion_mapping import WeightConverter, WeightRenaming, register_checkpoint_conversion_mapping
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model
from transformers.utils import ModelOutput

from looktwice.model.attention import PackedAttentionModel, packed_inputs
from looktwice.model.configuration import IGNORE_INDEX, NUM_INDICATORS, Ovis2_5Config
from looktwice.model.logprobs import chunked_logprobs, logprob_sum
from looktwice.model.norm import take_over_norms
from looktwice.model.released import ReleasedCalls
from looktwice.model.visual_tokenizer import VisualEmbedding, VisualTokenizer, embed_features


@dataclass
class Ovis2_5Output(ModelOutput):
    """`logits` [B, T, V] unless `labels` or `loss_mask` was given; with the latter `logprobs` [N] of the N trained
    tokens, or with `summed` their sum [1], and `entropy` [N] if it was asked for."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    logprobs: Tensor | None = None
    entropy: Tensor | None = None


class Ovis2_5PreTrainedModel(PreTrainedModel):
    config_class = Ovis2_5Config
    base_model_prefix = "model"
    input_modalities = ["image", "text"]
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Qwen3DecoderLayer", "VisionEmbeddings", "VisionLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True


class LanguageModel(PackedAttentionModel, Qwen3Model):
    """transformers' own Qwen3, with packed rows under every attention implementation."""


class Ovis2_5Model(Ovis2_5PreTrainedModel):
    """Everything but the output head.

    Its two towers, `language_model` and `visual_tokenizer.vit`, are transformers models themselves: gradient
    checkpointing and attention are switched on the whole model for both, or on a tower for that tower alone.
    """

    def __init__(self, config: Ovis2_5Config) -> None:
        super().__init__(config)
        self.language_model = LanguageModel(config.llm_config)
        take_over_norms(self.language_model)
        self.visual_tokenizer = VisualTokenizer(config.vit_config, config.visual_vocab_size)
        self.vte = VisualEmbedding(config.visual_vocab_size, config.hidden_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:  # type: ignore[override]
        self.language_model.embed_tokens = value

    def get_image_features(self, pixel_values: Tensor, image_grid_thw: Tensor) -> Tensor:
        """One vector per visual token, pictures one after the other: [P, C * p * p], [I, 3] -> [A, D].

        Patches are uint8, or floats normalised to [-1, 1].
        """
        features = self.visual_tokenizer.vit(pixel_values, image_grid_thw)
        return embed_features(features, self.visual_tokenizer, self.vte)

    def embed(self, input_ids: Tensor, image_features: Tensor | None) -> Tensor:
        """Ids [B, T] -> vectors [B, T, D]: text ids looked up, indicators from the table, atoms from the pictures.

        Raises ValueError when the number of atoms differs from the number of vectors.
        """
        return self._show(input_ids, self._look_up(input_ids), image_features)

    def _look_up(self, input_ids: Tensor) -> Tensor:
        """Vectors [B, T, D] of text ids and indicators, and of anything for atoms.

        Ids on the host, as packed rows have them, keep a GPU from waiting.
        """
        config = self.config
        is_indicator = torch.isin(input_ids, input_ids.new_tensor(config.indicator_token_ids))
        words = input_ids.masked_fill((input_ids == config.image_token_id) | is_indicator, 0)
        embeds = self.language_model.embed_tokens(_copied(words, self.language_model.embed_tokens.weight))
        if is_indicator.any():
            rows = torch.zeros_like(input_ids)
            for number, token_id in enumerate(config.indicator_token_ids):
                rows = rows.masked_fill(input_ids == token_id, number)
            numbers = config.visual_vocab_size - NUM_INDICATORS + rows[is_indicator]
            indicators = self.vte(_copied(numbers, self.vte.weight)).to(embeds)
            embeds = embeds.masked_scatter(_copied(is_indicator, embeds)[..., None], indicators)
        return embeds

    def _show(self, input_ids: Tensor, embeds: Tensor, image_features: Tensor | None) -> Tensor:
        """The vectors with those of the pictures at the places of atoms; out of place, so that frozen embeddings with
        input gradients work."""
        is_atom = input_ids == self.config.image_token_id
        num_features = 0 if image_features is None else len(image_features)
        if int(is_atom.sum()) != num_features:
            raise ValueError(f"{int(is_atom.sum())} visual tokens in input_ids, {num_features} in the pictures")
        if image_features is None:
            return embeds
        return embeds.masked_scatter(_copied(is_atom, embeds)[..., None], image_features.to(embeds))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        image_index: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        parents: Tensor | None = None,
        use_cache: bool | None = None,
        tower_features: Tensor | None = None,
        image_features: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states [B, T, D] of padded rows (`attention_mask`) or of one packed row (`cu_seqlens` [S + 1]), whose
        segments may go on after another one (`parents` [S]).

        `image_index` [J] names the picture shown at each of J places when one picture serves several sequences.
        In place of `pixel_values` there may be what was computed of them before: `tower_features` [A, F], or
        `image_features` [A, D].
        """
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("give input_ids or inputs_embeds")
            # first, since backward goes the other way: it makes these gradients, as large as the weights, when those
            # of the pictures need no more memory
            embeds = self._look_up(input_ids)
            if tower_features is not None:
                image_features = embed_features(tower_features, self.visual_tokenizer, self.vte)
            elif pixel_values is not None and len(pixel_values):
                if image_grid_thw is None:
                    raise ValueError("pixel_values come with image_grid_thw")
                image_features = self.get_image_features(pixel_values, image_grid_thw)
            if image_features is not None and image_index is not None:
                image_features = self._repeat_images(image_features, image_grid_thw, image_index)
            inputs_embeds = self._show(input_ids, embeds, image_features)
        if cu_seqlens is not None:
            if inputs_embeds.shape[0] != 1 or past_key_values is not None:
                raise ValueError("a packed batch is one row and uses no cache")
            implementation = self.language_model.config._attn_implementation
            packed = packed_inputs(
                cu_seqlens.tolist(),
                implementation,
                is_causal=True,
                like=inputs_embeds,
                parents=None if parents is None else parents.tolist(),
            )
            # a mapping of masks keeps transformers from building one: with its own defaults, packed rows leak
            attention_mask, use_cache = {"full_attention": packed.pop("attention_mask")}, False
            kwargs |= packed
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )

    def num_visual_tokens(self, image_grid_thw: Tensor) -> list[int]:
        """Of each picture: [I, 3] -> I numbers."""
        return (image_grid_thw.prod(-1) // self.config.vit_config.hidden_stride**2).tolist()

    def _repeat_images(self, features: Tensor, image_grid_thw: Tensor | None, image_index: Tensor) -> Tensor:
        if image_grid_thw is None:
            raise ValueError("image_index comes with image_grid_thw")
        images = features.split(self.num_visual_tokens(image_grid_thw))
        return torch.cat([images[index] for index in image_index.tolist()])


class Ovis2_5ForConditionalGeneration(ReleasedCalls, Ovis2_5PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: Ovis2_5Config) -> None:
        super().__init__(config)
        self.model = Ovis2_5Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def get_image_features(self, pixel_values: Tensor, image_grid_thw: Tensor) -> Tensor:
        """That of `Ovis2_5Model`, of pictures on any device."""
        return self.model.get_image_features(pixel_values.to(self.device), image_grid_thw.to(self.device))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        image_index: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        parents: Tensor | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        temperature: float = 1.0,
        with_entropy: bool = False,
        entropy_gradient: bool = False,
        summed: bool = False,
        logits_to_keep: int = 0,
        return_logits: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Ovis2_5Output:
        """Logits; or with `loss_mask` [1, T] the logprobs of the tokens it marks, at `temperature`; or with `labels`
        [B, T] (-100 = not trained) the shifted mean loss, `num_items_in_batch` in place of its divisor.

        All logits beside a loss exist only where `return_logits` or `logits_to_keep` asks for them. `loss_mask` is what
        training uses, on packed rows; `summed` is cheaper where the loss takes all logprobs alike, and with
        `entropy_gradient` the entropy may be part of it. The inputs of Ovis2_5Model are named here too because
        `generate` and Trainer read this signature.
        Raises ValueError for a `loss_mask` of several rows, without `input_ids`, or that marks what nothing predicts:
        the first token of a sequence.
        """
        if loss_mask is not None:
            check_loss_mask(loss_mask, input_ids, cu_seqlens)
        if labels is not None and use_cache is None:
            use_cache = False  # nobody goes on from it
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            image_grid_thw=image_grid_thw,
            image_index=image_index,
            cu_seqlens=cu_seqlens,
            parents=parents,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        weight = self.lm_head.weight
        if loss_mask is not None:
            # the token at t is predicted by the state at t - 1
            places = loss_mask[0].nonzero()[:, 0]
            rows = hidden[0, _copied(places - 1, hidden)].to(weight.device)
            targets = _copied(input_ids[0, places.to(input_ids.device)], weight)  # type: ignore[index,union-attr]
            if summed:
                return Ovis2_5Output(logprobs=logprob_sum(rows, weight, targets, temperature=temperature)[None])
            logprobs, entropy = chunked_logprobs(
                rows,
                weight,
                targets,
                temperature=temperature,
                with_entropy=with_entropy,
                entropy_gradient=entropy_gradient,
            )
            return Ovis2_5Output(logprobs=logprobs, entropy=entropy)
        loss = logits = None
        if labels is not None:
            is_trained = labels[:, 1:] != IGNORE_INDEX
            targets = labels[:, 1:][is_trained].to(weight.device)
            rows = hidden[:, :-1][is_trained.to(hidden.device)].to(weight.device)
            divisor = len(targets) if num_items_in_batch is None else num_items_in_batch
            loss = -logprob_sum(rows, weight, targets) / torch.as_tensor(divisor, device=weight.device)
        if labels is None or logits_to_keep or return_logits:
            logits = self.lm_head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        return Ovis2_5Output(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _prepare_generation_config(self, *args: Any, **kwargs: Any) -> Any:
        """The user's settings, and no visual id is ever sampled."""
        generation_config, model_kwargs = super()._prepare_generation_config(*args, **kwargs)  # type: ignore[misc]
        suppressed = {*(generation_config.suppress_tokens or ()), *self.config.visual_token_ids}
        generation_config.suppress_tokens = sorted(suppressed)
        return generation_config, model_kwargs

    def _expand_inputs_for_generation(  # type: ignore[override]
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **model_kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        """Rows repeated `expand_size` times; their pictures are stored, and encoded, only once."""
        images = {name: model_kwargs.pop(name, None) for name in ("pixel_values", "image_grid_thw", "image_index")}
        if expand_size > 1 and images["image_grid_thw"] is not None:
            cache = model_kwargs.get("past_key_values")
            new_ids = input_ids if cache is None else input_ids[:, cache.get_seq_length() :]
            shown = self._images_of_rows(new_ids, images["image_grid_thw"], images["image_index"])
            repeated = [index for row in shown for _ in range(expand_size) for index in row]
            images["image_index"] = images["image_grid_thw"].new_tensor(repeated)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        return input_ids, model_kwargs | {name: value for name, value in images.items() if value is not None}

    def _images_of_rows(self, ids: Tensor, image_grid_thw: Tensor, image_index: Tensor | None) -> list[list[int]]:
        """Indices of the pictures shown in each row of ids [B, T], told by how many visual tokens each needs."""
        counts = self.model.num_visual_tokens(image_grid_thw)
        indices = iter(range(len(counts)) if image_index is None else image_index.tolist())
        rows: list[list[int]] = []
        for num_left in (ids == self.config.image_token_id).sum(-1).tolist():
            row: list[int] = []
            while num_left > 0:
                row.append(next(indices))
                num_left -= counts[row[-1]]
            rows.append(row)
        return rows


def _copied(tensor: Tensor, like: Tensor) -> Tensor:
    """On the device of another, which the parts of a model may differ in, without waiting for it."""
    return tensor.to(like.device, non_blocking=True)


def check_loss_mask(loss_mask: Tensor, input_ids: Tensor | None, cu_seqlens: Tensor | None) -> None:
    """Raise ValueError unless `loss_mask` is one row over `input_ids` that marks no first token of a sequence."""
    if input_ids is None:
        raise ValueError("loss_mask marks places of input_ids; give them too")
    if loss_mask.shape != input_ids.shape or len(loss_mask) != 1:
        raise ValueError(
            f"loss_mask is {list(loss_mask.shape)}, input_ids {list(input_ids.shape)}; logprobs are of one row [1, T]"
        )
    firsts = [0] if cu_seqlens is None else cu_seqlens[:-1].to(loss_mask.device, torch.long)
    if loss_mask[0, firsts].any():
        raise ValueError("loss_mask marks the first token of a sequence, which nothing predicts")


RELEASED_PREFIXES = {
    "llm.model.": "model.language_model.",
    "llm.lm_head.": "lm_head.",
    "visual_tokenizer.vit.vision_model.": "model.visual_tokenizer.vit.",
    "visual_tokenizer.head.": "model.visual_tokenizer.head.",
    "vte.": "model.vte.",
}
"""Beginnings of released tensor names, and of ours."""
RELEASED_NAMES: list[WeightConverter | WeightRenaming] = [
    WeightRenaming(rf"^{re.escape(released)}", ours) for released, ours in RELEASED_PREFIXES.items()
]

AutoConfig.register(Ovis2_5Config.model_type, Ovis2_5Config)
AutoModel.register(Ovis2_5Config, Ovis2_5Model)
AutoModelForCausalLM.register(Ovis2_5Config, Ovis2_5ForConditionalGeneration)
AutoModelForImageTextToText.register(Ovis2_5Config, Ovis2_5ForConditionalGeneration)
register_checkpoint_conversion_mapping(Ovis2_5Config.model_type, RELEASED_NAMES)
