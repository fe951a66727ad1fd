"""The processor: a conversation becomes an Example; an Example grows by text, crops and tool replies.

Importing this module registers the processor, after which transformers' AutoProcessor finds it for a folder that was
saved here.

Legend: B texts, T tokens of a padded text, P patches, I pictures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, AutoTokenizer, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from looktwice.config import SampleConfig
from looktwice.errors import CheckpointError, DataError
from looktwice.geometry import BoxFrame, PixelPolicy, Size, smart_resize
from looktwice.messages import Conversation, Purpose
from looktwice.model.configuration import Ovis2_5Config
from looktwice.model.location import locate
from looktwice.processing.chat_template import ChatTemplate, Span
from looktwice.processing.image_processor import (
    HUB_ARGUMENTS,
    Images,
    Ovis2_5ImageProcessor,
    flatten,
    read_settings,
    write_settings,
)
from looktwice.processing.images import PatchedImage, open_image, patchify, resize
from looktwice.processing.video import open_video

VISUAL_TOKENS = (
    "<image>",
    "<video>",
    "<ovis_visual_atom>",
    "<ovis_image_start>",
    "<ovis_image_end>",
    "<ovis_video_start>",
    "<ovis_video_end>",
)
PLACEHOLDER, _, ATOM, IMAGE_START, IMAGE_END, _, _ = VISUAL_TOKENS
TEXT_END = "<|endoftext|>"
HUB_CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")


@dataclass(kw_only=True)
class Example:
    """One sequence: `input_ids` and `loss_mask` [T] (True = trained), its pictures in order of appearance, and the
    file and line of its sample, where there is one.

    `prompt` is what it began as, if siblings begin with the same one.
    """

    input_ids: list[int] = field(default_factory=list)
    loss_mask: list[bool] = field(default_factory=list)
    images: list[PatchedImage] = field(default_factory=list)
    where: str = ""
    prompt: Example | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    def append(self, ids: list[int], *, is_trained: bool) -> None:
        self.input_ids += ids
        self.loss_mask += [is_trained] * len(ids)

    def copy(self) -> Example:
        return replace(self, input_ids=[*self.input_ids], loss_mask=[*self.loss_mask], images=[*self.images])

    def sibling(self) -> Example:
        """A copy to go on from, which knows this one as its prompt; that must not end in a picture."""
        return replace(self.copy(), prompt=self)


class Ovis2_5Processor(ProcessorMixin):
    """Tokenizer, chat template, pixel policy and box frame of one checkpoint.

    `encode` and `assemble` are looktwice's own way in: text that spells a special token stays text. Called as Hugging
    Face calls a processor, it takes texts in which `<image>` stands for a picture, as `apply_chat_template` writes
    them.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: Ovis2_5Config,
        policy: PixelPolicy | None = None,
        box_frame: BoxFrame = "original_px",
    ) -> None:
        vit = config.vit_config
        image_processor = Ovis2_5ImageProcessor(vit.patch_size, vit.hidden_stride, policy)
        super().__init__(image_processor, tokenizer, chat_template=HUB_CHAT_TEMPLATE)
        self.config = config
        self.box_frame = box_frame
        self.template = ChatTemplate(tokenizer)
        self.patch_size, self.stride, self.factor = vit.patch_size, vit.hidden_stride, vit.factor
        self.end_ids = [self.template.turn_close_id, self.template.token_id(TEXT_END)]
        self._texts: dict[int, str] = {}

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]

    @property
    def policy(self) -> PixelPolicy:
        """How many pixels pictures and crops may have; the image processor's, so that both ways in see one policy."""
        return self.image_processor.policy

    @policy.setter
    def policy(self, policy: PixelPolicy) -> None:
        self.image_processor.policy = policy

    def at(self, policy: PixelPolicy) -> Ovis2_5Processor:
        """The same processor under another pixel policy."""
        other = copy(self)
        other.image_processor = copy(self.image_processor)
        other.policy = policy
        return other

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        path: str | PathLike[str],
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        **kwargs: Any,
    ) -> Ovis2_5Processor:
        """Read tokenizer, config, pixel policy and box frame of a model folder (or a hub name).

        `min_pixels` and `max_pixels` replace the policy's bounds of whole pictures. Of Hugging Face's own arguments
        those that say where files come from are heeded; remote code is never run.
        Raises CheckpointError when a file is missing or unreadable.
        """
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        try:
            config = Ovis2_5Config.from_pretrained(path, **hub)
            tokenizer = AutoTokenizer.from_pretrained(path, config=config, trust_remote_code=False, **hub)
            policy, box_frame = read_settings(path, **hub)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path}: no usable config and tokenizer files ({_first_line(error)}); give a model folder, a hub name "
                "that can be reached, or tiny"
            ) from error
        add_visual_tokens(tokenizer, config)
        policy = policy.override(image_min_pixels=min_pixels, image_max_pixels=max_pixels)
        return cls(tokenizer, config, policy, box_frame)

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """Write the tokenizer, what AutoProcessor looks for, and our settings beside the released image settings."""
        written = super().save_pretrained(save_directory)
        write_settings(save_directory, self.policy, self.box_frame)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)
        return written

    def to_dict(self) -> dict[str, Any]:
        """What processor_config.json holds: the class that AutoProcessor looks for.

        Nothing more: vLLM, which does not know our image processor, would read it here and give up on pictures.
        """
        return {"processor_class": type(self).__name__}

    def __call__(  # type: ignore[override]
        self,
        images: Images = None,
        text: str | Sequence[str] | None = None,
        videos: None = None,
        audio: None = None,
        *,
        return_tensors: str | None = None,
        padding_side: str = "left",
        return_text_replacement_offsets: bool = False,
        **kwargs: Any,
    ) -> BatchFeature:
        """`input_ids` and `attention_mask` [B, T] of texts, `pixel_values` [P, C * p * p] and `image_grid_thw` [I, 3].

        Pixels are float32 in [-1, 1]. Each `<image>` becomes image start, atoms and image end of the next picture;
        `images` are in that order, or lists of them, one a text. `kwargs` (`padding`, `truncation`, ...) are the
        tokenizer's; padding stands on the left, as `generate` needs it. Without `return_tensors` ids are lists.
        Raises DataError when placeholders and pictures differ in number, or truncation cuts a picture.
        """
        if videos is not None or audio is not None:
            raise DataError("this call takes texts and pictures; write a video's prompt with Ovis2_5Processor.encode")
        pixels = self.image_processor(images, return_tensors) if flatten(images) else {}
        if text is None:
            return BatchFeature(dict(pixels))
        texts = [text] if isinstance(text, str) else list(text)
        _check_texts(texts, images)
        merged = self.image_processor.merge_size**2
        num_tokens = iter([int(rows * columns) // merged for _, rows, columns in pixels.get("image_grid_thw", [])])
        expanded, offsets = zip(*[self._expand(written, num_tokens) for written in texts])
        kwargs = {"return_token_type_ids": False, **kwargs}
        encoded = self.tokenizer(list(expanded), return_tensors=return_tensors, padding_side=padding_side, **kwargs)
        self._check_atoms(expanded, encoded["input_ids"])
        if return_text_replacement_offsets:
            encoded["text_replacement_offsets"] = list(offsets)
        return BatchFeature({**encoded, **pixels})

    def _expand(self, text: str, num_tokens: Iterator[int]) -> tuple[str, list[dict[str, tuple[int, int]]]]:
        """The text with its pictures written out, and from where to where each stood and now stands, in characters.

        transformers moves the marks of `{% generation %}` by these when it masks what the assistant did not write.
        """
        expanded, *rest = text.split(PLACEHOLDER)
        place, offsets = len(expanded), []
        for following in rest:
            written = IMAGE_START + ATOM * next(num_tokens) + IMAGE_END
            offsets.append(
                {
                    "span": (place, place + len(PLACEHOLDER)),
                    "new_span": (len(expanded), len(expanded) + len(written)),
                }
            )
            expanded += written + following
            place += len(PLACEHOLDER) + len(following)
        return expanded, offsets

    def _check_atoms(self, texts: Sequence[str], input_ids: Any) -> None:
        for number, (text, ids) in enumerate(zip(texts, input_ids)):
            found = int((torch.as_tensor(ids) == self.config.image_token_id).sum())
            if found != text.count(ATOM):
                raise DataError(
                    f"text {number}: truncation leaves {found} of {text.count(ATOM)} visual tokens; raise max_length "
                    "or lower the pixel bounds"
                )

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", *self.image_processor.model_input_names]

    def encode(self, conversation: Conversation, *, purpose: Purpose, thinking: bool = True) -> Example:
        """The conversation as an Example; see ChatTemplate.spans. Raises ImageError for a picture that fails."""
        spans = self.template.spans(conversation, purpose=purpose, thinking=thinking)
        return self.assemble(spans, self.patch_all(conversation))

    def patch_all(self, conversation: Conversation) -> list[PatchedImage]:
        """Its pictures in order, or its video, at the policy's size. Raises ImageError for one that fails."""
        images = [self.patch_image(open_image(source)) for source in conversation.images]
        return images + [self.patch_video(open_video(source)) for source in conversation.videos]

    def assemble(self, spans: list[Span], images: list[PatchedImage]) -> Example:
        example = Example()
        for span in spans:
            if span.image_number is None:
                example.append(span.ids, is_trained=span.is_trained)
            else:
                self.append_image(example, images[span.image_number])
        return example

    def append_image(self, example: Example, image: PatchedImage) -> None:
        """Put a picture or video at the end: start, atoms, end; none of them trained."""
        example.append(self.image_ids(image), is_trained=False)
        example.images.append(image)

    def image_ids(self, image: PatchedImage) -> list[int]:
        """Start, atoms and end of a picture or video; nothing stands between the frames."""
        config = self.config
        start, end = config.image_start_token_id, config.image_end_token_id
        if image.is_video:
            start, end = config.video_start_token_id, config.video_end_token_id
        return [start, *[config.image_token_id] * image.num_tokens, end]

    def overview_size(self, original: Size) -> Size:
        """The size at which the model sees a whole picture of this upright size."""
        return self.image_processor.overview_size(original)

    def patch_image(self, image: Image.Image) -> PatchedImage:
        """A whole picture (upright RGB) at the policy's size."""
        return self.image_processor.patch_image(image)

    def frame_size(self, original: Size) -> Size:
        """The size at which the model sees every frame of a video whose first one has this upright size."""
        low, high = self.policy.frame_bounds
        return smart_resize(original, factor=self.factor, min_pixels=low, max_pixels=high)

    def patch_video(self, frames: Sequence[Image.Image]) -> PatchedImage:
        """The frames of a video (upright RGB), all at the size of the first, as the released code has it."""
        size = self.frame_size(Size(*frames[0].size))
        resized = [resize(frame, size) for frame in frames]
        tower = self.image_processor
        return patchify(*resized, patch_size=tower.patch_size, stride=tower.merge_size, is_video=True)

    def patch(self, image: Image.Image) -> PatchedImage:
        """A picture whose size is already right."""
        return self.image_processor.patch(image)

    def decode(self, ids: Sequence[int] | Tensor, skip_special_tokens: bool = False, **kwargs: Any) -> str:  # type: ignore[override]
        """Text of ids, tags kept, visual tokens left out."""
        hidden = set(self.config.visual_token_ids)
        shown = [token for token in torch.as_tensor(ids).tolist() if token not in hidden]
        return str(self.tokenizer.decode(shown, skip_special_tokens=skip_special_tokens, **kwargs))

    def decode_few(self, ids: Sequence[int]) -> str:
        """What `decode` gives for ids as they come one by one: those that stand alone are remembered."""
        if len(ids) != 1:
            return self.decode(ids)
        if (text := self._texts.get(ids[0])) is None:
            text = self._texts[ids[0]] = self.decode(ids)
        return text

    def batch_decode(self, sequences: Sequence[Sequence[int]] | Tensor, **kwargs: Any) -> list[str]:  # type: ignore[override]
        return [self.decode(ids, **kwargs) for ids in sequences]


def add_visual_tokens(tokenizer: PreTrainedTokenizerBase, config: Ovis2_5Config) -> None:
    """Give the tokenizer the seven visual tokens, so that their ids never come from anything else.

    Raises CheckpointError when they do not land on the ids of the config.
    """
    tokenizer.add_tokens(list(VISUAL_TOKENS), special_tokens=True)
    ids = [tokenizer.convert_tokens_to_ids(token) for token in VISUAL_TOKENS]
    if tuple(ids) != config.visual_token_ids:
        raise CheckpointError(
            f"visual tokens have the ids {ids} in the tokenizer and {list(config.visual_token_ids)} in config.json; "
            "use the tokenizer files that belong to this checkpoint"
        )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _check_texts(texts: list[str], images: Images) -> None:
    """One placeholder for each picture: in each text where pictures come as lists by text, in all texts otherwise."""
    groups: list[Images] = [images]
    if isinstance(images, (list, tuple)) and images and all(isinstance(group, (list, tuple)) for group in images):
        if len(images) != len(texts):
            raise DataError(f"{len(images)} lists of pictures for {len(texts)} texts; give one list a text")
        groups = list(images)
    for number, text in enumerate(texts if len(groups) == len(texts) else ["".join(texts)]):
        found, given = text.count(PLACEHOLDER), len(flatten(groups[number]))
        if found != given:
            where = f"text {number}" if len(groups) == len(texts) else f"{len(texts)} texts"
            raise DataError(f'{where}: {found} "{PLACEHOLDER}" for {given} pictures; write one for each and no other')
        if ATOM in text:
            raise DataError(f'a text spells the visual token "{ATOM}"; write "{PLACEHOLDER}" for a picture')


def load_processor(name: str, config: SampleConfig) -> Ovis2_5Processor:
    """The checkpoint's processor, under the pixel bounds and box frame that the settings name."""
    processor = Ovis2_5Processor.from_pretrained(locate(name))
    processor.policy = processor.policy.override(**config.pixel_bounds)
    processor.box_frame = config.box_frame or processor.box_frame
    return processor


AutoProcessor.register(Ovis2_5Config, Ovis2_5Processor)
