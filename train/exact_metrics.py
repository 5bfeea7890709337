# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Logging and evaluation with exact means over all tokens, instead of means of the means of batches."""

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import Trainer

from .metrics import LossSums
from .stages import Stage


class ExactMetrics(Trainer):
    """Part of [`VTLMMTrainer`]: log and evaluate with the sums of the model's forward."""

    stage: Stage
    vm_head_candidates: list[dict]
    task_scores: Callable[[Any], dict[str, float]] | None
    _sums: dict[str, LossSums]
    _log_time: float

    def train(self, *args, **kwargs):
        self._sums["train"].forget()
        self._log_time = time.perf_counter()
        return super().train(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the exact means since the last log. All processes must call this, because it reduces the sums."""
        if "loss" in logs:  # training logs have it, evaluation logs have `eval_loss`
            logs.update(self._drain("train"))
        super().log(logs, start_time)

    def _drain(self, mode: str) -> dict[str, float]:
        """Return the exact means since the last call, in training with the throughput."""
        metrics, num_rows, num_patches = self._sums[mode].drain()
        if mode == "train" and num_rows:
            now = time.perf_counter()
            seconds, self._log_time = now - self._log_time, now
            metrics["samples_per_second"] = num_rows / seconds
            if num_patches is not None:
                metrics["image_tokens_per_second"] = num_patches / seconds
        return metrics

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix: str = "eval"
    ):
        """Evaluate with the losses as exact means over the evaluation set, and with the scores of `eval_task_data`."""
        started = time.perf_counter()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        assert output.metrics is not None
        metrics = self._drain("eval")
        loss = self.stage.lm_loss_coef * metrics.get("lm_loss", 0.0)
        head_losses = [metrics[f"vm_head_{i}_loss"] for i in range(len(self.vm_head_candidates))]
        loss += self.stage.visual_loss_coef * sum(head_losses or [metrics.get("visual_loss", 0.0)])
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        output.metrics[f"{metric_key_prefix}_loss"] = loss
        if self.task_scores is not None:
            with self.accelerator.autocast():  # `generate` of an adapter bypasses the forward that has autocast
                scores = self.task_scores(self.model)
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in scores.items()})
        self._log_time += time.perf_counter() - started  # evaluation does not count as training time
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Return the loss only; logits are never built."""
        inputs = self._without_repeated_rows(self._prepare_inputs(inputs))
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs), None, None

    def _without_repeated_rows(self, inputs: dict) -> dict:
        """
        Remove the targets of rows that accelerate repeats.

        accelerate fills the last batches with rows from the start of the dataset, so that all processes have the same
        number of rows. No target is predicted at position 0.
        """
        state = self.accelerator.gradient_state
        if self.accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return inputs
        num_rows, length = inputs["input_ids"].shape
        rows = torch.arange(num_rows, device=inputs["input_ids"].device)[:, None]
        repeated = rows + self.accelerator.process_index * num_rows >= state.remainder
        position_ids = torch.arange(length, device=rows.device).masked_fill(repeated, 0)
        return {**inputs, "labels": inputs["labels"].masked_fill(repeated, -100), "position_ids": position_ids}
