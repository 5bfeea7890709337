# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The four stages of VT-LMM (arXiv 2403.07720) as one table: trainable modules, losses and teacher."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .setting_checks import validate_stage


MODULES = ("vision_tower", "multi_modal_projector", "vm_head", "language_model", "lm_head")
VISUAL_TARGETS = ("next_patch", "same_patch", "other_image", "feature", "basic")


@dataclass(frozen=True)
class Stage:
    """
    One row of [`STAGES`].

    Attributes:
        name (`str`): name of the stage.
        trains (`tuple[str, ...]`): trainable modules, from `MODULES`. All others are frozen.
        lm_loss_coef (`float`): weight of the language loss.
        visual_loss_coef (`float`): weight of the visual loss.
        visual_student (`str`, *optional*): head that the visual loss trains; the other head is the teacher.
            `"vm_head"` is KL(q ‖ p), `"lm_head"` is KL(p ‖ q).
        learning_rate (`float`): default learning rate.
        detach_visual_teacher (`bool`): whether the teacher of the visual loss gets no gradient.
        visual_target (`str`): target of the visual loss, from `VISUAL_TARGETS`; see `visual_targets.py`.
    """

    name: str
    trains: tuple[str, ...]
    lm_loss_coef: float
    visual_loss_coef: float
    visual_student: str | None
    learning_rate: float
    detach_visual_teacher: bool = True
    visual_target: str = "next_patch"

    def __post_init__(self):
        unknown = [name for name in self.trains if name not in MODULES]
        if unknown:
            raise ValueError(
                f"Unknown modules in `trainable_modules`: {', '.join(unknown)}. Use {', '.join(MODULES)}."
            )
        if not self.trains:
            raise ValueError("A stage must train at least one module. Set `trainable_modules`.")
        if self.visual_student not in (None, "vm_head", "lm_head"):
            raise ValueError(f"`visual_student` is {self.visual_student!r}; it must be 'vm_head' or 'lm_head'.")
        if self.lm_loss_coef < 0 or self.visual_loss_coef < 0:
            raise ValueError("`lm_loss_coef` and `visual_loss_coef` must not be negative.")
        if self.visual_target not in VISUAL_TARGETS:
            raise ValueError(f"`visual_target` is {self.visual_target!r}; it must be {', '.join(VISUAL_TARGETS)}.")


# Section 3 of the paper. Stages I, II and IV have LLaVA-1.5's learning rates. The one of stage III is our choice.
# Stage IV keeps the projector frozen because the projector makes the targets of the visual loss.
# fmt: off
STAGES = {
    stage.name: stage
    for stage in (
        #     name           trainable modules                                      L_lm  L_vm student    learning rate
        Stage("projector",   ("multi_modal_projector",),                             1.0, 0.0, None,      1e-3),
        Stage("decoder",     ("multi_modal_projector", "language_model", "lm_head"), 1.0, 0.0, None,      2e-5),
        Stage("visual_head", ("vm_head",),                                           0.0, 1.0, "vm_head", 1e-3),
        Stage("joint",       ("language_model", "lm_head"),                          1.0, 1.0, "lm_head", 2e-5),
    )
}
# fmt: on


def resolve_stage(
    name: str,
    trainable_modules: list[str] | None = None,
    lm_loss_coef: float | None = None,
    visual_loss_coef: float | None = None,
    visual_student: str | None = None,
    detach_visual_teacher: bool = True,
    visual_target: str = "next_patch",
) -> Stage:
    """
    Return the row `name` of [`STAGES`] with the given columns replaced.

    A visual loss in stage I or II trains the LM head unless `visual_student` is set.

    Raises:
        `ValueError`: if the stage or a module is unknown, or the losses do not reach a trainable module.
    """
    if name not in STAGES:
        raise ValueError(f"Unknown stage {name!r}. Use {', '.join(STAGES)}.")
    stage = STAGES[name]
    changes: dict[str, Any] = {"detach_visual_teacher": detach_visual_teacher, "visual_target": visual_target}
    if trainable_modules is not None:
        changes["trains"] = tuple(trainable_modules)
    if lm_loss_coef is not None:
        changes["lm_loss_coef"] = lm_loss_coef
    if visual_loss_coef is not None:
        changes["visual_loss_coef"] = visual_loss_coef
    if visual_student is None and visual_loss_coef and stage.visual_student is None:
        visual_student = "lm_head"
    if visual_student is not None:
        changes["visual_student"] = visual_student
    stage = replace(stage, **changes)
    validate_stage(stage)
    return stage


def next_stage(name: str) -> str | None:
    """Return the stage after `name`, None after the last stage."""
    names = list(STAGES)
    return dict(zip(names, names[1:], strict=False)).get(name)


def module_of(parameter_name: str) -> str | None:
    """Return the entry of `MODULES` that contains a parameter, also inside PEFT or DDP wrappers, or None."""
    parts = parameter_name.replace(".vm_head_candidates.", ".vm_head.").split(".")
    return next((module for module in MODULES if module in parts), None)


def set_trainable(model: nn.Module, stage: Stage) -> None:
    """
    Freeze all parameters except those of `stage.trains`.

    With tied embeddings, `lm_head` and the decoder's input embeddings are one parameter. It is trainable if either is.
    """
    trainable = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if module_of(name) in stage.trains:
            trainable.add(parameter)
    for parameter in model.parameters():
        # 4- and 8-bit weights are integers and cannot be trained
        parameter.requires_grad = parameter in trainable and torch.is_floating_point(parameter)


def describe(model: nn.Module, stage: Stage) -> str:
    """Return the losses, and the number of parameters and of trainable parameters of each module, as text."""
    losses = []
    if stage.lm_loss_coef:
        losses.append(f"{stage.lm_loss_coef:g} · L_lm")
    if stage.visual_loss_coef:
        direction = "KL(q ‖ p), teacher lm_head" if stage.visual_student == "vm_head" else "KL(p ‖ q), teacher vm_head"
        direction = {
            "same_patch": f"{direction}, at the same patch",
            "other_image": f"{direction}, of another image",
            "feature": "smooth L1 between hidden states and image features",
            "basic": "cosine and KL between image features and hidden states of the middle layer",
        }.get(stage.visual_target, direction)
        attached = "" if stage.detach_visual_teacher else ", teacher not detached"
        losses.append(f"{stage.visual_loss_coef:g} · L_vm [{direction}{attached}]")
    counts = {module: [0, 0] for module in MODULES}
    for name, parameter in model.named_parameters():
        module = module_of(name)
        if module is not None and "original_module" not in name:  # PEFT's frozen copy of a module in `modules_to_save`
            packed = getattr(parameter, "quant_state", None)  # a 4-bit weight stores two numbers per byte
            number = parameter.numel() if packed is None else packed.shape.numel()
            counts[module][0] += number
            counts[module][1] += number if parameter.requires_grad else 0
    changed = [] if stage == STAGES[stage.name] else ["  (changed from the paper's row)"]
    rows = [f"  {name:<22}{total:>15,} parameters{number:>15,} trainable" for name, (total, number) in counts.items()]
    return "\n".join([f"Stage {stage.name}: loss = {' + '.join(losses)}", *changed, *rows])
