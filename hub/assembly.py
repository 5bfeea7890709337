# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""What composing and converting share, and a composed model: from its parts' tensors to a saved folder."""

import logging
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from modeling_vtlmm import VTLMMConfig, VTLMMForConditionalGeneration, VTLMMPreTrainedModel


logger = logging.getLogger(__name__)


@contextmanager
def quiet_loading():
    """Without transformers' load report: here the keys are checked, and what matters is said once."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def require_native(model, name: str):
    """
    Raises:
        `ValueError`: when the code of `model` came with its checkpoint. A VT-LMM folder carries its own code only.
    """
    if not type(model).__module__.startswith("transformers.models."):
        raise ValueError(
            f"{name} is a {type(model).__name__} with code of its own; a VT-LMM is made of models that transformers "
            "itself has, since its folder cannot carry the code of others."
        )


def part_config(config, name: str | None):
    """The config of a part from checkpoint `name` as the model keeps it, without what says nothing there."""
    name = name or ""
    if Path(name).is_dir() or name.startswith(("/", ".", "~")) or name.count("/") > 1 or set(name) & set("\\:"):
        config._name_or_path = ""  # a folder of this machine, or of the one that the checkpoint comes from
    config.num_labels = 2  # a classifier's list of labels: a thousand lines for ImageNet
    return config


def assemble(
    config: VTLMMConfig,
    state_dict: dict[str, torch.Tensor],
    dtype: torch.dtype,
    untrained: tuple[str, ...] = (),
) -> VTLMMForConditionalGeneration:
    r"""
    A model from `config` with the tensors of `state_dict`.

    Args:
        state_dict (`dict`): the model's own names to tensors.
        untrained (`tuple[str, ...]`): beginnings of the names that may be missing; those are initialized.

    Raises:
        `ValueError`: naming every tensor that is missing, of no use, or of another shape.
    """
    with quiet_loading():
        # The base class's, because our own refuses a checkpoint that lacks a tensor, and here new parts may lack.
        model, info = super(VTLMMPreTrainedModel, VTLMMForConditionalGeneration).from_pretrained(
            None,
            config=config,
            state_dict=state_dict,
            dtype=dtype,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    wrong_shape = {key for key, *_ in info["mismatched_keys"]}
    problems = {
        "missing": {key for key in info["missing_keys"] if not key.startswith(untrained)} - wrong_shape,
        "without a place in the model": set(info["unexpected_keys"]),
        "of another shape than the config says": wrong_shape,
    }
    if any(problems.values()):
        raise ValueError(
            "The checkpoint does not fit the model. Tensors "
            + "; ".join(f"{what}: {', '.join(sorted(keys))}" for what, keys in problems.items() if keys)
            + "."
        )
    model.config._name_or_path = ""  # it would be "None"
    return model.eval()


def save(model: VTLMMForConditionalGeneration, processor, output):
    """A complete folder as a Hub repository has it: config, code files, safetensors, processor and chat template."""
    model.save_pretrained(output)
    if processor is not None:
        processor.save_pretrained(output)
    logger.info("Saved to %s.", output)
