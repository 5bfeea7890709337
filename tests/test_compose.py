# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Composed models: tower and decoder are unchanged, and the saved folder is complete."""

import textwrap

import pytest
import torch
from helpers.byte_tokenizers import byte_tokenizer
from helpers.composition import DECODERS, SIZE, TOWERS, asked, decoder_folder, tower_folder  # noqa: F401 - fixtures
from helpers.processes import in_clean_process
from helpers.tiny_models import scale_weights
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from modeling_vtlmm import VTLMMForConditionalGeneration, VTLMMProcessor
from vtlmm.hub.chat_templates import load_template
from vtlmm.hub.checkpoint_files import check_tensors, list_tensors, model_without_weights
from vtlmm.hub.compose import compose_model
from vtlmm.hub.special_tokens import Vocabulary, add_special_tokens, fit_embeddings
from vtlmm.hub.vision_tower import load_image_processor, load_vision_tower


@pytest.mark.parametrize("name", DECODERS)
def test_decoder_is_unchanged(tower_folder, decoder_folder, name):
    folder = decoder_folder(name)
    decoder = AutoModelForCausalLM.from_pretrained(folder)
    model, processor = compose_model(tower_folder("clip"), folder)
    rows = decoder.config.vocab_size
    input_ids = torch.randint(3, rows - 5, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(input_ids).logits
        torch.testing.assert_close(logits[..., :rows], decoder(input_ids).logits, atol=1e-5, rtol=1e-5)
    tied = DECODERS[name][0].get("tie_word_embeddings", False)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied

    spare_rows, num_words = DECODERS[name][1], rows - DECODERS[name][1]
    num_new = 1 if name == "qwen3" else 0  # it needs a padding token
    assert logits.shape[-1] == model.config.text_config.vocab_size == rows + num_new
    assert model.config.visual_vocab_size == model.model.vm_head.out_features == num_words
    assert model.config.image_token_id == processor.image_token_id == num_words + num_new
    assert spare_rows == 0 or torch.equal(model.lm_head.weight, decoder.lm_head.weight)
    if num_new:
        mean = model.lm_head.weight[:rows].mean(0)
        torch.testing.assert_close(model.lm_head.weight[rows:], mean.expand(num_new, -1))


@pytest.mark.slow
@pytest.mark.parametrize("name", TOWERS)
def test_composed_tensors_pass_the_check_of_verify(tower_folder, decoder_folder, tmp_path, name):
    """Also after a model was loaded and saved again. transformers names some tensors otherwise than the modules."""
    model, processor = compose_model(tower_folder(name), decoder_folder("llama"), tmp_path / "composed")
    model.save_pretrained(tmp_path / "saved")
    loaded = VTLMMForConditionalGeneration.from_pretrained(tmp_path / "composed")
    loaded.save_pretrained(tmp_path / "again")
    for folder in ("composed", "saved", "again"):
        check_tensors(list_tensors(tmp_path / folder), model_without_weights(loaded.config), tmp_path / folder)
    damaged = dict(list(list_tensors(tmp_path / "again").items())[30:])
    with pytest.raises(ValueError, match="missing from .* and 10 more"):
        check_tensors(damaged, model_without_weights(loaded.config), tmp_path / "again")


@pytest.mark.parametrize("name", DECODERS)
def test_special_tokens(tower_folder, decoder_folder, name):
    model, processor = compose_model(tower_folder("clip"), decoder_folder(name))
    tokenizer, generation = processor.tokenizer, model.generation_config
    pad = {"llama": "<unk>", "mistral": "<pad>", "qwen2": "<|endoftext|>", "qwen3": "<pad>"}[name]
    assert tokenizer.pad_token == pad and tokenizer.padding_side == "left"
    assert generation.pad_token_id == tokenizer.pad_token_id and generation.bos_token_id == tokenizer.bos_token_id
    stops = [tokenizer.eos_token_id]
    if DECODERS[name][3]:  # its turns end in a token that is not its end-of-text token
        stops.append(tokenizer.convert_tokens_to_ids("<|im_end|>"))
        assert processor.chat_template.count("{%- generation -%}") == 1
    assert generation.eos_token_id == (stops if len(stops) > 1 else stops[0])
    assert not generation.do_sample
    if model.config.image_token_id < model.config.text_config.vocab_size:  # on a spare row
        assert model.config.image_token_id in generation.suppress_tokens

    batch = asked(processor)
    ids = batch["input_ids"][0].tolist()
    assert ids.count(model.config.image_token_id) == 4
    assert tokenizer.bos_token_id is None or (ids[0], ids.count(ids[0])) == (tokenizer.bos_token_id, 1)
    generated = model.generate(**batch, max_new_tokens=5, eos_token_id=-1)
    assert generated.shape[1] == len(ids) + 5 and model.config.image_token_id not in generated[0, len(ids) :]


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_tower_is_unchanged(tower_folder, decoder_folder, name):
    folder = tower_folder(name)
    model, processor = compose_model(folder, decoder_folder("llama"))
    num_tokens, num_dropped, channels = TOWERS[name][4]
    pixel_values = torch.randn(2, 3, *processor.image_processor(Image.new("RGB", (9, 9)))["pixel_values"][0].shape[1:])

    whole = AutoModel.from_pretrained(folder)
    tower = getattr(whole, "vision_model", whole).eval()
    outputs = tower(pixel_values, output_hidden_states=True)
    if outputs.last_hidden_state.ndim == 4:
        features = outputs.last_hidden_state.flatten(2).transpose(1, 2)
        assert model.config.vision_feature_layer == -1
    else:
        features = outputs.hidden_states[-2][:, num_dropped:]
        assert model.config.vision_feature_layer == -2
    expected = model.model.multi_modal_projector(features)
    torch.testing.assert_close(model.get_image_features(pixel_values).image_features, expected, atol=1e-5, rtol=1e-5)
    assert features.shape[1:] == (num_tokens, channels)
    assert model.config.image_seq_length == num_tokens and model.config.vision_hidden_size == channels
    assert model.config.vision_feature_select_strategy == ("default" if num_dropped else "full")
    assert len(model.config.vision_config.id2label) == 2 and not model.config.vision_config._name_or_path

    batch = asked(processor)
    assert (batch["input_ids"] == model.config.image_token_id).sum() == num_tokens
    assert model(**batch).logits.isfinite().all()


def test_other_parts_of_a_checkpoint_are_not_logged(tower_folder, caplog):
    for name in TOWERS:
        load_vision_tower(tower_folder(name))
    assert not caplog.records


def test_clip_towers_get_the_image_processor_of_llava(tower_folder):
    """A wide red image is padded with the mean color above and below, not cropped."""
    folder = tower_folder("clip")
    processor = load_image_processor(folder, AutoConfig.from_pretrained(folder).vision_config)
    pixel_values = processor(images=Image.new("RGB", (56, 14), (255, 0, 0)), return_tensors="pt")["pixel_values"][0]
    assert pixel_values.shape == (3, 28, 28)
    assert pixel_values[:, 0].abs().max() < 0.02 and pixel_values[0, 14].min() > 1.5


def test_new_modules_depend_on_the_seed(tower_folder, decoder_folder):
    folders = tower_folder("clip"), decoder_folder("llama")
    first, again, other = (compose_model(*folders, seed=seed)[0].state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    differ = {name for name in first if not torch.equal(first[name], other[name])}
    assert differ == {f"model.multi_modal_projector.linear_{i}.weight" for i in (1, 2)}
    num_words = first["model.vm_head.weight"].shape[0]
    assert torch.equal(first["model.vm_head.weight"], first["lm_head.weight"][:num_words])


def test_options_are_used(tower_folder, decoder_folder, tmp_path):
    template = tmp_path / "mine.jinja"
    template.write_text("{{ messages[0].content }}")
    model, processor = compose_model(
        tower_folder("clip"),
        decoder_folder("llama"),
        projector_type="linear",
        vm_head_type="attention",
        vm_head_init="input_embeddings",
        vision_feature_layer=[-3, -1],
        chat_template=str(template),
        dtype="bfloat16",
    )
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config.vision_hidden_size == 32 == model.model.multi_modal_projector.linear_1.in_features
    embeddings = model.get_input_embeddings().weight
    assert torch.equal(model.model.vm_head.weight, embeddings[: model.config.visual_vocab_size])
    assert processor.chat_template == template.read_text()
    features = model.get_image_features(torch.randn(1, 3, 28, 28)).image_features
    assert torch.equal(model.model.vm_head.residual_block(features), features)  # a new residual_block does nothing yet
    processor = compose_model(tower_folder("clip"), decoder_folder("llama"), chat_template="mistral")[1]
    assert processor.chat_template == load_template("mistral") == processor.tokenizer.chat_template


CLEAN = textwrap.dedent(
    """
    import json
    import torch
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    torch.set_num_threads(1)
    found = []
    for folder in sys.argv[1:]:
        model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        content = [{"type": "image", "image": Image.new("RGB", (80, 50), (200, 30, 30))}]
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": "What is it?"}]}]
        inputs = processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
        ids = model.generate(**inputs, max_new_tokens=4)[0].tolist()
        found.append({"logits": model(**inputs).logits[0, -1].tolist(), "ids": ids})
    print("FOUND" + json.dumps(found))
    """
)


@pytest.mark.slow
def test_saved_folders_load_without_this_package(tower_folder, decoder_folder, tmp_path):
    pairs = [("clip", "qwen3"), ("siglip", "llama"), ("dinov2_with_registers", "mistral"), ("mobilenet_v2", "qwen2")]
    folders, expected = [], []
    for vision, text in pairs:
        folder = tmp_path / vision
        model, processor = compose_model(tower_folder(vision), decoder_folder(text), folder)
        names = {"config.json", "model.safetensors", "modeling_vtlmm.py", "processing_vtlmm.py", "chat_template.jinja"}
        names |= {"processor_config.json", "tokenizer.json", "generation_config.json"}
        assert names <= {file.name for file in folder.iterdir()}
        assert not [file for file in folder.glob("*.json") if str(tmp_path.parent) in file.read_text()]
        batch = asked(processor)
        with torch.no_grad():
            expected.append((model(**batch).logits[0, -1], model.generate(**batch, max_new_tokens=4)[0].tolist()))
        assert torch.equal(asked(VTLMMProcessor.from_pretrained(folder))["input_ids"], batch["input_ids"])
        folders.append(folder)
    found = in_clean_process(CLEAN, *folders, cache=tmp_path)
    for (logits, ids), there in zip(expected, found, strict=True):
        torch.testing.assert_close(torch.tensor(there["logits"]), logits, atol=1e-5, rtol=1e-5)
        assert there["ids"] == ids


@torch.no_grad()
def test_the_logit_of_a_new_row_never_is_the_largest(build_model):
    """Also where all logits are negative, and a row of zeros would win."""
    model = build_model()
    old = model.lm_head.weight.shape[0]
    model.lm_head.weight += 5
    fit_embeddings(model, Vocabulary(num_words=old, image_token_id=old + 1, new_ids=[old, old + 1]))
    hidden_states = -torch.rand(1000, model.config.text_config.hidden_size)
    logits = model.lm_head(hidden_states)
    assert logits.shape[-1] == old + 1 and logits.max() < 0
    assert logits.argmax(-1).max() < old


@pytest.mark.parametrize(
    ("settings", "pad"),
    [
        ({"pad": "<pad>"}, "<pad>"),
        ({}, "<unk>"),
        ({"unk": None}, "<pad>"),
        ({"unk": "</s>"}, "<pad>"),  # as GPT-2: unknown and end are one token
        ({"pad": "</s>"}, "</s>"),  # somebody's choice, kept
    ],
)
def test_padding_token(settings, pad):
    tokenizer = byte_tokenizer(**settings)
    num_words = len(tokenizer)
    vocabulary = add_special_tokens(tokenizer, num_words + 2)
    assert tokenizer.pad_token == pad and vocabulary.num_words == num_words
    image_token_id = len(tokenizer) - 1
    assert vocabulary.image_token_id == image_token_id
    assert tokenizer.encode("<image>", add_special_tokens=False) == [image_token_id]
    assert vocabulary.new_ids == list(range(num_words, len(tokenizer)))
    again = add_special_tokens(tokenizer, len(tokenizer))
    assert again.image_token_id == image_token_id and again.new_ids == []


SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou "
    "are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + "
    "message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def smollm2_folder(tmp_path_factory) -> str:
    """Return the folder of a tiny decoder with the tokenizer settings of SmolLM2-135M-Instruct."""
    folder = tmp_path_factory.mktemp("smollm2")
    control = ["<|im_start|>", "<|im_end|>", "<repo_name>"]
    tokenizer = byte_tokenizer(special=control, bos=None, eos="<|im_end|>", unk="<|endoftext|>", pad="<|im_end|>")
    tokenizer.bos_token = "<|im_start|>"  # the tokenizer does not add it; the template starts each turn with it
    tokenizer.chat_template = SMOLLM2
    config = AutoConfig.for_model(
        "llama",
        **SIZE,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(1)
    scale_weights(AutoModelForCausalLM.from_config(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("drop", [False, True])
def test_decoder_whose_bos_token_starts_each_turn(tower_folder, smollm2_folder, tmp_path, drop):
    output = tmp_path / "model"
    model, processor = compose_model(tower_folder("clip"), smollm2_folder, output, drop_system_prompt=drop)
    tokenizer = processor.tokenizer
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]},
    ]
    text = tokenizer.apply_chat_template(messages, chat_template=processor.chat_template, tokenize=False)
    turns = "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n<|im_start|>assistant\nA dog.<|im_end|>\n"
    assert text.endswith(turns) and (text == turns) is drop and ("named SmolLM" in text) is not drop
    own = [{"role": "system", "content": "Be brief."}, *messages]
    text = tokenizer.apply_chat_template(own, chat_template=processor.chat_template, tokenize=False)
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\n" + turns
    ids = asked(processor)["input_ids"][0].tolist()
    assert ids.count(tokenizer.bos_token_id) == (2 if drop else 3) and ids[0] == tokenizer.bos_token_id
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert VTLMMProcessor.from_pretrained(output).chat_template == processor.chat_template


def test_reloaded_model_is_the_same(tower_folder, decoder_folder, tmp_path):
    model, _ = compose_model(tower_folder("clip"), decoder_folder("qwen3"), tmp_path)
    again = VTLMMForConditionalGeneration.from_pretrained(tmp_path)
    state, loaded = model.state_dict(), again.state_dict()
    assert state.keys() == loaded.keys() and all(torch.equal(loaded[name], state[name]) for name in state)
    assert again.generation_config.suppress_tokens == model.generation_config.suppress_tokens
