# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Measure how long the training input takes, compared with the forward and backward pass of stage IV.

    python benchmarks/training_input.py --model outputs/real/start --json benchmarks/training_input.json

Each row has one JPEG photo of 640 × 480 pixels, a question and an answer of 40 words. *Decode* opens the image file.
*Input* is all that a step waits for without workers: the row, the decoded image, the image processor, the template
and the tokenizer. The step has no optimizer update. The times are CPU times of one thread.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from measuring import machine
from PIL import Image

from vtlmm.data.images import open_image
from vtlmm.data.rows import load_rows, undecoded_images
from vtlmm.inference.loading import load_model
from vtlmm.train.config import VTLMMTrainingConfig
from vtlmm.train.trainer import VTLMMTrainer


SIZE = 640, 480
ANSWER = " ".join(["a small red square next to a large blue circle"] * 4)


def write_rows(folder: Path, num_rows: int) -> Path:
    """Write photos, which are smooth noise, and a JSON file of rows."""
    generator, rows = torch.Generator().manual_seed(0), []
    for number in range(num_rows):
        coarse = torch.rand(1, 3, SIZE[1] // 8, SIZE[0] // 8, generator=generator)
        pixels = torch.nn.functional.interpolate(coarse, size=SIZE[::-1], mode="bicubic")[0].permute(1, 2, 0)
        pixels = pixels.clamp(0, 1).mul(255).byte().numpy()
        Image.fromarray(pixels).save(folder / f"{number}.jpg", quality=90)
        rows.append({"image": f"{number}.jpg", "question": "What is in the photo?", "answer": ANSWER})
    path = folder / "rows.json"
    path.write_text(json.dumps(rows))
    return path


def timed(function) -> tuple[float, object]:
    """Return the CPU seconds of a call, and its result."""
    started = time.process_time()
    result = function()
    return time.process_time() - started, result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a VT-LMM")
    parser.add_argument("--batch-size", type=int, default=4, help="rows of a step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file for all numbers")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    report = {"machine": machine("cpu"), "batch_size": arguments.batch_size}
    model, processor = load_model(arguments.model, dtype="float32")
    seconds: dict[str, list[float]] = {"decode": [], "input": [], "step": []}
    with tempfile.TemporaryDirectory() as name:
        rows = load_rows(write_rows(Path(name), arguments.batch_size * (arguments.rounds + 2)))  # one is fetched ahead
        config = VTLMMTrainingConfig(
            output_dir=name, stage="joint", per_device_train_batch_size=arguments.batch_size, use_cpu=True, bf16=False,
            gradient_checkpointing=False, dataloader_num_workers=0, save_strategy="no", report_to="none",
        )  # fmt: skip
        trainer = VTLMMTrainer(model=model, args=config, train_dataset=rows, processing_class=processor)
        trainer.model.train()
        batches, files = iter(trainer.get_train_dataloader()), undecoded_images(rows)
        for number in range(arguments.rounds + 1):
            images = files[number * arguments.batch_size : (number + 1) * arguments.batch_size]["images"]
            decode, _ = timed(lambda images=images: [open_image(image) for row in images for image in row])
            input_, (batch, counts) = timed(lambda: trainer.get_batch_samples(batches, 1, torch.device("cpu")))
            step, _ = timed(lambda batch=batch, counts=counts: trainer.training_step(trainer.model, batch[0], counts))
            if number:  # the first step is slower
                for label, value in zip(seconds, (decode, input_, step), strict=True):
                    seconds[label].append(value / arguments.batch_size)
    report["seconds_per_row"] = seconds
    medians = {label: statistics.median(values) for label, values in seconds.items()}
    print(json.dumps(report["machine"]))
    print("| part | ms per image | images per second and core | share of a step |")
    print("|---|---|---|---|")
    whole = medians["input"] + medians["step"]
    for label in ("decode", "input"):
        print(f"| {label} | {medians[label] * 1e3:.1f} | {1 / medians[label]:.0f} | {medians[label] / whole:.1%} |")
    print(f"| forward and backward | {medians['step'] * 1e3:.0f} | {1 / medians['step']:.2f} | |")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
