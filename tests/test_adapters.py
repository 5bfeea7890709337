# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""LoRA, DoRA and quantised bases: what is quantised, what learns, what is saved, and merging it."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from peft.utils.integrations import dequantize_module_weight
from PIL import Image
from safetensors.torch import load_file, save_file
from test_remote_code import LOAD, in_clean_process
from training_setup import write_start
from transformers import LlavaForConditionalGeneration

from modeling_vtlmm import VTLMMForConditionalGeneration
from vtlmm.cli.main import main
from vtlmm.train.config import VTLMMTrainingConfig
from vtlmm.train.merge import merge, round_weights
from vtlmm.train.qlora import DECODER_PROJECTIONS
from vtlmm.train.run import build_trainer, run_training
from vtlmm.train.stages import describe


pytest.importorskip("bitsandbytes")

LORA = {"adapter": "lora", "lora_r": 2, "learning_rate": 1e-2}
QLORA = {**LORA, "quantization": "nf4"}
PROJECTIONS = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
DECODER_LINEARS = {f"model.language_model.layers.{i}.{name}" for i in range(2) for name in PROJECTIONS}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return write_start(tmp_path_factory.mktemp("adapters"), vm_head_type="mlp")


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return write_start(tmp_path_factory.mktemp("tied"), "qwen2")


def learning(trainer) -> set[str]:
    return {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}


# ---- What is quantised, what learns ----


@pytest.mark.parametrize(
    ("quantization", "layer", "storage"), [("nf4", "Linear4bit", torch.uint8), ("int8", "Linear8bitLt", torch.int8)]
)
def test_layer_by_layer(settings, tmp_path, quantization, layer, storage):
    """Exactly the decoder's projections are quantised; the rest keeps `dtype`, and what learns is float32."""
    chosen = {"quantization": quantization, "adapter": "lora", "dtype": "bfloat16", "bf16": True}
    trainer = build_trainer({**settings, **chosen, "output_dir": str(tmp_path)})
    model = trainer.model.get_base_model()
    quantised = set()
    for name, module in model.named_modules():
        if type(module).__name__ == layer and hasattr(module, "base_layer"):  # LoRA's class has the same name
            quantised.add(name)
            weight = module.base_layer.weight
            assert type(module.base_layer).__name__ == layer and weight.dtype == storage, name
            if quantization == "nf4":
                state = weight.quant_state
                assert (state.quant_type, state.nested) == ("nf4", True), name
                assert module.base_layer.compute_dtype == torch.bfloat16, name
        elif isinstance(module, torch.nn.Linear) and ".base_layer" not in name and ".lora_" not in name:
            assert type(module).__module__.split(".")[0] in ("torch", "modeling_vtlmm"), name
    assert quantised == DECODER_LINEARS
    plain = VTLMMForConditionalGeneration.from_pretrained(settings["model"]).model.language_model
    adapter = sum(parameter.numel() for name, parameter in model.named_parameters() if ".lora_" in name)
    count = sum(parameter.numel() for parameter in plain.parameters()) + adapter
    assert f" {count:,} parameters" in describe(trainer.model, trainer.stage)
    for name, parameter in model.named_parameters():
        if name.removesuffix(".base_layer.weight") not in quantised:
            assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16), name
    trainer.train()  # bfloat16 and float32 meet in every loss
    assert trainer.state.log_history[0]["lm_loss"] > 0


@pytest.mark.parametrize(
    ("stage", "in_full"),
    [
        ("projector", ["model.multi_modal_projector"]),
        ("decoder", ["model.multi_modal_projector", "lm_head"]),
        ("visual_head", ["model.vm_head"]),
        ("joint", ["lm_head"]),
    ],
)
@pytest.mark.parametrize(
    ("adapter", "quantization"),
    [("lora", "none"), ("dora", "none"), ("lora", "nf4"), ("dora", "nf4"), ("lora", "int8")],
)
def test_exactly_this_learns(settings, tmp_path, stage, in_full, adapter, quantization):
    """By name, for each stage and kind of adapter; and all of it is in the saved folder."""
    options = {"stage": stage, "adapter": adapter, "quantization": quantization, "output_dir": str(tmp_path)}
    trainer = build_trainer({**settings, **options})
    parts = ["lora_A", "lora_B"] + ["lora_magnitude_vector"] * (adapter == "dora")
    expected = set()
    if stage in ("decoder", "joint"):
        expected |= {f"{layer}.{part}.default.weight" for layer in DECODER_LINEARS for part in parts}
    start = load_file(Path(settings["model"], "model.safetensors"))
    for module in in_full:
        inside = [name.removeprefix(module) for name in start if name.startswith(module + ".")]
        expected |= {f"{module}.modules_to_save.default{name}" for name in inside}
    found = {name.removeprefix("base_model.model.") for name in learning(trainer)}
    assert found == expected
    # neither type nor value went through bfloat16
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32
            if "modules_to_save" in name and "vm_head" not in name:
                own = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
                assert torch.equal(parameter, start[own]), name
            elif name.endswith("vm_head.modules_to_save.default.weight"):  # begins as a copy of the LM head
                assert torch.equal(parameter, start["lm_head.weight"][: len(parameter)])
            elif "lora_A" in name:
                assert not torch.equal(parameter, parameter.bfloat16().float()), name
    trainer.save_model()
    saved = load_file(tmp_path / "adapter_model.safetensors")
    short = {name.replace(".modules_to_save.default", "").replace(".default", "") for name in expected}
    assert {name.removeprefix("base_model.model.") for name in saved} == {
        name.removesuffix(".weight") if "magnitude" in name else name for name in short
    }


def test_what_learns_moves_and_nothing_else(settings, tmp_path):
    """In three steps: the first has learning rate 0, and LoRA's A rests until its B has left zero."""
    trainer = build_trainer({**settings, **QLORA, "max_steps": 3, "output_dir": str(tmp_path)})
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == learning(trainer)


def test_a_seed_is_a_run(settings):
    """LoRA's first values are drawn before TRL and transformers set the seed."""
    one, other = (build_trainer({**settings, **LORA, "seed": 7}) for _ in range(2))
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_tied_embeddings_stay_one_matrix(tied, tmp_path):
    """LoRA with a head that is the embedding matrix: one trained copy, in the model and in the merged folder."""
    trainer = run_training({**tied, **LORA, "output_dir": str(tmp_path / "adapter")})
    model = trainer.model.get_base_model()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert main(["merge", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged")]) == 0
    merged = VTLMMForConditionalGeneration.from_pretrained(tmp_path / "merged")
    assert merged.lm_head.weight is merged.get_input_embeddings().weight and merged.config.tie_word_embeddings
    assert_equal_outputs(trainer, merged)


@pytest.mark.parametrize(
    ("leaking", "reached"),
    [
        (DECODER_PROJECTIONS.replace(".*language_model", ""), "vision_tower"),  # it has modules of the same names
        (r".*(language_model.*q_proj|linear_1)", "multi_modal_projector"),
        (r".*(language_model.*q_proj|vm_head\.mixer\.input)", "vm_head"),
    ],
)
def test_lora_must_not_leave_the_decoder(settings, leaking, reached):
    with pytest.raises(ValueError, match=rf"reaches .*{reached}.*outside the decoder"):
        build_trainer({**settings, **LORA, "lora_target_modules": leaking})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization": "nf4", "adapter": "none"}, "set `adapter` to lora or dora"),
        ({"quantization": "int8", "adapter": "dora"}, "DoRA does not work on an int8 base"),
        ({"dtype": "bfloat16", "bf16": False}, "set `bf16: true`"),
        ({"vm_head_init": "random"}, "add vm_head to `trainable_modules`"),
        ({"vm_head_type": "mlp"}, "add vm_head to `trainable_modules`"),
    ],
)
def test_settings_that_do_not_go_together(settings, changes, message):
    with pytest.raises(ValueError, match=message):
        build_trainer({**settings, **LORA, **changes})


def test_learning_rates(settings):
    """LoRA's own beside that of what learns in full."""
    trainer = build_trainer({**settings, "adapter": "lora", "adapter_learning_rate": 2e-4})
    rates = {p: group["lr"] for group in trainer.create_optimizer().param_groups for p in group["params"]}
    for name, parameter in trainer.model.named_parameters():
        assert rates.get(parameter) == ((2e-4 if "lora_" in name else 2e-5) if parameter.requires_grad else None)


# ---- Gradients ----


def gradients(trainer) -> dict[str, torch.Tensor]:
    """Of one training batch, at a LoRA that is not zero any more."""
    trainer.model.zero_grad()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor([6, 8])).backward()
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_gradient_checkpointing_changes_nothing(settings, tmp_path, quantization):
    """Neither what two steps of SGD learn, nor that a frozen tower is not run backward."""
    options = {"lora_dropout": 0.0, "optim": "sgd", "learning_rate": 0.1, "warmup_steps": 0, "max_grad_norm": 0.0}
    options = {**settings, **LORA, **options, "quantization": quantization, "output_dir": str(tmp_path)}
    learnt = {}
    for checkpointing in (False, True):
        trainer = build_trainer({**options, "gradient_checkpointing": checkpointing})
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
        trainer.train()
        model = trainer.model.get_base_model()
        assert model.is_gradient_checkpointing == checkpointing
        pixel_values = trainer.data_collator([trainer.train_dataset[0]])["pixel_values"]
        assert not model.get_image_features(pixel_values).image_features.requires_grad
        learnt[checkpointing] = {name: trainer.model.get_parameter(name) - before[name] for name in before}
    for name, update in learnt[False].items():
        assert update.abs().max() > 0, name
        torch.testing.assert_close(learnt[True][name], update, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_a_resting_decoder_keeps_nothing_for_a_backward(settings, tmp_path, adapter):
    """Stage III under gradient checkpointing, which makes transformers ask for gradients at the embeddings."""
    options = {"stage": "visual_head", "adapter": adapter, "gradient_checkpointing": True}
    trainer = build_trainer({**settings, **options, "output_dir": str(tmp_path)})
    trainer.train()
    batch = trainer.data_collator([trainer.train_dataset[0]])
    batch.pop("labels")
    model = trainer.model.get_base_model() if adapter == "lora" else trainer.model
    assert not model.model(**batch).last_hidden_state.requires_grad


def test_evaluation_leaves_the_gradient_through_4_bit_weights(settings):
    """On a CPU with bfloat16 instructions bitsandbytes would repack them, and the gradient be wrong without a word."""
    trainer = build_trainer({**settings, **QLORA, "lora_dropout": 0.0})
    expected = gradients(trainer)
    trainer.evaluate(trainer.train_dataset)
    found = gradients(trainer)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_paged_optimizers_need_cuda(tmp_path):
    with pytest.raises(ValueError, match="needs CUDA: without it set `optim: adamw_torch`"):
        VTLMMTrainingConfig(output_dir=str(tmp_path), use_cpu=True, optim="paged_adamw_8bit")


# ---- Resuming ----

RESUMED = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "train_sampling_strategy": "random"}
KINDS = {"lora": {**LORA, **RESUMED}, "qlora": {**QLORA, **RESUMED}}
KILLED = textwrap.dedent(
    """
    import json, os, signal, sys
    from transformers import TrainerCallback
    import conftest
    from vtlmm.train.run import build_trainer

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                os.kill(os.getpid(), signal.SIGKILL)

    ends = []
    for settings in json.loads(sys.argv[1]):
        process = os.fork()  # spares the imports
        if process == 0:
            trainer = build_trainer(settings)
            trainer.add_callback(Kill())
            trainer.train()
            os._exit(0)
        ends.append(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
    print(ends)
    """
)


@pytest.fixture(scope="module")
def killed(settings, tmp_path_factory):
    """For each kind the folder of a run that SIGKILL ended one step after its checkpoint."""
    folders = {kind: tmp_path_factory.mktemp("killed") for kind in KINDS}
    runs = [{**settings, **KINDS[kind], "output_dir": str(folder)} for kind, folder in folders.items()]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", KILLED, json.dumps(runs)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.stdout.splitlines()[-1] == "[-9, -9]", result.stderr[-3000:]
    return folders


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_resumes_to_the_same_weights(settings, killed, tmp_path, kind):
    assert [path.name for path in killed[kind].glob("checkpoint-*")] == ["checkpoint-2"]
    whole = run_training({**settings, **KINDS[kind], "output_dir": str(tmp_path)})
    options = {"output_dir": str(killed[kind]), "resume_from_checkpoint": True}
    resumed = run_training({**settings, **KINDS[kind], **options})
    assert resumed.state.global_step == 6 and learning(resumed) == learning(whole)
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == (
        killed[kind] / "adapter_model.safetensors"
    ).read_bytes()


def test_resuming_from_an_adapter_that_lacks_a_tensor_is_refused(settings, tmp_path):
    options = {**settings, **LORA, **RESUMED, "max_steps": 2, "output_dir": str(tmp_path)}
    build_trainer(options).train()
    path = tmp_path / "checkpoint-2" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "base_model.model.model.language_model.layers.1.mlp.up_proj.lora_B.weight"
    del tensors[name]  # PEFT would only warn
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"does not fit the model: missing \['{name}'\]"):
        run_training({**options, "resume_from_checkpoint": True})


# ---- The folder, and merging ----


def assert_equal_outputs(trainer, merged, tolerance: float = 1e-5):
    batch = trainer.data_collator([trainer.train_dataset[0]])
    batch.pop("labels")
    trainer.model.eval(), merged.eval()
    with torch.no_grad():
        expected, found = (model(**batch, output_visual_logits=True) for model in (trainer.model, merged))
    torch.testing.assert_close(found.logits, expected.logits, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(found.visual_logits, expected.visual_logits, atol=tolerance, rtol=tolerance)


EXTRA = textwrap.dedent(
    """
    from peft import PeftModel
    base = transformers.AutoModelForImageTextToText.from_pretrained(BASE, **trust)
    adapted = PeftModel.from_pretrained(base, ADAPTER)
    for name, folder, adapted in (("adapter", ADAPTER, adapted), ("merged", folder, model)):
        processor = AutoProcessor.from_pretrained(folder, **trust)
        inputs = processor(text=["<image> what"], images=[image], return_tensors="pt")
        found[name] = adapted(**inputs).logits[0, -1].tolist()
    """
)


def test_the_adapter_folder_and_the_merged_one_load_without_this_package(settings, tmp_path):
    """From stage II, where LoRA, the projector and the head learn."""
    adapter, merged, again = tmp_path / "adapter", tmp_path / "merged", tmp_path / "again"
    options = {"stage": "decoder", "base_id": "someone/vt-lmm-base", "output_dir": str(adapter)}
    trainer = run_training({**settings, **LORA, **options})
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/vt-lmm-base"
    assert "base_model: someone/vt-lmm-base" in (adapter / "README.md").read_text()
    assert main(["merge", str(adapter), "--output", str(merged), "--base", settings["model"]]) == 0
    assert_equal_outputs(trainer, VTLMMForConditionalGeneration.from_pretrained(merged))
    assert main(["convert", str(merged), "--to", "llava", "--output", str(tmp_path / "twin")]) == 0
    twin = LlavaForConditionalGeneration.from_pretrained(tmp_path / "twin").eval()
    batch = trainer.data_collator([trainer.train_dataset[0]])
    with torch.no_grad():
        expected, found = (model(**batch).logits for model in (trainer.model, twin))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)

    code = LOAD.replace('print("FOUND"', EXTRA.replace("BASE", repr(settings["model"])) + 'print("FOUND"')
    cache = tmp_path / "cache"
    cache.mkdir()
    found = in_clean_process(code.replace("ADAPTER", repr(str(adapter))), merged, again, cache=cache)
    generated = [found[name] for name in found if name.startswith("AutoModel")]
    assert len(generated) == 4 and all(ids == generated[0] for ids in generated)
    torch.testing.assert_close(torch.tensor(found["adapter"]), torch.tensor(found["merged"]), atol=1e-5, rtol=1e-5)
    image = Image.new("RGB", (40, 30), (200, 30, 30))
    inputs = trainer.processing_class(text=["<image> what"], images=[image], return_tensors="pt")
    here = trainer.model(**inputs).logits[0, -1]
    torch.testing.assert_close(here, torch.tensor(found["adapter"]), atol=1e-5, rtol=1e-5)


def test_an_adapter_of_a_local_base_names_no_folder_in_its_card(settings, tmp_path):
    """The Hub refuses a card whose base model is a path."""
    build_trainer({**settings, **LORA, "output_dir": str(tmp_path)}).save_model()
    card = (tmp_path / "README.md").read_text()
    assert "library_name: peft" in card and settings["model"] not in card and "base_model" not in card


@pytest.mark.parametrize(
    "changes", [{"use_pseudo_image_features": True}, {"stage": "visual_head", "vm_head_type": "attention"}]
)
def test_merging_keeps_what_the_run_changed_of_the_model(settings, tmp_path, changes):
    """An adapter's folder has no configuration of the model: it stands in the record of the run."""
    trainer = run_training({**settings, **LORA, **changes, "output_dir": str(tmp_path / "adapter")})
    merge(tmp_path / "adapter", tmp_path / "merged")
    assert_equal_outputs(trainer, VTLMMForConditionalGeneration.from_pretrained(tmp_path / "merged"))


def test_stage_four_after_stage_three_on_a_quantised_base(settings, tmp_path, capsys):
    """III, merge, IV, merge; an adapter itself is no start."""
    three, merged, four = tmp_path / "three", tmp_path / "merged", tmp_path / "four"
    run_training({**settings, **QLORA, "stage": "visual_head", "output_dir": str(three)})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({**settings, **QLORA, "model": str(three), "output_dir": str(four)}))
    assert main(["train", "--config", str(recipe)]) == 1
    assert f"`vtlmm merge {three} --output FOLDER`, then set `model: FOLDER`" in capsys.readouterr().err
    assert main(["merge", str(three), "--output", str(merged)]) == 0
    whole, start = (load_file(Path(folder, "model.safetensors")) for folder in (merged, settings["model"]))
    changed = {name for name in whole if not torch.equal(whole[name], start[name])}
    assert changed and all(name.startswith("model.vm_head.") for name in changed)
    assert main(["train", "--config", str(recipe), f"model={merged}"]) == 0
    history = json.loads((four / "vtlmm_run.json").read_text())
    assert [entry["stage"] for entry in history] == ["visual_head", "joint"]


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_merging_into_the_base_as_it_was_quantised(settings, tmp_path, adapter):
    """Equal outputs on the dequantised base; on the base in full precision they are others, which is said."""
    options = {**QLORA, "adapter": adapter, "output_dir": str(tmp_path / "adapter")}
    trainer = run_training({**settings, **options})
    for name, flags in {"exact": ["--dequantize"], "near": []}.items():
        assert main(["merge", str(tmp_path / "adapter"), "--output", str(tmp_path / name), *flags]) == 0
    assert_equal_outputs(trainer, VTLMMForConditionalGeneration.from_pretrained(tmp_path / "exact"))
    with pytest.raises(AssertionError):
        assert_equal_outputs(trainer, VTLMMForConditionalGeneration.from_pretrained(tmp_path / "near"), 1e-3)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_the_base_is_rounded_as_it_was_in_training(settings, quantization):
    """Weights in bfloat16 give other 4-bit weights than those in float32."""
    chosen = {**LORA, "quantization": quantization, "dtype": "bfloat16", "bf16": True}
    model = build_trainer({**settings, **chosen}).model.get_base_model()
    merged = VTLMMForConditionalGeneration.from_pretrained(settings["model"], dtype=torch.float32)
    round_weights(merged, settings["model"], None, quantization, "bfloat16")
    for name in DECODER_LINEARS:
        expected = dequantize_module_weight(model.get_submodule(name).base_layer)
        assert torch.equal(merged.get_submodule(name).weight, expected.float()), name


def test_a_merge_that_merges_nothing_is_refused(settings, tmp_path, capsys):
    adapter = tmp_path / "adapter"
    trainer = build_trainer({**settings, **LORA, "output_dir": str(adapter)})
    trainer.save_model()  # before a step was made
    command = ["merge", str(adapter), "--output", str(tmp_path / "merged")]
    assert main(command) == 1
    assert "15 leave the base" in capsys.readouterr().err
    assert main([*command, "--dequantize"]) == 1
    assert "says that the base was quantised" in capsys.readouterr().err
    assert main([*command, "--base", str(tmp_path / "gone")]) == 1
    assert "say where it is with `--base`" in capsys.readouterr().err
    # names of another decoder: PEFT alone would warn, and merge nothing
    path = adapter / "adapter_model.safetensors"
    save_file({name.replace("layers.1.", "layers.7."): t for name, t in load_file(path).items()}, path)
    assert main(command) == 1
    assert "does not fit the model: missing" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()
