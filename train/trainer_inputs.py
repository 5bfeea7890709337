# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""What VTLMMTrainer accepts: convert the arguments that SFTTrainer takes, or raise one clear error."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from datasets import Dataset, Features, IterableDataset, IterableDatasetDict
from peft import PeftModel
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
    ProcessorMixin,
    TrainingArguments,
)

from vtlmm.data.encoding import position_limit
from vtlmm.data.rows import ROW_FEATURES, convert_dataset

from .collator import VTLMMCollator
from .config import VTLMMTrainingConfig


# Arguments of SFTTrainer that would have no effect: the reason and the fix.
UNSUPPORTED_ARGUMENTS = {
    "compute_loss_func": "`stage`, `lm_loss_coef` and `visual_loss_coef` define the loss.",
    "compute_metrics": "Evaluation never builds logits. Use `eval_task_data`, or `vtlmm eval` after the training.",
    "preprocess_logits_for_metrics": "Evaluation never builds logits.",
    "formatting_func": "Plain text does not say what is an answer. Map the dataset to `messages` before the training.",
}


def reject_unsupported(**arguments: Any) -> None:
    """
    Raises:
        `ValueError`: if an argument of `UNSUPPORTED_ARGUMENTS` is not None.
    """
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(f"VTLMMTrainer does not support `{name}`. {UNSUPPORTED_ARGUMENTS[name]}")


def resolve_args(args: TrainingArguments | None, model: str | PreTrainedModel | PeftModel) -> VTLMMTrainingConfig:
    """
    Return `args` as a `VTLMMTrainingConfig`; without `args`, the defaults with an output folder named after the model.

    Raises:
        `ValueError`: if a setting is not supported; see `LIMITED_SETTINGS`.
    """
    if isinstance(args, VTLMMTrainingConfig):
        return args
    if args is None:
        name = model if isinstance(model, str) else str(model.config.name_or_path or "")
        return VTLMMTrainingConfig(f"{name.rstrip('/').split('/')[-1] or 'model'}-VTLMM")
    settings = args.to_dict()
    settings |= {name: getattr(args, name) for name in settings if name.endswith("_token")}  # `to_dict` hides these
    if not settings.get("assistant_only_loss"):
        settings.pop("assistant_only_loss", None)  # TRL's default, not a choice
    return VTLMMTrainingConfig(**settings)


def load_model_and_processor(
    model: str | PreTrainedModel | PeftModel, args: VTLMMTrainingConfig, processor, quantization_config
) -> tuple[PreTrainedModel | PeftModel, ProcessorMixin]:
    r"""
    Return the model, loaded if it is a folder or a Hub id, and its processor.

    Raises:
        `ValueError`: if arguments for loading come with a loaded model, or the processor cannot be found.
    """
    options: dict[str, Any] = dict(args.model_init_kwargs or {})  # type: ignore[arg-type]  # TRL parses a str
    if isinstance(model, str):
        if quantization_config is not None:
            if "quantization_config" in options:
                raise ValueError("`quantization_config` is set twice. Remove it from `model_init_kwargs`.")
            options["quantization_config"] = quantization_config
        revision = {"revision": options["revision"]} if "revision" in options else {}
        # float32 for any checkpoint, as TRL does: AdamW loses small updates in bfloat16
        options = {"dtype": "float32", "trust_remote_code": args.trust_remote_code, **options}
        name, model = model, AutoModelForImageTextToText.from_pretrained(model, **options)
        args.model_init_kwargs = None
    else:
        for argument, value in {"model_init_kwargs": options, "quantization_config": quantization_config}.items():
            if value:
                raise ValueError(f"`{argument}` has no effect on a loaded model. Pass it to `from_pretrained`.")
        name, revision = str(model.config.name_or_path or ""), {}
    if processor is None:
        try:
            processor = AutoProcessor.from_pretrained(name, trust_remote_code=args.trust_remote_code, **revision)
        except (OSError, ValueError) as error:
            raise ValueError("Pass the model's processor as `processing_class`.") from error
    return model, processor


def check_model(model: PreTrainedModel | PeftModel, args: VTLMMTrainingConfig, processor, peft_config) -> None:
    """
    Raises:
        `ValueError`: if the model is not a VT-LMM, is loaded in a form that cannot be
            trained, or the processor is of another model.
    """
    if not isinstance(model, (PreTrainedModel, PeftModel)) or model.config.model_type != "vtlmm":
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise ValueError(
            f"VTLMMTrainer needs a VT-LMM, not {kind!r}. Make one with `vtlmm compose` or `vtlmm convert`."
        )
    if not hasattr(processor, "image_processor"):
        raise ValueError(
            f"`processing_class` is a {type(processor).__name__}. Pass the model's VTLMMProcessor, which also "
            "prepares the images."
        )
    if getattr(model.config.text_config, "router_aux_loss_coef", None) and args.router_aux_loss_coef is None:
        raise ValueError(
            "The balance loss of a mixture of experts is not computed. Set `router_aux_loss_coef: 0` to train without "
            "it."
        )
    has_adapter = isinstance(model, PeftModel)
    if not has_adapter and getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "The model has an adapter that `add_adapter` or `from_pretrained` injected. Use PEFT's `get_peft_model` "
            "or `PeftModel.from_pretrained(…, is_trainable=True)` instead."
        )
    if has_adapter and peft_config is not None:
        raise ValueError(
            "`model` is a PeftModel already. Remove `peft_config`, or merge the adapter first (`vtlmm merge`)."
        )
    if not has_adapter and peft_config is None and getattr(model, "is_quantized", False):
        raise ValueError("A quantized model cannot be trained in full. Pass `peft_config=LoraConfig(…)`.")


def build_collator(model: PreTrainedModel | PeftModel, args: VTLMMTrainingConfig, processor) -> VTLMMCollator:
    """Return the collator of a run. Rows are at most as long as `max_length` and as the positions of the decoder."""
    limits = (args.max_length, position_limit(model.config))
    max_length = min((limit for limit in limits if limit is not None), default=None)
    return VTLMMCollator(processor, max_length, cast(int | None, args.pad_to_multiple_of))


def prepare_datasets(train_dataset, eval_dataset, args: VTLMMTrainingConfig) -> tuple[Any, Any]:
    """Return the rows to train on, shuffled with `shuffle_dataset`, and to evaluate on; see [`prepare_dataset`]."""
    shuffle_seed = args.seed if args.shuffle_dataset else None
    train_dataset = prepare_dataset(train_dataset, "train_dataset", shuffle_seed)
    return train_dataset, prepare_dataset(eval_dataset, "eval_dataset")


def prepare_dataset(dataset, name: str, shuffle_seed: int | None = None):
    r"""
    Return the rows of a dataset with the columns of `ROW_FEATURES`, read as `load_rows` reads a file.

    Args:
        dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or a `dict` of several, *optional*): rows with
            `messages`, or `prompt` and `completion`, and `images` or `image`; see `vtlmm.data.rows`.
        name (`str`): how an error names the dataset.
        shuffle_seed (`int`, *optional*): shuffle the rows with this seed.

    Raises:
        `ValueError`: if `dataset` is of another type or tokenized, or a row has no supported format.
    """
    if isinstance(dataset, (dict, IterableDatasetDict)):
        return {key: prepare_dataset(part, f"{name}[{key!r}]", shuffle_seed) for key, part in dataset.items()}
    if dataset is None:
        return None
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise ValueError(
            f"`{name}` is a {type(dataset).__name__}, not a datasets.Dataset. Read files with `vtlmm.load_rows`, and "
            "lists with `Dataset.from_list`."
        )
    columns = dataset.column_names or list(next(iter(dataset), {}))
    if "input_ids" in columns:
        raise ValueError(
            f"`{name}` is tokenized (column `input_ids`), but the trainer tokenizes rows itself, with their images. "
            "Pass the rows with `messages` and `images`."
        )
    features = dataset.features or {}
    if any(features.get(column) != feature for column, feature in ROW_FEATURES.items()):
        dataset = convert_dataset(dataset, name)
    if shuffle_seed is None:
        return dataset
    if isinstance(dataset, IterableDataset):  # the shuffle buffer holds files, not decoded images
        return (
            dataset.decode(False)
            .shuffle(seed=shuffle_seed)
            .cast(Features({**(dataset.features or {}), **ROW_FEATURES}))
        )
    return dataset.shuffle(seed=shuffle_seed)


@contextmanager
def hidden_from_sft_trainer(args: VTLMMTrainingConfig) -> Iterator[None]:
    """Hide settings from `SFTTrainer.__init__` that it would reject for images, or apply to text itself."""
    values = {name: getattr(args, name) for name in ("packing", "assistant_only_loss")}
    for name in values:
        setattr(args, name, False)
    try:
        yield
    finally:
        for name, value in values.items():
            setattr(args, name, value)
