"""The released model's calls on ours: what its scripts give, they get; and the model card's own text runs."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessor, TextStreamer

from looktwice.errors import CheckpointError, ConfigError, DataError
from looktwice.messages import Conversation, Message, TextPart, VideoPart, question_about
from looktwice.model.adapters import add_lora, trained_parameters
from looktwice.model.configuration import Ovis2_5Config
from looktwice.model.modeling import Ovis2_5ForConditionalGeneration
from looktwice.model.released import RELEASED_PIXELS, own_config
from looktwice.model.weights import load_model, save_model
from looktwice.processing.chat_template import EARLY_STOP
from looktwice.processing.images import normalise
from looktwice.processing.processor import Example, Ovis2_5Processor
from looktwice.serving.configuration_ovis2_5 import Ovis2_5_Config

RELEASED_TOKENIZER = Path(__file__).parents[3] / "shared" / "ovis2_5_9b" / "tokenizer_config.json"
SOURCE = Path(__file__).parents[2] / "src"
BUDGET = 4

# PEFT asks transformers by an older name
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture
def released(model_folder: Path) -> Ovis2_5ForConditionalGeneration:
    """The model of a folder, whose tokenizer was not read yet."""
    return load_model(str(model_folder)).eval()  # type: ignore[return-value]


def ask(*content: Any) -> list[dict[str, Any]]:
    """The question of a user who shows pictures and says texts."""
    items = [{"type": "text", "text": c} if isinstance(c, str) else {"type": "image", "image": c} for c in content]
    return [{"role": "user", "content": items}]


def assert_same(given: tuple[Tensor, Tensor | None, Tensor | None], example: Example) -> None:
    ids, pixels, grids = given
    assert ids.dtype == torch.long and ids.tolist() == [example.input_ids]
    if not example.images:
        assert (pixels, grids) == (None, None)
        return
    assert pixels is not None and grids is not None and grids.dtype == torch.long
    assert torch.equal(pixels, normalise(torch.cat([image.pixel_values for image in example.images])))
    assert grids.tolist() == [list(image.grid_thw) for image in example.images]


# -- preprocess_inputs


@pytest.mark.parametrize("thinking", [False, True])
def test_an_image_and_a_question_are_the_published_sequence(
    released: Ovis2_5ForConditionalGeneration, processor: Ovis2_5Processor, image: Image.Image, thinking: bool
) -> None:
    text = processor.template.encode
    opener, closer, config = processor.template.turn_open_id, processor.template.turn_close_id, processor.config
    ids, pixels, grids = released.preprocess_inputs(ask(image, "Describe this image."), enable_thinking=thinking)
    assert grids is not None and pixels is not None
    atoms = int(grids.prod()) // 4
    assert ids[0].tolist() == [
        *[opener, *text("user\n")],
        *[config.image_start_token_id, *[config.image_token_id] * atoms, config.image_end_token_id],
        *[*text("\nDescribe this image."), closer, *text("\n"), opener, *text("assistant\n")],
        *([] if thinking else text("<think>\n\n</think>\n\n")),
    ]
    assert pixels.shape == (4 * atoms, 3 * 8**2) and pixels.min() >= -1 and pixels.max() <= 1
    assert_same(
        (ids, pixels, grids),
        processor.encode(question_about("Describe this image.", image), purpose="prompt", thinking=thinking),
    )


def test_several_images_each_at_its_own_size(
    released: Ovis2_5ForConditionalGeneration, processor: Ovis2_5Processor, image: Image.Image, tmp_path: Path
) -> None:
    image.crop((0, 0, 60, 100)).save(tmp_path / "b.png")
    given = released.preprocess_inputs(ask(image, tmp_path / "b.png", "Which?"))
    conversation = question_about("Which?", image, tmp_path / "b.png")
    assert_same(given, processor.encode(conversation, purpose="prompt", thinking=False))


def test_a_video_is_one_grid_of_all_its_frames(
    released: Ovis2_5ForConditionalGeneration, processor: Ovis2_5Processor, image: Image.Image
) -> None:
    frames = [image, image.rotate(180), image]
    content = [{"type": "video", "video": frames}, {"type": "text", "text": "What happens?"}]
    given = released.preprocess_inputs([{"role": "user", "content": content}])
    conversation = question_about("What happens?", VideoPart(source=frames))
    assert_same(given, processor.encode(conversation, purpose="prompt", thinking=False))
    assert given[2] is not None and given[2][0, 0] == 3


def test_text_alone_has_no_pixels(released: Ovis2_5ForConditionalGeneration, processor: Ovis2_5Processor) -> None:
    given = released.preprocess_inputs([{"role": "user", "content": "Hi <image>there<video>"}])
    assert_same(given, processor.encode(question_about("Hi there"), purpose="prompt", thinking=False))


def test_past_answers_lose_what_was_thought(
    released: Ovis2_5ForConditionalGeneration, processor: Ovis2_5Processor
) -> None:
    turns = [("user", "Q1"), ("assistant", "<think>\nno</think> yes\n</think>\n\nA1"), ("user", "Q2")]
    given = released.preprocess_inputs([{"role": role, "content": text} for role, text in turns], enable_thinking=True)
    kept = [("user", "Q1"), ("assistant", "A1"), ("user", "Q2")]
    messages = tuple(Message(role=role, parts=(TextPart(text=text),)) for role, text in kept)  # type: ignore[arg-type]
    assert_same(given, processor.encode(Conversation(messages=messages), purpose="prompt"))


def test_without_a_generation_prompt_nothing_follows_the_last_turn(
    released: Ovis2_5ForConditionalGeneration, processor: Ovis2_5Processor
) -> None:
    ids, _, _ = released.preprocess_inputs(ask("Hi"), add_generation_prompt=False)
    template = processor.template
    assert ids[0].tolist() == [
        template.turn_open_id, *template.encode("user\nHi"), template.turn_close_id, *template.encode("\n")
    ]  # fmt: skip


def test_an_answer_given_as_a_list_is_kept(released: Ovis2_5ForConditionalGeneration) -> None:
    parts = [{"type": "text", "text": "<think>no</think>"}, {"type": "text", "text": "\nA1"}]
    given, written = (
        released.preprocess_inputs([{"role": "assistant", "content": content}, *ask("Q2")])[0].tolist()
        for content in (parts, "A1")
    )
    assert given == written


@pytest.mark.skipif(not RELEASED_TOKENIZER.is_file(), reason="needs the released tokenizer files")
@pytest.mark.parametrize("prompt", [{"add_generation_prompt": False}, {"enable_thinking": True}, {}])
def test_texts_are_those_of_the_released_template(
    released: Ovis2_5ForConditionalGeneration, image: Image.Image, prompt: dict[str, bool]
) -> None:
    messages = [
        {"role": "system", "content": "Be <image>brief."},
        *ask("First\n", image, image, "then <video>", "\n\nlast"),
        {"role": "assistant", "content": "<think>a</think>\n<video>b"},
        {"role": "user", "content": "And <image>\nthis?"},
        {"role": "assistant", "content": "\n\n no"},
        *ask(""),
    ]
    environment = jinja2.Environment()
    environment.globals["raise_exception"] = None
    template = environment.from_string(json.loads(RELEASED_TOKENIZER.read_text(encoding="utf-8"))["chat_template"])
    written = template.render(messages=messages, **{"add_generation_prompt": True, "enable_thinking": False} | prompt)
    ids, _, _ = released.preprocess_inputs(messages, **prompt)
    chunks, config, tokenizer = written.split("<image>"), released.config, released.text_tokenizer
    found = [[]]  # type: ignore[var-annotated]
    for token in ids[0].tolist():
        if token == config.image_start_token_id:
            found.append([])
        elif token not in config.visual_token_ids:
            found[-1].append(token)
    assert found == [tokenizer.encode(chunk, add_special_tokens=False) for chunk in chunks]


@pytest.mark.parametrize("kind", ["image", "video"])
def test_pixel_bounds_hold_for_the_one_call(
    released: Ovis2_5ForConditionalGeneration, processor: Ovis2_5Processor, image: Image.Image, kind: str
) -> None:
    shown = {"type": kind, kind: image if kind == "image" else [image, image]}
    messages = [{"role": "user", "content": [shown]}]

    def area(**bounds: int) -> int:
        _, _, grids = released.preprocess_inputs(messages, **bounds)
        assert grids is not None
        return int(grids[0, 1:].prod()) * 8**2

    usual = area()
    assert area(max_pixels=64 * 64) <= 64 * 64 < usual
    assert area(min_pixels=256 * 256, max_pixels=512 * 512) >= 256 * 256 > usual
    assert area() == usual and released.processor.policy == processor.policy


def test_given_bounds_hold_for_frames_whatever_the_policy_says_of_videos(
    released: Ovis2_5ForConditionalGeneration, image: Image.Image
) -> None:
    narrow = released.processor.policy.override(video_min_pixels=0, video_max_pixels=32 * 32)
    released.processor.policy = narrow
    messages = [{"role": "user", "content": [{"type": "video", "video": [image]}]}]
    usual, given = (
        released.preprocess_inputs(messages, **bounds)[2]
        for bounds in ({}, {"min_pixels": 256 * 256, "max_pixels": 512 * 512})
    )
    assert usual is not None and given is not None
    assert usual.prod() * 8**2 <= 32 * 32 and given.prod() * 8**2 >= 256 * 256


def test_a_folder_that_says_nothing_of_pixels_has_the_released_bounds(model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path / "model")
    file = tmp_path / "model" / "preprocessor_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    del settings["looktwice"]
    file.write_text(json.dumps(settings), encoding="utf-8")
    loaded = load_model(str(tmp_path / "model"))
    assert loaded.processor.policy == RELEASED_PIXELS
    assert (RELEASED_PIXELS.image_min_pixels, RELEASED_PIXELS.image_max_pixels) == (448 * 448, 1792 * 1792)
    assert RELEASED_PIXELS.frame_bounds == (448 * 448, 1792 * 1792)


def test_pixels_have_the_dtype_of_the_model(model_folder: Path, image: Image.Image) -> None:
    half = load_model(str(model_folder), dtype=torch.bfloat16)
    _, pixels, _ = half.preprocess_inputs(ask(image))
    assert pixels.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        ("Hi", r"messages\[1\] is 'Hi'; give .*role"),
        ({"role": "tool", "content": "x"}, r"messages\[1\] is .*tool.*; give .*\"system\", \"user\" or \"assistant\""),
        ({"role": "user", "content": 3}, r"messages\[1\]: content is 3; give a text or a list"),
        ({"role": "user", "content": [{"type": "audio"}]}, r"messages\[1\].content\[0\] is .*audio"),
        ({"role": "user", "content": [{"type": "image"}]}, r"messages\[1\].content\[0\] is .*; give .*\"text\""),
        ({"role": "assistant", "content": [{"type": "image", "image": "a.png"}]}, r"messages\[1\]: an assistant's"),
    ],
)
def test_messages_that_the_released_template_refuses_are_named(
    released: Ovis2_5ForConditionalGeneration, message: Any, problem: str
) -> None:
    with pytest.raises(DataError, match=problem):
        released.preprocess_inputs([{"role": "user", "content": "Q"}, message])


def test_a_video_beside_an_image_is_refused(released: Ovis2_5ForConditionalGeneration, image: Image.Image) -> None:
    content = [{"type": "image", "image": image}, {"type": "video", "video": [image]}]
    with pytest.raises(ConfigError, match="1 videos and 1 pictures"):
        released.preprocess_inputs([{"role": "user", "content": content}])


# -- generate


class Script(LogitsProcessor):
    """Lets each row say only what is written for it, by the number of its new id."""

    def __init__(self, num_prompt: int, rows: Sequence[Sequence[int]]) -> None:
        self.num_prompt, self.rows = num_prompt, rows

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        said = torch.full_like(scores, -torch.inf)
        for row in range(len(scores)):  # beams of a row say the same
            script = self.rows[row * len(self.rows) // len(scores)]
            said[row, script[input_ids.shape[1] - self.num_prompt]] = 0.0
        return said


class BudgetAwareTextStreamer(TextStreamer):
    """The model card's: it ends when it is told to by its other name."""

    def end(self) -> None:
        pass

    def manual_end(self) -> None:
        super().end()


def play(released: Ovis2_5ForConditionalGeneration, *scripts: str, **options: Any) -> tuple[list[list[int]], Any]:
    """New ids of scripted rows of one prompt, thinking limited to BUDGET ids, and the rows as they were written."""
    text = released.processor.template.encode
    num_new = BUDGET + len(text(EARLY_STOP)) + 3
    rows = [
        (released.text_tokenizer.encode(script, add_special_tokens=False) * num_new)[:num_new] for script in scripts
    ]
    ids, _, _ = released.preprocess_inputs([{"role": "user", "content": "Q"}], enable_thinking=True)
    options = {"enable_thinking": True, "enable_thinking_budget": True, "thinking_budget": BUDGET} | options
    options = {"max_new_tokens": num_new, "logits_processor": [Script(ids.shape[1], rows)]} | options
    return released.generate(inputs=ids.repeat(len(rows), 1), **options).tolist(), rows


def test_only_the_new_ids_come_back_and_are_transformers_greedy_ones(
    released: Ovis2_5ForConditionalGeneration, image: Image.Image
) -> None:
    ids, pixels, grids = released.preprocess_inputs(ask(image, "What is it?"))
    new = released.generate(inputs=ids, pixel_values=pixels, grid_thws=grids, max_new_tokens=6)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": released.processor.end_ids}
    whole = released.generate(input_ids=ids, pixel_values=pixels, image_grid_thw=grids, **options)
    assert torch.equal(torch.cat([ids, new], dim=1), whole)
    told = released.generate(ids, pixel_values=pixels, grid_thws=grids, max_new_tokens=6, return_dict_in_generate=True)
    assert torch.equal(told.sequences, new)


def test_pads_of_a_batch_are_masked(released: Ovis2_5ForConditionalGeneration, image: Image.Image) -> None:
    asked = [released.preprocess_inputs(messages) for messages in (ask(image, "What is it?"), ask("Hi"), ask("So?"))]
    longest = max(ids.shape[1] for ids, _, _ in asked)
    pad_id = released.text_tokenizer.pad_token_id
    rows = [torch.nn.functional.pad(ids, (longest - ids.shape[1], 0), value=pad_id) for ids, _, _ in asked]
    options = {"max_new_tokens": 5, "eos_token_id": None}
    together = released.generate(inputs=torch.cat(rows), pixel_values=asked[0][1], grid_thws=asked[0][2], **options)
    alone = [
        released.generate(inputs=ids, pixel_values=pixels, grid_thws=grids, **options) for ids, pixels, grids in asked
    ]
    assert torch.equal(together, torch.cat(alone))


def test_the_settings_of_generation_config_json_are_not_applied(released: Ovis2_5ForConditionalGeneration) -> None:
    ids, _, _ = released.preprocess_inputs(ask("Hi"))
    greedy = released.generate(inputs=ids, max_new_tokens=5)
    settings = GenerationConfig(do_sample=True, temperature=9.0, repetition_penalty=9.0, min_new_tokens=2, max_length=3)
    released.generation_config = settings
    assert torch.equal(released.generate(inputs=ids, max_new_tokens=5), greedy)
    assert released.generation_config is settings


def test_sampling_is_at_temperature_1_among_the_best_50(released: Ovis2_5ForConditionalGeneration) -> None:
    ids, _, _ = released.preprocess_inputs(ask("Hi"))
    released.generation_config = GenerationConfig(temperature=0.1, top_k=1)
    runs = []
    for options in ({}, {"temperature": 1.0, "top_k": 50, "top_p": 1.0}, {"top_k": 3}):
        torch.manual_seed(0)
        runs.append(released.generate(inputs=ids, max_new_tokens=20, do_sample=True, **options).tolist())
    assert runs[0] == runs[1] != runs[2]


def test_every_other_call_is_transformers_own(released: Ovis2_5ForConditionalGeneration) -> None:
    ids, _, _ = released.preprocess_inputs(ask("Hi"))
    whole = released.generate(input_ids=ids, max_new_tokens=2, do_sample=False)
    assert torch.equal(whole[:, : ids.shape[1]], ids)
    assert torch.equal(released.generate(ids, max_new_tokens=2, do_sample=False), whole)


def test_a_call_without_a_prompt_is_named(released: Ovis2_5ForConditionalGeneration) -> None:
    with pytest.raises(ConfigError, match="generate was given no prompt; give inputs="):
        released.generate(enable_thinking=True, max_new_tokens=2)


def test_thinking_is_closed_where_its_budget_ends_in_each_row_that_still_thinks(
    released: Ovis2_5ForConditionalGeneration,
) -> None:
    closing = released.processor.template.encode(EARLY_STOP)
    new, rows = play(released, "<think>ab", "<think>a</think>", "abc", "<think><|im_end|>")
    thinks, closed, never, ended = rows
    pads = [released.text_tokenizer.pad_token_id] * (len(ended) - 2)
    assert new[0] == thinks[:BUDGET] + closing + thinks[BUDGET + len(closing) :]
    assert new[1:] == [closed, never, ended[:2] + pads]


@pytest.mark.parametrize("off", ["enable_thinking", "enable_thinking_budget"])
def test_without_both_flags_there_is_no_budget(released: Ovis2_5ForConditionalGeneration, off: str) -> None:
    new, rows = play(released, "<think>ab", **{off: False})
    assert new == rows


@pytest.mark.parametrize(
    "options", [{"do_sample": True, "top_p": 0.1, "temperature": 9.0, "repetition_penalty": 9.0}, {"num_beams": 2}]
)
def test_the_text_that_closes_thinking_is_forced_whatever_the_search(
    released: Ovis2_5ForConditionalGeneration, options: dict[str, Any]
) -> None:
    closing = released.processor.template.encode(EARLY_STOP)
    new, rows = play(released, "<think>ab", **options)
    assert new == [rows[0][:BUDGET] + closing + rows[0][BUDGET + len(closing) :]]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"max_new_tokens": None}, "max_new_tokens is None; an answer needs room after a thinking_budget of 4"),
        ({"max_new_tokens": 10, "thinking_budget": 10}, r"is 10; .* lower thinking_budget"),
        ({"thinking_budget": 7}, r"max_new_tokens is (\d+); .* 7 and the \d+ ids .*: give \d+ or more"),
        ({"thinking_budget": 0}, "thinking_budget is 0; it must be 1 or more"),
    ],
)
def test_a_budget_that_leaves_no_answer_is_refused(
    released: Ovis2_5ForConditionalGeneration, options: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        play(released, "<think>ab", **options)


@pytest.mark.parametrize("kind", [TextStreamer, BudgetAwareTextStreamer])
def test_the_answer_streams_to_its_end(
    released: Ovis2_5ForConditionalGeneration, kind: type[TextStreamer], capsys: pytest.CaptureFixture[str]
) -> None:
    streamer = kind(released.text_tokenizer, skip_prompt=True)
    new, _ = play(released, "<think>ab", streamer=streamer)
    assert capsys.readouterr().out == released.text_tokenizer.decode(new[0]) + "\n"


# -- where the tokenizer comes from


def test_a_model_of_no_folder_says_what_to_do(model: Ovis2_5ForConditionalGeneration) -> None:
    with pytest.raises(
        CheckpointError, match=r"no folder, so it has no tokenizer; load it with from_pretrained, or set"
    ):
        model.preprocess_inputs(ask("Hi"))


def test_a_folder_without_tokenizer_files_is_named(model: Ovis2_5ForConditionalGeneration, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=f"{tmp_path}: no usable config and tokenizer files"):
        load_model(str(tmp_path)).text_tokenizer.decode([1])


def test_the_small_model_finds_its_own_by_name() -> None:
    assert load_model("tiny").text_tokenizer.eos_token == "<|im_end|>"


def test_a_processor_may_be_put_in_its_place(
    model: Ovis2_5ForConditionalGeneration, processor: Ovis2_5Processor
) -> None:
    own = copy.deepcopy(model)
    own.processor = processor
    assert own.text_tokenizer is processor.tokenizer


def test_copies_pickles_and_saves_are_as_if_the_tokenizer_had_not_been_read(
    released: Ovis2_5ForConditionalGeneration, tmp_path: Path
) -> None:
    names = list(released.state_dict())
    tokenizer = released.text_tokenizer
    assert released.text_tokenizer is tokenizer and list(released.state_dict()) == names
    for again in (copy.deepcopy(released), pickle.loads(pickle.dumps(released))):
        assert "processor" in vars(released) and "processor" not in vars(again)
        assert again.text_tokenizer.get_vocab() == tokenizer.get_vocab()
    released.save_pretrained(tmp_path)
    assert "tokenizer.json" not in {path.name for path in tmp_path.iterdir()}


# -- adapters


@pytest.fixture
def adapter(model_folder: Path, processor: Ovis2_5Processor, tmp_path: Path) -> Path:
    """A trained adapter with one part trained whole, and pixel bounds of its own."""
    adapted = add_lora(load_model(str(model_folder)), r=2, alpha=4, modules_to_save=["visual_table"])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in trained_parameters(adapted):
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    save_model(adapted, tmp_path / "adapter")
    processor.at(processor.policy.override(image_max_pixels=64 * 64)).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_model_under_peft_passes_the_calls_on(adapter: Path, image: Image.Image) -> None:
    adapted = load_model(str(adapter)).eval()
    ids, pixels, grids = adapted.preprocess_inputs(ask(image, "What is it?"))
    assert int(grids.prod()) * 8**2 <= 64 * 64  # as the adapter was trained
    new = adapted.generate(inputs=ids, pixel_values=pixels, grid_thws=grids, max_new_tokens=4)
    options = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": adapted.processor.end_ids}
    whole = adapted.generate(input_ids=ids, pixel_values=pixels, image_grid_thw=grids, **options)
    assert torch.equal(torch.cat([ids, new], dim=1), whole)
    with adapted.disable_adapter():
        assert not torch.equal(
            adapted.generate(input_ids=ids, pixel_values=pixels, image_grid_thw=grids, **options), whole
        )


def test_transformers_loads_an_adapter_s_folder_as_the_base_with_the_adapter(adapter: Path, image: Image.Image) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(adapter, dtype=torch.float32, trust_remote_code=True)
    ours = load_model(str(adapter)).eval()
    ids, pixels, grids = loaded.preprocess_inputs(ask(image, "What is it?"))
    assert torch.equal(ids, ours.preprocess_inputs(ask(image, "What is it?"))[0])
    with torch.no_grad():
        logits = [m(input_ids=ids, pixel_values=pixels, image_grid_thw=grids).logits for m in (loaded, ours)]
    torch.testing.assert_close(*logits)


# -- the class of a folder


@pytest.mark.parametrize("trust", [True, False, None])
def test_the_auto_class_of_the_released_model_gives_ours(
    model_folder: Path, model: Ovis2_5ForConditionalGeneration, trust: bool | None
) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16, trust_remote_code=trust)
    assert type(loaded) is Ovis2_5ForConditionalGeneration and loaded.dtype == torch.bfloat16
    assert loaded.text_tokenizer.pad_token == "<|endoftext|>"
    assert type(AutoModelForCausalLM.from_config(loaded.config)) is Ovis2_5ForConditionalGeneration


def test_a_config_of_the_folder_s_own_class_is_read_as_ours(model_folder: Path) -> None:
    theirs = Ovis2_5_Config.from_pretrained(model_folder, attn_implementation="eager")
    ours = own_config(theirs)
    assert ours.to_dict() == Ovis2_5Config.from_pretrained(model_folder).to_dict()
    assert ours._attn_implementation == "eager"


CARD = """
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, TextStreamer

MODEL_PATH, AGAIN = {folder!r}, {again!r}
enable_thinking = True
enable_thinking_budget = True
max_new_tokens = 120
thinking_budget = 8

model = AutoModelForCausalLM.from_pretrained(MODEL_PATH, torch_dtype=torch.bfloat16, trust_remote_code=True)
picture = Image.linear_gradient("L").convert("RGB").resize((160, 120))


class BudgetAwareTextStreamer(TextStreamer):
    def manual_end(self):
        super().end()

    def end(self):
        pass


def run(messages, **bounds):
    input_ids, pixel_values, grid_thws = model.preprocess_inputs(
        messages=messages, add_generation_prompt=True, **bounds
    )
    with torch.no_grad():
        outputs = model.generate(
            inputs=input_ids,
            pixel_values=pixel_values,
            grid_thws=grid_thws,
            max_new_tokens=8,
            do_sample=True,
            eos_token_id=model.text_tokenizer.eos_token_id,
            pad_token_id=model.text_tokenizer.pad_token_id,
        )
    assert 1 <= outputs.shape[1] <= 8
    return model.text_tokenizer.decode(outputs[0], skip_special_tokens=True)


messages = [{{
    "role": "user",
    "content": [
        {{"type": "image", "image": picture}},
        {{"type": "text", "text": "Calculate the sum of the numbers in the middle box in figure (c)."}},
    ],
}}]
input_ids, pixel_values, grid_thws = model.preprocess_inputs(
    messages=messages,
    add_generation_prompt=True,
    enable_thinking=enable_thinking
)
outputs = model.generate(
    inputs=input_ids,
    pixel_values=pixel_values,
    grid_thws=grid_thws,
    enable_thinking=enable_thinking,
    enable_thinking_budget=enable_thinking_budget,
    max_new_tokens=max_new_tokens,
    thinking_budget=thinking_budget,
    streamer=BudgetAwareTextStreamer(model.text_tokenizer, skip_prompt=True, skip_special_tokens=True),
)
print("THOUGHT", model.text_tokenizer.decode(outputs[0], skip_special_tokens=True) != "")

multi = [{{"type": "image", "image": picture}}] * 3 + [{{"type": "text", "text": "Describe each image."}}]
print("IMAGES", type(run([{{"role": "user", "content": multi}}], max_pixels=896 * 896)).__name__)

frames = [picture.rotate(10 * number) for number in range(4)]
video = [{{"type": "video", "video": frames}}, {{"type": "text", "text": "Describe this video in detail."}}]
print("VIDEO", type(run([{{"role": "user", "content": video}}], max_pixels=896 * 896)).__name__)

messages = [{{"role": "user", "content": "Hi, please introduce Yellow Mountain."}}]
input_ids, _, _ = model.preprocess_inputs(messages=messages, add_generation_prompt=True)
outputs = model.generate(
    inputs=input_ids, max_new_tokens=8, do_sample=True,
    eos_token_id=model.text_tokenizer.eos_token_id,
    pad_token_id=model.text_tokenizer.pad_token_id,
)
print("TEXT", type(model.text_tokenizer.decode(outputs[0], skip_special_tokens=True)).__name__)
model.save_pretrained(AGAIN)
print("CLASS", type(model).__module__, type(model).__name__)
"""


def test_the_model_card_s_examples_run_with_transformers_alone_imported(model_folder: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    path = os.pathsep.join([str(SOURCE), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "HF_MODULES_CACHE": str(tmp_path / "code"), "HF_HUB_OFFLINE": "1"}
    script = CARD.format(folder=str(model_folder), again=str(again))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = [line.split() for line in done.stdout.splitlines() if line.split(" ")[0].isupper()]
    assert ["CLASS", "looktwice.model.modeling", "Ovis2_5ForConditionalGeneration"] in told
    assert [line for line in told if line[-1] == "str"] == [["IMAGES", "str"], ["VIDEO", "str"], ["TEXT", "str"]]
    # what is saved is what looktwice saves, no copy of its code
    assert {file.name for file in again.glob("*.py")} == {"configuration_ovis2_5.py", "modeling_ovis2_5.py"}


def test_a_copy_of_a_compiled_model_computes_with_its_own_weights(released: Ovis2_5ForConditionalGeneration) -> None:
    model = copy.deepcopy(released)
    model.compile(backend="eager")
    twin = copy.deepcopy(model)
    assert twin._compiled_call_impl is None
    assert pickle.loads(pickle.dumps(model))._compiled_call_impl is None


def test_a_token_of_the_hub_goes_into_no_pickle(model_folder: Path) -> None:
    loaded = Ovis2_5ForConditionalGeneration.from_pretrained(str(model_folder), token="hf_secret")
    assert loaded.hub_arguments == {"token": "hf_secret"}
    assert b"hf_secret" not in pickle.dumps(loaded)


def test_the_tokenizer_comes_from_where_the_weights_came(model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path / "inner")
    loaded = Ovis2_5ForConditionalGeneration.from_pretrained(
        pretrained_model_name_or_path=str(tmp_path), subfolder="inner"
    )
    assert loaded.text_tokenizer.get_vocab() == load_model(str(model_folder)).text_tokenizer.get_vocab()


@pytest.mark.parametrize(
    ("item", "problem"),
    [
        ({"type": "text", "text": None}, "text is None; give a text"),
        ({"type": "image", "image": None}, "image is None"),
    ],
)
def test_nothing_in_a_part_is_named(released: Ovis2_5ForConditionalGeneration, item: dict, problem: str) -> None:
    with pytest.raises(DataError, match=rf"messages\[0\]\.content\[0\]: {problem}"):
        released.preprocess_inputs([{"role": "user", "content": [item]}])


def test_pixels_and_grids_go_together(released: Ovis2_5ForConditionalGeneration, image: Image.Image) -> None:
    ids, pixels, grids = released.preprocess_inputs(ask(image, "What is it?"))
    for given in ({"pixel_values": pixels}, {"grid_thws": grids}):
        with pytest.raises(ConfigError, match="pixel_values and grid_thws go together"):
            released.generate(inputs=ids, max_new_tokens=2, **given)
