"""The processor: a conversation becomes an Example; an Example grows by text, crops and tool replies."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from PIL import Image
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import cached_file

from looktwice.errors import CheckpointError
from looktwice.geometry import BOX_FRAMES, BoxFrame, PixelPolicy, Size, smart_resize
from looktwice.messages import Conversation
from looktwice.model.configuration import Ovis2_5Config
from looktwice.processing.chat_template import ChatTemplate, Span
from looktwice.processing.images import PatchedImage, open_image, patchify, resize

VISUAL_TOKENS = (
    "<image>",
    "<video>",
    "<ovis_visual_atom>",
    "<ovis_image_start>",
    "<ovis_image_end>",
    "<ovis_video_start>",
    "<ovis_video_end>",
)
TEXT_END = "<|endoftext|>"
PREPROCESSOR_FILE = "preprocessor_config.json"
OWN_SETTINGS = "looktwice"
RELEASED_PREPROCESSOR = {
    "do_convert_rgb": None,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "SiglipImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "SiglipProcessor",
    "resample": 2,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 512, "width": 512},
}


@dataclass(kw_only=True)
class Example:
    """One sequence: `input_ids` and `loss_mask` [T] (True = trained), and its pictures in order of appearance."""

    input_ids: list[int] = field(default_factory=list)
    loss_mask: list[bool] = field(default_factory=list)
    images: list[PatchedImage] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.input_ids)

    def append(self, ids: list[int], *, is_trained: bool) -> None:
        self.input_ids += ids
        self.loss_mask += [is_trained] * len(ids)

    def copy(self) -> Example:
        return Example(input_ids=[*self.input_ids], loss_mask=[*self.loss_mask], images=[*self.images])


class Ovis2_5Processor:
    """Tokenizer, chat template, pixel policy and box frame of one checkpoint."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: Ovis2_5Config,
        policy: PixelPolicy | None = None,
        box_frame: BoxFrame = "original_px",
    ) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.policy = policy or PixelPolicy()
        self.box_frame = box_frame
        self.template = ChatTemplate(tokenizer)
        self.patch_size = config.vit_config.patch_size
        self.stride = config.vit_config.hidden_stride
        self.factor = config.vit_config.factor
        self.end_ids = [self.template.turn_close_id, self.template.token_id(TEXT_END)]

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Ovis2_5Processor:
        """Read tokenizer, config, pixel policy and box frame of a model folder (or a hub name).

        Raises CheckpointError when a file is missing or unreadable.
        """
        try:
            config = Ovis2_5Config.from_pretrained(path)
            tokenizer = AutoTokenizer.from_pretrained(path, config=config, trust_remote_code=False)
            settings = cached_file(path, PREPROCESSOR_FILE, _raise_exceptions_for_missing_entries=False)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: no usable config and tokenizer files ({_first_line(error)})") from error
        add_visual_tokens(tokenizer, config)
        return cls(tokenizer, config, *_read_settings(settings))

    def save_pretrained(self, path: str | Path) -> None:
        """Write the tokenizer, and our settings beside the released image settings."""
        self.tokenizer.save_pretrained(path)
        settings = {"pixels": asdict(self.policy), "box_frame": self.box_frame}
        text = json.dumps({**RELEASED_PREPROCESSOR, OWN_SETTINGS: settings}, indent=2)
        (Path(path) / PREPROCESSOR_FILE).write_text(text + "\n", encoding="utf-8")

    def encode(
        self, conversation: Conversation, *, purpose: Literal["train", "prompt"], thinking: bool = True
    ) -> Example:
        """The conversation as an Example; see ChatTemplate.spans. Raises ImageError for a picture that fails."""
        images = [self.patch_image(open_image(source)) for source in conversation.images]
        return self.assemble(self.template.spans(conversation, purpose=purpose, thinking=thinking), images)

    def assemble(self, spans: list[Span], images: list[PatchedImage]) -> Example:
        example = Example()
        for span in spans:
            if span.image_number is None:
                example.append(span.ids, is_trained=span.is_trained)
            else:
                self.append_image(example, images[span.image_number])
        return example

    def append_image(self, example: Example, image: PatchedImage) -> None:
        """Put a picture at the end: start, atoms, end; none of them trained."""
        example.append(self.image_ids(image), is_trained=False)
        example.images.append(image)

    def image_ids(self, image: PatchedImage) -> list[int]:
        config = self.config
        return [config.image_start_token_id, *[config.image_token_id] * image.num_tokens, config.image_end_token_id]

    def overview_size(self, original: Size) -> Size:
        """The size at which the model sees a whole picture of this upright size."""
        return smart_resize(
            original,
            factor=self.factor,
            min_pixels=self.policy.image_min_pixels,
            max_pixels=self.policy.image_max_pixels,
        )

    def patch_image(self, image: Image.Image) -> PatchedImage:
        """A whole picture (upright RGB) at the policy's size."""
        return self.patch(resize(image, self.overview_size(Size(*image.size))))

    def patch(self, image: Image.Image) -> PatchedImage:
        """A picture whose size is already right."""
        return patchify(image, patch_size=self.patch_size, stride=self.stride)

    def decode(self, ids: list[int]) -> str:
        """Text of ids, tags kept, visual tokens left out."""
        hidden = set(self.config.visual_token_ids)
        return str(self.tokenizer.decode([i for i in ids if i not in hidden], skip_special_tokens=False))


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


def _read_settings(path: str | None) -> tuple[PixelPolicy, BoxFrame]:
    """Our settings in the file, or the defaults where there are none."""
    if path is None:
        return PixelPolicy(), "original_px"
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8")).get(OWN_SETTINGS, {})
        policy, box_frame = PixelPolicy(**settings.get("pixels", {})), settings.get("box_frame", "original_px")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not readable as image settings ({error}); restore the file") from error
    if box_frame not in BOX_FRAMES:
        raise CheckpointError(f"{path}: box_frame is {box_frame!r}; it must be one of {BOX_FRAMES}")
    return policy, box_frame


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
