# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""LoRA, DoRA and quantized bases: one table of what is quantized, what gets an adapter and what is saved in full."""

from dataclasses import dataclass, field
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.save_and_load import load_peft_weights
from torch import nn
from transformers import PreTrainedModel

from .stages import Stage, module_of


# Only the decoder's projections: CLIP has modules of the same names, and `all-linear` reaches the tower too.
DECODER_PROJECTIONS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"


@dataclass
class AdapterConfig:
    """How the decoder is held in memory and how it learns. Fields of the recipe's YAML."""

    quantization: str = field(default="none", metadata={"help": "The decoder in memory: none, nf4 or int8."})
    adapter: str = field(default="none", metadata={"help": "none (full training), lora or dora: on the decoder."})
    lora_r: int = field(default=128, metadata={"help": "Rank; LLaVA-1.5's LoRA recipe has 128."})
    lora_alpha: int = field(default=256, metadata={"help": "Scale of the adapter, LLaVA-1.5's recipe has 256."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before the adapter."})
    lora_target_modules: str = field(
        default=DECODER_PROJECTIONS, metadata={"help": "Regular expression on full module names."}
    )
    base_id: str | None = field(
        default=None,
        metadata={"help": "Hub id that the adapter names as its base, where `model` is a folder of this machine."},
    )

    def __post_init__(self):
        if self.quantization not in ("none", "nf4", "int8"):
            raise ValueError(f"`quantization` is {self.quantization!r}; it must be none, nf4 or int8.")
        if self.adapter not in ("none", "lora", "dora"):
            raise ValueError(f"`adapter` is {self.adapter!r}; it must be none, lora or dora.")
        if self.quantization != "none" and self.adapter == "none":
            raise ValueError("A quantized decoder cannot learn in full: set `adapter` to lora or dora.")
        if (self.quantization, self.adapter) == ("int8", "dora"):
            # PEFT loses the scales of int8 weights on a CPU when it computes DoRA's norms; elsewhere it was not run
            raise ValueError("DoRA does not work on an int8 base: set `adapter: lora`, or `quantization: nf4`.")


def keep_differentiable_on_cpu(model: nn.Module) -> None:
    """On a CPU bitsandbytes repacks 4-bit weights in the first evaluation, and from then on there is no gradient
    through them, without an error. It asks this attribute whether to; without a 4-bit layer nothing has it."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def peft_config(config: AdapterConfig, stage: Stage) -> LoraConfig | None:
    """
    The adapter of a stage: LoRA or DoRA on the decoder if the stage trains it, its other modules in full.

    In stages I and III the decoder rests: the adapter only carries the modules that are saved in full.
    """
    if config.adapter == "none":
        return None
    in_full = [name for name in stage.trains if name != "language_model"]
    with_adapter = "language_model" in stage.trains
    return LoraConfig(
        r=config.lora_r if with_adapter else 1,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout if with_adapter else 0.0,
        use_dora=config.adapter == "dora" and with_adapter,
        # PEFT refuses an empty list; this name says that it is meant
        target_modules=config.lora_target_modules if with_adapter else DUMMY_TARGET_MODULES,
        modules_to_save=in_full or None,
        task_type="CAUSAL_LM" if with_adapter else None,
    )


def add_adapter(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """
    `model` with the adapter of `config`, which alone learns.

    With tied embeddings the head and the input embeddings go on being one matrix, as in full training.

    Raises:
        `ValueError`: when LoRA would reach another module than the decoder.
    """
    if model.config.tie_word_embeddings and "lm_head" in (config.modules_to_save or ()):
        config.ensure_weight_tying = True
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_" in name and module_of(name) != "language_model":
            raise ValueError(
                f"`lora_target_modules` {config.target_modules!r} reaches {name.split('.lora_')[0]}, outside the "
                "decoder: begin it with `.*language_model.*`. Other modules learn in full, by `trainable_modules`."
            )
    return model


def require_fit(model: PeftModel, folder: str | Path) -> list[str]:
    """
    The names of the adapter's tensors in `folder`, if they are those of `model`'s adapter. PEFT only warns.

    Raises:
        `ValueError`: naming what is missing or has no place.
    """
    saved = load_peft_weights(str(folder), device="cpu").keys()
    expected = get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    if saved != expected:
        raise ValueError(
            f"The adapter in {folder} does not fit the model: missing {sorted(expected - saved)[:5]}, unexpected "
            f"{sorted(saved - expected)[:5]}. Take the base and the settings that it was trained with."
        )
    return sorted(saved)
