# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The processor: images per text, batches, chats, the pipeline, saving, and numbers of image tokens by hand."""

import pytest
import torch
from helpers.tiny_models import TEMPLATE, build_processor
from PIL import Image
from transformers import CLIPImageProcessorPil, pipeline

from modeling_vtlmm import VTLMMProcessor


RED, GREEN, BLUE = (Image.new("RGB", (40, 30), color) for color in ("red", "green", "blue"))
SETTINGS = {"max_new_tokens": 4, "do_sample": False}


def chat(text: str, *images: Image.Image) -> list:
    content = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


CHATS = [
    chat("what is it ?", RED),
    chat("describe the image", GREEN, BLUE),
    chat("hello"),
    chat("yes no yes no"),
]


def left_padding_processor() -> VTLMMProcessor:
    processor = build_processor()
    processor.tokenizer.padding_side = "left"
    return processor


@pytest.fixture
def model(build_model):
    model = build_model()
    model.generation_config.update(eos_token_id=None, pad_token_id=3)
    return model


def image_counts(processor, inputs) -> list[int]:
    return ((inputs["input_ids"] == processor.image_token_id).sum(1) // 4).tolist()


@pytest.mark.parametrize(
    "text, images, counts",
    [
        (["<image>\nwhat", "<image> and <image> is"], [[RED], [GREEN, BLUE]], [1, 2]),
        (["<image> and <image> is", "hello", "<image>"], [[GREEN, BLUE], [], [RED]], [2, 0, 1]),
        (["<image> and <image> is", "<image>"], [GREEN, BLUE, RED], [2, 1]),
        ("<image> what", RED, [1]),
        ("hello", None, [0]),
        (["hello", "yes"], [], [0, 0]),
        (["hello", "yes"], [[], []], [0, 0]),
    ],
)
def test_each_placeholder_becomes_image_tokens(processor, text, images, counts):
    inputs = processor(text=text, images=images, padding=True, return_tensors="pt")
    assert image_counts(processor, inputs) == counts
    assert ("pixel_values" in inputs) == (sum(counts) > 0)
    if sum(counts):
        assert inputs["pixel_values"].shape == (sum(counts), 3, 28, 28)


def test_no_second_bos_token_is_added(processor):
    """Some chat templates write BOS, and lm-eval passes their output to the processor."""
    text = ["<image> what is it", "hello"]
    expected = processor(text=text, images=[[RED], []], padding=True)["input_ids"]
    bos = processor.tokenizer.bos_token
    assert processor(text=[bos + one for one in text], images=[[RED], []], padding=True)["input_ids"] == expected
    assert processor(text=bos + text[1])["input_ids"] == processor(text=text[1])["input_ids"]
    settings = {"padding": True}
    assert processor(text=bos + text[1], text_kwargs=settings)["input_ids"] == processor(text=text[1])["input_ids"]
    assert settings == {"padding": True}  # unchanged


@pytest.mark.parametrize(
    ("text", "images", "message"),
    [
        (
            ["<image> what", "<image> is"],
            [[RED, GREEN], []],
            r"Text 0 \('<image> what'\) has 1 <image> .* but 2 images",
        ),
        (["hello", "<image> is"], [[RED], []], r"Text 0 \('hello'\) has 0 <image> .* but 1 images"),
        (["<image>", "<image> is"], [RED], r"Text 1 \('<image> is'\) has 1 <image> .* but 0 images"),
        (["<image>", "hello"], [RED, GREEN], r"Text 1 \('hello'\) has 0 <image> .* but 1 images"),
        ("<image> what", None, r"Text 0 .* has 1 <image> .* but 0 images"),
        (["<image>", "<image>"], [[RED], [GREEN], [BLUE]], "3 lists of images for 2 texts"),
    ],
)
def test_wrong_number_of_images_names_the_text(processor, text, images, message):
    with pytest.raises(ValueError, match=message):
        processor(text=text, images=images)


@pytest.mark.parametrize("name", ["videos", "audio"])
def test_videos_and_audio_are_rejected(processor, name):
    with pytest.raises(ValueError, match=f"does not support `{name}`"):
        processor(text="hello", **{name: [torch.zeros(2, 3, 28, 28)]})


def test_images_keep_the_order_of_the_placeholders(processor):
    images = [[RED], [], [GREEN, BLUE]]
    text = ["<image>", "hello", "<image> <image>"]
    found = processor(text=text, images=images, padding=True, return_tensors="pt")["pixel_values"]
    alone = [
        processor(text="<image>", images=image, return_tensors="pt")["pixel_values"] for image in (RED, GREEN, BLUE)
    ]
    assert torch.equal(found, torch.cat(alone))


def test_truncation_inside_an_image_is_rejected(processor):
    with pytest.raises(ValueError, match="[Tt]runcat"):
        processor(text="<image> what", images=RED, truncation=True, max_length=3)


def test_tokenizer_that_splits_the_image_token_is_rejected(processor):
    with pytest.raises(ValueError, match="splits the image token '<figure>'"):
        VTLMMProcessor(processor.image_processor, processor.tokenizer, patch_size=14, image_token="<figure>")


@pytest.mark.parametrize(
    "strategy, additional, expected",
    [("default", 1, 4), ("full", 1, 5), ("full", 0, 4)],
    ids=["CLIP", "CLIP with CLS", "SigLIP"],
)
def test_image_tokens_by_hand(processor, strategy, additional, expected):
    """28 pixels and patches of 14 pixels give 2 × 2 tokens, plus the CLS position if it is kept."""
    processor = VTLMMProcessor(
        processor.image_processor,
        processor.tokenizer,
        patch_size=14,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=additional,
    )
    assert processor(RED, "<image>")["input_ids"][0].count(processor.image_token_id) == expected
    planned = processor._get_num_multimodal_tokens(image_sizes=[(30, 40), (400, 30)])
    assert planned["num_image_tokens"] == [expected, expected] and planned["num_image_patches"] == [1, 1]


def test_batched_chats_equal_single_chats(model):
    """The chats have one, two and no images, and the padding is on the left."""
    processor = left_padding_processor()
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    inputs = processor.apply_chat_template(CHATS, padding=True, **options)
    assert image_counts(processor, inputs) == [1, 2, 0, 0]
    lengths = inputs["attention_mask"].sum(1)
    assert len(set(lengths.tolist())) > 2 and (inputs["attention_mask"][:, -1] == 1).all()
    answers = model.generate(**inputs, **SETTINGS)[:, -4:]
    for i, one in enumerate(CHATS):
        alone = processor.apply_chat_template(one, **options)
        assert torch.equal(alone["input_ids"][0], inputs["input_ids"][i, -lengths[i] :])
        assert torch.equal(model.generate(**alone, **SETTINGS)[0, -4:], answers[i])


def test_pipeline_batches_equal_single_calls(model):
    ask = pipeline("image-text-to-text", model=model, processor=left_padding_processor())

    def answer(output):
        return (output[0] if isinstance(output, list) else output)["generated_text"][-1]["content"]

    alone = [answer(ask(text=one, **SETTINGS)) for one in CHATS]
    assert all(alone) and len(set(alone)) == len(alone)
    assert [answer(output) for output in ask(text=CHATS, batch_size=2, **SETTINGS)] == alone
    plain = ask(text="USER : <image>\nwhat is it ? ASSISTANT :", images=RED, return_full_text=False, **SETTINGS)
    assert plain[0]["generated_text"].split() == alone[0].split()


def test_save_and_load_round_trip(tmp_path):
    image_processor = CLIPImageProcessorPil(size={"height": 28, "width": 28}, do_center_crop=False)
    tokenizer = build_processor().tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<image>"]})
    values = {
        "patch_size": 7,
        "num_additional_image_tokens": 2,
        "vision_feature_select_strategy": "full",
        "image_token": "<image>",
    }
    processor = VTLMMProcessor(image_processor, tokenizer, chat_template=TEMPLATE, **values)
    processor.save_pretrained(tmp_path)
    loaded = VTLMMProcessor.from_pretrained(tmp_path)
    assert {name: getattr(loaded, name) for name in values} == values
    assert loaded.chat_template == TEMPLATE and loaded.image_token_id == tokenizer.convert_tokens_to_ids("<image>")
    assert loaded.to_dict() == processor.to_dict()
    assert loaded(RED, "<image>")["input_ids"] == processor(RED, "<image>")["input_ids"]


def test_visual_words_returns_one_string_per_id(processor):
    ids = torch.tensor([[[4, 5], [6, 7]]])
    words = processor.tokenizer.convert_ids_to_tokens(range(4, 8))
    assert processor.visual_words(ids) == [[words[:2], words[2:]]]
