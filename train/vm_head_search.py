# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Train several VM heads at once in stage III and keep the best one.

The vision tower and the decoder run once per batch. Each head trains as it would alone. The first candidate is the
model's `vm_head`. The others are in `vm_head_candidates` of the base model, so that DDP averages their gradients and
checkpoints contain them. The saved model has the best head only.
"""

from functools import partial

import torch
from torch import nn

from modeling_vtlmm.layers_vtlmm import VTLMMVisualHead, image_predictions


CHOICES = {"vm_head_type": ("linear", "mlp", "attention"), "vm_head_init": ("lm_head", "input_embeddings", "random")}


def check_candidates(candidates: list[dict]) -> None:
    """
    Check the setting `vm_head_candidates`, and convert learning rates to `float`.

    Raises:
        `ValueError`: if there are fewer than two candidates, or if a key or value is unknown.
    """
    if len(candidates) < 2:
        raise ValueError("`vm_head_candidates` needs two candidates or more. For one VM head, set `vm_head_init`.")
    for number, candidate in enumerate(candidates):
        for key, value in candidate.items():
            if key not in (*CHOICES, "learning_rate"):
                raise ValueError(
                    f"Candidate {number} of `vm_head_candidates` has the unknown key {key!r}. Supported keys are "
                    f"{', '.join(CHOICES)} and learning_rate."
                )
            if key == "learning_rate":
                candidate[key] = float(value)  # YAML reads 1e-3 as a string
            elif value not in CHOICES[key]:
                raise ValueError(f"`{key}` of candidate {number} is {value!r}; it must be {', '.join(CHOICES[key])}.")


def vm_heads(model) -> list[VTLMMVisualHead]:
    """Return all candidates. The first one is the model's `vm_head`."""
    return [model.model.vm_head, *getattr(model.model, "vm_head_candidates", ())]


def replace_vm_head(model, vm_head_type: str, seed: int, vm_head_init: str = "lm_head") -> None:
    """
    Replace the model's VM head by a new one of type `vm_head_type`.

    Args:
        seed (`int`): seed of the random initialization.
        vm_head_init (`str`, *optional*, defaults to `"lm_head"`): see
            [`~VTLMMForConditionalGeneration.initialize_vm_head`].

    Raises:
        `ValueError`: if the type is unknown.
    """
    if vm_head_type not in CHOICES["vm_head_type"]:
        types = ", ".join(CHOICES["vm_head_type"])
        raise ValueError(f"`vm_head_type` is {vm_head_type!r}; it must be one of {types}.")
    old, model.config.vm_head_type = model.model.vm_head, vm_head_type
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.model.vm_head = VTLMMVisualHead(model.config).to(old.weight.device, old.weight.dtype)
        model.model.vm_head.apply(model._init_weights)
        model.initialize_vm_head(vm_head_init)


def add_candidates(model, candidates: list[dict], learning_rate: float, vm_head_init: str, seed: int) -> list[dict]:
    r"""
    Add one new trainable VM head to the model for each candidate.

    Args:
        candidates (`list[dict]`): settings `vm_head_type`, `vm_head_init` and `learning_rate` of each candidate. The
            default of `vm_head_type` is the model's.
        learning_rate (`float`): default learning rate.
        vm_head_init (`str`): default initialization.
        seed (`int`): seed of the random initialization, which must be equal on all processes.

    Returns:
        `list[dict]`: `candidates` with all settings.
    """
    defaults = {
        "vm_head_type": model.config.vm_head_type,
        "vm_head_init": vm_head_init,
        "learning_rate": learning_rate,
    }
    candidates = [{**defaults, **candidate} for candidate in candidates]
    heads = nn.ModuleList()
    for number, candidate in enumerate(candidates):
        replace_vm_head(model, candidate["vm_head_type"], seed + number, candidate["vm_head_init"])
        heads.append(model.model.vm_head)
    model.model.vm_head, model.model.vm_head_candidates = heads[0], heads[1:]
    model.config.vm_head_type = candidates[0]["vm_head_type"]
    visual_loss_function = model.visual_loss_function
    if isinstance(visual_loss_function, partial) and visual_loss_function.func is candidate_losses:  # a search failed
        visual_loss_function = visual_loss_function.keywords["visual_loss_function"]
    model.visual_loss_function = partial(candidate_losses, visual_loss_function=visual_loss_function)
    return candidates


def candidate_losses(
    student_features,
    student_weight,
    teacher_features,
    teacher_weight,
    *,
    visual_loss_function,
    model,
    outputs,
    positions,
    **kwargs,
) -> torch.Tensor:
    """
    Return the visual loss of each candidate as a tensor of shape `(num_candidates,)`.

    The student is the VM head, and the decoder is the teacher of all candidates. `visual_loss_function` is the loss of
    one candidate.
    """
    kwargs |= {"model": model, "outputs": outputs, "positions": positions}
    students = [(student_features, student_weight)]
    students += [image_predictions(head, outputs, positions) for head in model.model.vm_head_candidates]
    return torch.stack(
        [visual_loss_function(*student, teacher_features, teacher_weight, **kwargs) for student in students]
    )


def keep_candidate(model, candidates: list[dict], number: int) -> None:
    """Make candidate `number` the model's VM head, and remove the other candidates."""
    model.model.vm_head = vm_heads(model)[number]
    model.config.vm_head_type = candidates[number]["vm_head_type"]
    model.visual_loss_function = model.visual_loss_function.keywords["visual_loss_function"]
    del model.model.vm_head_candidates


def format_table(table: list[dict]) -> str:
    """Return a text table of the candidates and their held-out losses, with a mark at the best one."""
    lines = ["VM heads (held-out KL in nats per image token)"]
    for row in table:
        settings = ", ".join(f"{key} {value}" for key, value in row.items() if key not in ("eval_visual_loss", "kept"))
        lines.append(f"  {row['eval_visual_loss']:.6f}  {settings}{'  ← kept' if row['kept'] else ''}")
    return "\n".join(lines)
