# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The demo: a tiny VT-LMM goes through its four stages on images of colored shapes, on a CPU, in minutes."""

import json
import random
import subprocess
import sys
import textwrap
import time
from itertools import islice
from pathlib import Path

import torch
from datasets import Dataset, Image
from datasets import List as ListFeature

from vtlmm.analysis.plots import save_curves, save_patch_words
from vtlmm.data.images import image_key
from vtlmm.data.questions import split_questions
from vtlmm.hub.compose import compose_model
from vtlmm.inference.generation import accuracy_by_kind, answer, with_shuffled_images
from vtlmm.train.config import VTLMMTrainingConfig
from vtlmm.train.trainer import VTLMMTrainer

from .shapes import caption_rows, describe_patches, draw, make_scenes, question_rows
from .warm_start import save_warm_start


NUM_CAPTIONED, NUM_QUESTIONED, NUM_HELD_OUT = 4800, 4000, 200  # images
HELD_OUT_FILE = "held_out.parquet"  # the local task demo_shapes reads it
SETTINGS = {
    "projector": {"learning_rate": 5e-3, "num_train_epochs": 1},
    # slowly: what the decoder predicts at a patch, and thus teaches the VM head, is not supervised here and wears off
    "decoder": {"learning_rate": 3e-4, "projector_learning_rate": 1e-3, "num_train_epochs": 1},
    "visual_head": {"learning_rate": 1e-2, "num_train_epochs": 0.4},
    "joint": {"learning_rate": 1.5e-3, "num_train_epochs": 1.5},
}
COMMON = {
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 64,
    "gradient_checkpointing": False,
    "dataloader_num_workers": 0,
    "save_strategy": "no",
    "logging_steps": 20,
    "report_to": "none",
    "use_cpu": True,
}


def as_dataset(rows: list[dict]) -> Dataset:
    return Dataset.from_list(rows).cast_column("images", ListFeature(Image()))


def save_questions(path: Path, asked: list[dict]) -> None:
    """As `vtlmm eval` and the harnesses read them; `asked` is what `split_questions` gives."""
    rows = [{**q, "questions": [q["question"]], "answers": [q["answer"]]} for q in asked]
    as_dataset(rows).remove_columns(["row", "question", "answer"]).to_parquet(path)


def train_stage(stage: str, model, processor, rows: Dataset, held_out: Dataset, output: Path, seed: int):
    """One stage in place. Gives its log and the held-out losses before and after."""
    args = VTLMMTrainingConfig(output_dir=str(output), stage=stage, seed=seed, **COMMON, **SETTINGS[stage])
    trainer = VTLMMTrainer(
        model=model, args=args, train_dataset=rows, eval_dataset=held_out, processing_class=processor
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    return trainer.state.log_history, before, after


ASK = textwrap.dedent(
    """
    import importlib.abc, sys

    class Block(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if path is None and name in ("modeling_vtlmm", "vtlmm"):
                raise ImportError(f"{name} is not installed here")

    sys.meta_path.insert(0, Block())
    from transformers import pipeline

    folder, image, question = sys.argv[1:]
    ask = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
    content = [{"type": "image", "path": image}, {"type": "text", "text": question}]
    found = ask(text=[{"role": "user", "content": content}], max_new_tokens=16, do_sample=False)
    print(found[0]["generated_text"][-1]["content"].strip())
    """
)


def ask_elsewhere(folder: Path, image: Path, question: str) -> str:
    """One answer through transformers' pipeline, in a process that cannot import this package."""
    command = [sys.executable, "-c", ASK, str(folder), str(image), question]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"The saved model does not load by itself:\n{result.stderr[-2000:]}")
    return result.stdout.strip().splitlines()[-1]


def named_patches(model, processor, seed: int) -> dict[str, float]:
    """Share of patches whose likeliest word is the color or the shape there, or "empty" where nothing is; `shuffled`
    by what is at the same place of another image."""
    scenes = list(islice(make_scenes(random.Random(seed), held_out=True), NUM_HELD_OUT))
    images = processor.image_processor([draw(scene) for scene in scenes], return_tensors="pt")
    words = processor.visual_words(model.get_visual_tokens(images["pixel_values"], top_k=1).token_ids[..., 0])
    there = [[patch[:2] for patch in describe_patches(scene)] for scene in scenes]

    def share(told):
        patches = [pair for row, own in zip(words, told, strict=True) for pair in zip(row, own, strict=True)]
        return sum(word in what for word, what in patches) / len(patches)

    return {"share": share(there), "shuffled": share(there[1:] + there[:1])}


def draw_first_questions(path: Path, model, processor, asked: list[dict], answers: list[str]) -> None:
    """The words of the first eight images' patches, each image under its first question and the answer."""
    first_question = {}
    for i, question in enumerate(asked):
        first_question.setdefault(image_key(question["images"][0]), i)
    chosen = list(first_question.values())[:8]
    titles = [f"{asked[i]['question']}\n{answers[i]} (truth: {asked[i]['answer']})" for i in chosen]
    save_patch_words(path, model, processor, [asked[i]["images"][0] for i in chosen], titles)


def table(accuracy: dict, blind: dict) -> str:
    """Held-out accuracy by kind beside the blind control, in Markdown."""
    lines = ["| kind | questions | accuracy | images shuffled |", "|---|---|---|---|"]
    for kind in [*sorted(set(accuracy) - {"all"}), "all"]:
        share, number = accuracy[kind]
        lines.append(f"| {kind} | {number} | {share:.1%} | {blind[kind][0]:.1%} |")
    return "\n".join(lines)


def run_demo(output: str | Path, seed: int = 0) -> dict:
    """
    Everything from drawing the images to asking the saved model; see the folder `output` afterwards.

    Returns:
        `dict`: what `results.json` holds.
    """
    started = time.time()
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # for matrices as small as these a second thread waits more than it computes

    print("\n== A vision tower and a decoder, each with a short warm start of its own ==")
    save_warm_start(output, seed)
    template = str(Path(__file__).parent / "chat_template.jinja")
    model, processor = compose_model(
        str(output / "vision_tower"),
        str(output / "language_model"),
        output / "start",
        chat_template=template,
        overwrite=True,
    )
    captions = as_dataset(caption_rows(NUM_CAPTIONED, seed))
    questions = as_dataset(question_rows(NUM_QUESTIONED, seed + 1))
    held_out_rows = question_rows(NUM_HELD_OUT, seed + 2, held_out=True, one_each=True)
    held_out = as_dataset(question_rows(NUM_HELD_OUT, seed + 2, held_out=True))

    histories, losses = {}, {}
    for stage in SETTINGS:
        print(f"\n== Stage {stage} ==")
        rows = captions if stage == "projector" else questions
        histories[stage], before, after = train_stage(stage, model, processor, rows, held_out, output, seed)
        names = [name for name in ("eval_lm_loss", "eval_visual_loss") if name in after]
        losses[stage] = {name: [before[name], after[name]] for name in names}
        for name in names:
            print(f"{name}: {before[name]:.3f} → {after[name]:.3f} nats")
    model.save_pretrained(output / "model")
    processor.save_pretrained(output / "model")

    print("\n== Questions about images it has not seen ==")
    asked = [{**q, "kind": held_out_rows[q["row"]]["kind"]} for q in split_questions(held_out_rows)]
    save_questions(output / HELD_OUT_FILE, asked)
    answers = answer(model, processor, asked, batch_size=64)
    accuracy = accuracy_by_kind(asked, answers)
    control = with_shuffled_images(asked, seed)
    blind = accuracy_by_kind(control, answer(model, processor, control, batch_size=64))
    print(table(accuracy, blind))

    named = named_patches(model, processor, seed + 3)
    print(
        f"\nThe likeliest word of a patch's visual token says what is there at {named['share']:.1%} of the patches "
        f"(what is there in another image: {named['shuffled']:.1%})."
    )

    draw_first_questions(output / "patches.png", model, processor, asked, answers)
    save_curves(output / "curves.png", histories)
    asked[0]["images"][0].save(output / "image.png")
    elsewhere = ask_elsewhere(output / "model", output / "image.png", asked[0]["question"])
    print(f"\nIn a process without this package: {asked[0]['question']} → {elsewhere}")

    results = {"accuracy": accuracy, "blind": blind, "named_patches": named, "losses": losses}
    results["seconds"] = round(time.time() - started, 1)
    results["pipeline"] = {"question": asked[0]["question"], "answer": elsewhere}
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"\n{results['seconds']:.0f} s. Images and numbers: {output}/patches.png, curves.png, results.json")
    return results
