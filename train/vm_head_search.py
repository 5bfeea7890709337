# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Several VM heads in one stage III: tower and decoder run once, each head learns as if it were alone, the best stays.

The first candidate is the model's `vm_head`, the others are `vm_head_candidates` beside it: inside the model, since
data parallelism averages only what its forward used, and in its checkpoints. The model that is saved has the best one.
"""

import torch
from torch import nn

from modeling_vtlmm.layers_vtlmm import VTLMMVisualHead


CHOICES = {"vm_head_type": ("linear", "mlp", "attention"), "vm_head_init": ("lm_head", "input_embeddings", "random")}


def check_candidates(candidates: list[dict]) -> None:
    """
    Raises:
        `ValueError`: for less than two candidates, or one with an unknown key or value.
    """
    if len(candidates) < 2:
        raise ValueError("`vm_head_candidates` needs two candidates or more: for one, set vm_head_init.")
    for number, candidate in enumerate(candidates):
        for key, value in candidate.items():
            if key not in (*CHOICES, "learning_rate"):
                raise ValueError(
                    f"Candidate {number} of `vm_head_candidates` has the key {key!r}; there are "
                    f"{', '.join(CHOICES)} and learning_rate."
                )
            if key == "learning_rate":
                candidate[key] = float(value)  # YAML reads 1e-3 as text
            elif value not in CHOICES[key]:
                raise ValueError(f"{key} of candidate {number} is {value!r}; it must be {', '.join(CHOICES[key])}.")


def vm_heads(model) -> list[VTLMMVisualHead]:
    """All candidates, the first of them the model's own head."""
    return [model.model.vm_head, *getattr(model.model, "vm_head_candidates", ())]


def replace_vm_head(model, vm_head_type: str, seed: int, vm_head_init: str = "lm_head") -> None:
    """
    Gives the model a new VM head of `vm_head_type`; what starts at random is drawn with `seed`.

    Raises:
        `ValueError`: for a type that there is not.
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
    Gives the model one new VM head for each of `candidates`, which learns.

    Args:
        candidates (`list[dict]`): `vm_head_type` (by default the model's), `vm_head_init` and `learning_rate`.
        learning_rate (`float`), vm_head_init (`str`): of those that do not say theirs.
        seed (`int`): of what starts at random; every process must have the same.

    Returns:
        `list[dict]`: `candidates` with every setting.
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
    return candidates


def keep_candidate(model, candidates: list[dict], number: int) -> None:
    """Makes candidate `number` the model's VM head, and forgets the others."""
    model.model.vm_head = vm_heads(model)[number]
    model.config.vm_head_type = candidates[number]["vm_head_type"]
    del model.model.vm_head_candidates


def format_table(table: list[dict]) -> str:
    """The candidates with their held-out losses, the one that is kept marked."""
    lines = ["VM heads (held-out KL in nats per image token)"]
    for row in table:
        settings = ", ".join(f"{key} {value}" for key, value in row.items() if key not in ("eval_visual_loss", "kept"))
        lines.append(f"  {row['eval_visual_loss']:.6f}  {settings}{'  ← kept' if row['kept'] else ''}")
    return "\n".join(lines)
