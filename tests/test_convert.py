# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Converted checkpoints of the release against everything that the released code computed from them."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_templates import byte_tokenizer

from modeling_vtlmm import VTLMMForConditionalGeneration, VTLMMProcessor
from vtlmm.hub.convert import convert, our_name, read_tensors, released_name


FOLDERS = ("llama-0", "mistral-1", "pif-2")
NUM_WORDS, NUM_PATCHES = 320, 4
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def expand(rows: torch.Tensor, input_ids: torch.Tensor, fill=None) -> torch.Tensor:
    """`rows`, aligned with `input_ids`, with every −200 repeated once per patch (as `fill`, if given)."""
    expanded = []
    for values, ids in zip(rows.tolist(), input_ids.tolist(), strict=True):
        pairs = zip(values, ids, strict=True)
        repeated = ([value] if i != -200 else [value if fill is None else fill] * NUM_PATCHES for value, i in pairs)
        expanded.append(sum(repeated, []))
    return torch.tensor(expanded)


class Case:
    """One reference folder, its golden tensors, and its inputs for the converted model."""

    def __init__(self, folder):
        self.folder = folder
        self.golden = load_file(folder / "golden.safetensors")
        self.model = self.convert()
        image_token_id = self.model.config.image_token_id
        ids = self.golden["input_ids"]
        self.inputs = {
            "input_ids": expand(ids, ids, image_token_id),
            "attention_mask": expand(self.golden["attention_mask"], ids),
            "pixel_values": self.golden["pixel_values"],
        }
        self.labels = expand(self.golden["labels"], ids, -100)

    def convert(self, *args, **kwargs) -> VTLMMForConditionalGeneration:
        return convert(self.folder / "checkpoint", *args, **kwargs)[0]

    def losses(self, model, student: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean language loss and mean visual loss, with the teacher attached as in the release."""
        sums = model(
            **self.inputs,
            labels=self.labels,
            return_loss_sums=True,
            visual_student=student,
            detach_visual_teacher=False,
        ).loss_sums
        return sums["lm_loss"] / sums["num_lm_targets"], sums["visual_loss"] / sums["num_visual_targets"]


@pytest.fixture(scope="module", params=FOLDERS)
def case(request, shared) -> Case:
    return Case(shared / "reference" / request.param)


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
    torch.testing.assert_close(outputs.image_features, golden["adapter_features"], **CLOSE)
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
    golden, model = case.golden, case.model
    ids = golden["generate_input_ids"]
    input_ids = expand(ids, ids, model.config.image_token_id)
    expected = golden["generate_output_ids"]
    stops, model.generation_config.eos_token_id = model.generation_config.eos_token_id, None
    generated = model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        pixel_values=golden["pixel_values"][2:3],
        max_new_tokens=expected.shape[1],
    )
    model.generation_config.eos_token_id = stops
    assert torch.equal(generated[:, input_ids.shape[1] :], expected)
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
            found = model.get_parameter(our_name(name)).grad
            torch.testing.assert_close(found, gradient, **CLOSE, msg=lambda text, n=name: n + text)
        return set(expected)

    model = case.convert()
    assert len(grads("stage4_grad.", sum(case.losses(model, "lm_head")))) == 8
    found = grads("stage3_grad.", case.losses(model, "vm_head")[1])
    assert found == (set() if case.folder.name == "pif-2" else {"vm_head.weight"})


def test_saved_and_reloaded_it_is_the_same(case, tmp_path):
    model, _ = convert(case.folder / "checkpoint", tmp_path)
    again = VTLMMForConditionalGeneration.from_pretrained(tmp_path)
    state, loaded = model.state_dict(), again.state_dict()
    assert state.keys() == loaded.keys() and all(torch.equal(loaded[name], state[name]) for name in state)
    assert {**again.config.to_dict(), "_name_or_path": ""} == model.config.to_dict()
    assert str(case.folder.parent) not in (tmp_path / "config.json").read_text()
    assert (tmp_path / "modeling_vtlmm.py").is_file()


def test_names_go_both_ways(llama):
    tensors = load_file(llama / "checkpoint" / "model.safetensors")
    assert all(released_name(our_name(name)) == name for name in tensors)


def test_the_processor_is_the_release_s(llama, tmp_path):
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    model, processor = convert(llama / "checkpoint", tmp_path / "out", tokenizer=tmp_path / "tokenizer")
    assert processor.image_processor.do_pad and processor.image_processor.crop_size.height == 28
    assert processor.tokenizer.pad_token == "<unk>" and processor.tokenizer.padding_side == "left"
    assert processor.image_token_id == model.config.image_token_id == 259  # a spare row of the released 320
    assert model.get_input_embeddings().weight.shape[0] == NUM_WORDS == model.config.visual_vocab_size
    processor = VTLMMProcessor.from_pretrained(tmp_path / "out")
    assert processor.num_image_tokens(28, 28) == model.config.image_seq_length == NUM_PATCHES
    text = processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}])
    assert text.endswith("questions. USER: <image>")
    assert convert(llama / "checkpoint")[1] is None


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
def test_every_kind_of_file(llama, copy, as_bin, num_shards):
    expected, found = read_tensors(llama / "checkpoint"), read_tensors(copy(as_bin=as_bin, num_shards=num_shards))
    assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_pickle_that_runs_code_is_refused(copy):
    checkpoint = copy(as_bin=True)
    torch.save({"lm_head.weight": torch.nn.Linear(2, 2)}, checkpoint / "pytorch_model.bin")
    with pytest.raises(Exception, match="[Ww]eights.only"):
        convert(checkpoint)


def test_tower_from_where_the_checkpoint_names_it(copy, llama):
    case, towerless = Case(llama), without("model.vision_tower.")
    model, _ = convert(copy(towerless))
    with torch.no_grad():
        logits = model(**case.inputs).logits[..., :NUM_WORDS]
    torch.testing.assert_close(logits, case.golden["logits"], **CLOSE)
    elsewhere = str(llama / "vision_tower")
    assert convert(copy(towerless, mm_vision_tower="no/such-tower"), vision_tower=elsewhere)[0] is not None
    with pytest.raises(ValueError, match="pass `vision_tower`"):
        convert(copy(towerless, mm_vision_tower=None))


def test_tensors_that_do_not_fit_are_named(copy):
    with pytest.raises(ValueError, match=r"missing: model\.layers\.1\.mlp\.up_proj\.weight, vm_head\.weight"):
        convert(copy(without("vm_head.", "model.layers.1.mlp.up_proj.")))
    tower = "model.vision_tower.vision_tower.vision_model.pre_layrnorm."
    with pytest.raises(ValueError, match=tower + "bias, " + tower + "weight"):
        convert(copy(without(tower)))

    def add(tensors):
        derived = "model.layers.0.self_attn.rotary_emb.inv_freq"
        return {**tensors, "model.image_newline": torch.zeros(64), derived: torch.zeros(8)}

    with pytest.raises(ValueError, match=r"without a place in the model: model\.image_newline\.$"):
        convert(copy(add))
    shorter = {"vm_head.weight": torch.zeros(319, 64)}
    with pytest.raises(ValueError, match=r"of another shape than the config says: vm_head\.weight\.$"):
        convert(copy(lambda tensors: {**tensors, **shorter}))


def test_the_decoder_s_config_is_kept(copy):
    """Mistral v0.2 has no window and another rotary base; the library's class has other defaults for both."""
    mistral = {"architectures": ["vwMistralForCausalLM"], "rope_theta": 1e6, "sliding_window": None}
    text_config = convert(copy(**mistral))[0].config.text_config
    assert text_config.model_type == "mistral" and text_config.sliding_window is None
    assert text_config.rope_parameters["rope_theta"] == 1e6
    assert not [key for key in text_config.to_dict() if key.startswith("mm_") or key == "use_mm_proj"]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"architectures": ["LlavaLlamaForCausalLM"]}, "architecture is LlavaLlamaForCausalLM"),
        ({"mm_projector_type": "linear"}, "`mm_projector_type` is 'linear'"),
        ({"mm_use_im_start_end": True}, "`mm_use_im_start_end` is True"),
    ],
)
def test_other_formats_are_refused(copy, config, said):
    with pytest.raises(ValueError, match=said):
        convert(copy(**config))


def test_no_weights(copy):
    checkpoint = copy(num_shards=2)
    (checkpoint / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="not there: model-00002-of-00002.safetensors"):
        convert(checkpoint)
    (checkpoint / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match="No weights in"):
        convert(checkpoint)
