# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Data, processors and random models of the benchmarks `step.py` and `gpu.py`."""

import argparse
import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch


def sizes(hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, **others):
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    values = hidden_size, intermediate_size, num_hidden_layers, num_attention_heads
    return {**dict(zip(names, values, strict=True)), **others}


# Vision tower, decoder, rows per padded batch, and (number of packs, tokens per pack) of a packed batch. `small` is a
# model for a test run on a laptop with the image tokens of CLIP-L/336. `7b` has the size of Vicuna.
SHAPES = {
    "tiny": {
        "vision": sizes(32, 64, 2, 4, image_size=56),
        "text": sizes(64, 128, 2, 4),
        "vocab_size": 4096,
        "batch_size": 4,
        "packs": (1, 1024),
    },
    "small": {
        "vision": sizes(192, 768, 6, 6, image_size=336),
        "text": sizes(384, 1024, 12, 6),
        "vocab_size": 32000,
        "batch_size": 4,
        "packs": (1, 2048),
    },
    "7b": {
        "vision": sizes(1024, 4096, 24, 16, image_size=336),
        "text": sizes(4096, 11008, 32, 32),
        "vocab_size": 32000,
        "batch_size": 8,
        "packs": (2, 2048),
    },
}
PATCH_SIZE = 14


@dataclass
class Task:
    """Settings of one process: the implementation, its data and its trainer."""

    name: str
    arguments: argparse.Namespace
    data: str
    num_rows: int
    stage: str = "joint"
    settings: dict = field(default_factory=dict)
    adapter: dict = field(default_factory=dict)  # settings of `AdapterConfig`


def load_data(task):
    """
    Return rows with `messages` and `images`.

    `llava` has LLaVA's captions and the same number of text-only rows, which list one to twelve captions. `easy_vqa`
    has one image and ten questions per row.
    """
    from vtlmm.data.rows import load_rows

    folder = Path(task.arguments.data_folder)
    if task.data == "easy_vqa":
        path = folder / "easy_vqa" / "train.parquet"
        return load_rows(path, max_rows=task.num_rows)
    records = json.loads((folder / "llava_pretrain_2k" / "chat.json").read_text(encoding="utf-8"))
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(records), generator=generator).tolist()
    captions = [records[i]["conversations"][1]["value"] for i in order]
    rows = []
    for i in order[: task.num_rows]:
        if len(rows) % 2:
            number = int(torch.randint(1, 13, (1,), generator=generator))
            start = int(torch.randint(len(captions) - number, (1,), generator=generator))
            answer = "\n".join(captions[start : start + number])
            question = f"Write {number} captions of photographs."
            rows.append({"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]})
        else:
            rows.append(records[i])
    path = Path(tempfile.mkdtemp()) / "rows.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return load_rows(path, image_folder=folder / "llava_pretrain_2k" / "images")


def build_tokenizer(dataset):
    """Return a byte-pair encoding of 2000 tokens trained on the rows. Captions are about as long as in Llama's."""
    from tokenizers import ByteLevelBPETokenizer, processors
    from transformers import PreTrainedTokenizerFast

    texts = [part["text"] for row in dataset["messages"] for m in row for part in m["content"] if part["text"]]
    special = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=2000, special_tokens=special, show_progress=False)
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer,
        **dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), special, strict=False)),
        additional_special_tokens=["<image>"],
    )


def build_processor(kind, dataset, shape):
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    from modeling_vtlmm import VTLMMProcessor
    from vtlmm.hub.chat_templates import load_template

    side = {"height": shape["vision"]["image_size"], "width": shape["vision"]["image_size"]}
    return {"llava": LlavaProcessor, "vtlmm": VTLMMProcessor}[kind](
        CLIPImageProcessorPil(size=side, crop_size=side, do_center_crop=False),
        build_tokenizer(dataset),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=load_template("vicuna_v1"),
    )


def build_model(kind, processor, shape, arguments, quantization="none"):
    from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration

    from modeling_vtlmm import VTLMMConfig, VTLMMForConditionalGeneration
    from vtlmm.hub.quantize import quantization_config
    from vtlmm.train.adapters import keep_differentiable_on_cpu

    config_class, model_class = {
        "llava": (LlavaConfig, LlavaForConditionalGeneration),
        "vtlmm": (VTLMMConfig, VTLMMForConditionalGeneration),
    }[kind]
    config = config_class(
        vision_config=AutoConfig.for_model("clip_vision_model", **shape["vision"], patch_size=PATCH_SIZE),
        text_config=AutoConfig.for_model("llama", **shape["text"], vocab_size=shape["vocab_size"]),
        image_token_id=processor.tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(shape["vision"]["image_size"] // PATCH_SIZE) ** 2,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, arguments.dtype))
    with torch.device(arguments.device):
        model = model_class(config)
    torch.set_default_dtype(torch.float32)
    if quantization == "none":
        return model
    dtype = getattr(torch, arguments.dtype)
    model = model_class.from_pretrained(
        None,
        config=config,
        state_dict=model.state_dict(),
        dtype=dtype,
        quantization_config=quantization_config(quantization, dtype),
        device_map={"": 0 if arguments.device == "cuda" else "cpu"},
    )
    keep_differentiable_on_cpu(model)
    return model
