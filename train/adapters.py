# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""LoRA, DoRA and quantized bases: one table of what is quantized, what gets an adapter and what is saved in full."""

from dataclasses import dataclass, field

from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn
from transformers import PreTrainedModel

from .stages import Stage, module_of


# Only the decoder's projections: CLIP has modules of the same names, and `all-linear` reaches the tower too.
DECODER_PROJECTIONS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"


@dataclass
class AdapterConfig:
    """Quantization of the decoder and its adapter. Field names are those of [`trl.ModelConfig`]."""

    load_in_4bit: bool = field(default=False, metadata={"help": "Load the decoder in 4 bits (nf4)."})
    load_in_8bit: bool = field(default=False, metadata={"help": "Load the decoder in 8 bits (int8)."})
    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter on the decoder."})
    use_dora: bool = field(default=False, metadata={"help": "Train a DoRA adapter instead of LoRA."})
    lora_r: int = field(default=128, metadata={"help": "Rank. The default is that of LLaVA-1.5's LoRA recipe."})
    lora_alpha: int = field(default=256, metadata={"help": "Scale of the adapter; LLaVA-1.5's recipe has 256."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before the adapter."})
    lora_target_modules: str = field(
        default=DECODER_PROJECTIONS, metadata={"help": "Regular expression on full module names."}
    )
    base_id: str | None = field(
        default=None,
        metadata={"help": "Hub id to record as the adapter's base when the model is a local folder."},
    )

    def __post_init__(self):
        if self.lora_r < 1:
            raise ValueError(f"`lora_r` is {self.lora_r}; it must be 1 or more.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"`lora_dropout` is {self.lora_dropout}; it must be at least 0 and below 1.")

    @property
    def quantization(self) -> str:
        """How the decoder is stored: `"nf4"`, `"int8"` or `"none"`."""
        return "nf4" if self.load_in_4bit else "int8" if self.load_in_8bit else "none"


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
    if not config.use_peft:
        return None
    in_full = [name for name in stage.trains if name != "language_model"]
    with_adapter = "language_model" in stage.trains
    return LoraConfig(
        r=config.lora_r if with_adapter else 1,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout if with_adapter else 0.0,
        use_dora=config.use_dora and with_adapter,
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
