# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The trainer: TRL's SFTTrainer with the visual loss, normalized over the whole optimizer step."""

import math
import time
from dataclasses import replace
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from datasets import IterableDataset
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, set_seed
from trl import SFTTrainer

from modeling_vtlmm.losses_vtlmm import predicted_positions, text_labels
from vtlmm.data.images import prepare_images
from vtlmm.data.vision_feature_cache import VisionFeatureCache, tower_key, undecoded
from vtlmm.evaluation.runner import task_scores
from vtlmm.inference.loading import require_fit

from .adapters import add_adapter
from .checkpoints import SafeCheckpoints
from .collator import VTLMMCollator
from .config import VTLMMTrainingConfig
from .metrics import LossSums, blank_words
from .packing import prepare_packs, with_lengths
from .publish import push_checkpoint, push_trained_model, write_run_card
from .stages import describe, set_trainable
from .visual_targets import set_visual_target
from .vm_head_search import add_candidates, format_table, keep_candidate, vm_heads


class VTLMMTrainer(SafeCheckpoints, SFTTrainer):
    r"""
    Trainer for one stage of VT-LMM ([Multi-modal Auto-regressive Modeling via Visual Tokens](https://huggingface.co/papers/2403.07720)).

    The loss is `lm_loss_coef · L_lm + visual_loss_coef · L_vm`. Both are means over *all* their tokens of an optimizer
    step, over gradient accumulation and over processes: the model's forward returns sums, this class divides.

    Args:
        model (`str` or [`PreTrainedModel`]): a VT-LMM, or a folder or id of one.
        args ([`VTLMMTrainingConfig`])
        train_dataset, eval_dataset ([`~datasets.Dataset`]): rows with `messages` and `images` (see `load_rows`).
        processing_class ([`ProcessorMixin`]): the model's processor; of a model given as `str` loaded beside it.
        data_collator (*optional*, defaults to [`VTLMMCollator`])
        eval_task_data ([`~datasets.Dataset`], *optional*): rows whose questions the model answers at every evaluation.
            Exact match gives the metrics `eval_accuracy` and `eval_accuracy_shuffled_images`.
        eval_task_images (`int`, *optional*, defaults to 100): number of images of `eval_task_data` to ask about.
        kwargs: further arguments of [`~trl.SFTTrainer`], e.g. `callbacks` or `peft_config`.

    Raises:
        `ValueError`: when the model is no VT-LMM, or a resumed checkpoint lacks a tensor; for `eval_task_data` with
            FSDP or DeepSpeed, and for a mixture of experts whose balance loss was not given up.
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
    # `compute_loss` divides by counts over the whole step: nothing may divide again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: VTLMMTrainingConfig,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        data_collator=None,
        eval_task_data=None,
        eval_task_images: int = 100,
        **kwargs,
    ):
        if isinstance(model, str):
            model, processing_class = self._load(model, args, processing_class)
        self._check_parts(model, args, processing_class)
        self.stage = args.resolved_stage()
        set_seed(args.seed)  # the base class's comes after LoRA's and the VM head's first values
        adapter = kwargs.pop("peft_config", None)
        set_visual_target(model, self.stage.visual_target)
        self.vm_head_candidates, self.vm_head_table = self._prepare_model(model, args, adapter, eval_dataset), None
        learner = model if adapter is None else add_adapter(model, adapter)
        # TRL rounds what learns on a quantized base to bfloat16, where small steps are lost; so they are in what is
        # saved in full of a base loaded in bfloat16
        learning = {p: p.data.float() for p in learner.parameters() if p.requires_grad and adapter is not None}
        if data_collator is None:
            data_collator = VTLMMCollator(processing_class, args.max_length, args.pad_to_multiple_of)
        datasets = [train_dataset, *(eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset])]
        if args.cache_image_features:
            train_dataset, eval_dataset = undecoded(train_dataset), undecoded(eval_dataset)
        packing, args.packing = args.packing, False  # TRL packs texts only and refuses images: it is not told
        if packing or args.train_sampling_strategy == "group_by_length":
            if isinstance(train_dataset, IterableDataset):
                raise ValueError("Packing and grouping by length need lengths: a dataset that is not streamed.")
            train_dataset = with_lengths(train_dataset, processing_class, args.max_length)
            if packing:
                train_dataset = prepare_packs(model, args, train_dataset)
            else:
                eval_dataset = with_lengths(eval_dataset, processing_class, args.max_length)
        # Of a stream accelerate would cut each batch to as many images as rows; TRL thinks of training rows only
        args.accelerator_config.dispatch_batches = False
        super().__init__(
            model=learner,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=data_collator,
            **kwargs,
        )
        args.packing = packing
        self.task_scores = None
        if eval_task_data is not None:
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise ValueError("`eval_task_data` is not supported with FSDP or DeepSpeed. Remove it.")
            batch_size = args.per_device_eval_batch_size
            self.task_scores = task_scores(eval_task_data, processing_class, eval_task_images, batch_size)
        for parameter, values in learning.items():
            parameter.data = values.to(parameter.device)
        if any(isinstance(one, IterableDataset) for one in datasets[1:]) and self.accelerator.num_processes > 1:
            raise ValueError("On several processes a stream is not evaluated exactly: load `eval_dataset` as a whole.")
        if self.is_fsdp_enabled:
            self._keep_exact_when_sharded(model)
        if args.cache_image_features:
            self.data_collator.feature_cache = self._cache_vision_features(model, datasets)
        words = None
        if self.stage.visual_student is not None:
            words = blank_words(self._tokenizer, model.config.visual_vocab_size)
        self._sums = {mode: LossSums(self.accelerator, words) for mode in ("train", "eval")}
        self._log_time = time.perf_counter()
        if self.is_world_process_zero():
            print(describe(self.model, self.stage))

    @staticmethod
    def _check_parts(model, args, processor) -> None:
        if model.config.model_type != "vtlmm":
            raise ValueError(
                f"This trainer needs a VT-LMM, not a {model.config.model_type!r}: make one with `vtlmm compose` or "
                "`vtlmm convert`."
            )
        if processor is None:
            raise ValueError("Pass the model's processor as `processing_class`: it writes and reads the rows.")
        if getattr(model.config.text_config, "router_aux_loss_coef", None) and args.router_aux_loss_coef is None:
            raise ValueError(
                "The balance loss of a mixture of experts is not computed here: set `router_aux_loss_coef: 0` to "
                "train without it."
            )

    @staticmethod
    def _load(name: str, args, processing_class):
        options = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
        args.model_init_kwargs = None
        # float32 as in TRL, whatever the checkpoint is in: AdamW loses small steps in bfloat16
        model = AutoModelForImageTextToText.from_pretrained(name, **{"dtype": "float32", **options})
        return model, processing_class or AutoProcessor.from_pretrained(name, **options)

    def _prepare_model(self, model, args, adapter, eval_dataset) -> list[dict]:
        """What learns and what the VM head starts from; gives the candidates for it, if there are several."""
        if args.vm_head_candidates:
            if eval_dataset is None or isinstance(eval_dataset, dict) or adapter is not None:
                raise ValueError("`vm_head_candidates` need one `eval_dataset`, to choose by, and no adapter.")
            streamed = isinstance(eval_dataset, IterableDataset)
            if not streamed and not any(row["images"] for row in undecoded(eval_dataset)):
                raise ValueError("`vm_head_candidates` are chosen by held-out images: `eval_dataset` has no image.")
        elif args.vm_head_init != "keep":
            model.initialize_vm_head(args.vm_head_init)
        if adapter is None:
            set_trainable(model, self.stage)
        elif args.vm_head_init != "keep" and "vm_head" not in self.stage.trains:
            raise ValueError(
                f"`vm_head_init: {args.vm_head_init}` changes the VM head, which an adapter of stage {args.stage} "
                "does not carry: leave it at keep, or add vm_head to `trainable_modules`."
            )
        if not args.vm_head_candidates:
            return []
        source = "lm_head" if args.vm_head_init == "keep" else args.vm_head_init
        return add_candidates(model, args.vm_head_candidates, args.learning_rate, source, args.seed)

    def _cache_vision_features(self, model, datasets) -> VisionFeatureCache | None:
        """The features of all images, as training would compute them; the processes share what lacks."""
        if not isinstance(self.data_collator, VTLMMCollator):
            raise ValueError("`cache_image_features` works with a VTLMMCollator: leave `data_collator` out.")
        image_processor, tower = self.processing_class.image_processor, model.model.vision_tower.eval()
        precision = self.accelerator.mixed_precision
        key = [tower_key(model, image_processor, precision) if self.is_world_process_zero() else None]
        cache = VisionFeatureCache(self.args.cache_image_features, broadcast_object_list(key)[0])

        @torch.no_grad()
        def encode(images):
            if self.is_fsdp_enabled:
                raise ValueError(
                    "Under FSDP the tower is not on a GPU yet: fill `cache_image_features` by the same command on one "
                    "process (`max_steps=1`), then start again."
                )
            pixel_values = image_processor(prepare_images(images, image_processor), return_tensors="pt")[
                "pixel_values"
            ].float()
            with self.accelerator.autocast():
                return model.get_image_features(pixel_values.to(tower.device)).vision_features

        for dataset in datasets:
            cache.fill(dataset, encode)
        if self.is_world_process_zero():
            print(cache.describe())
        return cache if cache.files else None

    def _keep_exact_when_sharded(self, model):
        plugin = self.accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise ValueError("FSDP 1 flattens the heads' weights, which the losses need whole: set fsdp_version: 2.")
        if plugin.mixed_precision_policy is not None:
            # accelerate's policy would round the sums that leave the forward, thousands of nats, to bfloat16
            plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)
        # a sharded model has a class from a file of torch, which would be saved instead of the model's code
        model.__module__ = type(model).__module__

    def _set_signature_columns_if_needed(self):
        self._signature_columns = ["messages", "images", "num_context_messages", "rows", "pack"]

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """As in the base class; projector, LoRA and each of several VM heads may have their own learning rates."""
        optimizer = super().create_optimizer(model)
        named = list(self.model.named_parameters())
        rates = [
            ({p for n, p in named if ".multi_modal_projector." in n}, self.args.projector_learning_rate),
            ({p for n, p in named if ".lora_" in n}, self.args.adapter_learning_rate),
        ]
        if self.vm_head_candidates:
            heads = zip(self.vm_head_candidates, vm_heads(self.model), strict=True)
            rates += [(set(head.parameters()), candidate["learning_rate"]) for candidate, head in heads]
        for parameters, rate in rates:
            for group in list(optimizer.param_groups) if rate is not None else ():
                chosen = [p for p in group["params"] if p in parameters]
                if chosen:
                    group["params"] = [p for p in group["params"] if p not in parameters]
                    optimizer.add_param_group({**group, "params": chosen, "lr": rate})
        return optimizer

    def _clip_grad_norm(self, model):
        """As in the base class; of several VM heads each by itself, as if it learnt alone."""
        if not self.vm_head_candidates:
            return super()._clip_grad_norm(model)
        norm = self.accelerator.clip_grad_norm_(model.parameters(), float("inf"))
        for head in vm_heads(self.model):
            torch.nn.utils.clip_grad_norm_(head.parameters(), self.args.max_grad_norm)
        return norm

    def _keep_best_candidate(self):
        """Of several VM heads the one with the least held-out loss becomes the model's; the others are forgotten."""
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
        """The micro-batches of one optimizer step, and how many targets of each loss they have: a tensor
        `[num_lm_targets, num_visual_targets]` over all of them and all processes."""
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
        """`[num_lm_targets, num_visual_targets]` of one micro-batch, as the model's forward will count them."""
        image_token_mask = batch["input_ids"] == self.model.config.image_token_id
        predicted = predicted_positions(image_token_mask, batch.get("attention_mask"), batch.get("position_ids"))
        config = self.model.config
        labels = text_labels(batch["labels"], config.image_token_id, config.text_config.vocab_size)
        return torch.stack([(labels[:, 1:] != -100).sum(), predicted.sum()])

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """
        a · Σ L_lm / N_text + b · Σ L_vm / N_image, N over the whole optimizer step.

        Evaluation computes both losses whatever their weight (a control run is to be compared), and the exact means
        are taken over the whole evaluation in [`~evaluation_loop`].
        """
        training = self.model.training
        inputs = dict(inputs)
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
        self._sums["train" if training else "eval"].add(sums, num_rows)
        if training:
            num_lm_targets, num_visual_targets = num_items_in_batch
        else:
            num_lm_targets, num_visual_targets = sums.get("num_lm_targets"), sums.get("num_visual_targets")
        loss = 0.0
        if self.stage.lm_loss_coef:
            loss = loss + self.stage.lm_loss_coef * sums["lm_loss"] / num_lm_targets.clamp(min=1)
        if self.stage.visual_loss_coef:
            visual_loss = sums["visual_loss"].sum()  # several VM heads have one loss each
            loss = loss + self.stage.visual_loss_coef * visual_loss / num_visual_targets.clamp(min=1)
        if training:
            # data parallelism averages gradients over the processes, and the counts are already over all of them
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Only the loss: logits are never built."""
        inputs = self._without_repeated_rows(self._prepare_inputs(inputs))
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs), None, None

    def _without_repeated_rows(self, inputs: dict) -> dict:
        """accelerate fills the last batches up with rows from the start, so that every process has as many: those rows
        lose their targets (at position 0 nothing is predicted)."""
        state = self.accelerator.gradient_state
        if self.accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return inputs
        num_rows, length = inputs["input_ids"].shape
        rows = torch.arange(num_rows, device=inputs["input_ids"].device)[:, None]
        repeated = rows + self.accelerator.process_index * num_rows >= state.remainder
        position_ids = torch.arange(length, device=rows.device).masked_fill(repeated, 0)
        return {**inputs, "labels": inputs["labels"].masked_fill(repeated, -100), "position_ids": position_ids}

    # ---- What is logged ----

    def _drain(self, mode: str) -> dict[str, float]:
        """Exact means since the last call, in training with how fast it went."""
        metrics, num_rows, num_patches = self._sums[mode].drain()
        if mode == "train" and num_rows:
            now = time.perf_counter()
            seconds, self._log_time = now - self._log_time, now
            metrics["samples_per_second"] = num_rows / seconds
            if num_patches is not None:
                metrics["image_tokens_per_second"] = num_patches / seconds
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means since the last log. Runs on every process, since the sums are reduced."""
        if "loss" in logs:  # the logs of training alone, also those of an epoch that ended with an evaluation
            logs.update(self._drain("train"))
        super().log(logs, start_time)

    def train(self, *args, **kwargs):
        self._sums["train"].forget()
        self._log_time = time.perf_counter()
        output = super().train(*args, **kwargs)
        if self.vm_head_candidates:
            self._keep_best_candidate()
        return output

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """As in the base class, with the losses as exact means over the evaluation set."""
        started = time.perf_counter()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        metrics = self._drain("eval")
        loss = self.stage.lm_loss_coef * metrics.get("lm_loss", 0.0)
        of_heads = [metrics[f"vm_head_{i}_loss"] for i in range(len(self.vm_head_candidates))]
        loss += self.stage.visual_loss_coef * sum(of_heads or [metrics.get("visual_loss", 0.0)])
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        output.metrics[f"{metric_key_prefix}_loss"] = loss
        if self.task_scores is not None:
            with self.accelerator.autocast():  # an adapter's `generate` goes past the forward that has it
                scores = self.task_scores(self.model)
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in scores.items()})
        self._log_time += time.perf_counter() - started  # no part of how fast training goes
        return output

    # ---- Checkpoints ----

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        """As in the base class, which takes an adapter as it comes."""
        if isinstance(self.model, PeftModel):
            require_fit(self.model, resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _issue_warnings_after_load(self, load_result) -> None:
        """A checkpoint that does not fit would go on from the initial weights with a warning: refuse it."""
        tied = set(getattr(self.model, "_tied_weights_keys", None) or {})
        missing = [key for key in load_result.missing_keys if key not in tied]
        if missing or load_result.unexpected_keys:
            raise ValueError(
                f"The checkpoint does not fit the model: missing {missing[:5]}, unexpected "
                f"{list(load_result.unexpected_keys)[:5]}. Resume with the model that the run began with."
            )

    def _save(self, output_dir=None, state_dict=None) -> None:
        """As in the base class, without the pickle of the settings, which a push would publish; and over the card that
        PEFT writes, which is empty and names the base's folder."""
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            Path(output_dir or self.args.output_dir, "training_args.bin").unlink(missing_ok=True)
        if isinstance(self.model, PeftModel) and self.args.should_save:
            write_run_card(self, Path(output_dir or self.args.output_dir), Path(self.args.output_dir).name)

    def create_model_card(self, model_name=None, dataset_name=None, tags=None, license=None):
        """Write the model card of the run so far, which `vtlmm push` replaces."""
        if self.is_world_process_zero():
            write_run_card(self, Path(self.args.output_dir), model_name, dataset_name, tags, license)

    def _push_from_checkpoint(self, checkpoint_folder) -> None:
        """Upload a complete repository without pickles; the base class uploads its settings with `hub_token`."""
        if not self._staging:  # called again when the folder has its final name
            push_checkpoint(self, Path(checkpoint_folder))

    def push_to_hub(self, commit_message="End of training", blocking=True, token=None, revision=None, **card):
        """As in the base class, but upload only the files of a model; `card` goes to [`create_model_card`]."""
        return push_trained_model(self, commit_message, blocking, token, revision, **card)
