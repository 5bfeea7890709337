# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Control tokens in texts, decoders whose BOS token starts each turn, unknown tokens, and grouped reports."""

import subprocess
import sys

import pytest
import torch
from helpers.tiny_models import build_processor
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from vtlmm.data.encoding import control_tokens, encode_messages, require_end_of_turn
from vtlmm.data.rows import load_rows
from vtlmm.data.validation import check_rows


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'][0]['text'] + '<|im_end|>' }}"
    "{% endgeneration %}{{ '\n' }}{% else %}{% for part in message['content'] %}"
    "{{ '<image>\n' if part['type'] == 'image' else part['text'] }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def smollm2():
    """A processor with the tokens of SmolLM2-Instruct: bytes, no unknown token, and BOS at the start of each turn."""
    vocabulary = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor, backend.decoder = processors.ByteLevel(trim_offsets=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    processor = build_processor()
    processor.tokenizer, processor.image_token_id = tokenizer, tokenizer.convert_tokens_to_ids("<image>")
    processor.chat_template = CHATML
    return processor


def rows(*pairs):
    return load_rows([{"question": question, "answer": answer} for question, answer in pairs])


def test_bos_token_that_starts_each_turn(smollm2):
    require_end_of_turn(smollm2)
    messages = [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    ]
    input_ids, supervised = encode_messages(smollm2, messages)
    tokenizer = smollm2.tokenizer
    assert (input_ids == tokenizer.bos_token_id).sum() == 4 and input_ids[1] != tokenizer.bos_token_id
    assert tokenizer.decode(input_ids[supervised]) == "b<|im_end|>d<|im_end|>"
    generated = smollm2.apply_chat_template(
        [messages[:1]], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    prompt = torch.as_tensor(generated["input_ids"])[0]
    assert torch.equal(prompt, input_ids[: len(prompt)])
    report = check_rows(rows(("a?", "b"), ("c?", "d")), smollm2)
    assert not report.problems and report.num_unknown_answers == 0


def test_turn_tokens_in_a_text_are_control_tokens(smollm2):
    report = check_rows(rows(("hi<|im_end|>\n<|im_start|>assistant", "ok"), ("hi", "ok<|im_end|> more")), smollm2)
    assert [(problem.row, problem.kind) for problem in report.problems] == [
        (0, "control token"),
        (0, "control token"),
        (1, "control token"),
    ]


@pytest.mark.parametrize("special", [True, False])
def test_added_tokens_outside_the_special_tokens_map(special):
    processor = build_processor()
    tokens = [AddedToken(text, special=special, normalized=False) for text in ("<|eot_id|>", "[TURN]")]
    processor.tokenizer.add_tokens([*tokens, AddedToken("domain_word"), AddedToken("    ")])
    processor.chat_template = processor.chat_template.replace("'USER : '", "'USER : [TURN]'")
    expected = {"<|eot_id|>", "[TURN]", "<image>", "</s>", "<s>", "<pad>", "<unk>"}
    assert set(control_tokens(processor)) == expected
    report = check_rows(
        rows(("what <|eot_id|> ?", "yes"), ("[TURN] what", "yes"), ("domain_word ?", "yes")), processor
    )
    assert [problem.row for problem in report.problems] == [0, 1]


def test_a_second_bos_token_is_rejected(processor):
    own = build_processor()
    own.chat_template = "{{ bos_token + bos_token }}" + own.chat_template
    [problem] = check_rows(rows(("what ?", "yes")), own).problems
    assert "the chat template writes the BOS token '<s>' twice" in str(problem)


def test_answers_that_the_tokenizer_cannot_write(processor):
    report = check_rows(rows(("what ?", "xylophone"), ("what ?", "red"), ("xylophone ?", "blue")), processor)
    assert (report.num_answers, report.num_unknown_answers, report.unknown_answer) == (3, 1, "xylophone")
    assert "1 of 3 answers have tokens that the tokenizer does not know, such as 'xylophone'" in report.format()
    assert not report.problems


def test_positions_of_the_decoder_limit_the_length(processor):
    data = rows(("what ?", "yes " * 40), ("what ?", "yes"))
    for max_length, max_positions, limit in ((None, 30, 30), (100, 30, 30), (20, 30, 20)):
        report = check_rows(data, processor, max_length=max_length, max_positions=max_positions)
        assert report.max_length == limit and [problem.row for problem in report.problems] == [0]


def test_problems_of_a_kind_are_one_group(processor):
    report = check_rows(rows(*[("what ?", "yes " * n) for n in range(30, 60)]), processor, max_length=20)
    text = report.format()
    lengths = report.lengths
    assert f"30 rows need {min(lengths)} to {max(lengths)} tokens. Set max_length=128" in text
    assert text.count("max_length is 20") == 3 and "… and 27 more" in text
    with pytest.raises(ValueError, match="30 rows need"):
        report.raise_for_problems()


def test_a_wrong_image_folder_is_one_line(processor, tmp_path):
    data = load_rows([{"image": f"{i}.png", "caption": "a boat"} for i in range(9)], image_folder=tmp_path)
    text = check_rows(data, processor).format(limit=0)
    assert f"9 rows: no image exists ({tmp_path}). Set image_folder" in text


def test_questions_without_answers_are_checked(processor):
    data = load_rows([{"question": "what ?"}, {"question": "what </s> ?"}], require_answers=False)
    report = check_rows(data, processor, require_answers=False)
    assert [(problem.row, problem.kind) for problem in report.problems] == [(1, "control token")]
    assert {problem.kind for problem in check_rows(data, processor).problems} == {"roles", "control token"}


@pytest.mark.slow
def test_data_checks_import_neither_trl_nor_bitsandbytes():
    code = (
        "import sys, vtlmm.data.rows, vtlmm.data.validation, vtlmm.data.vision_feature_cache; "
        "sys.exit(str({'trl', 'bitsandbytes', 'peft'} & set(sys.modules)) if "
        "{'trl', 'bitsandbytes', 'peft'} & set(sys.modules) else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
