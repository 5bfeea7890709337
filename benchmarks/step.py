# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Compare the optimizer steps of each stage with LLaVA, and packed, grouped and padded batches with each other.

    python benchmarks/step.py --data-folder ../shared/data --json step.json

Steps: `VTLMMTrainer` is compared with transformers' `LlavaForConditionalGeneration` and TRL's `SFTTrainer`. Rows,
batches, vision tower, decoder, trainable modules, optimizer and dtype are the same. All other settings are the
trainers' defaults. LLaVA has no stage III, so that stage is compared with LLaVA's step of stage IV. With SFTTrainer's
defaults all tokens are targets. A second LLaVA run has VT-LMM's targets, the answers.

Batches: the same rows are packed, grouped by length, or padded in their order. Each variant makes two passes with
learning rate 0. The second pass is timed, and its losses must be equal.

Each measurement runs in its own process, so its peak memory is separate (maximum resident set including libraries, or
the memory allocated by torch on a GPU). Each round starts with a different implementation. A ratio is the median over
the rounds of the ratio within a round, with minimum and maximum in brackets.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import resource
import statistics
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from measuring import machine, ratio
from step_models import SHAPES, Task, build_model, build_processor, load_data

from vtlmm.data.markdown import markdown_table


PRELOADED = ["transformers.models.llava.modeling_llava", "trl.trainer.sft_trainer", "vtlmm.train.trainer"]
LLAVA, SAME_TARGETS = "LLaVA, SFTTrainer", "LLaVA, SFTTrainer, answers alone are targets"
OURS, WITHOUT, CACHED = "ours", "ours, visual loss off", "ours, vision features cached"
PADDED, GROUPED, PACKED = "padded in the order of the file", "grouped by length", "packed"
# Implementations that are compared with LLaVA in each stage.
STEPS = {
    "projector": (OURS, CACHED),
    "decoder": (OURS,),
    "visual_head": (OURS, CACHED),
    "joint": (OURS, WITHOUT, CACHED),
}


def build_trainer(task, output_dir, callback):
    from datasets.utils import disable_progress_bars
    from transformers.utils import logging
    from trl import SFTConfig, SFTTrainer

    from vtlmm.train.adapters import AdapterConfig, peft_config
    from vtlmm.train.config import VTLMMTrainingConfig
    from vtlmm.train.stages import STAGES, set_trainable
    from vtlmm.train.trainer import VTLMMTrainer

    logging.set_verbosity_error()
    disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)
    arguments, shape = task.arguments, SHAPES[task.arguments.shape]
    is_llava = task.name in (LLAVA, SAME_TARGETS)
    kind = "llava" if is_llava else "vtlmm"
    dataset = load_data(task)
    processor = build_processor(kind, dataset, shape)
    adapter = AdapterConfig(**task.adapter)
    model = build_model(kind, processor, shape, arguments, adapter.quantization)
    settings = {
        "output_dir": output_dir,
        "per_device_train_batch_size": shape["batch_size"],
        "use_cpu": arguments.device == "cpu",
        "optim": arguments.optim,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **task.settings,
    }
    if is_llava:
        stage = STAGES["joint" if task.stage == "visual_head" else task.stage]
        if not adapter.use_peft:
            set_trainable(model, stage)
        config = SFTConfig(**settings, bf16=arguments.device == "cuda", assistant_only_loss=task.name == SAME_TARGETS)
        trainer_class = SFTTrainer
    else:
        stage = STAGES[task.stage]
        config = VTLMMTrainingConfig(**settings, stage=task.stage, bf16=arguments.device == "cuda")
        trainer_class = VTLMMTrainer
    return trainer_class(
        model=model,
        args=config,
        train_dataset=dataset,
        processing_class=processor,
        peft_config=peft_config(adapter, stage),
        callbacks=[callback],
    )


# ---- Measurements, one process each ----


def now(device):
    if device == "cuda":
        torch.cuda.synchronize()
    # The CPU time of a single thread excludes the time of other processes.
    return time.process_time() if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()


def measure(task):
    """Return the seconds per step and pass, the peak memory, and the losses of the last pass if it logs them."""
    from transformers import TrainerCallback

    steps, passes, device = [], [], task.arguments.device

    class Clock(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            passes.append(now(device))
            steps.append(passes[-1])

        def on_step_end(self, args, state, control, **kwargs):
            steps.append(now(device))

        def on_epoch_end(self, args, state, control, **kwargs):
            passes.append(now(device))

    torch.set_num_threads(task.arguments.threads)
    with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as output_dir:
        # A subfolder, so that the vision feature cache next to it is deleted too.
        trainer = build_trainer(task, str(Path(output_dir, "run")), Clock())
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()  # a quantized model needs more memory while it is built
        trainer.train()
    logged = [entry for entry in trainer.state.log_history if "lm_loss" in entry or "visual_loss" in entry]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    return {
        # The first step is a warm-up and not counted.
        "seconds": statistics.median(b - a for a, b in zip(steps[1:], steps[2:], strict=False)),
        "seconds_of_pass": passes[-1] - passes[-2],
        "steps_of_pass": trainer.state.global_step // (len(passes) // 2),
        "peak_bytes": peak,
        "losses": {name: logged[-1][name] for name in ("lm_loss", "visual_loss") if logged and name in logged[-1]},
    }


def run_rounds(tasks, rounds):
    """Return `{name: {"seconds": [value per round], …}}`, with a new process for each measurement."""
    results = {task.name: {} for task in tasks}
    # The server has imported all libraries, so a fork of it starts at once and has computed nothing.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    for i in range(rounds):
        offset = i % len(tasks)
        for task in tasks[offset:] + tasks[:offset]:
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                for key, value in pool.submit(measure, task).result().items():
                    results[task.name].setdefault(key, []).append(value)
    return results


def compare_steps(stage, arguments, names=None, adapter=None, settings=None):
    """
    Return the results and the table of one stage.

    Args:
        names: our implementations; by default those of `STEPS`.
        adapter (`dict`, *optional*): settings of `AdapterConfig`, the same for all implementations.
        settings (`dict`, *optional*): further settings of all trainers.
    """
    settings = {"max_steps": arguments.steps + 1, **(settings or {})}
    batch_size = settings.get("per_device_train_batch_size", SHAPES[arguments.shape]["batch_size"])
    changes = {WITHOUT: {"visual_loss_coef": 0.0}, CACHED: {"cache_image_features": True}}
    num_rows = batch_size * (arguments.steps + 1)
    tasks = [
        Task(name, arguments, arguments.data[0], num_rows, stage, settings | changes.get(name, {}), adapter or {})
        for name in (LLAVA, SAME_TARGETS, *(names or STEPS[stage]))
    ]
    results = run_rounds(tasks, arguments.rounds)
    header = ["implementation", "s a step", "time / LLaVA", "time / same targets", "peak GB", "memory / LLaVA"]
    header.append("memory / same targets")
    rows = []
    for name, result in results.items():
        cells = [name]
        for key, unit, digits in (("seconds", 1, 3), ("peak_bytes", 1e9, 2)):
            cells.append(f"{statistics.median(result[key]) / unit:.{digits}f}")
            for label, reference in (("llava", LLAVA), ("same_targets", SAME_TARGETS)):
                ratio_interval = result[f"{key}_to_{label}"] = ratio(result[key], results[reference][key])
                cells.append(interval(ratio_interval))
        rows.append(cells)
    return results, [markdown_table(header, rows)]


def compare_batches(data, arguments):
    settings = {"num_train_epochs": 2, "learning_rate": 0.0, "logging_strategy": "epoch"}
    num_packs, max_length = SHAPES[arguments.shape]["packs"]
    changes = {
        PADDED: {},
        GROUPED: {"train_sampling_strategy": "group_by_length"},
        PACKED: {"packing": True, "per_device_train_batch_size": num_packs, "max_length": max_length},
    }
    tasks = [Task(name, arguments, data, arguments.rows, settings=settings | changes[name]) for name in changes]
    results = run_rounds(tasks, arguments.rounds)
    rows = []
    for name, result in results.items():
        result["speed_to_padded"] = ratio(results[PADDED]["seconds_of_pass"], result["seconds_of_pass"])
        result["memory_to_padded"] = ratio(result["peak_bytes"], results[PADDED]["peak_bytes"])
        result["rows_per_second"] = arguments.rows / statistics.median(result["seconds_of_pass"])
        losses = result["losses"][0]
        cells = [name, f"{result['rows_per_second']:.2f}", interval(result["speed_to_padded"])]
        cells += [f"{statistics.median(result['peak_bytes']) / 1e9:.3f}", interval(result["memory_to_padded"])]
        rows.append([*cells, result["steps_of_pass"][0], *(f"{losses[k]:.6f}" for k in ("lm_loss", "visual_loss"))])
    header = ["batches", "rows/s", "speed / padded", "peak GB", "memory / padded", "steps", "L_lm", "L_vm"]
    return results, [markdown_table(header, rows)]


def interval(ratios):
    return "{median:.2f} ({min:.2f}–{max:.2f})".format(**ratios)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=SHAPES, help="cpu: small, cuda: 7b")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="dtype of the weights (7b: bfloat16, else float32)"
    )
    parser.add_argument(
        "--optim", help="optimizer (7b: sgd, since AdamW's state would fill a GPU, else adamw_torch_fused)"
    )
    parser.add_argument(
        "--stage", nargs="*", choices=STEPS, default=list(STEPS), help="stages to measure (empty list: none)"
    )
    parser.add_argument("--data", nargs="*", choices=("llava", "easy_vqa"), default=["llava", "easy_vqa"])
    parser.add_argument("--data-folder", default="../shared/data", help="folder of llava_pretrain_2k and easy_vqa")
    parser.add_argument("--steps", type=int, default=5, help="number of timed steps, after one warm-up step")
    parser.add_argument("--rows", type=int, default=64, help="rows per pass for the batches (0: no batches)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (1: measure CPU time)")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    arguments = parser.parse_args()
    arguments.shape = arguments.shape or ("7b" if arguments.device == "cuda" else "small")
    arguments.dtype = arguments.dtype or ("bfloat16" if arguments.shape == "7b" else "float32")
    arguments.optim = arguments.optim or ("sgd" if arguments.shape == "7b" else "adamw_torch_fused")
    return arguments


def main():
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    where = machine(arguments.device)
    print(", ".join(f"{key} {value}" for key, value in where.items() if value is not None))
    print(f"shape {arguments.shape}, {arguments.dtype}, {arguments.optim}, {arguments.rounds} rounds")
    report = {
        "machine": where,
        "arguments": {k: v for k, v in vars(arguments).items() if k not in ("json", "data_folder")},
    }
    report |= {"steps": {}, "batches": {}}
    for stage in arguments.stage:
        report["steps"][stage], lines = compare_steps(stage, arguments)
        print(f"\n### A step of stage {stage}\n", *lines, sep="\n", flush=True)
    for data in arguments.data if arguments.rows else ():
        report["batches"][data], lines = compare_batches(data, arguments)
        print(f"\n### Batches of {data} rows, stage joint\n", *lines, sep="\n", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
