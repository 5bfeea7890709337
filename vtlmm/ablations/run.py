# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Trains and measures a grid. What is finished stays: a grid that was killed goes on where it was.

In the folder of the output: `stages/`, every trained stage under the digest of all that its weights depend on, for all
grids with this output; and in a folder of each grid `rows.jsonl` (one line a finished run), `answers/`,
`results.json`, `results.md` and `results.png`; `others.png` where images of other kinds were measured.
"""

import gc
import json
import os
import platform
import shlex
import sys
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from filelock import FileLock

from vtlmm.data.environment import commit_of_code
from vtlmm.evaluation.report import score_answers
from vtlmm.train.stage_runner import run_training

from .grid import Grid, read_grid
from .metrics import HeldOut, check_answers_fit, measure, read_held_out, save_details
from .ood import OTHERS_NOTE, format_others, summarize_others
from .paired_tests import compare_arms, format_table


ROWS_FILE, RESULTS_FILE, TABLE_FILE, PLOT_FILE = "rows.jsonl", "results.json", "results.md", "results.png"
OTHERS_PLOT_FILE = "others.png"
MARK = "finished.json"
PACKAGES = ("vtlmm", "torch", "transformers", "trl", "datasets")


def run_grid(
    path: str | Path,
    output: str | Path,
    overrides: list[str] = (),
    seeds: list[int] | None = None,
    only: list[str] | None = None,
) -> str:
    r"""
    Runs what is not finished of a grid, seed by seed, and compares its arms.

    Args:
        path (`str` or `Path`): grid file.
        output (`str` or `Path`): folder of this and other grids.
        overrides (`list[str]`, *optional*): see [`read_grid`].
        seeds (`list[int]`, *optional*): instead of the file's.
        only (`list[str]`, *optional*): arms to run; the others are compared if they were run before.

    Returns:
        `str`: the table in Markdown.

    Raises:
        `ValueError`: for a mistake in the file, or a folder with runs of other settings.
    """
    chosen = [] if seeds is None else [f"seeds={seeds}"]
    grid, output = read_grid(path, [*overrides, *chosen]), Path(output)
    unknown = set(only or ()) - set(grid.arms)
    if unknown:
        raise ValueError(f"{path} has no arm {sorted(unknown)}; there are {', '.join(grid.arms)}.")
    folder = output / Path(path).stem
    folder.mkdir(parents=True, exist_ok=True)
    read_rows(folder, grid)
    measures = grid.measures(grid.reference)
    held_out = read_held_out(measures)
    score_answers(held_out.questions, [""] * len(held_out.questions), measures.scorer)  # does the scorer fit the rows?
    if measures.text and not Path(measures.text).is_file():
        raise ValueError(f"evaluate.text: there is no file {measures.text}.")
    for seed in grid.seeds:  # the start of each, before the first is trained
        start = grid.chain(grid.reference, seed)[0]["model_name_or_path"]
        check_answers_fit(held_out.questions, start, measures.max_new_tokens)
    versions = {package: version(package) for package in PACKAGES}
    about = {"machine": machine(), "versions": versions, "commit": commit_of_code()}  # now: files may change below
    for seed in grid.seeds:
        for arm in only or grid.arms:
            if any((row["arm"], row["seed"]) == (arm, seed) for row in read_rows(folder, grid)):
                print(f"{arm}, seed {seed}: finished before")
                continue
            print(f"\n== {arm}, seed {seed} ==")
            command = ["vtlmm", "ablate", str(path), *overrides, "--output", str(output)]
            command += ["--only", arm, "--seed", str(seed)]
            try:
                row = run_once(grid, arm, seed, output, folder, held_out)
            except Exception:
                print(f"The run of arm {arm}, seed {seed} failed.", file=sys.stderr)
                raise
            append_row(folder / ROWS_FILE, {**row, **about, "command": shlex.join(command)})
            write_results(folder, grid)
    return write_results(folder, grid)


def run_once(grid: Grid, arm: str, seed: int, output: Path, folder: Path, held_out: HeldOut) -> dict:
    """Trains what is not trained of one run, and measures it: a line of `rows.jsonl`."""
    chain, measures, key = grid.chain(arm, seed), grid.measures(arm), grid.run_key(arm, seed)
    started = time.time()
    model = train_chain(chain, output / "stages")
    trained = time.time()
    features = chain[-1].get("cache_image_features")
    features = features if isinstance(features, str) else output / "stages" / "image_features"
    figures, details, others = measure(model, measures, held_out, features)
    save_details(folder / "answers" / f"{key}.json", held_out, details)
    return {
        "arm": arm,
        "seed": seed,
        "key": key,
        "figures": figures,
        **({"others": others} if others else {}),
        "num_questions": len(held_out.questions),
        "num_images": len(held_out.places),
        "subset": measures.max_rows is not None,
        "model": str(model),
        "seconds": {"training": round(trained - started, 1), "evaluation": round(time.time() - trained, 1)},
        "stages": chain,
        "evaluate": vars(measures),
    }


def train_chain(chain: list[dict], stages: Path) -> Path | str:
    """Trains the stages of a chain that are not there yet, and gives the folder of the last."""
    model = chain[0]["model_name_or_path"]
    for run in chain:
        folder = stages / f"{run['stage']}-{run['key']}"
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):  # another process of this output may want the same stage
            if (folder / MARK).is_file():
                print(f"Stage {run['stage']} was trained before: {folder}")
            else:
                settings = {name: value for name, value in run.items() if name != "key"}
                settings |= {
                    "model_name_or_path": str(model),
                    "output_dir": str(folder),
                    "resume_from_checkpoint": True,
                }
                started = time.time()
                run_training(settings)
                gc.collect()  # a trainer is full of cycles
                write_whole(folder / MARK, json.dumps({"seconds": round(time.time() - started, 1)}))
        model = folder
    return model


# ---- Rows and results ----


def read_rows(folder: Path, grid: Grid) -> list[dict]:
    """
    The finished runs of this grid's arms, of whatever seeds.

    Raises:
        `ValueError`: when one of them was made with other settings.
    """
    path = folder / ROWS_FILE
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []  # half a line is none
    rows = [row for row in map(json.loads, lines) if row["arm"] in grid.arms]
    for row in rows:
        if row["key"] != grid.run_key(row["arm"], row["seed"]):
            raise ValueError(
                f"{path} holds a run of arm {row['arm']!r}, seed {row['seed']}, with other settings, data or start: "
                "choose another --output, or delete it. Runs of two kinds are never compared."
            )
    return rows


def append_row(path: Path, row: dict) -> None:
    line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
    with FileLock(f"{path}.lock"), open(path, "ab") as file:
        file.truncate(path.read_bytes().rfind(b"\n") + 1)  # half a line of a kill goes
        file.write(line)


def write_results(folder: Path, grid: Grid) -> str:
    """`results.json`, `results.md` and, with matplotlib, `results.png` of all finished runs; gives the table."""
    rows = read_rows(folder, grid)
    rows.sort(key=lambda row: (list(grid.arms).index(row["arm"]), row["seed"]))
    details, clusters = {}, []
    for row in rows:
        saved = json.loads((folder / "answers" / f"{row['key']}.json").read_text(encoding="utf-8"))
        details[row["arm"], row["seed"]] = {name: own["scores"] for name, own in saved["figures"].items()}
        clusters = saved["clusters"]
    lines = compare_arms(rows, list(grid.arms), grid.reference, details, clusters)
    others = summarize_others([row for row in rows if "others" in row], list(grid.arms))
    tables = [format_table(lines, grid.reference)]
    if others:
        tables.append(f"## Other kinds of images\n\n{format_others(others)}\n\n{OTHERS_NOTE}")
    text = "\n\n".join([f"# {Path(grid.path).stem}", *tables, footer(rows)]) + "\n"
    results = {"reference": grid.reference, "lines": lines, "others": others, "rows": rows}
    write_whole(folder / RESULTS_FILE, json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    write_whole(folder / TABLE_FILE, text)
    if rows and find_spec("matplotlib"):
        from .plots import save_differences, save_others

        save_differences(folder / PLOT_FILE, lines, grid.reference, Path(grid.path).stem)
        if others:
            save_others(folder / OTHERS_PLOT_FILE, others, Path(grid.path).stem)
    return text


def footer(rows: list[dict]) -> str:
    """What a reader of the table must know, and how to run each of its rows again."""
    if not rows:
        return "No run is finished."
    sizes = {(row["num_images"], row["num_questions"], row["subset"]) for row in rows}
    text = ["Differences are paired by seed; intervals over seeds are Student's, those over images a bootstrap for"]
    text[0] += " these trained models. No interval is corrected for the number of comparisons; one that holds 0 shows"
    text[0] += " no difference, which is not the same as showing that there is none."
    text += [f"Held out: {p} images, {q} questions{' (a subset)' if s else ''}." for p, q, s in sorted(sizes)]
    text += sorted({f"Machine: {row['machine']}; commit {row['commit']}." for row in rows})
    text += sorted({"Versions: " + ", ".join(f"{k} {v}" for k, v in row["versions"].items()) + "." for row in rows})
    seconds = [sum(row["seconds"].values()) for row in rows]
    text.append(f"{len(rows)} runs, {sum(seconds) / 60:.1f} min; stages that runs share were trained once.")
    return "\n\n".join(text) + "\n\n```bash\n" + "\n".join(row["command"] for row in rows) + "\n```"


def machine() -> str:
    """Processor, cores and threads, and the GPU if there is one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    text = f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{torch.cuda.get_device_name()}; {text}" if torch.cuda.is_available() else text


def write_whole(path: Path, text: str) -> None:
    """A file that is there as a whole or not at all."""
    draft = path.with_suffix(f".{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)
