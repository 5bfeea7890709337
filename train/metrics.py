# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""What a run logs of its losses and visual tokens: exact means over all processes and micro-batches."""

import torch


def is_punctuation_or_blank(word: str) -> bool:
    """Whether a word of the vocabulary says nothing by itself: no letter and no digit in it."""
    return not any(character.isalnum() for character in word)


def blank_words(tokenizer, vocab_size: int) -> torch.BoolTensor:
    """Which of the first `vocab_size` words are punctuation, blank, special or a lone byte: `(vocab_size,)`."""
    special = set(tokenizer.all_special_ids)
    words = (tokenizer.decode([i]) for i in range(vocab_size))
    return torch.tensor([i in special or is_punctuation_or_blank(word) for i, word in enumerate(words)])


class LossSums:
    r"""
    The sums of the model's forward since the last log. They stay on the device until then.

    Args:
        accelerator ([`~accelerate.Accelerator`])
        blank_words (`torch.BoolTensor` of shape `(visual_vocab_size,)`, *optional*): words that say nothing.
    """

    def __init__(self, accelerator, blank_words: torch.BoolTensor | None):
        self.accelerator = accelerator
        self.blank_words = blank_words
        self.totals = {}

    def forget(self) -> None:
        self.totals = {}

    def add(self, sums: dict, num_rows: int | torch.Tensor) -> None:
        """One micro-batch: `loss_sums` of the forward, and how many rows it had."""
        sums = {**sums, **sums.get("visual_tokens", {})}
        sums.pop("visual_tokens", None)
        device = self.accelerator.device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        for name, value in {**sums, "num_rows": torch.as_tensor(num_rows)}.items():
            self.totals[name] = self.totals.get(name, 0) + value.detach().to(device, dtype)

    def drain(self) -> tuple[dict[str, float], float, float | None]:
        """
        Exact means since the last call, over all processes (each must call); one reduction.

        Returns:
            `tuple`: the means by name, how many rows they are of, and of how many image tokens, if those were counted.
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
            blank = self.blank_words.to(flat.device)
            metrics["visual_loss"] = (totals["visual_loss"] / totals["num_visual_targets"]).item()
            for i, loss in enumerate(totals.get("vm_head_losses", ())):
                metrics[f"vm_head_{i}_loss"] = (loss / totals["num_visual_targets"]).item()
            metrics["visual_token_entropy"] = (totals["entropy"] / num_patches).item()
            metrics["mean_visual_token_entropy"] = torch.special.entr(totals["probability"] / num_patches).sum().item()
            metrics["blank_top_words"] = (totals["top_word"][blank].sum() / num_patches).item()
            metrics["head_agreement"] = (totals["agreement"] / num_patches).item()
        num_visual_targets = totals.get("num_visual_targets")
        return metrics, totals["num_rows"].item(), None if num_visual_targets is None else num_visual_targets.item()
