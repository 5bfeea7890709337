# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The GGUF export, read back with `gguf.GGUFReader`. tests/test_gguf_llama_cpp.py runs the files in llama.cpp."""

import logging
import re
import shutil

import pytest
import torch
from helpers.gguf_models import (
    DECODERS,
    LLAMA3_ROPE,
    TEXTS,
    build_gguf_tokenizer,
    patch_json,
    write_gguf_source,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_vtlmm import VTLMMForConditionalGeneration, VTLMMProcessor
from vtlmm.cli.main import main


gguf = pytest.importorskip("gguf")

from vtlmm.hub.export_gguf import export_gguf  # noqa: E402
from vtlmm.hub.gguf_template import llama_cpp_template  # noqa: E402
from vtlmm.hub.gguf_tokenizer import read_tokenizer  # noqa: E402


class GGUFFile:
    """Metadata and dequantized tensors of a GGUF file."""

    def __init__(self, path):
        reader = gguf.GGUFReader(path)
        self.fields = {name: field.contents() for name, field in reader.fields.items()}
        self.types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
        self.tensors = {}
        for tensor in reader.tensors:
            shape = tuple(map(int, reversed(tensor.shape)))
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            self.tensors[tensor.name] = torch.from_numpy(values.copy()).reshape(shape)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Function that writes a model of `write_gguf_source`, once per arguments, and gives its folder."""
    made = {}

    def write(kind: str, tower: str = "siglip_vision_model", **values):
        key = f"{kind} {tower} {values}"
        if key not in made:
            made[key] = write_gguf_source(tmp_path_factory.mktemp("source") / kind, kind, tower, **values)
        return made[key]

    return write


DECODER_NAMES = {
    "embed_tokens.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def decoder_name(name: str) -> str:
    """Return llama.cpp's name of a decoder's tensor, written down here a second time."""
    if name == "lm_head.weight":
        return "output.weight"
    name = name.removeprefix("model.language_model.")
    if not name.startswith("layers."):
        return DECODER_NAMES[name]
    _, number, rest = name.split(".", 2)
    part, kind = rest.rsplit(".", 1)
    return f"blk.{number}.{DECODER_NAMES[part]}.{kind}"


def rotated_rows(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Return the rows in llama.cpp's order: row 2i + j of a head is row j · half + i in transformers."""
    size = weight.shape[0] // num_heads
    half = size // 2
    order = [head * size + (i % 2) * half + i // 2 for head in range(num_heads) for i in range(size)]
    return weight[order]


@pytest.mark.slow
@pytest.mark.parametrize("kind", DECODERS)
def test_decoder_has_the_tensors_of_the_model(sources, tmp_path, kind):
    files = export_gguf(sources(kind), tmp_path, "f32")
    found = GGUFFile(files.model)
    model = VTLMMForConditionalGeneration.from_pretrained(sources(kind), dtype=torch.float32)
    text_config, expected = model.config.text_config, {}
    for name, tensor in model.state_dict().items():
        if name.startswith("model.language_model.") or name == "lm_head.weight" and kind not in ("smollm2", "qwen2"):
            theirs = decoder_name(name)
            heads = {"attn_q": text_config.num_attention_heads, "attn_k": text_config.num_key_value_heads}
            part = theirs.split(".")[-2]
            rotated = part in heads and text_config.model_type != "qwen2"
            expected[theirs] = rotated_rows(tensor, heads[part]) if rotated else tensor
    factors = found.tensors.pop("rope_freqs.weight", None)
    assert (factors is not None) == (kind == "llama3")
    assert found.tensors.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found.tensors[name], expected[name])] == []
    assert {"qwen2": ".attn_q.bias"}.get(kind, "token_embd.weight") in "".join(expected)


@pytest.mark.parametrize("kind", ["llama", "smollm2", "qwen2"])
@torch.no_grad()
def test_transformers_loads_the_decoder_with_the_same_logits(sources, tmp_path, kind):
    """The reader of GGUF in transformers is independent of this writer."""
    files = export_gguf(sources(kind), tmp_path, "f32")
    decoder = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=files.model.name, dtype=torch.float32).eval()
    model = VTLMMForConditionalGeneration.from_pretrained(sources(kind), dtype=torch.float32).eval()
    input_ids = torch.arange(40)[None] * 7 % 300
    torch.testing.assert_close(decoder(input_ids).logits, model(input_ids).logits, rtol=1e-5, atol=1e-5)


def test_rope_factors_are_those_of_llama_3(sources, tmp_path):
    """The longest wavelengths are divided by the factor, the shortest are unchanged, and those between are mixed."""
    factors = GGUFFile(export_gguf(sources("llama3"), tmp_path, "f32").model).tensors["rope_freqs.weight"]
    size = 16
    assert factors.shape == (size // 2,) and factors[-1] == pytest.approx(8) and factors[0] == pytest.approx(1)
    for i, factor in enumerate(factors.tolist()):
        wavelength = 2 * torch.pi * 10000.0 ** (2 * i / size)
        turns = LLAMA3_ROPE["original_max_position_embeddings"] / wavelength
        smooth = min(max((turns - 1.0) / (4.0 - 1.0), 0), 1)
        assert 1 / factor == pytest.approx((1 - smooth) / 8 + smooth, rel=1e-4)


def test_decoder_metadata(sources, tmp_path):
    fields = GGUFFile(export_gguf(sources("llama"), tmp_path / "llama", "f16").model).fields
    expected = {
        "general.architecture": "llama",
        "general.file_type": 1,
        "llama.block_count": 2,
        "llama.context_length": 1024,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": True,
    }
    assert {name: fields.get(name) for name in expected} == expected
    assert fields["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    mistral = GGUFFile(export_gguf(sources("mistral"), tmp_path / "mistral", "f16").model).fields
    assert (mistral["general.architecture"], mistral["llama.context_length"]) == ("llama", 512)  # the sliding window
    qwen2 = GGUFFile(export_gguf(sources("qwen2"), tmp_path / "qwen2", "q8_0").model).fields
    assert (qwen2["tokenizer.ggml.pre"], qwen2["general.file_type"]) == ("qwen2", 7)
    assert "tokenizer.ggml.bos_token_id" not in qwen2 and qwen2["tokenizer.ggml.add_bos_token"] is False


def test_token_scores_order_the_merges(sources, tmp_path):
    """A score is minus the rank of the first merge that builds the token. Words that no merge builds come last."""
    fields = GGUFFile(export_gguf(sources("llama"), tmp_path, "f16").model).fields
    tokens, scores, types = (fields[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type"))
    tokenizer = VTLMMProcessor.from_pretrained(sources("llama")).tokenizer
    assert tokens == [tokenizer.convert_ids_to_tokens(i) for i in range(len(tokens))] and "<image>" not in tokens
    kinds = gguf.TokenType
    assert types[:4] == [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, kinds.BYTE] and types[-1] == kinds.NORMAL
    merged = [score for score, token, kind in zip(scores, tokens, types, strict=True) if kind == 1 and len(token) > 1]
    assert merged == sorted(merged, reverse=True) and len(set(merged)) == len(merged) > 100
    assert merged[0] == 0 and merged[-1] > min(scores)


def test_byte_level_tokens_and_merges(sources, tmp_path):
    fields = GGUFFile(export_gguf(sources("qwen2"), tmp_path, "f16").model).fields
    tokenizer = VTLMMProcessor.from_pretrained(sources("qwen2")).tokenizer
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    num_words = len(tokenizer) - 1
    assert tokens[:num_words] == [tokenizer.convert_ids_to_tokens(i) for i in range(num_words)]
    assert tokens[num_words:] == ["<image>", f"[PAD{num_words + 1}]", f"[PAD{num_words + 2}]"]
    assert types[num_words:] == [gguf.TokenType.CONTROL, gguf.TokenType.UNUSED, gguf.TokenType.UNUSED]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    assert len(merges) == 240 and all("".join(pair) in tokens for pair in merges)


@pytest.mark.parametrize("kind", ["smollm2", "qwen2"])
def test_transformers_reads_the_same_tokenizer(sources, tmp_path, kind):
    """Texts without digits, since transformers' reader has one word split for all tokenizers."""
    files = export_gguf(sources(kind), tmp_path, "f16")
    found = AutoTokenizer.from_pretrained(tmp_path, gguf_file=files.model.name)
    tokenizer = VTLMMProcessor.from_pretrained(sources(kind)).tokenizer
    for text in (TEXTS[0], TEXTS[2], TEXTS[33]):
        assert found(text, add_special_tokens=False).input_ids == tokenizer(text, add_special_tokens=False).input_ids


TOWER_NAMES = {
    "embeddings.class_embedding": "v.class_embd",
    "embeddings.patch_embedding": "v.patch_embd",
    "embeddings.position_embedding": "v.position_embd",
    "pre_layrnorm": "v.pre_ln",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}


@pytest.mark.parametrize("tower", ["siglip_vision_model", "clip_vision_model"])
def test_mmproj_has_tower_and_projector(sources, tmp_path, tower):
    """Of four layers the third is the last that is used."""
    found = GGUFFile(export_gguf(sources("llama", tower), tmp_path, "f32").mmproj)
    model = VTLMMForConditionalGeneration.from_pretrained(sources("llama", tower), dtype=torch.float32)
    expected = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("model.multi_modal_projector."):
            part, kind = name.split(".")[2:]
            expected[f"mm.{ {'linear_1': 0, 'linear_2': 2}[part] }.{kind}"] = tensor
        if name.startswith("model.vision_tower."):
            name = name.removeprefix("model.vision_tower.")
            if name.startswith("encoder.layers."):
                _, _, number, rest = name.split(".", 3)
                part, kind = rest.rsplit(".", 1)
                if int(number) < 3:
                    expected[f"v.blk.{number}.{TOWER_NAMES[part]}.{kind}"] = tensor
            elif name in TOWER_NAMES:
                expected[TOWER_NAMES[name]] = tensor
            elif name.rsplit(".", 1)[0] in TOWER_NAMES:
                part, kind = name.rsplit(".", 1)
                expected[f"{TOWER_NAMES[part]}.{kind}"] = tensor
    assert found.tensors.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found.tensors[name], expected[name])] == []
    assert ("v.class_embd" in expected) == (tower == "clip_vision_model")
    values = {
        "image_size": 56,
        "patch_size": 14,
        "block_count": 3,
        "feature_layer": [3],
        "projection_dim": 64,
        "attention.head_count": 4,
    }
    assert {name: found.fields[f"clip.vision.{name}"] for name in values} == values
    assert found.fields["clip.use_gelu"] == (tower == "siglip_vision_model")
    assert found.fields["clip.projector_type"] == "mlp" and len(found.fields["clip.vision.image_mean"]) == 3


def test_file_types(sources, tmp_path):
    """Matrices have the type, vectors and convolutions stay in float32, and the error is that of the type."""
    exact = GGUFFile(export_gguf(sources("qwen2"), tmp_path / "f32", "f32").model).tensors
    errors = {}
    for file_type, stored in (("f16", "F16"), ("bf16", "BF16"), ("q8_0", "Q8_0")):
        files = export_gguf(sources("qwen2"), tmp_path / file_type, file_type)
        found, mmproj = GGUFFile(files.model), GGUFFile(files.mmproj)
        assert files.model.name == f"model-{file_type}.gguf" and files.mmproj.name == f"mmproj-{file_type}.gguf"
        types = {name: found.types[name] for name in ("token_embd.weight", "blk.0.attn_q.weight", "blk.0.attn_q.bias")}
        assert list(types.values()) == [stored, stored, "F32"]
        assert mmproj.types["v.patch_embd.weight"] == mmproj.types["v.position_embd.weight"] == "F32"
        assert mmproj.types["mm.0.weight"] == stored
        errors[file_type] = float((found.tensors["token_embd.weight"] - exact["token_embd.weight"]).abs().max())
    assert 0 < errors["f16"] < errors["bf16"] < errors["q8_0"] < 0.02


def test_rows_that_q8_0_cannot_divide_are_float16(sources, tmp_path, build_model, processor):
    """The tower of conftest.py has 16 channels, which is less than a block."""
    source = tmp_path / "source"
    shutil.copytree(sources("llama"), source)
    model = build_model("llama", "siglip_vision_model")
    model.config.text_config.vocab_size = 64
    model.save_pretrained(source)
    (source / "model.safetensors.index.json").unlink()

    def fit_image(values: dict) -> None:
        values["image_processor"]["size"] = {"height": 28, "width": 28}

    patch_json(source / "processor_config.json", fit_image)
    types = GGUFFile(export_gguf(source, tmp_path / "gguf", "q8_0").mmproj).types
    assert types["v.blk.0.attn_q.weight"] == "F16" and types["mm.2.weight"] == "Q8_0"


# ---- Chat templates ----


@pytest.mark.parametrize("kind", DECODERS)
def test_llama_cpp_template_prints_the_same_prompt(kind):
    """Rendered by Jinja here; tests/test_gguf_llama_cpp.py renders it in llama.cpp."""
    tokenizer = build_gguf_tokenizer(kind)
    image, marker = {"type": "image"}, "<__media_x1__>"
    texts = [{"type": "text", "text": "What is it?"}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "A boat."}]}
    for parts in ([image, *texts], [*texts, image], [image, image, *texts], texts):
        conversation = [{"role": "user", "content": parts}, answer, {"role": "user", "content": texts}]
        expected = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        template = llama_cpp_template(tokenizer.chat_template, "<image>", leading_space=kind == "vicuna")
        assert not re.search(r"%-? (end)?generation|\+%}|{%\+|find\(", template)
        typed = [{"type": "media_marker", "text": marker} if part is image else part for part in parts]
        joined = "".join(part["text"] for part in typed)
        for content in (typed, joined):
            messages = [{"role": "user", "content": content}, answer, {"role": "user", "content": texts}]
            found = tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=True
            )
            assert found.removeprefix(" " if kind == "vicuna" else "") == expected.replace("<image>", marker)


def test_ollama_modelfile(sources, tmp_path):
    modelfile = export_gguf(sources("smollm2"), tmp_path / "smollm2", "f16").modelfile.read_text()
    lines = modelfile.splitlines()
    assert "FROM ./model-f16.gguf" in lines and "FROM ./mmproj-f16.gguf" in lines
    assert 'PARAMETER stop "<|im_end|>"' in lines
    start, turn = r"<|im_start|>user\n", r"<|im_end|>\n<|im_start|>"
    assert f'{{{{- $next := "{start}" }}}}' in modelfile and f'{{{{ $next = "{turn}user\\n" }}}}' in modelfile
    assert f'{{{{ "{turn}assistant\\n" }}}}"""' in modelfile
    vicuna = export_gguf(sources("vicuna"), tmp_path / "vicuna", "f16").modelfile.read_text()
    assert '$next := " A chat between' in vicuna and '{{ " ASSISTANT:" }}"""' in vicuna


# ---- Errors ----


@pytest.mark.parametrize(
    ("text", "vision", "values", "said"),
    [
        ("qwen3", "siglip_vision_model", {}, "its decoder is a qwen3; supported are llama, mistral, qwen2"),
        ("llama", "convnext", {}, "its vision tower, a convnext, is convolutional"),
        ("llama", "mobilenet_v2", {}, "its vision tower, a mobilenet_v2, is convolutional"),
        ("llama", "dinov2", {}, "its vision tower is a dinov2; llama.cpp's LLaVA has the towers of SigLIP and CLIP"),
        ("llama", "clip_vision_model", {"vision_feature_select_strategy": "full"}, "the CLS position"),
        ("llama", "clip_vision_model", {"projector_type": "linear"}, "its projector is 'linear'"),
        ("llama", "clip_vision_model", {"use_pseudo_image_features": True}, "pseudo image features"),
        ("llama", "clip_vision_model", {}, "the tokenizer's model is WordLevel, but only BPE can be exported"),
    ],
)
def test_unsupported_models_are_rejected_with_the_reason(build_model, processor, tmp_path, text, vision, values, said):
    build_model(text, vision, **values).save_pretrained(tmp_path / "source")
    processor.save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match="cannot be exported to GGUF: ") as error:
        export_gguf(tmp_path / "source", tmp_path / "gguf")
    assert said in str(error.value) and not (tmp_path / "gguf").exists()


def test_tokenizers_that_llama_cpp_cannot_follow_are_rejected():
    tokenizer = build_gguf_tokenizer("smollm2")
    tokenizer.backend_tokenizer.pre_tokenizer = tokenizer.backend_tokenizer.pre_tokenizer[1]
    assert read_tokenizer(tokenizer, 300).pre == "gpt-2"
    tokenizer.backend_tokenizer.pre_tokenizer.add_prefix_space = True
    with pytest.raises(ValueError, match="splits words in a way that is not exported"):
        read_tokenizer(tokenizer, 300)


def test_adapter_and_wrong_type_are_rejected(sources, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="It is an adapter; merge it into its base model first"):
        export_gguf(tmp_path / "adapter", tmp_path / "gguf")
    with pytest.raises(ValueError, match="`file_type` is 'q4_0'; it must be one of f32, f16, bf16, q8_0"):
        export_gguf(sources("llama"), tmp_path / "gguf", "q4_0")


def test_warnings_name_what_llama_cpp_computes_differently(sources, tmp_path, caplog):
    export_gguf(sources("llama", "clip_vision_model"), tmp_path / "clip")
    assert "llama.cpp issue 25814" in caplog.text
    caplog.clear()
    export_gguf(sources("vicuna"), tmp_path / "vicuna")
    messages = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(messages) == 2 and "Resize images to 56 × 56 pixels" in messages[0] and "chat template" in messages[1]


def test_command(sources, tmp_path, capsys):
    """A second export needs --overwrite and leaves no file of the first one."""
    output = tmp_path / "gguf"
    command = ["export", str(sources("llama")), "--to", "gguf", "--output", str(output)]
    assert main([*command, "--type", "f32"]) == 0
    (output / "notes.txt").write_text("mine")
    assert main(command) == 1 and "--overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0
    names = {file.name for file in output.iterdir()}
    assert names == {"model-f16.gguf", "mmproj-f16.gguf", "Modelfile", "notes.txt"}
    wrong = ["export", str(sources("llama")), "--to", "llava", "--output", str(tmp_path / "llava"), "--type", "f16"]
    assert main(wrong) == 1 and "--type is for --to gguf" in capsys.readouterr().err
