# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The four stages of VT-LMM (arXiv 2403.07720) as one table: what learns, which losses, who teaches."""

from dataclasses import dataclass, replace

import torch
from torch import nn


MODULES = ("vision_tower", "multi_modal_projector", "vm_head", "language_model", "lm_head")
VISUAL_TARGETS = ("next_patch", "same_patch", "feature", "basic")


@dataclass(frozen=True)
class Stage:
    """
    One row of the table.

    Attributes:
        name (`str`): see [`STAGES`].
        trains (`tuple[str, ...]`): modules of `MODULES` that learn; everything else is frozen.
        lm_loss_coef (`float`): weight of the language loss.
        visual_loss_coef (`float`): weight of the visual loss.
        visual_student (`str`, *optional*): the head that the visual loss teaches; the other one is the teacher.
            `"vm_head"` is KL(q ‖ p), `"lm_head"` is KL(p ‖ q).
        learning_rate (`float`): used when the run does not set one.
        detach_visual_teacher (`bool`): whether the teacher's side of the visual loss is a constant.
        visual_target (`str`): what the visual loss is: the paper's, or one of its rivals in [`rivals`].
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
            raise ValueError(f"Unknown modules to train: {', '.join(unknown)}. There are {', '.join(MODULES)}.")
        if not self.trains:
            raise ValueError("A stage must train at least one module: set `trainable_modules`.")
        if self.visual_student not in (None, "vm_head", "lm_head"):
            raise ValueError(f"`visual_student` is {self.visual_student!r}; it must be 'vm_head' or 'lm_head'.")
        if self.lm_loss_coef < 0 or self.visual_loss_coef < 0:
            raise ValueError("`lm_loss_coef` and `visual_loss_coef` must not be negative.")
        if self.lm_loss_coef == 0 and self.visual_loss_coef == 0:
            raise ValueError("Both losses have weight 0: nothing would be learnt.")
        if self.visual_loss_coef > 0 and self.visual_student is None:
            raise ValueError("A visual loss needs a `visual_student`: 'lm_head' (stage IV) or 'vm_head' (stage III).")
        if self.visual_target not in VISUAL_TARGETS:
            raise ValueError(f"`visual_target` is {self.visual_target!r}; it must be {', '.join(VISUAL_TARGETS)}.")
        if self.visual_target in ("feature", "basic") and self.visual_student == "vm_head":
            raise ValueError(
                f"The VM head cannot learn by `visual_target: {self.visual_target}`, where it has no part."
            )
        if self.visual_target == "basic" and self.visual_loss_coef and "multi_modal_projector" not in self.trains:
            raise ValueError(
                "`visual_target: basic` teaches the projector, which rests: add multi_modal_projector to "
                "`trainable_modules`."
            )
        taught = {"vm_head", "multi_modal_projector", "vision_tower"}
        if self.visual_student == "vm_head" and self.visual_loss_coef and self.detach_visual_teacher:
            if not taught & set(self.trains):
                raise ValueError(
                    "The visual loss teaches the VM head, which rests: add vm_head to `trainable_modules`, or set "
                    "`visual_student: lm_head`."
                )


# Section 3 of the paper as far as it is told. Learning rates are LLaVA-1.5's, whose stages I and II are the same;
# III has no published one. In IV the projector rests: it makes the targets.
STAGES = {
    stage.name: stage
    for stage in (
        Stage("projector", ("multi_modal_projector",), 1.0, 0.0, None, 1e-3),
        Stage("decoder", ("multi_modal_projector", "language_model", "lm_head"), 1.0, 0.0, None, 2e-5),
        Stage("visual_head", ("vm_head",), 0.0, 1.0, "vm_head", 1e-3),
        Stage("joint", ("language_model", "lm_head"), 1.0, 1.0, "lm_head", 2e-5),
    )
}


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
    The row `name` of [`STAGES`] with the given columns replaced.

    A visual loss in stage I or II teaches the decoder unless `visual_student` says otherwise.

    Raises:
        `ValueError`: for an unknown stage or module, or a row that cannot learn anything.
    """
    if name not in STAGES:
        raise ValueError(f"Unknown stage {name!r}. There are {', '.join(STAGES)}.")
    stage = STAGES[name]
    changes = {"detach_visual_teacher": detach_visual_teacher, "visual_target": visual_target}
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
    return replace(stage, **changes)


def module_of(parameter_name: str) -> str | None:
    """Which of `MODULES` a parameter belongs to, by its name (also inside PEFT's or DDP's wrappers)."""
    parts = parameter_name.replace(".vm_head_candidates.", ".vm_head.").split(".")
    return next((module for module in MODULES if module in parts), None)


def set_trainable(model: nn.Module, stage: Stage) -> None:
    """
    Freezes everything but the modules of `stage.trains`.

    With tied embeddings `lm_head` and the decoder's input embeddings are one parameter, which learns if either does.
    """
    learning = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if module_of(name) in stage.trains:
            learning.add(parameter)
    for parameter in model.parameters():
        # 4- and 8-bit weights are integers and cannot learn; adapters on them can
        parameter.requires_grad = parameter in learning and torch.is_floating_point(parameter)


def describe(model: nn.Module, stage: Stage) -> str:
    """The plan of a run for people: its losses, and for each module how many parameters it has and how many learn."""
    losses = []
    if stage.lm_loss_coef:
        losses.append(f"{stage.lm_loss_coef:g} · L_lm")
    if stage.visual_loss_coef:
        direction = "KL(q ‖ p), lm_head teaches" if stage.visual_student == "vm_head" else "KL(p ‖ q), vm_head teaches"
        direction = {
            "same_patch": f"{direction}, at the patch itself",
            "feature": "smooth L1 of hidden states to image features",
            "basic": "cosine and KL of image features to hidden states in the middle",
        }.get(stage.visual_target, direction)
        attached = "" if stage.detach_visual_teacher else ", teacher not detached"
        losses.append(f"{stage.visual_loss_coef:g} · L_vm [{direction}{attached}]")
    counts = {module: [0, 0] for module in MODULES}
    for name, parameter in model.named_parameters():
        module = module_of(name)
        if module is not None and "original_module" not in name:  # PEFT's copy of what is saved in full
            packed = getattr(parameter, "quant_state", None)  # of a 4-bit weight, which holds two numbers a byte
            number = parameter.numel() if packed is None else packed.shape.numel()
            counts[module][0] += number
            counts[module][1] += number if parameter.requires_grad else 0
    changed = [] if stage == STAGES[stage.name] else ["  (changed from the paper's row)"]
    rows = [f"  {module:<22}{total:>15,} parameters{learn:>15,} learn" for module, (total, learn) in counts.items()]
    return "\n".join([f"Stage {stage.name}: loss = {' + '.join(losses)}", *changed, *rows])
