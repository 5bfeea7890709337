# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Which kinds of parallelism keep the losses exact."""

from dataclasses import replace

from datasets import IterableDataset
from transformers import Trainer


def prepare_parallelism(trainer: Trainer, model, eval_datasets: list) -> None:
    """
    Check the parallelism of a trainer, and keep the loss sums exact if its model is sharded.

    Raises:
        `ValueError`: if several processes would evaluate a stream, or processes would share a sequence.
    """
    if trainer.accelerator.num_processes > 1 and any(isinstance(one, IterableDataset) for one in eval_datasets):
        raise ValueError("Several processes cannot evaluate a stream exactly. Load `eval_dataset` as a whole.")
    parallelism = trainer.accelerator.parallelism_config
    kinds = ("tp_enabled", "cp_enabled", "sp_enabled")
    if parallelism is not None and any(getattr(parallelism, kind, False) for kind in kinds):
        raise ValueError(
            "Tensor, context and sequence parallelism are not supported: the losses need whole sequences. Use DDP, "
            "FSDP2 or DeepSpeed ZeRO."
        )
    if trainer.is_fsdp_enabled:
        keep_exact_when_sharded(trainer, model)


def keep_exact_when_sharded(trainer: Trainer, model) -> None:
    """
    Keep loss sums in float32 under FSDP2, and the class that `save_pretrained` looks up.

    Raises:
        `ValueError`: with FSDP 1.
    """
    plugin = trainer.accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ValueError("FSDP 1 flattens the weights of the heads, which the losses need. Set fsdp_version: 2.")
    if plugin.mixed_precision_policy is not None:
        # accelerate's policy would round the loss sums, which are thousands of nats, to bfloat16
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)
    # The class of a sharded model is in a file of torch, which would be saved instead of the model's code.
    model.__module__ = type(model).__module__
