# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""A tiny search over VM heads in stage III."""

from .training import build_rows, build_trainer


CANDIDATES = [
    {"vm_head_init": "random", "learning_rate": 1e-2},
    {"vm_head_type": "mlp", "learning_rate": 3e-2},
    {"vm_head_type": "attention", "vm_head_init": "input_embeddings"},
    {"vm_head_init": "lm_head", "learning_rate": 1e-4},
]
SETTINGS = {"stage": "visual_head", "optim": "adamw_torch", "learning_rate": 2e-2, "weight_decay": 0.1}
# The clipping has an effect: it would be stronger on the gradients of all heads together.
SETTINGS |= {"max_grad_norm": 0.1, "max_steps": 4, "per_device_train_batch_size": 2, "lr_scheduler_type": "cosine"}


def build_search(output_dir, **settings):
    """Return a trainer that trains `CANDIDATES` on four rows."""
    rows = build_rows((1, 1, 0, 2), seed=1)
    return build_trainer(output_dir, eval_dataset=rows, vm_head_candidates=CANDIDATES, **{**SETTINGS, **settings})
