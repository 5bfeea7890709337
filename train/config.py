# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Settings of a training run: TRL's, with the stage and its losses."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from trl import SFTConfig

from .stages import Stage, resolve_stage
from .vm_head_search import check_candidates


@dataclass
class VTLMMTrainingConfig(SFTConfig):
    r"""
    Configuration of a [`VTLMMTrainer`]: every setting of TRL's [`SFTConfig`], and those of one VT-LMM stage.

    Parameters:
        stage (`str`, *optional*, defaults to `"joint"`):
            `"projector"` (I), `"decoder"` (II), `"visual_head"` (III) or `"joint"` (IV): the row of `STAGES`.
        trainable_modules (`list[str]`, *optional*):
            Modules that learn, instead of the row's.
        lm_loss_coef, visual_loss_coef (`float`, *optional*):
            Weights of the losses, instead of the row's. `visual_loss_coef=0` in stage IV is the control of the paper's
            claim.
        visual_student (`str`, *optional*):
            Head that the visual loss teaches, `"vm_head"` or `"lm_head"`, instead of the row's.
        detach_visual_teacher (`bool`, *optional*, defaults to `True`):
            Whether the teacher's side of the visual loss is a constant.
        visual_target (`str`, *optional*, defaults to `"next_patch"`):
            What the visual loss is: the paper's, or a rival: `"same_patch"`, `"feature"` or `"basic"` (see `rivals`).
        vm_head_init (`str`, *optional*):
            What the VM head starts from: `"lm_head"`, `"input_embeddings"`, `"random"`, or `"keep"`. Defaults to
            `"lm_head"` in stage III (the decoder has learnt since the checkpoint was composed), else to `"keep"`.
        vm_head_candidates (`list[dict]`, *optional*):
            VM heads that stage III trains side by side, each as if alone: `vm_head_type`, `vm_head_init`
            and `learning_rate` of each. The best on `eval_dataset` is kept; `loss` is the sum over all of them.
        projector_learning_rate (`float`, *optional*):
            Learning rate of the projector where it differs.
        adapter_learning_rate (`float`, *optional*):
            Learning rate of LoRA's weights where it differs (LLaVA-1.5's recipe: 2e-4 beside 2e-5).
        cache_image_features (`str` or `bool`, *optional*):
            Folder where the frozen tower's features of every image are kept (`True`: `image_features` beside
            `output_dir`, which further stages find too). Each image is decoded and encoded once, whatever the
            epochs and runs; several processes share the work, so all machines must see the folder. Takes num_patches ·
            vision_feature_size numbers a image: 1.2 MB with CLIP-L/336 in bfloat16.

    > Defaults other than TRL's: `learning_rate` (the stage's), `lr_scheduler_type` (cosine), `warmup_steps` (0.03 of
    > the steps), `max_length` (2048, and a longer row is refused, never cut), `bf16` (where the GPU has it),
    > `remove_unused_columns` (`False`), `hub_strategy` (`"end"`).

    Raises:
        `ValueError`: for a stage that does not exist or cannot learn, packing without `max_length`, a paged optimizer
            without CUDA, and settings that would have no effect.
    """

    learning_rate: float | None = field(
        default=None, metadata={"help": "Initial learning rate; the stage's if unset."}
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    warmup_steps: float = field(default=0.03, metadata={"help": "Warm-up steps, or below 1 their share of all steps."})
    max_length: int | None = field(default=2048, metadata={"help": "Longest row in tokens; longer ones are refused."})
    remove_unused_columns: bool | None = field(default=False, metadata={"help": "Drop columns the model cannot use."})
    # a push in the middle of a run publishes a pickle of the settings, and checkpoints
    hub_strategy: str = field(default="end", metadata={"help": "When `push_to_hub` pushes; as in the base class."})

    stage: str = field(default="joint", metadata={"help": "projector, decoder, visual_head or joint (I to IV)."})
    trainable_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules that learn, if not the stage's."}
    )
    lm_loss_coef: float | None = field(default=None, metadata={"help": "Weight of L_lm, if not the stage's."})
    visual_loss_coef: float | None = field(default=None, metadata={"help": "Weight of L_vm, if not the stage's."})
    visual_student: str | None = field(default=None, metadata={"help": "Head that L_vm teaches, if not the stage's."})
    detach_visual_teacher: bool = field(default=True, metadata={"help": "Whether the teacher of L_vm is a constant."})
    visual_target: str = field(default="next_patch", metadata={"help": "next_patch, same_patch, feature or basic."})
    vm_head_init: str | None = field(
        default=None, metadata={"help": "lm_head, input_embeddings, random or keep; lm_head by default in stage III."}
    )
    vm_head_candidates: list[dict] | None = field(
        default=None,
        metadata={"help": "VM heads that stage III trains in one pass; the best held-out one is kept."},
    )
    projector_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the projector, if it differs."}
    )
    adapter_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of LoRA's weights, if it differs."}
    )
    cache_image_features: str | None = field(
        default=None, metadata={"help": "Folder for the tower's features (true: beside output_dir)."}
    )

    def __post_init__(self):
        stage = self.resolved_stage()
        if self.learning_rate is None:
            self.learning_rate = stage.learning_rate
        if self.vm_head_init is None:
            self.vm_head_init = "lm_head" if self.stage == "visual_head" else "keep"
        if self.vm_head_init not in ("lm_head", "input_embeddings", "random", "keep"):
            raise ValueError(
                f"`vm_head_init` is {self.vm_head_init!r}; it must be lm_head, input_embeddings, random or keep."
            )
        for name, without in (("label_smoothing_factor", 0.0), ("loss_type", "nll"), ("eval_packing", None)):
            if getattr(self, name) != without:
                raise ValueError(f"`{name}` has no effect on the losses of a stage: leave it out.")
        if self.router_aux_loss_coef:
            raise ValueError("`router_aux_loss_coef` can be 0 only: the balance loss is not computed here.")
        if self.packing and self.max_length is None:
            raise ValueError("Packing needs `max_length`: the length of a pack.")
        if "paged" in self.optim and (self.use_cpu or not torch.cuda.is_available()):
            raise ValueError(
                f"`optim: {self.optim}` moves its state between the memories of GPU and CPU and needs CUDA: without "
                "it set `optim: adamw_torch`."
            )
        if self.vm_head_candidates:
            check_candidates(self.vm_head_candidates)
            if stage.trains != ("vm_head",):
                raise ValueError("`vm_head_candidates` belong to stage III (visual_head): the VM head alone learns.")
        if self.cache_image_features is True:
            self.cache_image_features = str(Path(self.output_dir or "trainer_output").parent / "image_features")
        if self.cache_image_features and "vision_tower" in stage.trains:
            raise ValueError("The tower learns, so its features change: take `cache_image_features` out.")
        if self.bf16 is None and not self.fp16:
            # TRL would switch bf16 on everywhere and stop on a machine without a GPU
            self.bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported() and not self.use_cpu
        super().__post_init__()

    def resolved_stage(self) -> Stage:
        """The stage's row with this run's changes."""
        return resolve_stage(
            self.stage,
            self.trainable_modules,
            self.lm_loss_coef,
            self.visual_loss_coef,
            self.visual_student,
            self.detach_visual_teacher,
            self.visual_target,
        )
