# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Private and undocumented names of TRL, transformers, PEFT and datasets that this project uses.

A new release may change any of them without notice. `tests/test_compat.py` runs [`find_problems`] on the newest and on
the oldest supported versions, and checks that the list is complete for the trainer.
"""

import importlib
import inspect
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PrivateName:
    """
    A name of a library that its documentation does not promise.

    Attributes:
        path (`str`): full name. `Class.self.name` is an attribute that the class sets on its instances.
        user (`str`): our file that uses it.
        parameters (`tuple[str, ...]`, *optional*): parameters that must exist, for a function.
    """

    path: str
    user: str
    parameters: tuple[str, ...] | None = None


_TRAINER, _SFT = "transformers.Trainer", "trl.SFTTrainer"
PRIVATE_NAMES = (
    # Methods that the trainer overrides or calls
    PrivateName(f"{_TRAINER}._clip_grad_norm", "train/trainer.py", ("self", "model")),
    PrivateName(f"{_TRAINER}._load_from_checkpoint", "train/trainer.py", ("self", "resume_from_checkpoint", "model")),
    PrivateName(f"{_TRAINER}._issue_warnings_after_load", "train/trainer.py", ("self", "load_result")),
    PrivateName(f"{_TRAINER}._save", "train/trainer.py", ("self", "output_dir", "state_dict")),
    PrivateName(f"{_TRAINER}._set_signature_columns_if_needed", "train/trainer.py", ("self",)),
    PrivateName(f"{_TRAINER}.self._signature_columns", "train/trainer.py"),
    PrivateName(f"{_TRAINER}._prepare_inputs", "train/exact_metrics.py", ("self", "inputs")),
    PrivateName(f"{_TRAINER}._run_epoch", "train/checkpoints.py", ("self",)),
    PrivateName(f"{_TRAINER}._get_output_dir", "train/checkpoints.py", ("self", "trial")),
    PrivateName(f"{_TRAINER}._push_from_checkpoint", "train/checkpoints.py", ("self", "checkpoint_folder")),
    PrivateName(f"{_TRAINER}._save_checkpoint", "train/checkpoints.py", ("self", "model", "trial")),
    # Documented for subclasses, but with a signature that has changed before
    PrivateName(f"{_SFT}.loss_is_scaled_for_ga", "train/trainer.py"),
    PrivateName(f"{_TRAINER}.get_batch_samples", "train/trainer.py", ("epoch_iterator", "num_batches", "device")),
    PrivateName(f"{_TRAINER}.evaluation_loop", "train/exact_metrics.py", ("metric_key_prefix",)),
    PrivateName(f"{_TRAINER}.compute_loss_context_manager", "train/exact_metrics.py", ("self",)),
    PrivateName(
        f"{_SFT}.compute_loss", "train/trainer.py", ("model", "inputs", "return_outputs", "num_items_in_batch")
    ),
    PrivateName(f"{_SFT}.prediction_step", "train/exact_metrics.py", ("model", "inputs", "prediction_loss_only")),
    PrivateName(f"{_SFT}.log", "train/exact_metrics.py", ("logs", "start_time")),
    PrivateName(f"{_SFT}.create_model_card", "train/trainer.py", ("model_name", "dataset_name", "tags")),
    PrivateName(f"{_SFT}.self._tokenizer", "train/trainer.py"),
    PrivateName(f"{_SFT}._tag_names", "train/trainer.py"),
    PrivateName(f"{_SFT}._name", "train/trainer.py"),
    PrivateName(f"{_SFT}._paper", "train/trainer.py"),
    # Models and attention
    PrivateName("transformers.PreTrainedModel.self._tied_weights_keys", "modeling_vtlmm, hub/checkpoint_files.py"),
    PrivateName("transformers.LlavaForConditionalGeneration._tied_weights_keys", "hub/export_llava.py"),
    PrivateName("transformers.PreTrainedModel._init_weights", "modeling_vtlmm", ("self", "module")),
    PrivateName("transformers.PreTrainedModel.self._require_grads_hooks", "modeling_vtlmm"),
    PrivateName("transformers.PreTrainedModel._is_stateful", "train/packing.py"),
    PrivateName("transformers.PreTrainedModel.self._hf_peft_config_loaded", "train/trainer_inputs.py"),
    PrivateName("transformers.PreTrainedConfig._attn_implementation", "train/packing.py"),
    PrivateName(
        "transformers.GenerationMixin._expand_inputs_for_generation",
        "modeling_vtlmm",
        ("expand_size", "is_encoder_decoder", "input_ids"),
    ),
    PrivateName(
        "transformers.integrations.sdpa_attention.sdpa_attention_forward",
        "train/packing.py",
        ("module", "query", "key", "value", "attention_mask"),
    ),
    PrivateName(
        "transformers.masking_utils.sdpa_mask", "train/packing.py", ("q_length", "kv_length", "attention_mask")
    ),
    PrivateName(
        "transformers.utils.chat_template_utils.render_jinja_template",
        "vtlmm/data/encoding.py",
        ("conversations", "chat_template", "return_assistant_tokens_mask"),
    ),
    PrivateName("transformers.utils.find_adapter_config_file", "train/stage_runner.py", ("model_id", "revision")),
    # PEFT and datasets
    PrivateName("peft.utils.constants.DUMMY_TARGET_MODULES", "train/adapters.py"),
    PrivateName("peft.utils.save_and_load.load_peft_weights", "vtlmm/inference/loading.py", ("model_id", "device")),
    PrivateName("peft.utils.integrations.dequantize_module_weight", "train/merge.py", ("module",)),
    PrivateName("datasets.Dataset.self._fingerprint", "vtlmm/data/rows.py"),
)


def find_problems(names: tuple[PrivateName, ...] = PRIVATE_NAMES) -> list[str]:
    """Return one line for each name that is missing in the installed libraries, or has other parameters."""
    problems = []
    for name in names:
        path, _, attribute = name.path.partition(".self.")
        try:
            value = resolve(path)
        except (ImportError, AttributeError) as error:
            problems.append(f"{name.path} does not exist ({name.user}): {error}")
            continue
        if attribute:
            sources = [inspect.getsource(cls) for cls in value.__mro__ if cls is not object]
            if not any(attribute in source for source in sources):
                problems.append(f"{name.path} does not exist ({name.user})")
        elif name.parameters is not None:
            missing = set(name.parameters) - set(inspect.signature(value).parameters)
            if missing:
                problems.append(f"{name.path} has no parameter {', '.join(sorted(missing))} ({name.user})")
    return problems


def resolve(path: str) -> Any:
    """Return the object with a full name such as `transformers.Trainer._save`."""
    parts = path.split(".")
    for number in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:number]))
        except ModuleNotFoundError:
            continue
        for part in parts[number:]:
            value = getattr(value, part)
        return value
    raise ImportError(f"no module {parts[0]}")
