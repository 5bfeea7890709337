# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Generation: batches, beam search, caches, and options that look up the ids of the prompt."""

import pytest
import torch
from helpers.tiny_models import random_rows
from transformers import StaticCache


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}])
def test_batched_generation_equals_single_rows(build_model, options):
    """Rows have different numbers of images and left padding. Beam search repeats the images of a row as a group."""
    model = build_model()
    counts = [1, 2, 0]
    right_ids, right_mask, pixel_values = random_rows(model, counts)
    texts = [ids[mask.bool()] for ids, mask in zip(right_ids, right_mask, strict=True)]
    length = right_ids.shape[1]
    input_ids = torch.stack([torch.nn.functional.pad(text, (length - len(text), 0), value=3) for text in texts])
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 3, **options}
    found = model.generate(
        input_ids=input_ids, attention_mask=right_mask.flip(1), pixel_values=pixel_values, **settings
    )
    for i, images in enumerate(pixel_values.split(counts)):
        images = {"pixel_values": images} if len(images) else {}
        alone = model.generate(
            input_ids=texts[i][None], attention_mask=torch.ones_like(texts[i][None]), **images, **settings
        )
        assert torch.equal(found[i, -5:], alone[0, -5:])


def test_beam_search_from_embeddings_equals_ids(build_model):
    """Without input ids, `generate` finds the image tokens of a row by their embedding."""
    model = build_model()
    right_ids, right_mask, pixel_values = random_rows(model, [1, 2])
    settings = {"attention_mask": right_mask.flip(1), "pixel_values": pixel_values, "num_beams": 3, "do_sample": False}
    settings |= {"max_new_tokens": 5, "eos_token_id": None, "pad_token_id": 3}
    ids = [row[mask.bool()] for row, mask in zip(right_ids, right_mask, strict=True)]
    input_ids = torch.stack([torch.nn.functional.pad(row, (right_ids.shape[1] - len(row), 0), value=3) for row in ids])
    from_ids = model.generate(input_ids=input_ids, **settings)
    from_embeddings = model.generate(inputs_embeds=model.get_input_embeddings()(input_ids), **settings)
    assert torch.equal(from_embeddings, from_ids[:, -5:])


def test_cache_and_logits_to_keep(build_model):
    model = build_model()
    input_ids, _, pixel_values = random_rows(model, [2])
    full = model(input_ids, pixel_values).logits
    cache = StaticCache(config=model.config.text_config, max_cache_len=32)
    first = model(input_ids[:, :-1], pixel_values, past_key_values=cache, use_cache=True, logits_to_keep=1)
    assert first.logits.shape[1] == 1
    torch.testing.assert_close(first.logits[:, 0], full[:, -2])
    position = torch.tensor([[input_ids.shape[1] - 1]])
    last = model(input_ids[:, -1:], past_key_values=cache, position_ids=position, use_cache=True).logits
    torch.testing.assert_close(last[:, 0], full[:, -1])


OPTIONS = [
    {"prompt_lookup_num_tokens": 3},
    {"prompt_lookup_num_tokens": 3, "no_repeat_ngram_size": 2},
    {"encoder_repetition_penalty": 1.5},
    {"encoder_no_repeat_ngram_size": 2},
    {"repetition_penalty": 1.5},
    {"num_beams": 2, "encoder_repetition_penalty": 1.5, "encoder_no_repeat_ngram_size": 2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options))
def test_prompt_options_work_without_an_image_embedding(build_model, options):
    """With an embedding and a suppressed logit, the image token gives the same answers as without both."""
    outside = build_model(image_token_id=64)
    inside = build_model(image_token_id=63)
    inside.load_state_dict(outside.state_dict())
    input_ids, _, pixel_values = random_rows(outside, [2])
    prompt = torch.cat([input_ids, input_ids[:, :2]], dim=1)  # repeats two tokens, so that prompt lookup finds a match
    settings = {"pixel_values": pixel_values, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    settings |= {"pad_token_id": 3, "suppress_tokens": [63], **options}
    found = outside.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **settings)
    prompt = prompt.masked_fill(prompt == 64, 63)
    expected = inside.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **settings)
    assert torch.equal(found[:, -6:], expected[:, -6:])


def test_prompt_lookup_proposes_no_image_token(build_model):
    """The prompt ends with the two tokens before an image, so the image tokens are the first candidates."""
    model = build_model(image_token_id=64)
    input_ids, _, pixel_values = random_rows(model, [1])
    prompt = torch.cat([input_ids, input_ids[:, 1:3]], dim=1)
    settings = {"attention_mask": torch.ones_like(prompt), "pixel_values": pixel_values, "max_new_tokens": 6}
    settings |= {"do_sample": False, "eos_token_id": None, "pad_token_id": 3}
    expected = model.generate(input_ids=prompt, **settings)
    assert torch.equal(model.generate(input_ids=prompt, prompt_lookup_num_tokens=4, **settings), expected)
