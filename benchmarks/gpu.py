# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Measure everything that needs a GPU with one command, in at most 25 minutes on one GPU of 80 GB or more.

    PYTHONPATH=. python benchmarks/gpu.py --parts ../shared --output outputs/gpu

Each row runs in its own process with a time limit and writes `rows/NAME.json` in the output folder. A row that fails
records its error, and the next row runs. The same command resumes: it keeps the rows that are done, and measures
failed rows again. At the end, `gpu.json` has all numbers and `gpu.md` has the tables. `--shape tiny --device cpu`
runs all rows with tiny models.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from vtlmm.data.output_files import write_json, write_text


SCRIPT = Path(__file__).with_name("gpu_rows.py")
ROOT = Path(__file__).parents[1]
# A record with other values of these arguments belongs to another run.
COMPARED = ("shape", "device", "threads")


@dataclass
class Row:
    """A measurement: its title, its time limit in seconds, and what it needs. `gpu_rows.py` has its function."""

    title: str
    seconds: int
    needs: tuple[str, ...] = ()


ROWS = {
    "loss_iii": Row("Visual loss, stage III", 120),
    "loss_iv": Row("Visual loss, stage IV", 120),
    "loss_iv_with_text": Row("Text + visual loss, stage IV", 120),
    "pseudo": Row("Pseudo image features", 120),
    "step_iii": Row("Step of stage III, SGD", 240, ("data",)),
    "step_iv": Row("Step of stage IV, SGD", 240, ("data",)),
    "step_lora": Row("Step of stage IV, LoRA in bfloat16", 240, ("data",)),
    "step_qlora": Row("Step of stage IV, QLoRA (nf4), 4 rows", 300, ("data", "bitsandbytes")),
    "generation": Row("Generated tokens per second", 240),
    "server": Row("Requests per second of `vtlmm serve`", 300),
    "real_qlora": Row("Real QLoRA run of stages III and IV", 240, ("data", "weights", "bitsandbytes")),
    "batches": Row("Packed, grouped and padded batches, stage IV, SGD", 300, ("data",)),
    "step_lora_kept": Row("Step of stage IV, LoRA in bfloat16, without gradient checkpointing", 240, ("data",)),
}


def missing(row, arguments):
    """Return what a row needs and this machine does not have, None if it can run."""
    if "data" in row.needs and not (arguments.parts / "data/llava_pretrain_2k/chat.json").is_file():
        return f"{arguments.parts}/data/llava_pretrain_2k/chat.json does not exist; set --parts"
    if "weights" in row.needs:
        if not (arguments.parts / "weights/dinov2_small").is_dir():
            return f"{arguments.parts}/weights/dinov2_small does not exist; set --parts"
        if not Path(arguments.decoder).is_dir():
            return f"{arguments.decoder} does not exist; set --decoder, or run `make outputs/real/smollm2`"
    if "bitsandbytes" in row.needs and find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed: pip install 'vtlmm[qlora]'"
    return None


def read_record(path, arguments):
    """Return the record of a row, None if it does not exist. Raise `SystemExit` if it belongs to another run."""
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    changed = [name for name in COMPARED if record["arguments"][name] != getattr(arguments, name)]
    if changed:
        values = ", ".join(f"--{name} {record['arguments'][name]}" for name in changed)
        raise SystemExit(f"{path} was measured with {values}. Use the same options or another --output.")
    return record


def run_row(name, arguments, path, seconds):
    """Measure one row in a separate process, and return its record."""
    log = arguments.output / "logs" / f"{name}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{name}.draft.json")
    draft.unlink(missing_ok=True)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    if arguments.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    values = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    command = [sys.executable, str(SCRIPT), name, json.dumps(values), str(draft)]
    started = time.perf_counter()
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
        try:
            code = process.wait(seconds)
            error = f"The process ended with status {code}." if code else None
        except subprocess.TimeoutExpired:
            error = f"The row was stopped after {seconds:.0f} s."
        finally:
            # The row may have started a server or worker processes.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    if error or not draft.is_file():
        last = next((line for line in reversed(lines) if line.strip()), "")
        record = {"status": "failed", "error": f"{error} {last}".strip(), "log": str(log)}
    else:
        record = json.loads(draft.read_text(encoding="utf-8"))
    draft.unlink(missing_ok=True)
    record["notes"] = [line for line in lines if line.startswith("Skipped:")]
    return {**record, "seconds_of_row": time.perf_counter() - started, "arguments": values}


def measure_rows(names, arguments):
    """Measure the rows that are not done, and return the records of all rows by name."""
    deadline = time.monotonic() + 60 * arguments.minutes
    records = {}
    for name, row in ROWS.items():
        path = arguments.output / "rows" / f"{name}.json"
        record = read_record(path, arguments)
        if name in names and (record is None or record["status"] == "failed"):
            limit = row.seconds if arguments.device != "cpu" else 10 * row.seconds  # the limits are those of a GPU
            seconds = min(limit, deadline - time.monotonic())
            reason = missing(row, arguments)
            if reason:
                record = {"status": "skipped", "error": reason}
            elif seconds < 1:
                record = record or {"status": "not run", "error": f"the {arguments.minutes} minutes were over"}
            else:
                record = run_row(name, arguments, path, seconds)
                write_json(path, record, indent=1)
            took = f" in {record['seconds_of_row']:.0f} s" if "seconds_of_row" in record else ""
            print(f"{name}: {record['status']}{took} {record.get('error', '')}".rstrip(), flush=True)
        elif name in names:
            print(f"{name}: {record['status']} earlier")
        records[name] = record or {"status": "not run", "error": "not in --only"}
    return records


def report(records):
    """Return the tables of all rows as Markdown."""
    parts = []
    for name, record in records.items():
        parts.append(f"## {ROWS[name].title}")
        if record["status"] == "done":
            where = ", ".join(f"{key} {value}" for key, value in record["machine"].items() if value is not None)
            parts += [where, record["table"], *record["notes"]]
        else:
            parts.append(f"**{record['status']}**: {record['error']}")
    return "\n\n".join(parts) + "\n"


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/gpu"))
    parser.add_argument("--parts", type=Path, default=Path("../shared"), help="folder with data/ and weights/")
    parser.add_argument("--decoder", default="outputs/real/smollm2", help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--shape", choices=("tiny", "7b"), default="7b")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--only", nargs="+", choices=ROWS, metavar="NAME", help="measure these rows; see --list")
    parser.add_argument("--list", action="store_true", help="print the rows and exit")
    parser.add_argument("--minutes", type=float, default=25, help="time for all rows of this call")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    arguments = parser.parse_args()
    if not arguments.list and arguments.device == "cuda":
        import torch  # slow, and not needed for the other options

        if not torch.cuda.is_available():
            parser.error("torch finds no GPU. For a test run, use --shape tiny --device cpu.")
    if arguments.shape == "7b" and arguments.device == "cpu":
        parser.error("--shape 7b needs a GPU. Use --shape tiny with --device cpu.")
    return arguments


def main():
    arguments = parse_arguments()
    if arguments.list:
        for name, row in ROWS.items():
            print(f"{name:18} {row.title} (at most {row.seconds} s)")
        return
    arguments.output = arguments.output.resolve()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # also ends the processes of the running row
    records = measure_rows(arguments.only or list(ROWS), arguments)
    write_json(arguments.output / "gpu.json", records, indent=1)
    write_text(arguments.output / "gpu.md", report(records))
    print(f"The tables are in {arguments.output / 'gpu.md'}.")
    if any(record["status"] == "failed" for record in records.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
