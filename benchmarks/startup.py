# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Measure the start of `vtlmm ask` compared with a plain transformers script, and `vtlmm data check` on 40 rows.

    python benchmarks/startup.py --model outputs/demo/start --json startup.json

Each run is a new process on one thread. The runs alternate, and their CPU times are compared within a round, because
they do not depend on other programs as much as the wall time does.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from data_check import START, write_rows
from measuring import machine, ratio


ROOT = Path(__file__).parents[1]
PLAIN = """
import sys
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, image, question = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
content = [{"type": "image"}, {"type": "text", "text": question}]
text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
inputs = processor(images=Image.open(image).convert("RGB"), text=text, return_tensors="pt")
ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
print(processor.decode(ids[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
"""
QUESTION = "What is in the image?"


def measure(command: list[str], environment: dict) -> tuple[float, float, str]:
    """Run a command. Return the CPU seconds, the seconds and the last line of its output."""
    before, started = os.times(), time.perf_counter()
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    seconds, after = time.perf_counter() - started, os.times()
    return sum(after[2:4]) - sum(before[2:4]), seconds, output.strip().splitlines()[-1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a small VT-LMM")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="file for all numbers")
    arguments = parser.parse_args()
    report = {"machine": machine("cpu"), "rounds": arguments.rounds}
    with tempfile.TemporaryDirectory() as name:
        [rows, *_], image, model = (
            write_rows(Path(name), 40),
            str(Path(name, "image.png")),
            str(arguments.model.resolve()),
        )
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        environment |= {"HF_DATASETS_CACHE": str(Path(name, "cache")), "HF_MODULES_CACHE": str(Path(name, "modules"))}
        vtlmm = [sys.executable, "-c", START]
        commands = {
            "plain transformers script": [sys.executable, "-c", PLAIN, model, image, QUESTION],
            "vtlmm ask": [*vtlmm, "ask", model, image, QUESTION, "--max-new-tokens", "8"],
            "vtlmm data check, 40 rows": [*vtlmm, "data", "check", "--model", model, "--dataset", str(rows)],
        }
        runs: dict[str, list] = {label: [] for label in commands}
        for number in range(arguments.rounds + 1):
            for label, command in commands.items():
                values = measure(command, environment)
                if number:  # the first round compiles the modules
                    runs[label].append(values)
    if len({run[2] for label in list(commands)[:2] for run in runs[label]}) != 1:
        raise RuntimeError(f"The answers differ: {runs}")
    plain = [run[0] for run in runs["plain transformers script"]]
    print(json.dumps(report["machine"]))
    print("| command | CPU seconds | seconds | CPU time / plain script |")
    print("|---|---|---|---|")
    for label, values in runs.items():
        cpu, wall = ([run[i] for run in values] for i in (0, 1))
        compared = ratio(cpu, plain)
        report[label] = {"cpu_seconds": cpu, "seconds": wall, "cpu_ratio": compared}
        medians = f"{statistics.median(cpu):.2f} | {statistics.median(wall):.2f}"
        print(f"| {label} | {medians} | {compared['median']:.2f} ({compared['min']:.2f}–{compared['max']:.2f}) |")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
