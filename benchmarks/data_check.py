# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Measure the time and the memory of `vtlmm data check` for many rows in JSON, JSON lines and parquet.

    python benchmarks/data_check.py --model outputs/demo/start --json data_check.json

The rows are in LLaVA's format. All rows have the same image file, which is decoded once in each process, so the time
is that of reading, converting and encoding the texts. Each file is checked by the command in a separate process,
first without and then with converted rows in the cache of `datasets`. The CPU time is that of all its processes. The
memory is the largest resident memory of one process, and the largest sum of the proportional memory (PSS) of all
processes, which counts shared pages once.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
from measuring import machine
from PIL import Image


ROOT = Path(__file__).parents[1]
START = "import sys; from vtlmm.cli.main import main; sys.exit(main(sys.argv[1:]))"
QUESTIONS = ("What is in the image?", "Describe the image.", "What color is it?")
WORDS = "a the red blue green square circle in on left right of and two yes no image photo small large".split()
ROWS_PER_PART = 10_000
FORMATS = ("json", "jsonl", "parquet")


def row(number: int) -> dict:
    """Return a row in LLaVA's format with one question and an answer of 4 to 19 words. Most answers are different."""
    code = number * 2654435761 % 2**32
    answer = " ".join(WORDS[code // len(WORDS) ** (i % 7) % len(WORDS)] for i in range(4 + number % 16))
    question = f"<image>\n{QUESTIONS[number % len(QUESTIONS)]}"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": f"{number:09}", "image": "image.png", "conversations": turns}


def write_rows(folder: Path, num_rows: int) -> list[Path]:
    """Write the same rows as JSON, JSON lines and parquet."""
    Image.new("RGB", (64, 64), "red").save(folder / "image.png")
    paths = [folder / f"rows.{suffix}" for suffix in FORMATS]
    writer = None
    with paths[0].open("w") as as_list, paths[1].open("w") as as_lines:
        for first in range(0, num_rows, ROWS_PER_PART):
            rows = [row(number) for number in range(first, min(first + ROWS_PER_PART, num_rows))]
            lines = [json.dumps(each) for each in rows]
            as_list.write(("," if first else "[") + ",\n".join(lines))
            as_lines.write("\n".join(lines) + "\n")
            table = pa.Table.from_pylist(rows)
            writer = writer or parquet.ParquetWriter(paths[2], table.schema)
            writer.write_table(table)
        as_list.write("]")
    if writer is not None:
        writer.close()
    return paths


def proportional_mib(parent: int) -> float:
    """Return the sum of the proportional set sizes of a process and its children."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(folder.name) == parent or int(fields[1]) == parent:
                lines = (folder / "smaps_rollup").read_text().splitlines()
                total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        except OSError:  # the process ended
            continue
    return total / 1024


def measure(path: Path, model: Path, cache: Path) -> dict:
    """Check one file with the command. Return the seconds, the CPU seconds and the peak memory in MiB."""
    environment = {**os.environ, "HF_DATASETS_CACHE": str(cache), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", START, "data", "check", "--model", str(model), "--dataset", str(path)]
    before, started, peak, done = os.times(), time.perf_counter(), [0.0], threading.Event()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def watch():
        while not done.wait(1):
            peak[0] = max(peak[0], proportional_mib(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, _ = process.communicate()
    done.set()
    watcher.join()
    after = os.times()
    if process.returncode or "problems    none" not in output:
        raise RuntimeError(f"The check of {path} ended with status {process.returncode}.\n{output}")
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": sum(after[2:4]) - sum(before[2:4]),
        "peak_pss_mib": peak[0],
        # The largest process of all commands so far
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a VT-LMM, for its processor")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--formats", nargs="+", default=FORMATS, choices=FORMATS)
    parser.add_argument("--json", type=Path, help="file for all numbers")
    arguments = parser.parse_args()
    report: dict = {"machine": machine("cpu"), "rows": arguments.rows, "results": {}}
    print(json.dumps(report["machine"]))
    print("| rows | cache | seconds | CPU seconds | peak RSS of one process, MiB | peak PSS of all, MiB |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        paths = [path for path in write_rows(Path(name), arguments.rows) if path.suffix[1:] in arguments.formats]
        for path in paths:
            for cache in ("empty", "full"):
                values = measure(path, arguments.model.resolve(), Path(name, "cache"))
                report["results"][f"{path.suffix[1:]}, {cache}"] = values
                numbers = [values[key] for key in ("seconds", "cpu_seconds", "peak_rss_mib", "peak_pss_mib")]
                cells = " | ".join(f"{number:,.0f}" for number in numbers)
                print(f"| {path.suffix[1:]} | {cache} | {cells} |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
