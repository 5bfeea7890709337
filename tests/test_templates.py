# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Chat templates: the release's to the character, the decoder's own with images, and what the marks cover."""

import json

import pytest
from helpers.byte_tokenizers import CHATML, byte_tokenizer
from jinja2 import TemplateError
from PIL import Image
from transformers import CLIPImageProcessorPil

from modeling_vtlmm import VTLMMProcessor
from vtlmm.hub.chat_templates import TEMPLATE_NAMES, _read, add_images_and_marks, end_of_turn, load_template


QUESTION = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is in the image?"}]}
ANSWER = {"role": "assistant", "content": [{"type": "text", "text": "A boat."}]}
TWO_TURNS = [
    QUESTION,
    ANSWER,
    {"role": "user", "content": "What colour is it?"},
    {"role": "assistant", "content": "White."},
]
LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + "
    "eos_token }}\n{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + "
    "eos_token }}\n{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n"
    "{% endfor %}\n"
)
THINKING = (
    "{%- for message in messages %}\n    {%- set content = message.content %}\n"
    "    {%- if '</think>' in content %}\n        {%- set content = content.split('</think>')[-1].lstrip('\n') %}\n"
    "    {%- endif %}\n    {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}\n{%- endfor %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer(SPECIAL)


def as_processor(template: str, *args, **kwargs) -> VTLMMProcessor:
    """28 × 28 pixel images, 4 patches each."""
    tokenizer = byte_tokenizer([*SPECIAL, "<image>"], *args, **kwargs)
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return VTLMMProcessor(
        image_processor, tokenizer, patch_size=14, num_additional_image_tokens=1, chat_template=template
    )


def with_image(message: dict) -> dict:
    image = {"type": "image", "image": Image.new("RGB", (50, 40))}
    return {**message, "content": [image, *message["content"][1:]]}


def text_of(template: str, messages: list[dict], tokenizer, **kwargs) -> str:
    return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **kwargs)


@pytest.mark.parametrize("name", TEMPLATE_NAMES)
def test_equal_to_the_release_to_the_character(shared, tokenizer, name):
    prompts = json.loads((shared / "reference" / "prompts.json").read_text())[name]
    messages = {"1 turn(s), last answer open": 1, "2 turn(s), last answer open": 3, "2 turn(s), last answer given": 4}
    assert prompts.keys() == messages.keys()
    for case, text in prompts.items():
        given = TWO_TURNS[: messages[case]]
        open_answer = case.endswith("open")
        assert text_of(load_template(name), given, tokenizer, add_generation_prompt=open_answer) == text
        # as Arrow fills rows: every part with every key
        filled = [dict(message) for message in given]
        filled[0]["content"] = [{"text": None, "image": None, **part} for part in QUESTION["content"]]
        assert text_of(load_template(name), filled, tokenizer, add_generation_prompt=open_answer) == text


@pytest.mark.parametrize("name", TEMPLATE_NAMES)
def test_image_block_is_one_text(name):
    """The file of each template is whole, and begins with the block that other templates get."""
    assert load_template(name).startswith(_read("image_block"))


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        (["<image>", "<image>", "Which?"], "<image>\n<image>\nWhich?"),
        (["Which?", "<image>"], "Which?\n<image>"),
        (["A", "<image>", "B\n", "<image>", "\nC"], "A\n<image>\nB\n<image>\nC"),
        (["<image>", ""], "<image>"),
        (["A", "B"], "AB"),
        ([], ""),
    ],
)
def test_images_stand_on_a_line_of_their_own(tokenizer, parts, text):
    content = [{"type": "image"} if part == "<image>" else {"type": "text", "text": part} for part in parts]
    messages = [{"role": "user", "content": content}]
    assert text_of(load_template("mistral"), messages, tokenizer) == f"[INST] {text} [/INST]"
    assert text_of(load_template("vicuna_v1"), messages, tokenizer).endswith(f"USER: {text}")
    foreign = text_of(add_images_and_marks(CHATML, tokenizer), messages, tokenizer)
    assert foreign == f"<|im_start|>user\n{text}<|im_end|>\n"


def test_system_message(tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert text_of(load_template("vicuna_v1"), messages, tokenizer) == "Be brief. USER: Hi"
    assert text_of(load_template("mistral"), messages, tokenizer) == "[INST] Be brief.\n\nHi [/INST]"


@pytest.mark.parametrize("name", TEMPLATE_NAMES)
@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([ANSWER], "message 1 of them is from assistant"),
        ([QUESTION, QUESTION], "message 2 of them is from user"),
        ([QUESTION, {"role": "tool", "content": "4"}], "message 2 of them is from tool"),
        ([QUESTION, ANSWER, {"role": "system", "content": "x"}], "message 3 of them is from system"),
        ([{"role": "user", "content": [{"type": "video"}]}], "not video"),
    ],
)
def test_wrong_roles_and_parts_raise(tokenizer, name, messages, said):
    with pytest.raises(TemplateError, match=said):
        text_of(load_template(name), messages, tokenizer)


@pytest.mark.parametrize("num_messages", [2, 4])
@pytest.mark.parametrize(
    ("template", "answers"),
    [
        ("vicuna_v1", [" A boat.</s>", " White.</s>"]),  # an open prompt ends in the colon: the space is predicted
        ("mistral", ["A boat.</s>", "White.</s>"]),
        (CHATML, ["A boat.<|im_end|>", "White.<|im_end|>"]),
        (LLAMA_3, ["A boat.<|eot_id|>", "White.<|eot_id|>"]),
        (ZEPHYR, ["A boat.</s>", "White.</s>"]),
    ],
    ids=["vicuna_v1", "mistral", "chatml", "llama_3", "zephyr"],
)
def test_marks_cover_the_answers_and_their_ends(tokenizer, template, answers, num_messages):
    own = template in TEMPLATE_NAMES
    processor = as_processor(load_template(template) if own else add_images_and_marks(template, tokenizer))
    messages = [with_image(QUESTION), *TWO_TURNS[1:num_messages]]
    batch = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
    )
    input_ids, mask = batch["input_ids"][0], batch["assistant_masks"][0].bool()
    assert (input_ids == processor.image_token_id).sum() == 4
    starts = (mask & ~mask.roll(1)).nonzero().flatten().tolist()
    ends = (mask & ~mask.roll(-1)).nonzero().flatten().tolist()
    found = [processor.tokenizer.decode(input_ids[a : b + 1]) for a, b in zip(starts, ends, strict=True)]
    assert found == answers[: num_messages // 2]


@pytest.mark.parametrize(
    ("template", "bos"),
    [("vicuna_v1", "<s>"), ("vicuna_v1", None), ("mistral", "<s>"), (LLAMA_3, "<s>"), (CHATML, "<s>"), (CHATML, None)],
)
def test_one_bos_when_the_tokenizer_has_one(tokenizer, template, bos):
    own = template in TEMPLATE_NAMES
    processor = as_processor(load_template(template) if own else add_images_and_marks(template, tokenizer), bos=bos)
    batch = processor.apply_chat_template(
        [with_image(QUESTION)], tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
    )
    ids = batch["input_ids"][0].tolist()
    assert ids.count(processor.tokenizer.bos_token_id) == (1 if bos else 0)
    assert not bos or ids[0] == processor.tokenizer.bos_token_id


@pytest.mark.parametrize("template", [CHATML, LLAMA_3, ZEPHYR], ids=["chatml", "llama_3", "zephyr"])
def test_without_images_a_foreign_template_prints_as_before(tokenizer, template):
    adapted = add_images_and_marks(template, tokenizer)
    talk = [{"role": "user", "content": " spaces \n"}, {"role": "assistant", "content": "\n around \n\n"}]
    for messages in (talk[:1], talk, [*talk, talk[0]], [*talk, *talk]):
        for prompt in (False, True):
            expected = text_of(template, messages, tokenizer, add_generation_prompt=prompt)
            assert text_of(adapted, messages, tokenizer, add_generation_prompt=prompt) == expected
    going_on = text_of(adapted, talk, tokenizer, continue_final_message=True)
    assert going_on.rstrip() == text_of(template, talk, tokenizer, continue_final_message=True).rstrip()


def test_a_template_that_has_marks_gets_the_image_block_only(tokenizer):
    marked = CHATML.replace("{{'<|im_start|>'", "{% generation %}{% endgeneration %}{{'<|im_start|>'")
    assert add_images_and_marks(marked, tokenizer) == _read("image_block") + marked


def test_the_end_of_a_turn_is_what_follows_the_answer(tokenizer):
    """Not what the conversation begins with, where a template prints messages in parts only."""
    parts = "{% for part in message['content'] if part.type == 'text' %}{{ part.text }}{% endfor %}"
    loop = "{% for message in messages %}{{ message.role }}: " + parts + " END{% endfor %}"
    assert end_of_turn("{{ bos_token }}" + loop.replace(" END", "{{ ' ' }}"), tokenizer) is None
    assert end_of_turn("{{ bos_token }}" + loop.replace(" END", "{{ eos_token }}"), tokenizer) == tokenizer.eos_token
    assert end_of_turn("{{ bos_token }}", tokenizer) is None


def test_answers_that_cannot_be_marked_are_said(tokenizer):
    plain = "{% for message in messages %}{{ message.role + ': ' + message.content + '\n' }}{% endfor %}"
    with pytest.warns(UserWarning, match="no special token follows an answer"):
        adapted = add_images_and_marks(plain, tokenizer)
    expected = "user: <image>\nWhat is in the image?\nassistant: A boat.\n"
    assert text_of(adapted, TWO_TURNS[:2], tokenizer) == expected

    later = "(message['content'] if loop.index < 3 else message['content'] | upper)"
    upper = CHATML.replace("message['content']", later)
    with pytest.warns(UserWarning, match="the marks do not enclose the answers"):
        add_images_and_marks(upper, tokenizer)

    adapted = add_images_and_marks(THINKING, tokenizer)
    thought = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nYes."}
    with pytest.raises(TemplateError, match="reasoning_content"):
        text_of(adapted, [QUESTION, thought], tokenizer)
