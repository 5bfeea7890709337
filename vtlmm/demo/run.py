# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The demo: train a tiny VT-LMM in four stages on images of colored shapes, on a CPU, in minutes."""

import contextlib
import io
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Image, disable_progress_bars, enable_progress_bars
from datasets import List as ListFeature
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from vtlmm.analysis.plots import save_curves
from vtlmm.data.dataset_files import require_new_folder
from vtlmm.data.output_files import write_json
from vtlmm.data.questions import split_questions
from vtlmm.data.setting_values import require_integers
from vtlmm.hub.compose import compose_model
from vtlmm.train.config import VTLMMTrainingConfig
from vtlmm.train.trainer import VTLMMTrainer

from .measure import (
    ask_without_package,
    format_accuracy,
    held_out_accuracy,
    held_out_scenes,
    named_patches,
    plot_patch_words,
)
from .shapes import caption_rows, question_rows
from .warm_start import save_warm_start


NUM_CAPTIONED, NUM_QUESTIONED, NUM_HELD_OUT = 4800, 4000, 200  # images
HELD_OUT_FILE = "held_out.parquet"  # read by the harness task demo_shapes
SETTINGS: dict[str, dict[str, Any]] = {
    "projector": {"learning_rate": 3e-3, "num_train_epochs": 1},
    # The decoder's prediction of patches supervises the VM head, and stage II does not train it. A lower learning rate
    # than in stage IV keeps it.
    "decoder": {"learning_rate": 5e-4, "projector_learning_rate": 1e-3, "num_train_epochs": 1},
    "visual_head": {"learning_rate": 1e-2, "num_train_epochs": 0.8},
    "joint": {"learning_rate": 1.5e-3, "num_train_epochs": 1.75},
}
COMMON: dict[str, Any] = {
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 64,
    "gradient_checkpointing": False,
    # A sixth of the time of a step is for its batch. Elsewhere, a new process would import everything again.
    "dataloader_num_workers": 1 if sys.platform == "linux" else 0,
    "save_strategy": "no",
    "logging_steps": 20,
    "report_to": "none",
    "use_cpu": True,
}
LOSSES = {"eval_lm_loss": "language loss", "eval_visual_loss": "visual loss"}


class StageProgress(TrainerCallback):
    """Shows one progress bar per stage instead of a log line every few steps."""

    def __init__(self, title: str):
        self.title = title

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(total=state.max_steps, desc=self.title, leave=False, disable=None)

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update()

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hide the progress bars of datasets and transformers, and the details that `compose_model` logs."""
    logger = logging.getLogger("vtlmm.hub")
    level = logger.level
    disable_progress_bars()
    disable_progress_bar()
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        enable_progress_bars()
        enable_progress_bar()
        logger.setLevel(level)


def as_dataset(rows: list[dict]) -> Dataset:
    """Return rows as a dataset with an image column."""
    return Dataset.from_list(rows).cast_column("images", ListFeature(Image()))


def save_questions(path: Path, asked: list[dict]) -> None:
    """Save questions from [`~vtlmm.data.questions.split_questions`] as parquet, one per row, for `vtlmm eval`."""
    rows = [{**q, "questions": [q["question"]], "answers": [q["answer"]]} for q in asked]
    as_dataset(rows).remove_columns(["question", "answer"]).to_parquet(path)


def train_stage(stage: str, model, processor, rows: Dataset, held_out: Dataset, output: Path, seed: int):
    """Train one stage in place. Return its log history and the held-out losses before and after."""
    title = f"Stage {list(SETTINGS).index(stage) + 1} of {len(SETTINGS)}, {stage}"
    args = VTLMMTrainingConfig(output_dir=str(output), stage=stage, seed=seed, **COMMON, **SETTINGS[stage])
    with contextlib.redirect_stdout(io.StringIO()):  # the trainer's table of parameters
        trainer = VTLMMTrainer(
            model=model, args=args, train_dataset=rows, eval_dataset=held_out, processing_class=processor
        )
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(StageProgress(title))
    started = time.time()
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    losses = {name: [before[name], after[name]] for name in LOSSES if name in after}
    texts = [f"{LOSSES[name]} {old:.2f} → {new:.2f}" for name, (old, new) in losses.items()]
    print(f"{title}: {trainer.state.global_step} steps, {time.time() - started:.0f} s, {', '.join(texts)}", flush=True)
    return trainer.state.log_history, losses


def train(output: Path, seed: int, held_out_rows: list[dict]):
    """Compose the model and train all stages. Return model, processor, log histories and losses of the stages."""
    save_warm_start(output, seed)
    template = str(Path(__file__).parent / "chat_template.jinja")
    model, processor = compose_model(
        str(output / "vision_tower"), str(output / "language_model"), output / "start", chat_template=template
    )
    captions = as_dataset(caption_rows(NUM_CAPTIONED, seed))
    conversations = as_dataset(question_rows(NUM_QUESTIONED, seed + 1))
    held_out = as_dataset(held_out_rows)
    histories, losses = {}, {}
    for stage in SETTINGS:
        rows = captions if stage == "projector" else conversations
        histories[stage], losses[stage] = train_stage(stage, model, processor, rows, held_out, output, seed)
    model.save_pretrained(output / "model")
    processor.save_pretrained(output / "model")
    return model, processor, histories, losses


@quiet_libraries()
def run_demo(output: str | Path, seed: int = 0) -> dict:
    """
    Run the demo: draw the images, train the four stages, and measure the model on held-out images.

    Args:
        output (`str` or `Path`): Folder for the model, images and results.
        seed (`int`, *optional*, defaults to 0): Seed of data, initial weights and training.

    Returns:
        `dict`: The content of `results.json`.

    Raises:
        `FileExistsError`: if `output` has files.
    """
    require_integers(0, seed=seed)
    started = time.time()
    output = Path(output)
    require_new_folder(output)
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # the matrices are so small that a second thread slows the training down

    model, processor, histories, losses = train(output, seed, question_rows(NUM_HELD_OUT, seed + 2, held_out=True))
    rows = question_rows(NUM_HELD_OUT, seed + 2, held_out=True, one_each=True)
    asked = [{**question, "kind": rows[question["row"]]["kind"]} for question in split_questions(rows)]
    save_questions(output / HELD_OUT_FILE, asked)
    accuracy, shuffled = held_out_accuracy(model, processor, asked, seed)
    print(f"\nQuestions about {NUM_HELD_OUT} held-out images:\n\n{format_accuracy(accuracy, shuffled)}\n")

    scenes = held_out_scenes(seed + 3)
    named = named_patches(model, processor, scenes)
    print(
        f"The likeliest word of a patch names what is in it for {named['share']:.1%} of the patches "
        f"({named['shuffled']:.1%} if compared with another image)."
    )
    plot_patch_words(output / "patches.png", model, processor, scenes, seed)
    save_curves(output / "curves.png", histories)
    asked[0]["images"][0].save(output / "image.png")
    text = ask_without_package(output / "model", output / "image.png", asked[0]["question"])
    print(f"Loaded with transformers alone, the model answers: {asked[0]['question']} → {text}")

    results = {
        "accuracy": accuracy,
        "accuracy_shuffled_images": shuffled,
        "named_patches": named,
        "losses": losses,
        "seconds": round(time.time() - started, 1),
        "pipeline": {"question": asked[0]["question"], "answer": text},
    }
    write_json(output / "results.json", results)
    print(f"{results['seconds']:.0f} s. See patches.png, curves.png, results.json and model/ in {output}.")
    return results
