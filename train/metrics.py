# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Exact means of the losses and the statistics of visual tokens, over all micro-batches and processes."""

from collections.abc import Sequence
from typing import Any

import torch

from modeling_vtlmm.losses_vtlmm import predicted_positions, text_labels


def is_punctuation_or_blank(word: str) -> bool:
    """Return whether `word` has no letter and no digit."""
    return not any(character.isalnum() for character in word)


def blank_words(tokenizer, vocab_size: int) -> torch.Tensor:
    """Return a mask `(vocab_size,)` of the punctuation, blank, special and single-byte tokens of the vocabulary."""
    special = set(tokenizer.all_special_ids)
    words = (tokenizer.decode([i]) for i in range(vocab_size))
    return torch.tensor([i in special or is_punctuation_or_blank(word) for i, word in enumerate(words)])


def target_masks(batch: dict, config) -> tuple[torch.Tensor, torch.Tensor]:
    """Return masks of the targets of both losses, `(B, S − 1)` and `(B, S)`, by the rules of the model's forward."""
    is_image_token = batch["input_ids"] == config.image_token_id
    predicted = predicted_positions(is_image_token, batch.get("attention_mask"), batch.get("position_ids"))
    labels = text_labels(batch["labels"], config.image_token_id, config.text_config.vocab_size)
    return labels[:, 1:] != -100, predicted


def target_datasets(batch: dict, config) -> dict[str, torch.Tensor]:
    """Return the dataset of each target, as `lm` for the language loss and `visual`; `{}` without a mixture."""
    if "mixture_index" not in batch:
        return {}
    is_target, predicted = target_masks(batch, config)
    return {"lm": batch["mixture_index"][:, 1:][is_target], "visual": batch["mixture_index"][predicted]}


class LossSums:
    r"""
    Accumulate the sums of the model's forward until the next log, without synchronizing the device.

    Args:
        accelerator ([`~accelerate.Accelerator`]): reduces the sums over the processes.
        blank_words (`torch.BoolTensor` of shape `(visual_vocab_size,)`, *optional*): mask from [`blank_words`]. Needed
            for runs with a visual loss.
        dataset_names (`list[str]`, *optional*): names of the datasets of a mixture.
    """

    def __init__(self, accelerator, blank_words: torch.Tensor | None, dataset_names: Sequence[str] = ()):
        self.accelerator = accelerator
        self.dataset_names = dataset_names
        self.blank_words = blank_words
        self.totals: dict[str, torch.Tensor] = {}

    def forget(self) -> None:
        """Discard the sums."""
        self.totals = {}

    def add(self, sums: dict[str, Any], num_rows: int | torch.Tensor, datasets: dict[str, torch.Tensor]) -> None:
        """Add one micro-batch, given the `loss_sums` of the forward and the result of [`target_datasets`]."""
        sums = {**sums, **sums.get("visual_tokens", {})}
        sums.pop("visual_tokens", None)
        sums |= self._dataset_sums(sums.pop("token_losses"), datasets)
        device = self.accelerator.device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        for name, value in {**sums, "num_rows": torch.as_tensor(num_rows)}.items():
            self.totals[name] = self.totals.get(name, 0) + value.detach().to(device, dtype)

    def _dataset_sums(self, token_losses: dict, datasets: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return sum and number of the losses of each dataset, with the visual loss of the first VM head."""
        sums = {}
        for name, indices in datasets.items():
            for losses in token_losses[name][:1]:
                values = torch.stack([losses, torch.ones_like(losses)])
                totals = losses.new_zeros(2, len(self.dataset_names))
                sums[f"datasets_{name}_loss"] = totals.index_add(1, indices.to(losses.device), values)
        return sums

    def drain(self) -> tuple[dict[str, float], float, float | None]:
        """
        Return the exact means since the last call over all processes, and reset the sums.

        All processes must call this method, which makes one reduction.

        Returns:
            `tuple`: the means by name, the number of rows, and the number of image tokens (`None` without a visual
                loss).
        """
        totals, self.totals = self.totals, {}
        if not totals:
            return {}, 0, None
        names = sorted(totals)
        flat = self.accelerator.reduce(torch.cat([totals[name].reshape(-1) for name in names]), reduction="sum")
        sizes = [totals[name].numel() for name in names]
        totals = dict(zip(names, flat.split(sizes), strict=True))
        metrics = {}
        if totals.get("num_lm_targets", 0) > 0:
            metrics["lm_loss"] = (totals["lm_loss"] / totals["num_lm_targets"]).item()
        if totals.get("num_visual_targets", 0) > 0:
            num_patches = totals["num_patches"]
            if self.blank_words is None:
                raise ValueError("`LossSums` needs `blank_words` for a run with a visual loss.")
            blank = self.blank_words.to(flat.device)
            losses = (totals["visual_loss"] / totals["num_visual_targets"]).tolist()
            metrics["visual_loss"] = losses[0]
            if len(losses) > 1:  # several VM heads
                metrics |= {f"vm_head_{i}_loss": loss for i, loss in enumerate(losses)}
            metrics["visual_token_entropy"] = (totals["entropy"] / num_patches).item()
            metrics["mean_visual_token_entropy"] = torch.special.entr(totals["probability"] / num_patches).sum().item()
            metrics["blank_top_words"] = (totals["top_word"][blank].sum() / num_patches).item()
            metrics["head_agreement"] = (totals["agreement"] / num_patches).item()
        for name in ("lm_loss", "visual_loss"):
            sums_and_numbers = totals.get(f"datasets_{name}", flat[:0]).view(2, -1).tolist()
            for dataset, loss, number in zip(self.dataset_names, *sums_and_numbers, strict=False):
                if number:
                    metrics[f"{dataset}_{name}"] = loss / number
        num_visual_targets = totals.get("num_visual_targets")
        return metrics, totals["num_rows"].item(), None if num_visual_targets is None else num_visual_targets.item()
