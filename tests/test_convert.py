# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Converted checkpoints of the release against everything that the released code computed from them."""

import json
import shutil

import pytest
import torch
from helpers.byte_tokenizers import byte_tokenizer
from helpers.released_checkpoints import CLOSE, NUM_PATCHES, NUM_WORDS, Case, converted
from safetensors.torch import load_file, save_file

from modeling_vtlmm import VTLMMForConditionalGeneration, VTLMMProcessor
from vtlmm.hub.checkpoint_files import list_tensors, our_name, their_name
from vtlmm.hub.convert import convert_checkpoint
from vtlmm.hub.source_formats import ORIGINAL_NAMES


FOLDERS = ("llama-0", "mistral-1", "pif-2")


@pytest.fixture(scope="module", params=FOLDERS)
def case(request, shared, tmp_path_factory) -> Case:
    return Case(shared / "reference" / request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(shared):
    return shared / "reference" / "llama-0"


@torch.no_grad()
def test_outputs_are_the_released_ones(case):
    golden, model = case.golden, case.model
    assert torch.equal(case.inputs["attention_mask"], golden["expanded_attention_mask"].long())
    assert torch.equal(case.labels, golden["expanded_labels"])
    seen = {}
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    outputs = model(**case.inputs, output_visual_logits=True)
    hook.remove()
    assert torch.equal(outputs.image_token_mask, golden["image_positions"].bool())
    torch.testing.assert_close(outputs.logits[..., :NUM_WORDS], golden["logits"], **CLOSE)
    torch.testing.assert_close(seen["inputs_embeds"], golden["inputs_embeds"], **CLOSE)
    torch.testing.assert_close(outputs.image_outputs.image_features, golden["adapter_features"], **CLOSE)
    logprobs = outputs.visual_logits.log_softmax(-1)
    torch.testing.assert_close(logprobs, golden["visual_token_logprobs"], **CLOSE)
    assert model.config.use_pseudo_image_features == ("pseudo_image_features" in golden)
    if model.config.use_pseudo_image_features:
        pseudo = torch.stack(model.get_image_features(golden["pixel_values"]).pooler_output)
        torch.testing.assert_close(pseudo, golden["pseudo_image_features"], **CLOSE)


@torch.no_grad()
def test_text_alone(case):
    logits = case.model(case.golden["text_only_input_ids"]).logits[..., :NUM_WORDS]
    torch.testing.assert_close(logits, case.golden["text_only_logits"], **CLOSE)


def test_the_same_words_are_generated(case):
    model, expected = case.model, case.golden["generate_output_ids"]
    stops, model.generation_config.eos_token_id = model.generation_config.eos_token_id, None
    generated = model.generate(**case.generate_inputs, max_new_tokens=expected.shape[1])
    model.generation_config.eos_token_id = stops
    assert torch.equal(generated[:, -expected.shape[1] :], expected)
    assert model.lm_head.weight.shape[0] == NUM_WORDS == model.config.image_token_id


@torch.no_grad()
def test_losses_are_the_released_ones(case):
    golden = case.golden
    stage_3 = case.losses(case.model, "vm_head")[1]
    lm_loss, stage_4 = case.losses(case.model, "lm_head")
    torch.testing.assert_close(stage_3, golden["stage3_loss_vm"], **CLOSE)
    torch.testing.assert_close(stage_4, golden["stage4_loss_vm"], **CLOSE)

    torch.testing.assert_close(lm_loss, golden["loss_lm"], **CLOSE)
    torch.testing.assert_close(lm_loss + stage_4, golden["stage4_loss"], **CLOSE)


def test_gradients_are_the_released_ones(case):
    def grads(stage: str, loss: torch.Tensor):
        expected = {n.removeprefix(stage): g for n, g in case.golden.items() if n.startswith(stage)}
        model.zero_grad()
        loss.backward()
        for name, gradient in expected.items():
            found = model.get_parameter(our_name(name, ORIGINAL_NAMES)).grad
            torch.testing.assert_close(found, gradient, **CLOSE, msg=lambda text, n=name: n + text)
        return set(expected)

    model = VTLMMForConditionalGeneration.from_pretrained(case.output)
    assert len(grads("stage4_grad.", sum(case.losses(model, "lm_head")))) == 8
    found = grads("stage3_grad.", case.losses(model, "vm_head")[1])
    assert found == (set() if case.folder.name == "pif-2" else {"vm_head.weight"})


def test_the_folder_is_the_one_that_the_model_saves(case, tmp_path):
    """Nothing of it was written by a model; the model that is loaded from it writes the same."""
    assert not case.model.training
    case.model.save_pretrained(tmp_path)
    written, saved = load_file(case.output / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert written.keys() == saved.keys() and all(torch.equal(written[name], saved[name]) for name in saved)
    assert {file.name for file in case.output.iterdir()} == {file.name for file in tmp_path.iterdir()}
    for file in tmp_path.iterdir():
        if file.suffix != ".safetensors":
            assert (case.output / file.name).read_text() == file.read_text(), file.name
    assert str(case.folder.parent) not in (case.output / "config.json").read_text()


def test_names_go_both_ways(llama):
    tensors = load_file(llama / "checkpoint" / "model.safetensors")
    assert all(their_name(our_name(name, ORIGINAL_NAMES), ORIGINAL_NAMES) == name for name in tensors)


def test_the_processor_is_the_release_s(llama, tmp_path):
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    model = converted(llama / "checkpoint", tmp_path / "out", tokenizer=tmp_path / "tokenizer")
    processor = VTLMMProcessor.from_pretrained(tmp_path / "out")
    assert processor.image_processor.do_pad and processor.image_processor.crop_size.height == 28
    assert processor.tokenizer.pad_token == "<unk>" and processor.tokenizer.padding_side == "left"
    assert processor.image_token_id == model.config.image_token_id == 259  # a spare row of the released 320
    assert model.get_input_embeddings().weight.shape[0] == NUM_WORDS == model.config.visual_vocab_size
    assert processor.num_image_tokens(28, 28) == model.config.image_seq_length == NUM_PATCHES
    text = processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}])
    assert text.endswith("questions. USER: <image>")


@pytest.fixture
def copy(llama, tmp_path):
    """Function that writes llama-0 anew, with changed tensors and config, and gives its checkpoint folder."""

    def write(change_tensors=lambda tensors: tensors, as_bin: bool = False, num_shards: int = 1, **config):
        folder = tmp_path / "copy"
        shutil.copytree(llama / "vision_tower", folder / "vision_tower", dirs_exist_ok=True)
        checkpoint = folder / "checkpoint"
        checkpoint.mkdir(exist_ok=True)
        values = json.loads((llama / "checkpoint" / "config.json").read_text())
        (checkpoint / "config.json").write_text(json.dumps({**values, **config}))
        tensors = change_tensors(load_file(llama / "checkpoint" / "model.safetensors"))
        stem, suffix, store = ("pytorch_model", "bin", torch.save) if as_bin else ("model", "safetensors", save_file)
        files = {}
        for i in range(num_shards):
            file = f"{stem}.{suffix}" if num_shards == 1 else f"{stem}-{i + 1:05}-of-{num_shards:05}.{suffix}"
            files[file] = dict(list(tensors.items())[i::num_shards])
            store(files[file], checkpoint / file)
        if num_shards > 1:
            weight_map = {name: file for file, part in files.items() for name in part}
            (checkpoint / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return checkpoint

    return write


def without(*beginnings: str):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.startswith(beginnings)}


@pytest.mark.parametrize(("as_bin", "num_shards"), [(False, 3), (True, 1), (True, 2)])
def test_every_kind_of_file(llama, copy, tmp_path, as_bin, num_shards):
    expected = {
        our_name(name, ORIGINAL_NAMES): tensor
        for name, tensor in load_file(llama / "checkpoint" / "model.safetensors").items()
    }
    convert_checkpoint(copy(as_bin=as_bin, num_shards=num_shards), tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_pickle_with_code_is_rejected(copy, tmp_path):
    checkpoint = copy(as_bin=True)
    torch.save({"lm_head.weight": torch.nn.Linear(2, 2)}, checkpoint / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin cannot be read.*[Ww]eights.only"):
        convert_checkpoint(checkpoint, tmp_path / "out")


def test_tower_is_read_from_another_folder(copy, llama, tmp_path):
    towerless = without("model.vision_tower.")
    case = Case(llama, tmp_path / "case")
    model = converted(copy(towerless), tmp_path / "beside")
    with torch.no_grad():
        logits = model(**case.inputs).logits[..., :NUM_WORDS]
    torch.testing.assert_close(logits, case.golden["logits"], **CLOSE)
    checkpoint = copy(towerless, mm_vision_tower="no/such")
    convert_checkpoint(checkpoint, tmp_path / "given", vision_tower=str(llama / "vision_tower"))
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("given", "beside"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(ValueError, match="Pass `vision_tower`"):
        convert_checkpoint(copy(towerless, mm_vision_tower=None), tmp_path / "none")


def test_tensors_that_do_not_fit_are_named(copy, tmp_path):
    def refused(change, match: str, **kwargs):
        with pytest.raises(ValueError, match=match):
            convert_checkpoint(copy(change, **kwargs), tmp_path / "out")

    lacking = without("vm_head.", "model.layers.1.mlp.up_proj.")
    refused(lacking, r"missing from model\.safetensors: model\.layers\.1\.mlp\.up_proj\.weight, vm_head\.weight\.$")
    tower = r"model\.vision_tower\.vision_tower\.vision_model\.pre_layrnorm\."
    refused(without(tower.replace("\\", "")), tower + "bias, " + tower + "weight")

    def add(tensors):
        derived = "model.layers.0.self_attn.rotary_emb.inv_freq"
        return {**tensors, derived: torch.zeros(8), "model.image_newline": torch.zeros(64)}

    refused(add, r"unexpected: model\.image_newline \(model\.safetensors\)\.$")
    shorter = {"vm_head.weight": torch.zeros(319, 64)}
    said = r"of a shape that differs from the config: vm_head\.weight \(model\.safetensors\)\.$"
    refused(lambda tensors: {**tensors, **shorter}, said)
    refused(add, r"model\.image_newline \(model-0000[12]-of-00002\.safetensors\)\.$", num_shards=2)
    assert not (tmp_path / "out").exists()


def test_decoder_config_is_kept(copy, tmp_path):
    """Mistral v0.2 has no sliding window and another rotary base than the defaults of transformers."""
    mistral = {"architectures": ["vwMistralForCausalLM"], "rope_theta": 1e6, "sliding_window": None}
    text_config = converted(copy(**mistral), tmp_path / "out").config.text_config
    assert text_config.model_type == "mistral" and text_config.sliding_window is None
    assert text_config.rope_parameters["rope_theta"] == 1e6
    assert not [key for key in text_config.to_dict() if key.startswith("mm_") or key == "use_mm_proj"]


LLAVA = {"architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava_llama"}


@pytest.mark.parametrize("source", ["lm_head", "input_embeddings", "random"])
def test_original_llava_format(llama, copy, tmp_path, source):
    """The decoder is unchanged, and a VM head is initialized."""
    case = Case(llama, tmp_path / "case")
    checkpoint = copy(without("vm_head."), **{**LLAVA, "architectures": None})
    model = converted(checkpoint, tmp_path / "out", vm_head_init=source)
    with torch.no_grad():
        logits = model(**case.inputs).logits[..., :NUM_WORDS]
    torch.testing.assert_close(logits, case.golden["logits"], **CLOSE)
    head = model.model.vm_head.weight
    expected = {"lm_head": model.lm_head.weight, "input_embeddings": model.get_input_embeddings().weight}.get(source)
    assert torch.equal(head, expected) if expected is not None else 0.019 < head.std() < 0.021


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, "architecture GPT2LMHeadModel .*'gpt2'"),
        ({"architectures": None, "model_type": None}, "architecture None"),
        ({"mm_projector_type": "linear"}, "`mm_projector_type` is 'linear'"),
        ({"mm_use_im_start_end": True}, "`mm_use_im_start_end` is True"),
        ({**LLAVA, "image_aspect_ratio": "anyres"}, "`image_aspect_ratio` is 'anyres'; only 'pad' or 'square'"),
        ({**LLAVA, "mm_patch_merge_type": "spatial_unpad"}, "`mm_patch_merge_type` is 'spatial_unpad'"),
        ({"quantization_config": {"load_in_4bit": True}}, "weights are quantized"),
    ],
)
def test_other_formats_are_rejected(copy, tmp_path, config, said):
    with pytest.raises(ValueError, match=said):
        convert_checkpoint(copy(**config), tmp_path / "out")


def test_folder_without_a_checkpoint_is_rejected(copy, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="no config.json. It is an adapter; merge it"):
        convert_checkpoint(tmp_path, tmp_path / "out")
    (tmp_path / "config.json").write_text('{"model_type": "lla')
    with pytest.raises(ValueError, match="config.json is not valid JSON"):
        convert_checkpoint(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("as_bin", [False, True])
def test_damaged_files_are_named(copy, tmp_path, as_bin):
    checkpoint = copy(num_shards=2, as_bin=as_bin)
    index, first, second = sorted(checkpoint.glob("*model*"), key=lambda file: (file.suffix != ".json", file.name))
    whole = second.read_bytes()
    second.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"{second.name} cannot be read"):
        convert_checkpoint(checkpoint, tmp_path / "out")
    shutil.copy(first, second)
    with pytest.raises(ValueError, match=f"{second.name}: tensors that the index lists are missing: "):
        convert_checkpoint(checkpoint, tmp_path / "out")
    second.unlink()
    with pytest.raises(ValueError, match=f"missing files: {second.name}"):
        convert_checkpoint(checkpoint, tmp_path / "out")
    index.unlink()
    with pytest.raises(ValueError, match="contains no weights"):
        convert_checkpoint(checkpoint, tmp_path / "out")


def test_existing_output_and_input_are_not_overwritten(copy):
    checkpoint = copy()
    before = {file.name: file.read_bytes() for file in checkpoint.iterdir()}
    with pytest.raises(ValueError, match="is or contains the input"):
        convert_checkpoint(checkpoint, checkpoint, overwrite=True)
    with pytest.raises(FileExistsError, match=r"already contains files \(config\.json"):
        convert_checkpoint("nobody/has-this", checkpoint)  # before anything is downloaded
    with pytest.raises(ValueError, match="vicuna_v1 or mistral"):
        convert_checkpoint("nobody/has-this", checkpoint / "out", chat_template="vicuna")
    assert {file.name: file.read_bytes() for file in checkpoint.iterdir()} == before


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("/home/alice/vicuna", False),
        ("../checkpoints/vicuna", False),
        ("C:/vicuna", False),
        ("lmsys/vicuna-7b-v1.5", True),
    ],
)
def test_local_paths_are_removed_from_the_config(copy, tmp_path, name, kept):
    checkpoint = copy()
    values = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**values, "_name_or_path": name}))
    convert_checkpoint(checkpoint, tmp_path / "out")
    assert (name in (tmp_path / "out/config.json").read_text()) is kept


def test_shards(llama, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    convert_checkpoint(llama / "checkpoint", whole)
    convert_checkpoint(llama / "checkpoint", parts, shard_size=200_000)
    expected = load_file(whole / "model.safetensors")
    index = json.loads((parts / "model.safetensors.index.json").read_text())
    files = {file.name: load_file(file) for file in parts.glob("*.safetensors")}
    assert len(files) > 3 and index["weight_map"] == {name: file for file, part in files.items() for name in part}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    assert max(sum(tensor.nbytes for tensor in part.values()) for part in files.values()) <= 200_000
    found = {name: tensor for part in files.values() for name, tensor in part.items()}
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert list_tensors(parts).keys() == expected.keys()
    VTLMMForConditionalGeneration.from_pretrained(parts)


@pytest.mark.parametrize("name", ["./llava", "outputs/llava/joint", "here/joint"])
def test_missing_folder_is_not_looked_up_on_the_hub(name, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vtlmm.hub.paths.download", None)
    with pytest.raises(FileNotFoundError, match=f"The folder '{name}' does not exist"):
        convert_checkpoint(name, tmp_path / "out")


def test_overwrite_removes_the_files_of_the_old_model(copy, tmp_path):
    checkpoint, output = copy(num_shards=2), tmp_path / "out"
    convert_checkpoint(checkpoint, output, shard_size=200_000)
    (output / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="--overwrite"):
        convert_checkpoint(checkpoint, output)
    convert_checkpoint(checkpoint, output, overwrite=True)
    assert [file.name for file in output.glob("*.safetensors*")] == ["model.safetensors"]
    assert (output / "notes.txt").read_text() == "mine"
