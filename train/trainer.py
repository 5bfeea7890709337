# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The trainer: TRL's SFTTrainer with the visual loss, normalized over the whole optimizer step."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from transformers import (
    BitsAndBytesConfig,
    DataCollator,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from trl import SFTTrainer

from vtlmm.data.mixture import mixture_names
from vtlmm.data.vision_feature_cache import undecoded
from vtlmm.evaluation.runner import task_scores
from vtlmm.inference.loading import require_fit

from .adapters import adapted_stage, add_adapter, float32_copies
from .cached_features import cache_vision_features
from .checkpoints import SafeCheckpoints
from .collator import VTLMMCollator
from .config import VTLMMTrainingConfig
from .exact_metrics import ExactMetrics
from .learning_rates import set_learning_rates
from .metrics import LossSums, blank_words, target_datasets, target_masks
from .packing import prepare_batching
from .parallelism import prepare_parallelism
from .patch_word_images import add_patch_word_images
from .publish import push_checkpoint, push_trained_model, write_adapter_files, write_run_card
from .stages import describe, set_trainable
from .trainer_inputs import (
    build_collator,
    check_model,
    hidden_from_sft_trainer,
    load_model_and_processor,
    prepare_dataset,
    prepare_datasets,
    reject_unsupported,
    resolve_args,
)
from .visual_targets import set_visual_target
from .vm_head_search import add_candidates, format_table, keep_candidate, vm_heads


Rows: TypeAlias = Dataset | IterableDataset


class VTLMMTrainer(SafeCheckpoints, ExactMetrics, SFTTrainer):
    r"""
    Trainer for one stage of VT-LMM ([Multi-modal Auto-regressive Modeling via Visual Tokens](https://huggingface.co/papers/2403.07720)).

    The loss is `lm_loss_coef · L_lm + visual_loss_coef · L_vm`. Each is the mean over *all* its tokens of an optimizer
    step, over gradient accumulation and over processes; see [`~VTLMMTrainer.normalized_loss`].

    ```python
    >>> trainer = VTLMMTrainer(model="outputs/model", train_dataset=dataset, peft_config=LoraConfig(r=16))
    >>> trainer.train()
    ```

    Args:
        model (`str`, [`PreTrainedModel`] or [`~peft.PeftModel`]): a VT-LMM, or a folder or Hub id of one. Of a
            `PeftModel`, only the adapter is trained.
        args ([`VTLMMTrainingConfig`], *optional*): also an [`~trl.SFTConfig`]. Defaults to stage IV.
        data_collator (*optional*, defaults to [`VTLMMCollator`])
        train_dataset, eval_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]): rows in any
            format of [`load_rows`], such as `messages` and `images`. Images without placeholders in the text come
            before the first question. `eval_dataset` may be a `dict` of several.
        processing_class ([`~transformers.ProcessorMixin`], *optional*): the model's processor. By default it is loaded
            from the folder or Hub id of the model.
        callbacks, optimizers, optimizer_cls_and_kwargs, quantization_config: see [`~trl.SFTTrainer`].
        peft_config ([`~peft.PeftConfig`], *optional*): adapter on the decoder. By default on all its projections.
            `modules_to_save` are trained in full.
        compute_loss_func, compute_metrics, preprocess_logits_for_metrics, formatting_func: not supported.
        eval_task_data ([`~datasets.Dataset`], *optional*): rows whose questions the model answers at every evaluation.
            Exact match gives the metrics `eval_accuracy` and `eval_accuracy_shuffled_images`.
        eval_task_images (`int`, *optional*, defaults to 100): number of images of `eval_task_data` to ask about.

    Raises:
        `ValueError`: if an argument is not supported, or does not fit the model, the stage or the other arguments.
    """

    _tag_names = ["trl", "sft", "vt-lmm"]
    _name = "VT-LMM"
    _paper = {
        "title": "Multi-modal Auto-regressive Modeling via Visual Tokens",
        "id": "2403.07720",
        "citation": """@inproceedings{peng2024multimodal,
  title={Multi-modal Auto-regressive Modeling via Visual Tokens},
  author={Peng, Tianshuo and Li, Zuchao and Zhang, Lefei and Zhao, Hai and Wang, Ping and Du, Bo},
  booktitle={Proceedings of the 32nd ACM International Conference on Multimedia},
  year={2024}
}""",
    }
    args: VTLMMTrainingConfig
    model: Any  # a VT-LMM or a PeftModel of one
    # `normalized_loss` divides by counts over the whole step, so Trainer must not divide again.
    loss_is_scaled_for_ga = True  # type: ignore[assignment]  # TRL annotates None

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: TrainingArguments | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | dict[str, Rows] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        formatting_func: Callable[[dict], str] | None = None,
        eval_task_data: Dataset | None = None,
        eval_task_images: int = 100,
    ):
        reject_unsupported(
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            formatting_func=formatting_func,
        )
        args = resolve_args(args, model)
        model, processor = load_model_and_processor(model, args, processing_class, quantization_config)
        check_model(model, args, processor, peft_config)
        if data_collator is None:
            data_collator = build_collator(model, args, processor)
        train_dataset, eval_dataset = prepare_datasets(train_dataset, eval_dataset, args)
        set_seed(args.seed)  # SFTTrainer sets it after the first values of LoRA and of the VM head are drawn
        base_model: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        model = self._prepare_model(model, base_model, args, peft_config, eval_dataset)
        trained_values = float32_copies(model, args)
        datasets = [train_dataset, *(eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset])]
        train_dataset, eval_dataset = prepare_batching(base_model, args, processor, train_dataset, eval_dataset)
        with hidden_from_sft_trainer(args):
            super().__init__(
                model=model,
                args=args,
                data_collator=data_collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processor,
                callbacks=callbacks,
                optimizers=optimizers,
                optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            )
        for parameter, values in trained_values.items():
            parameter.data = values.to(parameter.device)
        prepare_parallelism(self, base_model, datasets[1:])
        add_patch_word_images(self, processor, datasets[1:])
        self.task_scores = self._prepare_task_scores(eval_task_data, processor, eval_task_images)
        if args.cache_image_features:
            cast(VTLMMCollator, self.data_collator).feature_cache = cache_vision_features(self, base_model, datasets)
        self._prepare_metrics(base_model.config.visual_vocab_size, mixture_names(datasets[0]))
        if self.is_world_process_zero():
            print(describe(self.model, self.stage))

    # ---- Setup ----

    def _prepare_metrics(self, visual_vocab_size: int, dataset_names: list[str]) -> None:
        """Create the sums of the losses, with the metrics of visual tokens if the stage has a visual loss."""
        has_visual_loss = self.stage.visual_student is not None
        words = blank_words(self._tokenizer, visual_vocab_size) if has_visual_loss else None
        self._sums = {mode: LossSums(self.accelerator, words, dataset_names) for mode in ("train", "eval")}
        self._log_time = time.perf_counter()

    def _prepare_task_scores(self, eval_task_data: Dataset | None, processor, eval_task_images: int):
        """Return the function that answers and scores `eval_task_data`, None without such data."""
        if eval_task_data is None:
            return None
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("`eval_task_data` is not supported with FSDP or DeepSpeed. Remove it.")
        batch_size = self.args.per_device_eval_batch_size
        return task_scores(eval_task_data, processor, eval_task_images, batch_size, config=self.model.config)

    def _prepare_model(self, model, base_model, args, peft_config, eval_dataset) -> PreTrainedModel | PeftModel:
        """Set the stage, the trainable parameters and the initial VM heads; return the model, with its adapter."""
        self.stage = args.resolved_stage()
        self.vm_head_candidates: list[dict] = []
        self.vm_head_table: list[dict] | None = None
        set_visual_target(base_model, self.stage.visual_target)
        has_adapter = peft_config is not None or isinstance(model, PeftModel)
        if args.vm_head_candidates:
            if eval_dataset is None or isinstance(eval_dataset, dict) or has_adapter:
                raise ValueError("`vm_head_candidates` needs one `eval_dataset` to choose by, and no adapter.")
            streamed = isinstance(eval_dataset, IterableDataset)
            if not streamed and not any(row["images"] for row in undecoded(eval_dataset)):
                raise ValueError("`vm_head_candidates` are compared on images, but `eval_dataset` has no image.")
        elif args.vm_head_init != "keep":
            base_model.initialize_vm_head(args.vm_head_init)
        if peft_config is not None:
            model = add_adapter(model, peft_config)
        if isinstance(model, PeftModel):
            self.stage = adapted_stage(model, self.stage)
            if args.vm_head_init != "keep" and "vm_head" not in self.stage.trains:
                raise ValueError(
                    f"`vm_head_init: {args.vm_head_init}` changes the VM head, which the adapter does not save. Set "
                    "it to keep, or add vm_head to `trainable_modules` and to the adapter's `modules_to_save`."
                )
            return model
        set_trainable(model, self.stage)
        if args.vm_head_candidates:
            source = "lm_head" if args.vm_head_init == "keep" else args.vm_head_init
            self.vm_head_candidates = add_candidates(
                model, args.vm_head_candidates, args.learning_rate, source, args.seed
            )
        return model

    def _set_signature_columns_if_needed(self):
        self._signature_columns = ["messages", "images", "num_context_messages", "mixture_index", "rows", "pack"]

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Create the optimizer, with the learning rates of the projector, of LoRA and of each candidate VM head."""
        optimizer = super().create_optimizer(model)
        named = list(self.model.named_parameters())
        rates = [
            ({p for n, p in named if ".multi_modal_projector." in n}, self.args.projector_learning_rate),
            ({p for n, p in named if ".lora_" in n}, self.args.adapter_learning_rate),
        ]
        if self.vm_head_candidates:
            heads = zip(self.vm_head_candidates, vm_heads(self.model), strict=True)
            rates += [(set(head.parameters()), candidate["learning_rate"]) for candidate, head in heads]
        set_learning_rates(optimizer, rates)
        return optimizer

    def _clip_grad_norm(self, model):
        """Clip the gradients; those of each candidate VM head separately, as if it were the only one."""
        if not self.vm_head_candidates:
            return super()._clip_grad_norm(model)
        norm = self.accelerator.clip_grad_norm_(model.parameters(), float("inf"))
        for head in vm_heads(self.model):
            torch.nn.utils.clip_grad_norm_(head.parameters(), self.args.max_grad_norm)
        return norm

    def _keep_best_candidate(self) -> None:
        """Keep the candidate VM head with the lowest loss on `eval_dataset`, and delete the others."""
        metrics, candidates = self.evaluate(), self.vm_head_candidates
        losses = [metrics[f"eval_vm_head_{i}_loss"] for i in range(len(candidates))]
        best = min(range(len(losses)), key=lambda i: (math.isnan(losses[i]), losses[i]))
        self.vm_head_table = [
            {**candidate, "eval_visual_loss": loss, "kept": i == best}
            for i, (candidate, loss) in enumerate(zip(candidates, losses, strict=True))
        ]
        keep_candidate(self.model, candidates, best)
        self.vm_head_candidates = []
        if self.is_world_process_zero():
            print(format_table(self.vm_head_table))

    # ---- The loss ----

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        """
        Return the micro-batches of one optimizer step, and its token counts N_lm and N_vm (see `normalized_loss`).

        Returns:
            `tuple[list[dict], torch.Tensor]`: the micro-batches of this process, and `[N_lm, N_vm]`, a
            `torch.LongTensor` of shape `(2,)`, summed over the micro-batches and over all processes.
        """
        batches = []
        for _ in range(num_batches):
            try:
                batches.append(next(epoch_iterator))
            except StopIteration:
                break
        counts = torch.zeros(2, dtype=torch.long, device=device)
        for batch in batches:
            counts += self._count_targets(batch).to(device)
        return batches, self.accelerator.reduce(counts, reduction="sum")

    def _count_targets(self, batch: dict) -> torch.Tensor:
        """Return `[N_lm, N_vm]` of one micro-batch, by the same rules as the model's forward."""
        return torch.stack([mask.sum() for mask in target_masks(batch, self.model.config)])

    def normalized_loss(self, sums: dict, num_lm_targets, num_visual_targets, num_processes: int) -> torch.Tensor:
        r"""
        Return the loss of one micro-batch, normalized over gradient accumulation and processes (ranks):

            loss = R · ( a · Σ_micro-batch L_lm / N_lm  +  b · Σ_micro-batch L_vm / N_vm )

        a, b are `lm_loss_coef`, `visual_loss_coef`. N_lm, N_vm count the supervised tokens and the predicted image
        tokens of the *whole optimizer step*: all micro-batches of all R processes. The gradients of the micro-batches
        are summed. Data parallelism averages over the R processes, and the factor R cancels this. The update is
        therefore the gradient of a · mean(L_lm) + b · mean(L_vm) over the step, however the rows are split.

        Args:
            sums (`dict`): `loss_sums` of the model's forward, in nats.
            num_lm_targets, num_visual_targets (`torch.Tensor` of shape `()`): N_lm and N_vm.
            num_processes (`int`): R.
        """
        terms = []
        if self.stage.lm_loss_coef:
            terms.append(self.stage.lm_loss_coef * sums["lm_loss"] / num_lm_targets.clamp(min=1))
        if self.stage.visual_loss_coef:
            visual_loss = sums["visual_loss"].sum()  # candidate VM heads have one loss each
            terms.append(self.stage.visual_loss_coef * visual_loss / num_visual_targets.clamp(min=1))
        return torch.stack(terms).sum() * num_processes

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """
        Return [`~VTLMMTrainer.normalized_loss`] of one micro-batch; `num_items_in_batch` is `[N_lm, N_vm]`.

        Evaluation computes the language loss, and the visual loss if the stage has a `visual_student`, even if its
        weight is 0, so that runs can be compared. `evaluation_loop` computes the means over the evaluation set.
        """
        training = self.model.training
        inputs = dict(inputs)
        datasets = target_datasets(inputs, self.model.config) if training else {}
        inputs.pop("mixture_index", None)
        position_ids = inputs.get("position_ids")
        num_rows = inputs["input_ids"].shape[0] if position_ids is None else (position_ids == 0).sum()
        if training and not self.stage.lm_loss_coef:
            inputs.pop("labels")
        with_visual_loss = bool(self.stage.visual_loss_coef) if training else self.stage.visual_student is not None
        if self.stage.visual_target == "basic":
            inputs["output_hidden_states"] = True
        outputs = model(
            **inputs,
            return_loss_sums=True,
            visual_student=self.stage.visual_student if with_visual_loss else None,
            detach_visual_teacher=self.stage.detach_visual_teacher,
        )
        sums = outputs.loss_sums
        self._sums["train" if training else "eval"].add(sums, num_rows, datasets)
        if training:
            loss = self.normalized_loss(sums, *num_items_in_batch, self.accelerator.num_processes)
        else:
            loss = self.normalized_loss(sums, sums.get("num_lm_targets"), sums.get("num_visual_targets"), 1)
        return (loss, outputs) if return_outputs else loss

    # ---- Training, evaluation and checkpoints ----

    def train(self, *args, **kwargs):
        output = super().train(*args, **kwargs)
        if self.vm_head_candidates:
            self._keep_best_candidate()
        return output

    def evaluate(self, eval_dataset=None, *args, **kwargs):
        """Evaluate on `eval_dataset`, in any format that the constructor accepts; see [`~transformers.Trainer`]."""
        if not isinstance(eval_dataset, str):
            eval_dataset = prepare_dataset(eval_dataset, "eval_dataset")
        return super().evaluate(eval_dataset, *args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        """Load a checkpoint, and check that an adapter's tensors are complete; PEFT only warns."""
        if isinstance(self.model, PeftModel):
            require_fit(self.model, resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _issue_warnings_after_load(self, load_result) -> None:
        """Reject a checkpoint with missing or unexpected tensors; Trainer would warn and keep the initial weights."""
        tied = set(getattr(self.model, "_tied_weights_keys", None) or {})
        missing = [key for key in load_result.missing_keys if key not in tied]
        if missing or load_result.unexpected_keys:
            raise ValueError(
                f"The checkpoint does not fit the model: missing {missing[:5]}, unexpected "
                f"{list(load_result.unexpected_keys)[:5]}. Resume with the model that the run started from."
            )

    def _save(self, output_dir=None, state_dict=None) -> None:
        """Save without the pickle of the settings, which a push would publish, and replace PEFT's empty model card."""
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        run_folder = Path(self.args.output_dir or "")
        folder = Path(output_dir or run_folder)
        (folder / "training_args.bin").unlink(missing_ok=True)
        if isinstance(self.model, PeftModel):
            write_adapter_files(self, folder, run_folder.name)

    def create_model_card(self, model_name=None, dataset_name=None, tags=None, license=None):
        """Write the model card of the run so far, which `vtlmm push` replaces. Checkpoints have no card."""
        if self.is_world_process_zero() and not self._staging:
            write_run_card(self, Path(self.args.output_dir or ""), model_name, dataset_name, tags, license)

    def _push_from_checkpoint(self, checkpoint_folder) -> None:
        """Upload a complete repository without pickles; the base class uploads its settings with `hub_token`."""
        if not self._staging:  # called again when the folder has its final name
            push_checkpoint(self, Path(checkpoint_folder))

    def push_to_hub(self, *args, **kwargs):
        """As in the base class, but upload only the files of a model; see [`push_trained_model`]."""
        return push_trained_model(self, *args, **kwargs)
