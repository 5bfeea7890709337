# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""LoRA, DoRA and quantized bases: quantized layers, trainable parameters, saved files, and resuming."""

from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.adapter_settings import ADAPTERS, DECODER_LINEARS, LORA, QLORA, QUANTIZED
from helpers.forked import train_until_kill
from helpers.training import write_start
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig

from modeling_vtlmm import VTLMMForConditionalGeneration
from vtlmm.train.adapters import DECODER_PROJECTIONS
from vtlmm.train.config import VTLMMTrainingConfig
from vtlmm.train.stage_runner import build_trainer, run_training
from vtlmm.train.stages import describe


pytestmark = pytest.mark.slow


pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return write_start(tmp_path_factory.mktemp("adapters"), vm_head_type="mlp")


def trainable(trainer) -> set[str]:
    return {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}


# ---- Quantized layers and trainable parameters ----


@pytest.mark.parametrize(
    ("quantization", "layer", "storage"), [("nf4", "Linear4bit", torch.uint8), ("int8", "Linear8bitLt", torch.int8)]
)
def test_layer_by_layer(settings, tmp_path, quantization, layer, storage):
    """Only the decoder's projections are quantized. Trainable parameters are float32, all others `dtype`."""
    chosen = {**QUANTIZED[quantization], "use_peft": True, "dtype": "bfloat16", "bf16": True}
    trainer = build_trainer({**settings, **chosen, "output_dir": str(tmp_path)})
    model = trainer.model.get_base_model()
    quantized = set()
    for name, module in model.named_modules():
        if type(module).__name__ == layer and hasattr(module, "base_layer"):  # LoRA's class has the same name
            quantized.add(name)
            weight = module.base_layer.weight
            assert type(module.base_layer).__name__ == layer and weight.dtype == storage, name
            if quantization == "nf4":
                state = weight.quant_state
                assert (state.quant_type, state.nested) == ("nf4", True), name
                assert module.base_layer.compute_dtype == torch.bfloat16, name
        elif isinstance(module, torch.nn.Linear) and ".base_layer" not in name and ".lora_" not in name:
            assert type(module).__module__.split(".")[0] in ("torch", "modeling_vtlmm"), name
    assert quantized == DECODER_LINEARS
    plain = VTLMMForConditionalGeneration.from_pretrained(settings["model_name_or_path"]).model.language_model
    adapter = sum(parameter.numel() for name, parameter in model.named_parameters() if ".lora_" in name)
    count = sum(parameter.numel() for parameter in plain.parameters()) + adapter
    assert f" {count:,} parameters" in describe(trainer.model, trainer.stage)
    for name, parameter in model.named_parameters():
        if name.removesuffix(".base_layer.weight") not in quantized:
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
def test_trainable_and_saved_parameters_of_each_stage(settings, tmp_path, stage, in_full, adapter, quantization):
    """Compare the names of trainable and of saved parameters with the expected ones."""
    options = {"stage": stage, **ADAPTERS[adapter], **QUANTIZED[quantization], "output_dir": str(tmp_path)}
    trainer = build_trainer({**settings, **options})
    parts = ["lora_A", "lora_B"] + ["lora_magnitude_vector"] * (adapter == "dora")
    expected = set()
    if stage in ("decoder", "joint"):
        expected |= {f"{layer}.{part}.default.weight" for layer in DECODER_LINEARS for part in parts}
    start = load_file(Path(settings["model_name_or_path"], "model.safetensors"))
    for module in in_full:
        inside = [name.removeprefix(module) for name in start if name.startswith(module + ".")]
        expected |= {f"{module}.modules_to_save.default{name}" for name in inside}
    found = {name.removeprefix("base_model.model.") for name in trainable(trainer)}
    assert found == expected
    # neither the dtype nor the values were rounded to bfloat16
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


def test_only_trainable_parameters_change(settings, tmp_path):
    """Three steps: the first has learning rate 0, and LoRA's A gets no gradient while its B is zero."""
    trainer = build_trainer({**settings, **QLORA, "max_steps": 3, "output_dir": str(tmp_path)})
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == trainable(trainer)


def test_the_seed_determines_initial_values(settings):
    """LoRA's initial values are drawn before TRL and transformers set the seed."""
    one, other = (build_trainer({**settings, **LORA, "seed": 7}) for _ in range(2))
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("leaking", "reached"),
    [
        (DECODER_PROJECTIONS.replace(".*language_model", ""), "vision_tower"),  # it has modules with the same names
        (r".*(language_model.*q_proj|linear_1)", "multi_modal_projector"),
        (r".*(language_model.*q_proj|vm_head\.residual_block\.input)", "vm_head"),
    ],
)
def test_lora_outside_the_decoder_is_rejected(settings, leaking, reached):
    with pytest.raises(ValueError, match=rf"reach .*{reached}.*outside the decoder"):
        build_trainer({**settings, **LORA, "lora_target_modules": leaking})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"load_in_4bit": True, "use_peft": False}, "Set `use_peft: true`"),
        ({"load_in_8bit": True, "use_dora": True}, "DoRA does not work with `load_in_8bit`"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "exclude each other"),
        ({"use_peft": False, "use_dora": True}, "`use_dora` needs `use_peft: true`"),
        ({"use_peft": False, "dtype": "float16"}, "loses small updates"),
        ({"dtype": "bfloat16", "bf16": False}, "Set `bf16: true`"),
        ({"vm_head_init": "random"}, "add vm_head to `trainable_modules`"),
        ({"vm_head_type": "mlp"}, "add vm_head to `trainable_modules`"),
    ],
)
def test_contradicting_settings_are_rejected(settings, changes, message):
    with pytest.raises(ValueError, match=message):
        build_trainer({**settings, **LORA, **changes})


def test_learning_rates(settings):
    """`adapter_learning_rate` applies to LoRA, `learning_rate` to modules trained in full."""
    trainer = build_trainer({**settings, "use_peft": True, "adapter_learning_rate": 2e-4})
    rates = {p: group["lr"] for group in trainer.create_optimizer().param_groups for p in group["params"]}
    for name, parameter in trainer.model.named_parameters():
        assert rates.get(parameter) == ((2e-4 if "lora_" in name else 2e-5) if parameter.requires_grad else None)


@pytest.mark.parametrize("options", [{"load_in_4bit": True}, {"load_in_8bit": True}])
def test_bitsandbytes_quantizes_the_decoder_only_by_default(settings, options):
    config = BitsAndBytesConfig(**options)
    model = VTLMMForConditionalGeneration.from_pretrained(settings["model_name_or_path"], quantization_config=config)
    quantized = {name for name, module in model.named_modules() if type(module).__name__.startswith("Linear")}
    quantized = {name for name in quantized if model.get_submodule(name).weight.dtype in (torch.uint8, torch.int8)}
    assert quantized == DECODER_LINEARS
    assert config.llm_int8_skip_modules is None


# ---- Gradients ----


def gradients(trainer) -> dict[str, torch.Tensor]:
    """Return the gradients of one training batch, with nonzero LoRA weights."""
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
    """Two steps of SGD give the same update, and a frozen tower stores no activations."""
    options = {"lora_dropout": 0.0, "optim": "sgd", "learning_rate": 0.1, "warmup_steps": 0, "max_grad_norm": 0.0}
    options = {**settings, **LORA, **options, **QUANTIZED[quantization], "output_dir": str(tmp_path)}
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
def test_a_frozen_decoder_stores_no_activations(settings, tmp_path, adapter):
    """Gradient checkpointing makes transformers call `enable_input_require_grads`, also in stage III."""
    options = {"stage": "visual_head", **ADAPTERS[adapter], "gradient_checkpointing": True}
    trainer = build_trainer({**settings, **options, "output_dir": str(tmp_path)})
    trainer.train()
    batch = trainer.data_collator([trainer.train_dataset[0]])
    batch.pop("labels")
    model = trainer.model.get_base_model() if adapter == "lora" else trainer.model
    assert not model.model(**batch).last_hidden_state.requires_grad


def test_evaluation_keeps_gradients_of_4_bit_weights(settings):
    """On a CPU with bfloat16 instructions, bitsandbytes would repack the weights and return wrong gradients."""
    trainer = build_trainer({**settings, **QLORA, "lora_dropout": 0.0})
    expected = gradients(trainer)
    trainer.evaluate(trainer.train_dataset)
    found = gradients(trainer)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_paged_optimizers_need_cuda(tmp_path):
    with pytest.raises(ValueError, match="needs CUDA. Set `optim: adamw_torch`"):
        VTLMMTrainingConfig(output_dir=str(tmp_path), use_cpu=True, optim="paged_adamw_8bit")


# ---- Resuming ----

RESUMED = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "train_sampling_strategy": "random"}
KINDS = {"lora": {**LORA, **RESUMED}, "qlora": {**QLORA, **RESUMED}}


@pytest.fixture(scope="module")
def killed(settings, tmp_path_factory):
    """Return, for each kind, the folder of a run that SIGKILL stopped one step after its checkpoint."""
    folders = {kind: tmp_path_factory.mktemp("killed") for kind in KINDS}
    for kind, folder in folders.items():
        options = {**settings, **KINDS[kind], "output_dir": str(folder)}
        log = tmp_path_factory.mktemp("log") / "log.txt"
        assert train_until_kill(partial(build_trainer, options), 3, log) == -9, log.read_text()[-3000:]
    return folders


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_resumes_to_the_same_weights(settings, killed, tmp_path, kind):
    assert [path.name for path in killed[kind].glob("checkpoint-*")] == ["checkpoint-2"]
    whole = run_training({**settings, **KINDS[kind], "output_dir": str(tmp_path)})
    assert not [*tmp_path.glob("checkpoint-*/README.md")]  # PEFT's card names the local folder of the base
    options = {"output_dir": str(killed[kind]), "resume_from_checkpoint": True}
    resumed = run_training({**settings, **KINDS[kind], **options})
    assert resumed.state.global_step == 6 and trainable(resumed) == trainable(whole)
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == (
        killed[kind] / "adapter_model.safetensors"
    ).read_bytes()


def test_resuming_an_adapter_with_a_missing_tensor_is_rejected(settings, tmp_path):
    options = {**settings, **LORA, **RESUMED, "max_steps": 2, "output_dir": str(tmp_path)}
    build_trainer(options).train()
    path = tmp_path / "checkpoint-2" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "base_model.model.model.language_model.layers.1.mlp.up_proj.lora_B.weight"
    del tensors[name]  # PEFT would only warn
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"does not fit the model: missing \['{name}'\]"):
        build_trainer(options)._load_from_checkpoint(str(path.parent))
