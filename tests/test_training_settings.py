# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Every setting of SFTConfig and TrainingArguments works with VTLMMTrainer, or raises."""

import dataclasses

import pytest
import torch
from helpers.training import build_rows, build_trainer
from trl import SFTConfig

from vtlmm.train.config import LIMITED_SETTINGS, VTLMMTrainingConfig


# Settings that work, in groups that are trained together: values other than the defaults.
TRAINED = {
    "optimizer": {
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr": 1e-5},
        "warmup_steps": 1,
        "optim": "adafactor",
        "optim_args": "scale_parameter=True",
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "neftune_noise_alpha": 5.0,
        "torch_empty_cache_steps": 1,
    },
    "AdamW": {
        "optim": "adamw_torch",
        "adam_beta1": 0.8,
        "adam_beta2": 0.99,
        "adam_epsilon": 1e-7,
        "num_train_epochs": 1.0,
        "max_steps": -1,
        "auto_find_batch_size": True,
        "full_determinism": False,
        "use_cache": True,
    },
    "precision and checkpointing": {
        "bf16": True,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": False},
    },
    "evaluation": {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "eval_delay": 0,
        "eval_on_start": True,
        "per_device_eval_batch_size": 2,
        "prediction_loss_only": True,
        "metric_for_best_model": "eval_lm_loss",
        "greater_is_better": False,
        "load_best_model_at_end": True,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 1,
    },
    "logging": {
        "logging_strategy": "steps",
        "logging_steps": 1,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "log_on_each_node": False,
        "log_level": "error",
        "log_level_replica": "error",
        "disable_tqdm": True,
        "include_num_input_tokens_seen": "all",
        "report_to": "none",
        "run_name": "run",
        "project": "project",
        "skip_memory_metrics": False,
        "debug": "underflow_overflow",
    },
    "data": {
        "seed": 1,
        "data_seed": 2,
        "shuffle_dataset": True,
        "max_length": 100,
        "pad_to_multiple_of": 8,
        "remove_unused_columns": True,
        "dataloader_drop_last": True,
        "dataloader_num_workers": 1,
        "dataloader_pin_memory": False,
        "dataloader_persistent_workers": True,
        "dataloader_prefetch_factor": 1,
        "dataloader_multiprocessing_context": "fork",
        "dataloader_in_order": False,
        "accelerator_config": {"even_batches": True},
        "save_only_model": True,
        "save_on_each_node": True,
        "use_cpu": True,
    },
    "packing": {"packing": True, "max_length": 50, "completion_only_loss": True, "assistant_only_loss": True},
    "lengths": {"train_sampling_strategy": "group_by_length"},
}
# Settings that work and that this file does not train with: where they are tested, or what they need.
NOT_TRAINED_HERE = {
    "output_dir": "every test",
    "resume_from_checkpoint": "test_run.py",
    "ignore_data_skip": "passed through to resuming",
    "restore_callback_states_from_checkpoint": "passed through to resuming",
    "enable_jit_checkpoint": "passed through to saving",
    "model_init_kwargs": "test_trainer_inputs.py",
    "trust_remote_code": "test_remote_code.py",
    "optim_target_modules": "needs galore or apollo",
    "fp16": "needs a GPU; weights stay float32",
    "tf32": "needs a GPU",
    "torch_compile": "needs a compiler",
    "torch_compile_backend": "needs a compiler",
    "torch_compile_mode": "needs a compiler",
    "activation_offloading": "needs a GPU",
    "fsdp": "test_distributed.py",
    "fsdp_config": "test_distributed.py",
    "deepspeed": "recipes/accelerate",
    "ddp_find_unused_parameters": "passed through to DDP",
    "ddp_bucket_cap_mb": "passed through to DDP",
    "ddp_broadcast_buffers": "passed through to DDP",
    "ddp_static_graph": "passed through to DDP",
    "ddp_backend": "passed through to DDP",
    "ddp_timeout": "passed through to DDP",
    "local_rank": "set by the launcher",
    "push_to_hub": "helpers/hub_session.py",
    "hub_token": "helpers/hub_session.py",
    "hub_private_repo": "helpers/hub_session.py",
    "hub_model_id": "helpers/hub_session.py",
    "hub_strategy": "helpers/hub_session.py",
    "hub_always_push": "helpers/hub_session.py",
    "hub_revision": "helpers/hub_session.py",
    "trackio_space_id": "needs trackio",
    "trackio_bucket_id": "needs trackio",
    "trackio_static_space_id": "needs trackio",
    "do_train": "for scripts; Trainer does not read it",
    "do_eval": "for scripts; Trainer does not read it",
    "do_predict": "for scripts; Trainer does not read it",
}
# Settings that raise: a value that would have no effect or another meaning.
RAISES = {
    "assistant_only_loss": False,
    "completion_only_loss": False,
    "label_smoothing_factor": 0.1,
    "loss_type": "dft",
    "average_tokens_across_devices": False,
    "router_aux_loss_coef": 0.01,
    "packing_strategy": "wrapped",
    "eval_packing": True,
    "padding_free": True,
    "truncation_mode": "keep_end",
    "dataset_text_field": "content",
    "dataset_kwargs": {"skip_prepare_dataset": True},
    "dataset_num_proc": 2,
    "eos_token": "</s>",
    "pad_token": "<pad>",
    "chat_template_path": "template.jinja",
    "use_liger_kernel": True,
    "liger_kernel_config": {"rope": True},
    "train_sampling_strategy": "batch_rebalance",
    "length_column_name": "size",
    "label_names": ["labels"],
    "include_for_metrics": ["loss"],
    "batch_eval_metrics": True,
    "eval_do_concat_batches": False,
    "eval_use_gather_object": True,
    "eval_accumulation_steps": 2,
    "fp16_full_eval": True,
    "bf16_full_eval": True,
    "parallelism_config": {"tp_size": 2},
}


def test_the_table_has_every_setting_of_the_installed_versions():
    table = {*NOT_TRAINED_HERE, *RAISES}.union(*TRAINED.values())
    installed = {field.name for field in dataclasses.fields(SFTConfig) if field.init}
    assert installed - table == set(), "decide whether these settings work, and add them to the table"
    assert not {*NOT_TRAINED_HERE} & {*RAISES}


def test_every_limited_setting_has_a_value_that_raises():
    assert set(RAISES) == set(LIMITED_SETTINGS)


@pytest.mark.parametrize("name", RAISES)
def test_settings_without_effect_raise_by_name(tmp_path, name):
    with pytest.raises(ValueError, match=f"`{name}=.*` is not supported"):
        VTLMMTrainingConfig(output_dir=str(tmp_path), use_cpu=True, **{name: RAISES[name]})


@pytest.mark.slow
@pytest.mark.parametrize("group", TRAINED)
def test_settings_that_work_train_a_model(tmp_path, group):
    rows = build_rows()
    settings = {"learning_rate": 1e-3, **TRAINED[group]}
    trainer = build_trainer(tmp_path, rows, eval_dataset=rows, **settings)
    for name, value in TRAINED[group].items():
        if name not in ("logging_steps", "accelerator_config", "debug", "report_to", "shuffle_dataset"):
            assert getattr(trainer.args, name) == value, name
    trainer.train()
    assert trainer.state.global_step == max(trainer.args.max_steps, 1)
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())
    assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize("name", ["dispatch_batches", "split_batches"])
def test_batches_cannot_be_split_by_rows(tmp_path, name):
    with pytest.raises(ValueError, match="split a batch by rows"):
        VTLMMTrainingConfig(output_dir=str(tmp_path), use_cpu=True, accelerator_config={name: True})


def test_packing_is_restored_after_sft_trainer_ignores_it(tmp_path):
    trainer = build_trainer(tmp_path, packing=True, max_length=50)
    assert trainer.args.packing and trainer.args.assistant_only_loss and "rows" in trainer.train_dataset[0]


def test_default_settings_give_no_warning(tmp_path, recwarn):
    VTLMMTrainingConfig(output_dir=str(tmp_path), use_cpu=True)
    assert [str(warning.message) for warning in recwarn if "deprecated" in str(warning.message)] == []
