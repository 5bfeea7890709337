# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""LoRA and DoRA adapters on the decoder, also on a quantized one; the other modules of a stage are trained in full."""

from collections.abc import Collection
from dataclasses import dataclass, field, replace

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from vtlmm.data.setting_values import require_integers

from .setting_checks import validate_stage
from .stages import Stage, module_of


# Only the decoder's projections: CLIP has modules of the same names.
DECODER_PROJECTIONS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
OTHER_MODULES = r".*(vision_tower|multi_modal_projector|vm_head|lm_head).*"


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
        require_integers(lora_r=self.lora_r, lora_alpha=self.lora_alpha)
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"`lora_dropout` is {self.lora_dropout}; it must be at least 0 and below 1.")

    @property
    def quantization(self) -> str:
        """How the decoder is stored: `"nf4"`, `"int8"` or `"none"`."""
        return "nf4" if self.load_in_4bit else "int8" if self.load_in_8bit else "none"


def keep_differentiable_on_cpu(model: nn.Module) -> None:
    """
    Stop bitsandbytes from repacking 4-bit weights on a CPU.

    It repacks them in the first evaluation if the CPU has bfloat16 instructions, and later backward passes then return
    no gradient and no error. Only 4-bit layers have the attribute.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]  # not a tensor


def peft_config(config: AdapterConfig, stage: Stage) -> LoraConfig | None:
    """
    Return the adapter of a stage: LoRA or DoRA on the decoder if the stage trains it, and its other modules in full.

    In stages I and III the decoder is frozen, and the adapter only holds the modules that are trained in full.
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
        # PEFT rejects an empty list; the dummy target opts out explicitly
        target_modules=config.lora_target_modules if with_adapter else DUMMY_TARGET_MODULES,
        modules_to_save=in_full or None,
        task_type="CAUSAL_LM" if with_adapter else None,
    )


def check_adapter_type(config: PeftConfig) -> None:
    """
    Raises:
        `ValueError`: if `config` is not a PEFT config, or is of prompt, prefix or P-tuning.
    """
    if not isinstance(config, PeftConfig):
        raise ValueError(f"`peft_config` is a {type(config).__name__}. Pass a peft config, e.g. `LoraConfig(r=16)`.")
    if config.is_prompt_learning:
        raise ValueError(
            f"{PeftType(config.peft_type).value} adds virtual tokens before the text, which shifts the image tokens "
            "and their losses. VTLMMTrainer does not support it; use `LoraConfig`."
        )


def add_adapter(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """
    Return `model` with the adapter of `config`, whose weights alone are trainable.

    Without `target_modules` the adapter is on all projections of the decoder. Names of modules, and `"all-linear"`,
    mean those of the decoder. With tied embeddings the LM head and the input embeddings remain one matrix.

    Raises:
        `ValueError`: if the adapter has no support here, or a regular expression reaches modules outside the decoder.
    """
    check_adapter_type(config)
    if isinstance(config, LoraConfig):
        if config.target_modules is None:
            config.target_modules = DECODER_PROJECTIONS
        elif config.exclude_modules is None and not is_expression(config.target_modules):
            config.exclude_modules = OTHER_MODULES
        if model.config.tie_word_embeddings and "lm_head" in (config.modules_to_save or ()):
            config.ensure_weight_tying = True
    return get_peft_model(model, config)


def is_expression(target_modules: str | Collection[str]) -> bool:
    """Return whether PEFT reads `target_modules` as a regular expression on full module names."""
    return isinstance(target_modules, str) and target_modules != "all-linear"


def adapted_stage(model: PeftModel, stage: Stage) -> Stage:
    """
    Return `stage` with the modules that the adapter of `model` trains.

    Raises:
        `ValueError`: if the adapter is of prompt tuning, has no trainable weight, trains a module that the stage does
            not, or has LoRA weights outside the decoder.
    """
    check_adapter_type(model.active_peft_config)
    trained = set()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        module = module_of(name) or name
        trained.add(module)
        if "modules_to_save" not in name and module != "language_model":
            raise ValueError(
                f"The adapter's `target_modules` reach {name.split('.lora_')[0]}, outside the decoder. Start the "
                "regular expression with `.*language_model.*`. To train another module in full, add it to "
                "`modules_to_save`, or to `trainable_modules` of a recipe."
            )
    if not trained:
        raise ValueError(
            "The adapter has no trainable weight. Load it with `PeftModel.from_pretrained(…, is_trainable=True)`."
        )
    if trained - set(stage.trains):
        raise ValueError(
            f"The adapter trains {', '.join(sorted(trained - set(stage.trains)))}, but stage {stage.name} trains "
            f"{', '.join(stage.trains)}. Change `stage` or `trainable_modules`, or the adapter's `modules_to_save`."
        )
    stage = replace(stage, trains=tuple(module for module in stage.trains if module in trained))
    validate_stage(stage)
    return stage


def float32_copies(model: PreTrainedModel | PeftModel, args: TrainingArguments) -> dict[nn.Parameter, torch.Tensor]:
    """
    Return float32 values of an adapter's trainable parameters, to be restored after TRL casts them to bfloat16.

    TRL casts trainable parameters on a quantized base to bfloat16. `modules_to_save` inherit the dtype of the base.
    AdamW loses small updates in bfloat16.

    Raises:
        `ValueError`: if trainable weights of a model without an adapter are float16, or float32 modules meet a base in
            half precision without mixed precision.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not isinstance(model, PeftModel):
        half = [name for name, parameter in trainable.items() if parameter.dtype == torch.float16]
        if half:
            raise ValueError(
                f"The trainable weights are float16 (e.g. {half[0]}), in which AdamW diverges. Load the model with "
                '`dtype="float32"`, and set `fp16: true` or `bf16: true` for mixed precision.'
            )
        return {}
    in_full = [parameter for name, parameter in trainable.items() if "modules_to_save" in name]
    dtypes = {p.dtype for p in in_full} - {torch.float32}
    if dtypes and not (args.bf16 or args.fp16):
        raise ValueError(
            f"The base is in {dtypes.pop()} and `modules_to_save` are trained in float32, which needs mixed "
            'precision. Set `bf16: true`, or load the model with `dtype="float32"`.'
        )
    return {parameter: parameter.data.float() for parameter in trainable.values()}
