# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Estimate the FLOPs and the time of a stage before it starts."""

import math
import time
from dataclasses import dataclass

import torch
from accelerate import PartialState, init_empty_weights
from transformers import AutoConfig, AutoModelForImageTextToText

from .config import VTLMMTrainingConfig
from .packing import pack_lengths
from .recipe import RunSettings
from .stages import Stage, module_of


PROBE_SIZE = 1024  # rows and columns of the matrices that measure the speed of the device
PROBE_SECONDS = 0.2
# Training reaches about half the speed of large matrix products, on CPUs and GPUs
UTILIZATION = 0.5


@dataclass
class StageCost:
    """
    Cost of one stage over all processes.

    Args:
        num_steps (`int`): optimizer steps.
        num_rows (`int`): rows over all steps.
        tokens_per_row (`float`): mean, with image tokens.
        flops (`float`): of the decoder and the heads. The vision tower and attention scores are not included.
        seconds (`float`): at half the measured speed of matrix products.
    """

    num_steps: int
    num_rows: int
    tokens_per_row: float
    flops: float
    seconds: float

    def format(self, name: str) -> str:
        """Return one line for the stage `name`."""
        return (
            f"  {name:<12} {self.num_steps:,} steps, {self.num_rows:,} rows of {self.tokens_per_row:.0f} tokens, "
            f"{self.flops:.1e} FLOPs, about {_duration(self.seconds)}"
        )


def format_costs(runs: list[RunSettings], datasets: list[list]) -> str:
    """
    Return one line per stage with its steps, tokens, FLOPs and estimated time. All stages have the first one's model.

    Args:
        runs (`list[RunSettings]`): the stages.
        datasets (`list[list]`): for each stage its rows to train on, and others. Streams and rows that were not
            checked have no lengths, so they are left out.
    """
    state, args = PartialState(), runs[0].args
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    speed = measure_speed(state.device, dtype)
    load = {"revision": runs[0].model.model_revision, "trust_remote_code": args.trust_remote_code}
    lines = []
    for run, (rows, *_) in zip(runs, datasets, strict=True):
        if "length" in (rows.column_names or ()):
            cost = estimate_cost(
                runs[0].model.model_name_or_path,
                run.args,
                list(rows["length"]),
                speed,
                state.num_processes,
                run.adapter.use_peft,
                **load,
            )
            lines.append(cost.format(run.args.stage))
    if not lines:
        return ""
    about = f"at {speed / 1e9:,.0f} GFLOP/s per process; without the vision tower"
    return "\n".join([f"Estimated cost ({about}):", *lines])


def estimate_cost(
    name: str,
    args: VTLMMTrainingConfig,
    lengths: list[int],
    flops_per_second: float,
    num_processes: int = 1,
    use_adapter: bool = False,
    **load,
) -> StageCost:
    r"""
    Return the cost of a stage, from the shapes of the model. No weights are loaded.

    A token takes 2 FLOPs per weight forward. It takes 2 more per weight that a gradient passes, and 2 more per
    trainable weight. Gradient checkpointing repeats the forward. With `packing`, a row is a packed sequence.

    Args:
        name (`str`): folder or Hub id of the model.
        args ([`VTLMMTrainingConfig`])
        lengths (`list[int]`): tokens of each row, with image tokens.
        flops_per_second (`float`): see [`measure_speed`].
        num_processes (`int`, *optional*, defaults to 1): processes that share the work.
        use_adapter (`bool`, *optional*, defaults to `False`): whether LoRA trains the decoder, whose own weights are
            frozen then. The few weights of LoRA are not counted.
        load: further arguments of `from_pretrained`, e.g. `trust_remote_code`.
    """
    config = AutoConfig.from_pretrained(name, **load)
    with init_empty_weights(include_buffers=True):
        model = AutoModelForImageTextToText.from_config(config, trust_remote_code=load.get("trust_remote_code", False))
    if args.packing and args.max_length is not None:
        lengths = [sum(lengths[row] for row in pack) for pack in pack_lengths(lengths, args.max_length)]
    rows_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * num_processes
    steps_per_epoch = math.ceil(len(lengths) / rows_per_step)
    num_steps = args.max_steps if args.max_steps > 0 else math.ceil(steps_per_epoch * args.num_train_epochs)
    num_rows = num_steps * rows_per_step
    if args.max_steps <= 0:
        num_rows = min(num_rows, round(len(lengths) * args.num_train_epochs))
    tokens_per_row = sum(lengths) / len(lengths)
    stage, checkpointing = args.resolved_stage(), args.gradient_checkpointing
    flops = num_rows * tokens_per_row * flops_per_token(model, stage, checkpointing, use_adapter)
    return StageCost(num_steps, num_rows, tokens_per_row, flops, flops / num_processes / flops_per_second)


def flops_per_token(model, stage: Stage, gradient_checkpointing: bool = False, use_adapter: bool = False) -> float:
    """Return the FLOPs per token of one training step: decoder, LM head and, with a visual loss, VM head."""
    embeddings = model.get_input_embeddings().weight
    sizes = {"language_model": 0, "lm_head": 0, "vm_head": 0}
    for parameter_name, parameter in model.named_parameters(remove_duplicate=False):
        module = module_of(parameter_name)
        if module in sizes and (module != "language_model" or parameter is not embeddings):
            sizes[module] += parameter.numel()
    # Stage III trains a head alone: the decoder gets no gradient.
    before_decoder = bool({"vision_tower", "multi_modal_projector"} & set(stage.trains))
    trains_decoder = "language_model" in stage.trains
    backward = trains_decoder or (before_decoder and bool(stage.lm_loss_coef or stage.visual_student == "lm_head"))
    passes = 1 + backward * (1 + gradient_checkpointing) + (trains_decoder and not use_adapter)
    flops = 2.0 * passes * sizes["language_model"]
    trains_head = bool({"lm_head", "vm_head"} & set(stage.trains))
    flops += 2 * (1 + backward + trains_head) * sizes["lm_head"]  # every token is a target of one of the losses
    if stage.visual_loss_coef:
        flops += 2 * sizes["vm_head"]
    return flops


def measure_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOPs per second that training can expect: half of what matrix products reach on `device`."""
    left = torch.randn(PROBE_SIZE, PROBE_SIZE, device=device, dtype=dtype)
    result = left @ left  # warm-up
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < PROBE_SECONDS:
        result = left @ left
        result[0, 0].item()  # waits for the device
        count += 1
    return UTILIZATION * count * 2 * PROBE_SIZE**3 / (time.perf_counter() - started)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
