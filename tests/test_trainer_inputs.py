# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""VTLMMTrainer takes what SFTTrainer takes: each input trains, or raises one clear error."""

import contextlib
import inspect
import io

import pytest
import torch
from datasets import Dataset, DatasetDict, Image
from datasets import List as ListFeature
from helpers.tiny_models import build_config, build_processor
from helpers.training import build_rows, weights
from peft import LoraConfig
from PIL import Image as PILImage
from transformers import BitsAndBytesConfig, TrainingArguments
from trl import SFTConfig, SFTTrainer

from modeling_vtlmm import VTLMMForConditionalGeneration
from vtlmm.train.config import VTLMMTrainingConfig
from vtlmm.train.trainer import VTLMMTrainer
from vtlmm.train.trainer_inputs import UNSUPPORTED_ARGUMENTS


OPTIONS = {
    "max_steps": 1,
    "per_device_train_batch_size": 2,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
}
OPTIONS |= {"save_strategy": "no", "gradient_checkpointing": False, "learning_rate": 1e-2, "logging_steps": 1}


def turn(role: str, text, parts: bool = False) -> dict:
    return {"role": role, "content": [{"type": "text", "text": text}] if parts else text}


def image(color: str = "red") -> PILImage.Image:
    return PILImage.new("RGB", (28, 28), color)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and its processor."""
    folder = tmp_path_factory.mktemp("inputs") / "model"
    torch.manual_seed(0)
    VTLMMForConditionalGeneration(build_config()).save_pretrained(folder)
    build_processor().save_pretrained(folder)
    return str(folder)


def build(folder, tmp_path, dataset, args=None, **arguments) -> VTLMMTrainer:
    args = args or VTLMMTrainingConfig(output_dir=str(tmp_path), **OPTIONS)
    with contextlib.redirect_stdout(io.StringIO()):
        return VTLMMTrainer(folder, args, train_dataset=dataset, **arguments)


def with_images(rows: list[dict]) -> Dataset:
    dataset = Dataset.from_list(rows)
    if "images" in dataset.column_names:
        return dataset.cast_column("images", ListFeature(Image()))
    return dataset.cast_column("image", Image())


QUESTION, ANSWER = turn("user", "what is it ?"), turn("assistant", "red boat")
MARKED = turn("user", "<image> what is it ?")
PARTS = {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "what is it ?"}]}
WORKS = {
    "text only": Dataset.from_list([{"messages": [turn("user", "hello", True), turn("assistant", "yes", True)]}] * 2),
    "string contents": Dataset.from_list([{"messages": [QUESTION, ANSWER]}] * 2),
    "prompt and completion": Dataset.from_list([{"prompt": [QUESTION], "completion": [ANSWER]}] * 2),
    "texts of prompt and completion": Dataset.from_list([{"prompt": "what is it ?", "completion": "red boat"}] * 2),
    "image column": with_images([{"messages": [MARKED, ANSWER], "image": image()}] * 2),
    "images without placeholders": with_images([{"messages": [QUESTION, ANSWER], "images": [image()]}] * 2),
    "image without placeholders": with_images([{"messages": [QUESTION, ANSWER], "image": image()}] * 2),
    "placeholder parts": with_images(
        [{"messages": [PARTS, turn("assistant", "red boat", True)], "images": [image()]}] * 2
    ),
    "prompt, completion and images": with_images(
        [{"prompt": [QUESTION], "completion": [ANSWER], "images": [image(), image("blue")]}] * 2
    ),
    "other columns": Dataset.from_list([{"messages": [QUESTION, ANSWER], "id": "a1"}] * 2),
    "stream": with_images([{"messages": [QUESTION, ANSWER], "images": [image()]}] * 2).to_iterable_dataset(),
}


WORKS_IMAGES = {
    "image column": 1,
    "images without placeholders": 1,
    "image without placeholders": 1,
    "placeholder parts": 1,
    "prompt, completion and images": 2,
    "stream": 1,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WORKS)
def test_datasets_of_sft_trainer_train(folder, tmp_path, name):
    trainer = build(folder, tmp_path, WORKS[name], eval_dataset=WORKS[name])
    row = next(iter(trainer.train_dataset))
    marks = sum(part["type"] == "image" for message in row["messages"] for part in message["content"])
    expected = WORKS_IMAGES.get(name, 0)
    assert marks == len(row["images"]) == expected
    batch = trainer.data_collator([row])
    targets = batch["labels"][batch["labels"] != -100]
    assert trainer.processing_class.tokenizer.decode(targets) in ("red boat </s>", "yes </s>")
    trainer.train()
    assert trainer.state.log_history[0]["lm_loss"] > 0
    assert trainer.evaluate(WORKS[name])["eval_lm_loss"] == trainer.evaluate()["eval_lm_loss"]


FAILS = {
    "tokenized": (Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[1, 2]]}), "is tokenized"),
    "plain text": (Dataset.from_dict({"text": ["hello there"]}), "train_dataset, row 0"),
    "list": ([{"messages": [QUESTION, ANSWER]}], "Dataset.from_list"),
    "path": ("rows.json", "load_rows"),
    "nothing": (None, "`train_dataset` is required"),
}


@pytest.mark.parametrize("name", FAILS)
def test_other_datasets_raise_one_clear_error(folder, tmp_path, name):
    dataset, message = FAILS[name]
    with pytest.raises(ValueError, match=message):
        build(folder, tmp_path, dataset)


def test_conversion_keeps_rows_of_load_rows(folder, tmp_path):
    rows = build_rows()
    assert build(folder, tmp_path, rows).train_dataset is rows


def test_several_evaluation_datasets_are_converted(folder, tmp_path):
    datasets = DatasetDict({"one": WORKS["string contents"], "two": WORKS["image column"]})
    trainer = build(folder, tmp_path, WORKS["text only"], eval_dataset=datasets)
    metrics = trainer.evaluate()
    assert metrics["eval_one_lm_loss"] > 0 and metrics["eval_two_visual_loss"] > 0


def test_shuffle_dataset_shuffles_rows(folder, tmp_path):
    rows = Dataset.from_list([{"messages": [turn("user", word), ANSWER]} for word in "a b c d e f g h".split()])
    args = VTLMMTrainingConfig(output_dir=str(tmp_path), shuffle_dataset=True, **OPTIONS)
    shuffled = build(folder, tmp_path, rows, args).train_dataset["messages"]
    plain = build(folder, tmp_path, rows).train_dataset["messages"]
    assert shuffled[:] != plain[:] and sorted(map(str, shuffled)) == sorted(map(str, plain))


# ---- Arguments ----


def test_constructor_has_the_arguments_of_sft_trainer_in_their_order():
    ours, theirs = (list(inspect.signature(cls.__init__).parameters) for cls in (VTLMMTrainer, SFTTrainer))
    assert ours[: len(theirs)] == theirs


def test_a_plain_sft_config_trains_stage_four(folder, tmp_path):
    args = SFTConfig(output_dir=str(tmp_path), bf16=False, hub_token="secret", **OPTIONS)
    trainer = build(folder, tmp_path, WORKS["image column"], args)
    trainer.train()
    assert trainer.stage.name == "joint" and trainer.args.max_length == 1024 and trainer.args.hub_token == "secret"
    assert trainer.args.assistant_only_loss and trainer.state.log_history[0]["visual_loss"] > 0


def test_plain_training_arguments_train(folder, tmp_path):
    trainer = build(folder, tmp_path, WORKS["text only"], TrainingArguments(output_dir=str(tmp_path), **OPTIONS))
    trainer.train()
    assert trainer.state.global_step == 1


def test_unsupported_settings_of_a_plain_config_raise(folder, tmp_path):
    args = SFTConfig(output_dir=str(tmp_path), bf16=False, packing_strategy="wrapped", **OPTIONS)
    with pytest.raises(ValueError, match="`packing_strategy='wrapped'` is not supported"):
        build(folder, tmp_path, WORKS["text only"], args)


def test_no_args_are_the_defaults(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = VTLMMTrainer(folder, train_dataset=WORKS["text only"])
    assert trainer.args.output_dir == "model-VTLMM" and trainer.stage.name == "joint"


@pytest.mark.parametrize("name", UNSUPPORTED_ARGUMENTS)
def test_arguments_without_effect_are_rejected(folder, tmp_path, name):
    with pytest.raises(ValueError, match=f"does not support `{name}`"):
        build(folder, tmp_path, WORKS["text only"], **{name: lambda *_: None})


def test_optimizers_of_the_user_are_used(folder, tmp_path):
    model = VTLMMForConditionalGeneration.from_pretrained(folder)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = build(model, tmp_path, WORKS["text only"], optimizers=(optimizer, None))
    trainer.train()
    assert trainer.optimizer.optimizer is optimizer
    arguments = {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.5})}
    trainer = build(folder, tmp_path, WORKS["text only"], **arguments)
    assert isinstance(trainer.create_optimizer(), torch.optim.SGD)


def test_a_model_in_memory_gets_the_processor_of_its_folder(folder, tmp_path):
    model = VTLMMForConditionalGeneration.from_pretrained(folder)
    trainer = build(model, tmp_path, WORKS["text only"])
    assert trainer.processing_class.tokenizer.get_vocab() == build_processor().tokenizer.get_vocab()
    with pytest.raises(ValueError, match="Pass the model's VTLMMProcessor"):
        build(model, tmp_path, WORKS["text only"], processing_class=build_processor().tokenizer)


def test_loading_arguments_need_a_model_to_load(folder, tmp_path):
    model = VTLMMForConditionalGeneration.from_pretrained(folder)
    with pytest.raises(ValueError, match="`quantization_config` has no effect on a loaded model"):
        build(model, tmp_path, WORKS["text only"], quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    args = VTLMMTrainingConfig(output_dir=str(tmp_path), model_init_kwargs={"dtype": "float32"}, **OPTIONS)
    with pytest.raises(ValueError, match="`model_init_kwargs` has no effect on a loaded model"):
        build(model, tmp_path, WORKS["text only"], args)


def test_full_training_in_float16_is_rejected(folder, tmp_path):
    args = VTLMMTrainingConfig(output_dir=str(tmp_path), model_init_kwargs={"dtype": "float16"}, **OPTIONS)
    with pytest.raises(ValueError, match="trainable weights are float16"):
        build(folder, tmp_path, WORKS["text only"], args)
    model = VTLMMForConditionalGeneration.from_pretrained(folder, dtype=torch.float16)
    model.model.vm_head.float()  # the only trainable module of stage III
    args = VTLMMTrainingConfig(output_dir=str(tmp_path), stage="visual_head", **{**OPTIONS, "learning_rate": 1e-3})
    assert build(model, tmp_path, WORKS["image column"], args).stage.trains == ("vm_head",)


def test_fifteen_lines_as_with_sft_trainer(folder, tmp_path):
    """A model, a dataset with `messages` and `images`, and a LoRA adapter."""
    model = VTLMMForConditionalGeneration.from_pretrained(folder)
    before = weights(model)
    trainer = build(
        model,
        tmp_path,
        WORKS["images without placeholders"],
        VTLMMTrainingConfig(output_dir=str(tmp_path), **{**OPTIONS, "max_steps": 3}),
        processing_class=build_processor(),
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
    )
    trainer.train()
    trainable = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert trainable and all("language_model" in name and "lora_" in name for name in trainable)
    base = {name.replace(".base_layer", ""): p for name, p in trainer.model.get_base_model().state_dict().items()}
    assert all(torch.equal(base[name], tensor) for name, tensor in before.items())
