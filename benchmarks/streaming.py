# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Measure the resident memory while a long stream is read and trained on. It must not grow with the number of rows.

    PYTHONPATH=tests python benchmarks/streaming.py --rows 100000 --json streaming.json

The script writes a JSONL file of conversations, four of five with a tiny image. It reads the file as `vtlmm train`
does with `streaming: true`: rows are checked one by one, images are decoded and batches are collated. The first pass
has no model. The second pass trains a tiny model for `--steps` optimizer steps. Linux only.

The growth is measured after the first tenth, because Python's allocator takes memory at the start.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path

import torch
from helpers.tiny_models import WORDS, build_processor
from helpers.training import build_trainer
from PIL import Image
from transformers import TrainerCallback

from vtlmm.train.collator import VTLMMCollator
from vtlmm.train.dataset_config import DatasetConfig
from vtlmm.train.run_data import prepare_dataset


NUM_IMAGES, NUM_INTERVALS = 32, 10


def write_rows(folder: Path, num_rows: int) -> Path:
    """Write a JSONL file in LLaVA's format. All rows differ, so a cache of strings has no effect."""
    generator = torch.Generator().manual_seed(0)
    for i in range(NUM_IMAGES):
        color = torch.randint(0, 256, (3,), generator=generator).tolist()
        Image.new("RGB", (28, 28), tuple(color)).save(folder / f"{i}.png")
    words = torch.randint(4, len(WORDS), (num_rows, 12), generator=generator).tolist()
    with open(folder / "rows.jsonl", "w", encoding="utf-8") as file:
        for number, row in enumerate(words):
            image = {} if number % 5 == 0 else {"image": f"{number % NUM_IMAGES}.png"}
            question, answer = (" ".join(WORDS[i] for i in half) for half in (row[:6], row[6:]))
            talk = [
                {"from": "human", "value": ("<image>\n" if image else "") + question},
                {"from": "gpt", "value": answer},
            ]
            file.write(json.dumps({**image, "conversations": talk}) + "\n")
    return folder / "rows.jsonl"


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


class Memory:
    """Record the resident memory at even intervals of a run."""

    def __init__(self, title: str, total: int, unit: str):
        self.title, self.total, self.unit = title, total, unit
        self.started, self.points = time.perf_counter(), []

    def look(self, done: int):
        if done * NUM_INTERVALS // self.total > len(self.points):
            self.points.append((done, round(resident_mib(), 1)))
            print(f"{self.title}: {done:>8,} {self.unit}  {self.points[-1][1]:8.1f} MiB", flush=True)

    def report(self) -> dict:
        seconds, growth = time.perf_counter() - self.started, self.points[-1][1] - self.points[0][1]
        print(f"{self.title}: {growth:+.1f} MiB from the first tenth to the last, {seconds:.0f} s\n")
        return {"unit": self.unit, "points": self.points, "growth_mib": round(growth, 1), "seconds": round(seconds)}


def read(rows, collator: VTLMMCollator, num_rows: int, batch_size: int) -> dict:
    memory, batch, done = Memory("read", num_rows, "rows"), [], 0
    for row in rows:
        batch.append(row)
        if len(batch) == batch_size:
            done += len(collator(batch)["input_ids"])
            batch = []
            memory.look(done)
    return memory.report()


def train(rows, folder: Path, num_steps: int, batch_size: int) -> dict:
    memory = Memory("train", num_steps, "steps")

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            memory.look(state.global_step)

    settings = {"max_steps": num_steps, "per_device_train_batch_size": batch_size, "learning_rate": 0.01}
    settings |= {"dataloader_num_workers": 0}  # a worker process would use its own memory
    trainer = build_trainer(folder / "out", rows, logging_steps=num_steps, **settings)
    trainer.add_callback(Look())
    trainer.train()
    return memory.report()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--steps", type=int, default=500, help="optimizer steps of the tiny model (0: no training)")
    parser.add_argument("--batch-size", type=int, default=20, help="rows")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    arguments = parser.parse_args()
    report = {"machine": platform.platform(), "rows": arguments.rows, "batch_size": arguments.batch_size}
    processor = build_processor()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = DatasetConfig(dataset_name=str(write_rows(folder, arguments.rows)), dataset_streaming=True)
        rows = prepare_dataset(data, "train", processor, max_length=None)
        report["read"] = read(rows, VTLMMCollator(processor), arguments.rows, arguments.batch_size)
        if arguments.steps:
            report["train"] = train(rows, folder, arguments.steps, arguments.batch_size)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
