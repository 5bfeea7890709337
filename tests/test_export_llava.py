# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""VT-LMM to transformers' own llava and back, and llava-hf checkpoints to VT-LMM: equal outputs, equal tensors."""

import json

import pytest
import torch
from helpers.released_checkpoints import CLOSE, NUM_WORDS, Case
from helpers.tiny_models import build_config, build_tokenizer
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessorPil,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from modeling_vtlmm import VTLMMConfig, VTLMMForConditionalGeneration, VTLMMProcessor
from vtlmm.cli.main import main
from vtlmm.hub.chat_templates import load_template
from vtlmm.hub.convert import convert_checkpoint
from vtlmm.hub.export_llava import export_to_llava


def all_tensors(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_equal_tensors(found: dict, expected: dict):
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different and all(found[name].dtype == expected[name].dtype for name in expected)


def load_twin(folder) -> LlavaForConditionalGeneration:
    """By the Auto class and without remote code; transformers misses no tensor and has use for each."""
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert type(model) is LlavaForConditionalGeneration and not any(info.values()), info
    return model.eval()


def asked(processor, image_token_id: int) -> dict:
    """Two questions of different length about two images."""
    images = [Image.new("RGB", (40, 30), (200, 30, 30)), Image.new("RGB", (30, 50), (20, 160, 60))]
    texts = ["USER : <image> what is in the image ? ASSISTANT :", "USER : <image> describe ASSISTANT :"]
    inputs = processor(images=images, text=texts, return_tensors="pt", padding=True)
    inputs["input_ids"][inputs["input_ids"] == processor.image_token_id] = image_token_id
    return dict(inputs)


# --- from the released checkpoints, against what the released code computed


@pytest.mark.parametrize("name", ["llama-0", "mistral-1"])
@torch.no_grad()
def test_twin_of_a_released_checkpoint(shared, tmp_path, name):
    case = Case(shared / "reference" / name, tmp_path / "vtlmm")
    export_to_llava(tmp_path / "vtlmm", tmp_path / "twin")
    twin, golden = load_twin(tmp_path / "twin"), case.golden
    torch.testing.assert_close(twin(**case.inputs).logits[..., :NUM_WORDS], golden["logits"], **CLOSE)
    text_only = twin(golden["text_only_input_ids"]).logits[..., :NUM_WORDS]
    torch.testing.assert_close(text_only, golden["text_only_logits"], **CLOSE)

    expected = golden["generate_output_ids"]
    twin.generation_config.eos_token_id = None
    generated = twin.generate(**case.generate_inputs, max_new_tokens=expected.shape[1])
    assert torch.equal(generated[:, -expected.shape[1] :], expected)


def test_a_model_of_pseudo_image_features_has_none(shared, tmp_path, capsys):
    checkpoint = shared / "reference" / "pif-2" / "checkpoint"
    assert main(["convert", str(checkpoint), "--output", str(tmp_path / "vtlmm")]) == 0
    assert main(["export", str(tmp_path / "vtlmm"), "--to", "llava", "--output", str(tmp_path / "twin")]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "cannot be exported to LLaVA: its decoder reads pseudo image features" in said
    assert not (tmp_path / "twin").exists()


# --- from any VT-LMM, and back


@pytest.fixture
def vtlmm(build_model, processor, tmp_path):
    """Function of `build_config`'s arguments that saves a VT-LMM in small shards, and gives folder and model."""

    def write(*args, dtype=torch.float32, **kwargs):
        model = build_model(*args, **kwargs).to(dtype)
        # as compose and convert have it: what was added is never generated
        model.generation_config.suppress_tokens = [i for i in (3, model.config.image_token_id) if i < 64]
        model.save_pretrained(tmp_path / "vtlmm", max_shard_size="20KB")
        if model.config.image_token_id == processor.image_token_id:
            processor.save_pretrained(tmp_path / "vtlmm")
        assert len(list((tmp_path / "vtlmm").glob("*.safetensors"))) > 2
        return tmp_path / "vtlmm", model

    return write


ROWLESS = {"image_token_id": 64}  # the first id after the decoder's vocabulary
CASES = {
    "a row for the image token": ("llama", "clip_vision_model", {}),
    "no row for it": ("llama", "clip_vision_model", ROWLESS),
    "tied embeddings": ("qwen2", "clip_vision_model", {}),
    "tied, no row": ("qwen2", "clip_vision_model", ROWLESS),
    "siglip": ("qwen3", "siglip_vision_model", {}),
    "dinov2, two layers": ("mistral", "dinov2", {"vision_feature_layer": [-3, -2]}),
    "every position": ("llama", "clip_vision_model", {"vision_feature_select_strategy": "full"}),
}


@pytest.mark.slow
@pytest.mark.parametrize(("text", "vision", "values"), CASES.values(), ids=CASES)
@torch.no_grad()
def test_twin_and_back(vtlmm, processor, tmp_path, text, vision, values):
    folder, model = vtlmm(text, vision, **values)
    image_token_id, words = model.config.image_token_id, model.config.visual_vocab_size
    export_to_llava(folder, tmp_path / "twin", shard_size="15KB")
    assert len(list((tmp_path / "twin").glob("*.safetensors"))) > 2
    twin, inputs = load_twin(tmp_path / "twin"), asked(processor, image_token_id)
    if values.get("vision_feature_select_strategy") == "full":  # one more position, CLS
        ids = inputs["input_ids"]
        first = (ids == image_token_id).int().argmax(-1)
        rows = [[*row[:i], image_token_id, *row[i:]] for row, i in zip(ids.tolist(), first.tolist(), strict=True)]
        inputs = {"input_ids": torch.tensor(rows), "pixel_values": inputs["pixel_values"]}
    found, expected = twin(**inputs).logits[..., :64], model(**inputs).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected, **CLOSE)
    assert torch.equal(twin.generate(**inputs, max_new_tokens=8), model.generate(**inputs, max_new_tokens=8))
    assert twin.generation_config.suppress_tokens == [3, image_token_id]

    convert_checkpoint(tmp_path / "twin", tmp_path / "back")
    found, expected = all_tensors(tmp_path / "back"), all_tensors(folder)
    embeddings = expected["model.language_model.embed_tokens.weight"]
    assert torch.equal(found["model.vm_head.weight"], expected.get("lm_head.weight", embeddings)[:words])
    assert_equal_tensors(without_vm_head(found), without_vm_head(expected))
    again, before = (VTLMMConfig.from_pretrained(path).to_dict() for path in (tmp_path / "back", folder))
    assert without_dtypes(again) == without_dtypes(before)


def without_vm_head(tensors: dict) -> dict:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("model.vm_head.")}


def without_dtypes(config: dict) -> dict:
    """A model that was never loaded does not say the types of its parts."""
    for part in ("vision_config", "text_config"):
        config[part].pop("dtype")
    return config


def test_the_twin_s_processor_is_stock(vtlmm, processor, tmp_path):
    export_to_llava(vtlmm()[0], tmp_path / "twin")
    twin = AutoProcessor.from_pretrained(tmp_path / "twin")
    assert type(twin) is LlavaProcessor and twin.chat_template == processor.chat_template
    expected, found = asked(processor, processor.image_token_id), asked(twin, twin.image_token_id)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    count = twin._get_num_multimodal_tokens(image_sizes=[(40, 30)] * 2)["num_image_tokens"]
    assert count == [4, 4] == processor._get_num_multimodal_tokens(image_sizes=[(40, 30)] * 2)["num_image_tokens"]
    files = {file.name: file.read_text() for file in (tmp_path / "twin").iterdir() if file.suffix != ".safetensors"}
    assert {"chat_template.jinja", "generation_config.json", "preprocessor_config.json"} <= files.keys()
    assert not [name for name, text in files.items() if name.endswith(".py") or "auto_map" in text.lower()]
    convert_checkpoint(tmp_path / "twin", tmp_path / "back")
    back = VTLMMProcessor.from_pretrained(tmp_path / "back")
    assert back.to_dict() == VTLMMProcessor.from_pretrained(tmp_path / "vtlmm").to_dict()


def test_exported_files_are_those_of_llava_hf(vtlmm, tmp_path):
    """The class is LLaVA's, there is no code, and the tensors have the names of llava-hf."""
    export_to_llava(vtlmm()[0], tmp_path / "twin")
    config = json.loads((tmp_path / "twin" / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"] and config["model_type"] == "llava"
    assert "auto_map" not in json.dumps(config) and config["image_token_index"] < config["text_config"]["vocab_size"]
    processor = json.loads((tmp_path / "twin" / "processor_config.json").read_text())
    assert processor["processor_class"] == "LlavaProcessor" and processor["patch_size"] == 14
    assert "{%" in (tmp_path / "twin" / "chat_template.jinja").read_text()
    parts = (
        "vision_tower.vision_model.",
        "multi_modal_projector.",
        "language_model.model.",
        "language_model.lm_head.",
    )
    assert all(name.startswith(parts) for name in all_tensors(tmp_path / "twin"))


@pytest.mark.parametrize(
    ("vision", "values", "said"),
    [
        ("convnext", {}, "its vision tower is a convnext, but LLaVA needs the hidden states of a ViT"),
        ("mobilenet_v2", {}, "its vision tower is a mobilenet_v2"),
        ("dinov2_with_registers", {}, "has register tokens"),
        ("clip_vision_model", {"projector_type": "linear"}, "its projector is 'linear'"),
        ("clip_vision_model", {"use_pseudo_image_features": True}, "pseudo image features"),
    ],
)
def test_unsupported_models_are_rejected_with_the_reason(vtlmm, tmp_path, vision, values, said):
    with pytest.raises(ValueError, match=said):
        export_to_llava(vtlmm("llama", vision, **values)[0], tmp_path / "twin")


def test_incomplete_vtlmm_is_not_exported(vtlmm, tmp_path):
    folder, _ = vtlmm()
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    file = folder / index["weight_map"].pop(name)
    tensors = load_file(file)
    save_file({"model.extra": torch.zeros(2), **{key: t for key, t in tensors.items() if key != name}}, file)
    with pytest.raises(ValueError, match=f"{file.name}: tensors that the index lists are missing: {name}"):
        export_to_llava(folder, tmp_path / "twin")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    said = rf"missing from .*{file.name}.*: {name}; unexpected: model.extra \({file.name}\)\.$"
    with pytest.raises(ValueError, match=said):
        export_to_llava(folder, tmp_path / "twin")
    LlavaConfig().save_pretrained(folder)
    with pytest.raises(ValueError, match="`model_type` is 'llava'; only a VT-LMM can be exported"):
        export_to_llava(folder, tmp_path / "twin")


# ---- From the llava-hf format and back ----

OLD, MODULES, SAVED = "as llava-hf has them", "the modules' own", "as transformers saves them today"


def llava_name(name: str, style: str) -> str:
    """The name on disk of the stock module's tensor `name`."""
    if style == MODULES:
        return name.replace("model.vision_tower.", "model.vision_tower.vision_model.")
    old = name.removeprefix("model.")
    old = old.replace("language_model.", "language_model.model.").replace("lm_head.", "language_model.lm_head.")
    return old.replace("vision_tower.", "vision_tower.vision_model.") if style == OLD else old


@pytest.fixture
def llava(tmp_path):
    """Function that writes a random llava-hf checkpoint in bfloat16 and gives its folder."""
    folder = tmp_path / "llava"

    def write(style: str = OLD, text: str = "llama", change=lambda tensors: tensors, **values):
        ours = build_config(text)
        config = LlavaConfig(
            vision_config=ours.vision_config,
            text_config=ours.text_config,
            image_token_index=61,
            image_seq_length=4,
            **values,
        )
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config).to(torch.bfloat16).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 if parameter.ndim == 1 else 10)
        model.config.architectures, model.config.dtype = ["LlavaForConditionalGeneration"], "bfloat16"
        model.config.save_pretrained(folder)
        tensors = {llava_name(name, style): t for name, t in model.state_dict().items()}
        if config.tie_word_embeddings:
            tensors = {name: tensor for name, tensor in tensors.items() if "lm_head" not in name}
        tensors = change(tensors)
        names = list(tensors)
        parts = {f"model-{i + 1:05}-of-00003.safetensors": names[i::3] for i in range(3)}
        for file, part in parts.items():
            save_file({name: tensors[name].contiguous() for name in part}, folder / file, metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder

    return write


@pytest.mark.slow
@pytest.mark.parametrize("text", ["llama", "qwen2"])
@pytest.mark.parametrize("style", [OLD, MODULES, SAVED])
@torch.no_grad()
def test_llava_hf_and_back(llava, processor, tmp_path, style, text):
    folder = llava(style, text)
    theirs = load_twin(folder)
    convert_checkpoint(folder, tmp_path / "vtlmm", vm_head_init="lm_head", shard_size="15KB")
    ours = VTLMMForConditionalGeneration.from_pretrained(tmp_path / "vtlmm")
    assert ours.dtype == torch.bfloat16 and ours.config.image_token_id == ours.config.visual_vocab_size == 61
    assert torch.equal(ours.model.vm_head.weight, theirs.lm_head.weight[:61])
    inputs = asked(processor, 61)
    assert torch.equal(ours(**inputs).logits, theirs(**inputs).logits)

    export_to_llava(tmp_path / "vtlmm", tmp_path / "again")
    assert_equal_tensors(load_twin(tmp_path / "again").state_dict(), theirs.state_dict())
    if style == OLD:
        assert_equal_tensors(all_tensors(tmp_path / "again"), all_tensors(folder))
    found, expected = (LlavaConfig.from_pretrained(path).to_dict() for path in (tmp_path / "again", folder))
    assert found.pop("vtlmm") == {"visual_vocab_size": 61, "vocab_size": 64}
    assert without_dtypes(found) == without_dtypes(expected)


@pytest.mark.parametrize("style", [OLD, MODULES])
def test_unfitting_llava_tensors_are_named(llava, tmp_path, style):
    name = llava_name("model.language_model.layers.1.mlp.up_proj.weight", style)

    def change(tensors):
        return {"image_newline": torch.zeros(2), **{key: t for key, t in tensors.items() if key != name}}

    said = rf"missing from model-00001-.*: {name}; unexpected: image_newline \(model-00001-of-0"
    with pytest.raises(ValueError, match=said):
        convert_checkpoint(llava(style, change=change), tmp_path / "out")


@pytest.mark.parametrize("mark", ["", "{% generation %}{% endgeneration %}"])
def test_processor_of_an_older_llava_folder(llava, tmp_path, caplog, mark):
    """Older folders have no patch size. The template has no generation marks, or no end-of-turn token."""
    tokenizer, side = build_tokenizer(), {"height": 28, "width": 28}
    folder = llava()
    values = json.loads((folder / "config.json").read_text())
    template = "{% for message in messages %}{{ message['content'][0]['text'] }}{% endfor %}" + mark
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=side).save_pretrained(folder)
    image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    with pytest.raises(ValueError, match=f"is 61 in config.json, but the tokenizer has <image> as {image_token_id}"):
        convert_checkpoint(folder, tmp_path / "vtlmm")
    (folder / "config.json").write_text(json.dumps({**values, "image_token_index": image_token_id}))

    convert_checkpoint(folder, tmp_path / "vtlmm")
    processor = VTLMMProcessor.from_pretrained(tmp_path / "vtlmm")
    assert processor.chat_template == template and "does not mark answers" in caplog.text
    assert processor.num_image_tokens(28, 28) == 4 and processor.tokenizer.padding_side == "left"
    assert not getattr(processor.image_processor, "do_pad", False) and processor.image_processor.do_center_crop
    generation = GenerationConfig.from_pretrained(tmp_path / "vtlmm")
    assert generation.suppress_tokens == [image_token_id] and generation.pad_token_id == tokenizer.pad_token_id

    assert "crops the center of each image" in caplog.text

    caplog.clear()
    command = ["convert", str(folder), "--output", str(tmp_path / "named"), "--chat-template", "vicuna_v1"]
    assert main([*command, "--pad-to-square"]) == 0 and "crops the center" not in caplog.text
    named = VTLMMProcessor.from_pretrained(tmp_path / "named")
    assert named.chat_template == load_template("vicuna_v1") and named.image_processor.do_pad
    wide = Image.new("RGB", (56, 28), "red")
    wide.paste("blue", (0, 0, 10, 28))  # at the side, which the crop takes away
    cropped, padded = (p.image_processor(wide, return_tensors="pt")["pixel_values"][0] for p in (processor, named))
    assert cropped.shape == padded.shape and cropped.std(dim=(1, 2)).max() < 1e-3 < padded.std(dim=(1, 2)).min()
    values["vision_config"]["model_type"] = "siglip_vision_model"
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="siglip_vision_model sees the whole image"):
        convert_checkpoint(folder, tmp_path / "siglip", pad_to_square=True)
    assert main([*command, "--tokenizer", "x"]) == 1


def test_pixtral_is_rejected(llava, tmp_path):
    folder = llava()
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "vision_config": {"model_type": "pixtral"}}))
    with pytest.raises(ValueError, match="Pixtral takes images of any size"):
        convert_checkpoint(folder, tmp_path / "vtlmm")
