# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Measure the time of `vtlmm eval` on easy-VQA, compared with an older version, and compare the answers.

    python benchmarks/evaluation.py --model outputs/demo/model --old 0859aa8 --json evaluation.json

The rows are the first test images with five questions each. Each question is answered twice, with its own and with a
shuffled image. Both versions run the command with the same options, in float32 and greedily, one after the other in
each round and in separate processes; the older code is never imported here. `--old` is a commit of this repository, or
a folder with a checkout. *Evaluation* starts when the model and the processor are loaded. The older version reads
the rows before that. The CPU time is that of the process and its children.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow.parquet as parquet
from measuring import machine, ratio
from serving import ROOT, old_packages


DATA = ROOT.parent / "shared/data/easy_vqa/test.parquet"
# Runs the command in its arguments, and writes the times since the start and since the model is loaded to a file.
CHILD = """
import json, os, sys, time

def now():
    return time.perf_counter(), sum(os.times()[:4])

started = loaded = now()
import transformers

def record(cls):
    load = cls.from_pretrained
    def from_pretrained(*args, **kwargs):
        global loaded
        result = load(*args, **kwargs)
        loaded = now()
        return result
    cls.from_pretrained = from_pretrained

record(transformers.AutoModelForImageTextToText)
record(transformers.AutoProcessor)
from vtlmm.cli.main import main
if main(sys.argv[2:]):
    sys.exit("vtlmm eval failed")
ended = now()
names = ("s", "cpu_s", "s_with_loading", "cpu_s_with_loading")
values = [end - start for since in (loaded, started) for end, start in zip(ended, since)]
with open(sys.argv[1], "w") as file:
    json.dump(dict(zip(names, values)), file)
"""
DATA_OPTION = {"new": "--dataset", "old": "--data"}
ANSWER_FILES = {
    "new": ("answers.jsonl", "answers_shuffled_images.jsonl"),
    "old": ("answers.jsonl", "blind.jsonl"),
}
COLUMNS = {
    "s": "evaluation, s",
    "cpu_s": "evaluation, CPU s",
    "s_with_loading": "with imports and loading, s",
    "cpu_s_with_loading": "with imports and loading, CPU s",
}


def write_rows(source: Path, path: Path, num_images: int, num_questions: int) -> None:
    """Write the first images with their first questions."""
    table = parquet.read_table(source).slice(0, num_images)
    for name in ("questions", "answers"):
        shortened = [texts[:num_questions] for texts in table[name].to_pylist()]
        table = table.set_column(table.column_names.index(name), name, [shortened])
    parquet.write_table(table, path)


def evaluate(version: str, packages: Path, model: Path, rows: Path, options: list[str], threads: int):
    """Run `vtlmm eval` of one version. Return its times in seconds, and its answers in the order of the questions."""
    environment = {**os.environ, "PYTHONPATH": str(packages), "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [sys.executable, "-c", CHILD, str(folder / "times.json"), "eval", str(model)]
        command += [DATA_OPTION[version], str(rows), "--output", str(folder / "run"), "--dtype", "float32", *options]
        process = subprocess.run(command, env=environment, cwd=packages, capture_output=True, text=True)
        if process.returncode:
            raise RuntimeError(f"The {version} version ended with status {process.returncode}.\n{process.stderr}")
        answers = []
        for file in ANSWER_FILES[version]:
            records = map(json.loads, (folder / "run" / file).read_text().splitlines())
            answers += [record["answer"] for record in sorted(records, key=lambda record: record["index"])]
        return json.loads((folder / "times.json").read_text()), answers


def compare(versions: dict[str, Path], rounds: int, *arguments) -> tuple[dict, dict]:
    """Run all versions in each round. Return the times of each version, and a summary of the answers."""
    results: dict = {version: [] for version in versions}
    different = 0
    for _ in range(rounds):
        texts = {}
        for version, packages in versions.items():
            times, texts[version] = evaluate(version, packages, *arguments)
            results[version].append(times)
            print(f"{version}: " + ", ".join(f"{key} {value:.1f}" for key, value in times.items()), flush=True)
        different += sum(len(set(answers)) > 1 for answers in zip(*texts.values(), strict=True))
    answers = texts["new"]
    lengths = [len(answer.split()) for answer in answers]
    about = {"answers": len(answers), "distinct": len(set(answers)), "mean_words": statistics.mean(lengths)}
    return results, about | {"different": different, "compared": len(answers) * rounds if len(versions) > 1 else 0}


def table(results: dict) -> str:
    """Return a Markdown table with medians over the rounds, and how many times as fast the new version is."""
    lines = ["| version | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for version, times in results.items():
        medians = [statistics.median(each[key] for each in times) for key in COLUMNS]
        lines.append(f"| {version} | " + " | ".join(f"{value:.1f}" for value in medians) + " |")
    if "old" in results:
        ratios = [ratio(*([each[key] for each in results[version]] for version in ("old", "new"))) for key in COLUMNS]
        cells = [f"{each['median']:.2f} ({each['min']:.2f}–{each['max']:.2f})" for each in ratios]
        lines.append("| old / new | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a VT-LMM")
    parser.add_argument("--old", help="commit or checkout of version 0.1")
    parser.add_argument("--data", type=Path, default=DATA, help="test.parquet of easy-VQA")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--questions", type=int, default=5, help="questions of each image")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="OMP_NUM_THREADS of the processes")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    arguments = parser.parse_args()
    options = [f"--{name}={getattr(arguments, name.replace('-', '_'))}" for name in ("batch-size", "max-new-tokens")]
    report: dict = {"machine": machine("cpu"), "model": arguments.model.name, "options": options}
    report |= {"images": arguments.images, "questions": arguments.questions, "threads": arguments.threads}
    with contextlib.ExitStack() as stack:
        rows = Path(stack.enter_context(tempfile.TemporaryDirectory()), "rows.parquet")
        write_rows(arguments.data, rows, arguments.images, arguments.questions)
        versions = {"new": ROOT}
        if arguments.old:
            versions["old"] = stack.enter_context(old_packages(arguments.old))
        model = arguments.model.resolve()
        results, answers = compare(versions, arguments.rounds, model, rows, options, arguments.threads)
    report |= {"results": results, "answers": answers, "load_after": os.getloadavg()[0]}
    print(f"\n{table(results)}\n\n{answers}")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
