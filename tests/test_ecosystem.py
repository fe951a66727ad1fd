"""The model among its peers: transformers' Auto classes and Trainer, PEFT, TRL, on a saved folder of the tiny model."""

from __future__ import annotations

import copy
import math
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, Trainer
from transformers import TrainingArguments as Arguments

from looktwice.messages import Conversation, ImagePart, Message, TextPart
from looktwice.model.adapters import LORA_TARGETS
from looktwice.model.modeling import Ovis2_5ForConditionalGeneration
from looktwice.processing.packing import collate_packed
from looktwice.processing.processor import Example, Ovis2_5Processor

LEARNING_RATE = 1e-3
QUIET: dict[str, Any] = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
"""For every trainer: no GPU, no tracker, no checkpoints, no bars."""

CALL, AFTER = "<think>\nI look. <tool_call>[0, 0, 40, 40]</tool_call>", "\nIt is red.\n</think>\n\nred"


@pytest.fixture
def trained(model: Ovis2_5ForConditionalGeneration) -> Ovis2_5ForConditionalGeneration:
    """A copy that a test may train."""
    return copy.deepcopy(model).train()


@pytest.fixture(scope="module")
def images(image: Image.Image) -> list[Image.Image]:
    return [image, image.crop((10, 0, 100, 120)), image.rotate(90, expand=True), image.crop((0, 0, 60, 60))]


@pytest.fixture(scope="module")
def messages(image: Image.Image, images: list[Image.Image]) -> list[list[dict[str, Any]]]:
    """Four conversations as Hugging Face writes them: with a crop in the answer, plain, of two turns, text alone."""
    return [
        [turn("user", images[0], "Which?"), turn("assistant", CALL, image.crop((0, 0, 40, 40)), AFTER)],
        [turn("user", images[1], "What is it?"), turn("assistant", "noise")],
        [turn("user", images[2], "And"), turn("assistant", "A1"), turn("user", "then?"), turn("assistant", "A2")],
        [turn("user", "Hi"), turn("assistant", "Hello")],
    ]


def turn(role: str, *parts: str | Image.Image) -> dict[str, Any]:
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts]
    return {"role": role, "content": content}


def conversation(turns: list[dict[str, Any]]) -> Conversation:
    """The same conversation as looktwice writes it."""
    return Conversation(
        messages=tuple(
            Message(
                role=written["role"],
                parts=tuple(
                    TextPart(text=p["text"]) if p["type"] == "text" else ImagePart(source=p["image"])
                    for p in written["content"]
                ),
            )
            for written in turns
        )
    )


@pytest.fixture(scope="module")
def examples(processor: Ovis2_5Processor, messages: list[list[dict[str, Any]]]) -> list[Example]:
    return [processor.encode(conversation(turns), purpose="train") for turns in messages]


def losses_by_hand(model: Ovis2_5ForConditionalGeneration, examples: list[Example], *, steps: int) -> list[float]:
    """Losses of plain updates on all examples, each scored by itself through the path that our own training uses."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        loss = mean_loss(model, examples)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def mean_loss(model: nn.Module, examples: list[Example]) -> Tensor:
    """Mean over all trained tokens of the examples, each in a row of its own."""
    num_tokens = sum(sum(example.loss_mask) for example in examples)
    return sum(model(**collate_packed([example]), num_items_in_batch=num_tokens).loss for example in examples)


def logged_losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def without_images(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """A row of a data set as TRL reads it: the pictures in a column of their own, their places in the messages."""
    images = [part["image"] for written in turns for part in written["content"] if part["type"] == "image"]
    emptied = [
        [{name: value for name, value in part.items() if name != "image"} for part in written["content"]]
        for written in turns
    ]
    return {
        "messages": [{"role": written["role"], "content": parts} for written, parts in zip(turns, emptied)],
        "images": images,
    }


# -- transformers


def test_the_auto_classes_load_a_saved_folder(
    model_folder: Path, model: Ovis2_5ForConditionalGeneration, processor: Ovis2_5Processor, examples: list[Example]
) -> None:
    config = AutoConfig.from_pretrained(model_folder)
    assert (config.text_config, config.vision_config) == (config.llm_config, config.vit_config)
    again = AutoProcessor.from_pretrained(model_folder, trust_remote_code=False)
    assert isinstance(again, Ovis2_5Processor)
    assert (again.policy, again.box_frame) == (processor.policy, processor.box_frame)
    assert again.image_processor.to_dict() == processor.image_processor.to_dict()
    loaded = AutoModelForImageTextToText.from_pretrained(model_folder)
    inputs = collate_packed(examples)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)


def test_a_prompt_of_the_hub_s_form_generates_what_ours_does(
    model_folder: Path, messages: list[list[dict[str, Any]]]
) -> None:
    processor = AutoProcessor.from_pretrained(model_folder)
    model = AutoModelForImageTextToText.from_pretrained(model_folder)
    prompts = [messages[0][:1], messages[3][:1]]
    inputs = processor.apply_chat_template(
        prompts,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )
    assert inputs["attention_mask"][1, 0] == 0, "the shorter prompt is padded on the left"
    written = model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    for prompt, ids in zip(prompts, written):
        example = processor.encode(conversation(prompt), purpose="prompt")
        alone = {name: value for name, value in collate_packed([example]).items() if "pixel" in name or "grid" in name}
        ours = model.generate(
            torch.tensor([example.input_ids]), **alone, max_new_tokens=6, do_sample=False, use_cache=False
        )
        assert processor.decode(ids) == processor.decode(ours[0, len(example) :])


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_a_padded_batch_has_the_loss_of_the_packed_row(
    model: Ovis2_5ForConditionalGeneration,
    processor: Ovis2_5Processor,
    messages: list[list[dict[str, Any]]],
    examples: list[Example],
    padding_side: str,
) -> None:
    padded = processor.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        processor_kwargs={"padding": True, "padding_side": padding_side},
    )
    labels = padded["input_ids"].masked_fill(padded.pop("assistant_masks") == 0, -100)
    with torch.no_grad():
        torch.testing.assert_close(model(**padded, labels=labels).loss, model(**collate_packed(examples)).loss)


def test_trainer_takes_the_steps_of_a_loop_by_hand(
    trained: Ovis2_5ForConditionalGeneration, examples: list[Example], tmp_path: Path
) -> None:
    """Two rows a step, of unequal numbers of trained tokens: the mean is over all of them, not of the rows' means."""
    wanted = losses_by_hand(trained, examples, steps=2)
    arguments = Arguments(
        tmp_path,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=2,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        **QUIET,
    )
    trainer = Trainer(trained, arguments, data_collator=collate_packed, train_dataset=examples)
    trainer.train()
    assert logged_losses(trainer) == pytest.approx(wanted, abs=1e-4)


# -- PEFT


def test_an_adapter_is_saved_reloaded_and_merged(
    model: Ovis2_5ForConditionalGeneration, examples: list[Example], tmp_path: Path
) -> None:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=LORA_TARGETS["llm"], init_lora_weights=False)
    adapted = get_peft_model(copy.deepcopy(model), config)
    assert all("language_model" in name for name, weight in adapted.named_parameters() if weight.requires_grad)
    inputs = {**collate_packed(examples), "labels": None}
    with torch.no_grad():
        wanted = adapted(**inputs).logits
        assert not torch.allclose(wanted, model(**inputs).logits, atol=1e-2)
        adapted.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
        torch.testing.assert_close(again(**inputs).logits, wanted)
        merged = again.merge_and_unload()
        torch.testing.assert_close(merged(**inputs).logits, wanted, atol=1e-4, rtol=1e-4)


# -- TRL


def test_trl_s_sft_trainer_takes_packed_rows(
    trained: Ovis2_5ForConditionalGeneration, processor: Ovis2_5Processor, examples: list[Example], tmp_path: Path
) -> None:
    trl = pytest.importorskip("trl")
    (wanted,) = losses_by_hand(trained, examples, steps=1)
    datasets = pytest.importorskip("datasets")
    arguments = trl.SFTConfig(
        tmp_path,
        per_device_train_batch_size=4,
        max_steps=1,
        logging_steps=1,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        **QUIET,
    )
    trainer = trl.SFTTrainer(
        trained,
        arguments,
        data_collator=lambda rows: collate_packed([examples[row["number"]] for row in rows]),
        train_dataset=datasets.Dataset.from_dict({"number": range(4)}),
        processing_class=processor,
    )
    trainer.train()
    assert logged_losses(trainer) == pytest.approx([wanted], abs=1e-4)


def test_trl_s_sft_trainer_trains_the_answers_of_plain_messages(
    trained: Ovis2_5ForConditionalGeneration,
    processor: Ovis2_5Processor,
    messages: list[list[dict[str, Any]]],
    examples: list[Example],
    tmp_path: Path,
) -> None:
    """`assistant_only_loss` trains what we train: no crop in the middle of an answer, no empty think block."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    (wanted,) = losses_by_hand(trained, examples[:3], steps=1)
    arguments = trl.SFTConfig(
        tmp_path,
        per_device_train_batch_size=3,
        max_steps=1,
        logging_steps=1,
        assistant_only_loss=True,
        max_length=None,
        **QUIET,
    )
    rows = datasets.Dataset.from_list([without_images(turns) for turns in messages[:3]])
    trainer = trl.SFTTrainer(trained, arguments, train_dataset=rows, processing_class=processor)
    trainer.train()
    assert logged_losses(trainer) == pytest.approx([wanted], abs=1e-4)


@pytest.mark.parametrize("with_lora", [False, True], ids=["whole", "lora"])
def test_trl_s_grpo_trainer_takes_a_step_about_an_image(
    model_folder: Path, image: Image.Image, tmp_path: Path, with_lora: bool
) -> None:
    """The processor is found by TRL itself. A KL reference needs LoRA: TRL would load a whole one from classes of
    transformers' own only."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    seen: list[str] = []

    def reward(completions: list[list[dict[str, str]]], **columns: object) -> list[float]:
        """Rises from one completion to the next, so that the group always carries signal."""
        seen.extend(completion[0]["content"] for completion in completions)
        return [float(place) for place in range(len(completions))]

    arguments = trl.GRPOConfig(
        tmp_path,
        per_device_train_batch_size=2,
        num_generations=2,
        max_completion_length=6,
        max_steps=1,
        logging_steps=1,
        learning_rate=LEARNING_RATE,
        beta=0.04 if with_lora else 0.0,
        chat_template_kwargs={"enable_thinking": False},
        **QUIET,
    )
    trainer = trl.GRPOTrainer(
        AutoModelForImageTextToText.from_pretrained(model_folder),
        reward,
        arguments,
        train_dataset=datasets.Dataset.from_list([{"prompt": [{"role": "user", "content": "Q?"}], "image": image}]),
        peft_config=LoraConfig(r=4, target_modules=LORA_TARGETS["llm"]) if with_lora else None,
    )
    assert isinstance(trainer.processing_class, Ovis2_5Processor)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    assert len(seen) == 2
    assert all(math.isfinite(loss) for loss in logged_losses(trainer))
    moved = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    if with_lora:
        assert moved and all("language_model" in name and "lora_B" in name for name in moved)
    else:
        assert {"model.vte.weight", "lm_head.weight"} <= moved
        assert any("visual_tokenizer.vit" in name for name in moved)
