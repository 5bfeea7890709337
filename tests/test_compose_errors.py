# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Parts that do not fit are rejected with the reason."""

import json

import pytest
import transformers
from helpers.byte_tokenizers import byte_tokenizer
from helpers.composition import SIZE, decoder_folder, tower_folder  # noqa: F401 - fixtures
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from vtlmm.hub.compose import compose_model
from vtlmm.hub.special_tokens import add_special_tokens


REFUSED = {
    "phi": ({}, "head has a bias"),
    "cohere": ({}, r"`logit_scale` is 0\.0625"),
    "gemma2": ({"head_dim": 8, "num_key_value_heads": 2}, "final_logit_softcapping"),
    "gemma": ({"head_dim": 8, "num_key_value_heads": 2}, "it scales its embeddings"),
    "granite": ({"logits_scaling": 8.0}, "logits_scaling"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_decoders_with_another_head_are_rejected(tower_folder, tmp_path, name):
    config, said = REFUSED[name]
    tokenizer = byte_tokenizer()
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(name, **SIZE, **config, **ids, vocab_size=len(tokenizer))
    )
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=said):
        compose_model(tower_folder("clip"), str(tmp_path))


def test_unknown_change_of_the_logits_is_found(tower_folder, decoder_folder, monkeypatch):
    forward = transformers.LlamaForCausalLM.forward

    def doubled(self, *args, **kwargs):
        outputs = forward(self, *args, **kwargs)
        outputs.logits = 2 * outputs.logits
        return outputs

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", doubled)
    with pytest.raises(ValueError, match="not its head × its last hidden state"):
        compose_model(tower_folder("clip"), decoder_folder("llama"))


@pytest.mark.parametrize(
    ("vision", "changes", "options", "said"),
    [
        ("mobilenet_v2", {"do_center_crop": False}, {}, "different sizes"),
        ("mobilenet_v2", {}, {"vision_feature_layer": -2}, "has one feature map"),
        ("dinov2", {}, {"vision_feature_layer": 9}, "has 4 hidden states"),
        ("clip", {}, {"chat_template": "vicuna"}, "vicuna_v1 or mistral, or a .jinja file"),
        ("clip", {}, {"vm_head_init": "zeros"}, "'zeros'"),
    ],
)
def test_unfitting_parts_are_rejected_with_the_reason(
    tower_folder, decoder_folder, tmp_path, vision, changes, options, said
):
    for file in ("config.json", "model.safetensors", "preprocessor_config.json"):
        source = f"{tower_folder(vision)}/{file}"
        (tmp_path / file).write_bytes(open(source, "rb").read())
    values = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**values, **changes}))
    with pytest.raises(ValueError, match=said):
        compose_model(str(tmp_path), decoder_folder("llama"), **options)


def test_incomplete_checkpoints_are_rejected(tower_folder, decoder_folder, tmp_path):
    tower = AutoModel.from_pretrained(tower_folder("convnext"))
    state_dict = {name: value for name, value in tower.state_dict().items() if "stages.2" not in name}
    tower.save_pretrained(tmp_path, state_dict=state_dict)
    with pytest.raises(ValueError, match=r"Tensors of the vision tower \(ConvNextModel\) are missing .*stages\.2"):
        compose_model(str(tmp_path), decoder_folder("llama"))
    AutoModel.from_pretrained(tower_folder("convnext")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="contains no image processor"):
        compose_model(str(tmp_path), decoder_folder("llama"))
    with pytest.raises(ValueError, match=r"has 259 tokens but the decoder only 200"):
        add_special_tokens(byte_tokenizer(), 200)


def test_system_prompt_of_another_template_is_not_dropped(tower_folder, decoder_folder):
    with pytest.raises(ValueError, match="Leave out `chat_template`"):
        options = {"chat_template": "vicuna_v1", "drop_system_prompt": True}
        compose_model(tower_folder("clip"), decoder_folder("llama"), **options)


def test_missing_part_is_not_looked_up_on_the_hub(tower_folder):
    with pytest.raises(FileNotFoundError, match=r"'\./decoder' does not exist"):
        compose_model(tower_folder("clip"), "./decoder")
