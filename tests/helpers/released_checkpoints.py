# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints of the release and everything that the released code computed from them."""

import torch
from safetensors.torch import load_file

from modeling_vtlmm import VTLMMForConditionalGeneration
from vtlmm.hub.convert import convert_checkpoint


NUM_WORDS, NUM_PATCHES = 320, 4
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def expand(rows: torch.Tensor, input_ids: torch.Tensor, fill=None) -> torch.Tensor:
    """`rows`, aligned with `input_ids`, with every −200 repeated once per patch (as `fill`, if given)."""
    expanded = []
    for values, ids in zip(rows.tolist(), input_ids.tolist(), strict=True):
        pairs = zip(values, ids, strict=True)
        repeated = ([value] if i != -200 else [value if fill is None else fill] * NUM_PATCHES for value, i in pairs)
        expanded.append(sum(repeated, []))
    return torch.tensor(expanded)


def converted(checkpoint, output, **kwargs) -> VTLMMForConditionalGeneration:
    convert_checkpoint(checkpoint, output, **kwargs)
    return VTLMMForConditionalGeneration.from_pretrained(output)


class Case:
    """One reference folder, its golden tensors, and its inputs for the model that was converted into `output`."""

    def __init__(self, folder, output):
        self.folder, self.output = folder, output
        self.golden = load_file(folder / "golden.safetensors")
        self.model = converted(folder / "checkpoint", output)
        image_token_id = self.model.config.image_token_id
        ids = self.golden["input_ids"]
        self.inputs = {
            "input_ids": expand(ids, ids, image_token_id),
            "attention_mask": expand(self.golden["attention_mask"], ids),
            "pixel_values": self.golden["pixel_values"],
        }
        self.labels = expand(self.golden["labels"], ids, -100)
        ids = self.golden["generate_input_ids"]
        input_ids = expand(ids, ids, image_token_id)
        self.generate_inputs = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "pixel_values": self.golden["pixel_values"][2:3],
        }

    def losses(self, model, student: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean language loss and mean visual loss, with the teacher attached as in the release."""
        sums = model(
            **self.inputs,
            labels=self.labels,
            return_loss_sums=True,
            visual_student=student,
            detach_visual_teacher=False,
        ).loss_sums
        return sums["lm_loss"] / sums["num_lm_targets"], sums["visual_loss"] / sums["num_visual_targets"]
