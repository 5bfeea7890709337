# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""
The runs of `test_distributed.py`: `python -m helpers.distributed_run folder`.

Imports take longer than the training, so they run once and each pair of processes is forked. Each case writes its
final weights to `case.safetensors`, or its results to `case.json`.
"""

import json
import os
import signal
import socket
import sys
from dataclasses import asdict
from pathlib import Path
from unittest.mock import patch

from accelerate.commands.config.config_args import ClusterConfig
from accelerate.state import AcceleratorState, DistributedType, PartialState
from datasets import Dataset, Image, List
from safetensors.torch import save_file
from torch.multiprocessing import ProcessExitedException, start_processes
from transformers import TrainerCallback

from vtlmm.data.validation import check_rows
from vtlmm.evaluation.runner import task_scores
from vtlmm.inference.generation import answer_batch
from vtlmm.train.adapters import AdapterConfig

from .tiny_models import build_processor
from .training import build_rows, build_trainer
from .vm_heads import build_search


FSDP2 = Path(__file__).parents[2] / "recipes/accelerate/fsdp2.yaml"
RAGGED = (1, 0, 2, 1, 0, 3, 1, 1)
TEXT_ON_ONE = (1, 2, 1, 1, 0, 0, 0, 0)  # batches of four: the second process has no image
HALF, QUARTER = {"per_device_train_batch_size": 4}, {"per_device_train_batch_size": 2}
LORA = AdapterConfig(use_peft=True, lora_r=2, lora_dropout=0.0)
PROJECTOR_TOO = ["multi_modal_projector", "language_model", "lm_head"]
PSEUDO = {"use_pseudo_image_features": True}

# name: (images of the rows, settings of `build_trainer`), one optimizer step over all eight rows
UPDATES = {
    "ddp_ragged": (RAGGED, HALF),
    "ddp_text_on_one": (TEXT_ON_ONE, HALF),
    "ddp_cached": (RAGGED, HALF | {"cache_image_features": True}),
    "ddp_feature": (TEXT_ON_ONE, HALF | {"visual_target": "feature", "visual_loss_coef": 20.0}),
    "ddp_basic": (TEXT_ON_ONE, HALF | {"visual_target": "basic", "trainable_modules": PROJECTOR_TOO}),
    "fsdp_joint": (TEXT_ON_ONE, HALF | {"gradient_checkpointing": True}),
    "fsdp_accumulated": (RAGGED, QUARTER | {"gradient_accumulation_steps": 2}),
    "fsdp_visual_head": (TEXT_ON_ONE, HALF | {"stage": "visual_head"}),
    "fsdp_tied": (TEXT_ON_ONE, HALF | {"model_options": {"text": "qwen2"}, "max_steps": 2, "learning_rate": 1.0}),
    "fsdp_lora": (RAGGED, HALF | {"adapter": LORA}),
    "fsdp_feature": (TEXT_ON_ONE, HALF | {"visual_target": "feature", "visual_loss_coef": 20.0}),
    "fsdp_basic": (TEXT_ON_ONE, HALF | {"visual_target": "basic", "trainable_modules": PROJECTOR_TOO}),
    "fsdp_pseudo": (TEXT_ON_ONE, HALF | {"stage": "decoder", "model_options": PSEUDO}),
}
EVALUATED = ["ddp_evaluated", "fsdp_evaluated", "fsdp_evaluated_decoder"]  # the last has no visual loss
RESUMED = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "learning_rate": 1e-2}
RESUMED |= {"lr_scheduler_type": "cosine", "train_sampling_strategy": "random", "per_device_train_batch_size": 2}


class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)


def build(name: str, folder: Path, rows, **settings):
    """Return a trainer; for FSDP2, with the environment of `accelerate launch --config_file fsdp2.yaml`."""
    if name.startswith("ddp"):
        return build_trainer(folder, rows, **settings)
    config = ClusterConfig.from_yaml_file(FSDP2).fsdp_config
    os.environ.update({key.upper(): str(value) for key, value in config.items()}, ACCELERATE_USE_FSDP="true")
    initialize = AcceleratorState.__init__

    def shard_on_cpu(self, *args, **kwargs):
        """Enable FSDP2 on a CPU; accelerate enables it on GPUs only."""
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        initialize(self, *args, **kwargs)

    with patch.object(AcceleratorState, "__init__", shard_on_cpu):
        trainer = build_trainer(folder, rows, **settings)
    assert trainer.accelerator.is_fsdp2
    return trainer


def broken_rows():
    """Return seven rows; the fourth has one image placeholder too many."""
    rows = list(build_rows(RAGGED[:7]))
    rows[3]["messages"][0]["content"].append({"type": "image", "text": None})
    return Dataset.from_list(rows).cast_column("images", List(Image()))


def with_scored_questions(trainer):
    """Score five questions at evaluations. The answers to the second and fourth are the model's."""
    rows = list(build_rows((1, 1, 2, 1, 1), seed=2))
    trainer.model.generation_config.eos_token_id = list(range(2, 64))  # a random model would hardly ever stop
    for row in (rows[1], rows[3]):
        question = {"images": row["images"], "question": row["messages"][0]["content"][-1]["text"]}
        truth = answer_batch(trainer.model, build_processor(), [question])[0]
        row["messages"][1]["content"][0]["text"] = truth
    rows = Dataset.from_list(rows).cast_column("images", List(Image()))
    trainer.task_scores = task_scores(rows, build_processor(), num_images=6, batch_size=2)
    return trainer


def save(trainer, path: Path):
    state = trainer.accelerator.get_state_dict(trainer.model)
    if trainer.is_world_process_zero():
        save_file({name: tensor.clone() for name, tensor in state.items()}, path)


def run(name: str, folder: Path):
    kind, _, what = name.partition("_")
    if what == "checked":
        report = check_rows(broken_rows(), build_processor(), max_length=30)
        Path(folder, f"{name}_{PartialState().process_index}.json").write_text(json.dumps(asdict(report)))
        return
    if what == "heads":
        trainer = build_search(folder / name, per_device_train_batch_size=1)
        trainer._keep_best_candidate = lambda: None
    elif name in UPDATES:
        images, settings = UPDATES[name]
        trainer = build(name, folder / name, build_rows(images), **settings)
    elif what.startswith("evaluated"):
        rows, stage = build_rows(TEXT_ON_ONE[:7]), what.partition("_")[2] or "joint"
        settings = HALF | {"stage": stage, "learning_rate": 0.0, "per_device_eval_batch_size": 2}
        trainer = build(name, folder / name, rows, **settings)
        if kind == "ddp":
            with_scored_questions(trainer)
    elif what == "bf16":
        trainer = build(name, folder / name, build_rows(), **HALF, bf16=True)
    else:
        trainer = build(name, folder / f"{kind}_{what.removesuffix('_resumed')}", build_rows(), **RESUMED)
        if what == "killed":
            trainer.add_callback(Kill())
    checkpoint = str(Path(trainer.args.output_dir, "checkpoint-2")) if what.endswith("_resumed") else None
    trainer.train(resume_from_checkpoint=checkpoint)
    if what.startswith("evaluated"):
        metrics = trainer.evaluate(build_rows(TEXT_ON_ONE[:7]))
        if trainer.is_world_process_zero():  # only one process may write a file
            Path(folder, f"{name}.json").write_text(json.dumps(metrics))
    elif what == "bf16":
        batch = trainer._prepare_inputs(trainer.data_collator(list(build_rows())))
        sums = trainer.model(**batch, return_loss_sums=True, visual_student="lm_head").loss_sums
        del sums["token_losses"]
        dtypes = {key: str(value.dtype) for key, value in (sums | sums.pop("visual_tokens")).items()}
        if trainer.is_world_process_zero():  # only one process may write a file
            Path(folder, f"{name}.json").write_text(json.dumps(dtypes))
    else:
        save(trainer, folder / f"{name}.safetensors")


def work(rank: int, port: int, folder: Path, cases: list[str]):
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ.update(address, RANK=str(rank), LOCAL_RANK=str(rank))
    for case in cases:
        run(case, folder)


def start(folder: Path, cases: list[str]):
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    start_processes(work, (port, folder, cases), nprocs=2, start_method="fork")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    others = ["ddp_checked", "ddp_heads", *EVALUATED, "ddp_whole", "fsdp_bf16", "fsdp_whole"]
    for kind in ("ddp", "fsdp"):  # in separate processes, because the environment selects FSDP
        start(folder, [case for case in (*UPDATES, *others) if case.startswith(kind)])
        try:
            start(folder, [f"{kind}_killed"])
        except ProcessExitedException as error:
            assert error.signal_name == "SIGKILL"
        start(folder, [f"{kind}_killed_resumed"])
