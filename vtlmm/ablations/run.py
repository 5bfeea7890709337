# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Train and measure the runs of a grid, and compare its arms. An interrupted grid resumes.

The output folder has `stages/` with every trained stage under its key, shared by all grids with this output, and a
folder for each grid: `rows.jsonl` (one line per finished run), `answers/`, `results.json`, `results.md`, `results.png`
and, for out-of-distribution images, `ood.png`.
"""

import gc
import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from filelock import FileLock
from transformers import AutoProcessor

from vtlmm.data.environment import commit_of_code, machine, package_versions
from vtlmm.data.json_files import read_json, require_type
from vtlmm.data.output_files import json_text, write_json, write_text
from vtlmm.evaluation.report import image_cluster
from vtlmm.train.stage_runner import run_training

from .grid import Grid, read_grid
from .metrics import HeldOutData, check_answer_lengths, measure, read_held_out_data
from .ood import OOD_NOTE, format_ood, summarize_ood
from .paired_tests import compare_arms, format_table


ROWS_FILE, RESULTS_FILE, TABLE_FILE = "rows.jsonl", "results.json", "results.md"
PLOT_FILE, OOD_PLOT_FILE = "results.png", "ood.png"
FINISHED_FILE = "finished.json"  # in the folder of a stage
PACKAGES = ("vtlmm", "torch", "transformers", "trl", "datasets")
TABLE_NOTE = (
    "Differences are paired by seed. Intervals over seeds are Student's t intervals. Intervals over images are "
    "bootstrap intervals for these trained models. No interval is corrected for multiple comparisons. An interval "
    "that contains 0 shows no difference, but the arms may still differ."
)


def run_grid(
    path: str | Path,
    output: str | Path,
    overrides: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
    only: Sequence[str] | None = None,
) -> str:
    r"""
    Run the unfinished runs of a grid, seed by seed, and compare its arms.

    Args:
        path (`str` or `Path`): grid file.
        output (`str` or `Path`): output folder. Several grids can share it.
        overrides (`Sequence[str]`, *optional*): `key=value` pairs, see [`read_grid`].
        seeds (`Sequence[int]`, *optional*): seeds to run instead of the grid's.
        only (`Sequence[str]`, *optional*): arms to run. The table also has the other arms' finished runs.

    Returns:
        `str`: the table in Markdown.

    Raises:
        `ValueError`: for a mistake in the grid or its data, or if `output` has runs with other settings.
    """
    seed_setting = [] if seeds is None else [f"seeds={list(seeds)}"]
    grid, output = read_grid(path, [*overrides, *seed_setting]), Path(output)
    unknown = sorted(set(only or ()) - set(grid.arms))
    if unknown:
        raise ValueError(f"{path} has no arms {unknown}. Use some of {', '.join(grid.arms)}.")
    folder = output / Path(path).stem
    read_rows(folder, grid)
    data = check_grid_data(grid)
    folder.mkdir(parents=True, exist_ok=True)
    # Recorded before the training: the code can change while it runs
    about = {"machine": machine(), "versions": package_versions(PACKAGES), "commit": commit_of_code()}
    for seed in grid.seeds:
        for arm in only or grid.arms:
            if any((row["arm"], row["seed"]) == (arm, seed) for row in read_rows(folder, grid)):
                print(f"{arm}, seed {seed}: already finished")
                continue
            print(f"\n== {arm}, seed {seed} ==")
            command = ["vtlmm", "ablate", str(path), *overrides, "--output", str(output)]
            command += ["--only", arm, "--seed", str(seed)]
            try:
                row = run_once(grid, arm, seed, output, folder, data)
            except Exception:
                print(f"The run of arm {arm}, seed {seed} failed.", file=sys.stderr)
                raise
            append_row(folder / ROWS_FILE, {**row, **about, "command": shlex.join(command)})
            write_results(folder, grid)
    return write_results(folder, grid)


def check_grid_data(grid: Grid) -> HeldOutData:
    """
    Load the held-out data, and check it with the start model of every seed before the first training.

    Raises:
        `ValueError`: for invalid rows, or an answer that is too long to be generated.
    """
    evaluation = grid.evaluation(grid.reference)
    starts = [grid.chain(grid.reference, seed)[0] for seed in grid.seeds]
    processors = [
        AutoProcessor.from_pretrained(start["model_name_or_path"], revision=start.get("model_revision"))
        for start in starts
    ]
    data = read_held_out_data(evaluation, processors[0])
    generates = any(metric.startswith("accuracy") for metric in evaluation.metrics)
    for processor in processors if generates else ():
        check_answer_lengths(data.held_out.questions, processor.tokenizer, evaluation.max_new_tokens)
    return data


def run_once(grid: Grid, arm: str, seed: int, output: Path, folder: Path, data: HeldOutData) -> dict[str, Any]:
    """Train the missing stages of one run, measure the model, and return the line for `rows.jsonl`."""
    chain, evaluation, key = grid.chain(arm, seed), grid.evaluation(arm), grid.run_key(arm, seed)
    start_time = time.time()
    model_folder = train_chain(chain, output / "stages")
    trained_time = time.time()
    cache = chain[-1].get("cache_image_features")
    cache_folder = cache if isinstance(cache, str) else output / "stages" / "image_features"
    result = measure(model_folder, evaluation, data, cache_folder)
    held_out = data.held_out
    answers = {
        "clusters": [image_cluster(question) for question in held_out.questions],
        "metrics": {metric: asdict(answers) for metric, answers in result.scored_answers.items()},
    }
    write_json(folder / "answers" / f"{key}.json", answers)
    row: dict[str, Any] = {
        "arm": arm,
        "seed": seed,
        "key": key,
        "metrics": result.metrics,
        "num_questions": len(held_out.questions),
        "num_images": len(held_out.image_positions),
        "subset": evaluation.max_rows is not None,
        "model": str(model_folder),
        "seconds": {
            "training": round(trained_time - start_time, 1),
            "evaluation": round(time.time() - trained_time, 1),
        },
        "stages": chain,
        "evaluate": vars(evaluation),
    }
    if result.ood:
        row["ood"] = {
            images: {metric: asdict(estimate) for metric, estimate in estimates.items()}
            for images, estimates in result.ood.items()
        }
        row["num_ood_images"] = {name: len(question_set.image_positions) for name, question_set in data.ood.items()}
    return row


def train_chain(chain: list[dict[str, Any]], stages: Path) -> Path:
    """Train the stages of a chain that are not finished, and return the folder of the last model."""
    model: str | Path = chain[0]["model_name_or_path"]
    for run in chain:
        folder = stages / f"{run['stage']}-{run['key']}"
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):  # another process with this output may train the same stage
            if (folder / FINISHED_FILE).is_file():
                print(f"Stage {run['stage']} is already trained: {folder}")
            else:
                settings = {name: value for name, value in run.items() if name != "key"}
                settings |= {
                    "model_name_or_path": str(model),
                    "output_dir": str(folder),
                    "resume_from_checkpoint": True,
                }
                start_time = time.time()
                run_training(settings)
                gc.collect()  # a trainer has reference cycles
                write_json(folder / FINISHED_FILE, {"seconds": round(time.time() - start_time, 1)})
        model = folder
    return Path(model)


# ---- Rows and results ----


def read_rows(folder: Path, grid: Grid) -> list[dict[str, Any]]:
    """
    Return the finished runs of this grid's arms, of all seeds.

    Raises:
        `ValueError`: if a run was made with other settings, data or another start model.
    """
    path = folder / ROWS_FILE
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []  # a truncated last line is ignored
    rows = [row for row in (_read_row(path, *numbered) for numbered in enumerate(lines, 1)) if row["arm"] in grid.arms]
    for row in rows:
        if row["key"] != grid.run_key(row["arm"], row["seed"]):
            raise ValueError(
                f"{path} has a run of arm {row['arm']!r}, seed {row['seed']}, with other settings, data or another "
                "start model. Choose another --output, or delete this folder: such runs cannot be compared."
            )
    return rows


def _read_row(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}, line {number} is not JSON: {error}. Remove the line to repeat its run.") from error
    return require_type(row, dict, f"{path}, line {number}", {"arm": str, "seed": int, "key": str})


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append a line, after removing a truncated last line of a killed process."""
    line = f"{json_text(row)}\n".encode()
    with FileLock(f"{path}.lock"), open(path, "ab") as file:
        file.truncate(path.read_bytes().rfind(b"\n") + 1)
        file.write(line)


def write_results(folder: Path, grid: Grid) -> str:
    """Write the results of all finished runs, and return the table in Markdown. Plots need matplotlib."""
    rows, arms = read_rows(folder, grid), list(grid.arms)
    rows.sort(key=lambda row: (arms.index(row["arm"]), row["seed"]))
    scores, clusters = {}, []
    for row in rows:
        saved = read_json(folder / "answers" / f"{row['key']}.json", entries={"metrics": dict, "clusters": list})
        scores[row["arm"], row["seed"]] = {metric: saved["metrics"][metric]["scores"] for metric in saved["metrics"]}
        clusters = saved["clusters"]
    comparisons = compare_arms(rows, arms, grid.reference, scores, clusters)
    ood_rows = [row for row in rows if "ood" in row]
    ood = summarize_ood(ood_rows, arms)
    tables = [format_table(comparisons, grid.reference)]
    if ood:
        counts = {"held out": ood_rows[0]["num_images"], **ood_rows[0]["num_ood_images"]}
        images = f"Images: {', '.join(f'{name} {number:,}' for name, number in counts.items())}."
        tables.append("\n\n".join(["## Out-of-distribution images", format_ood(ood), images, OOD_NOTE]))
    text = "\n\n".join([f"# {Path(grid.path).stem}", *tables, footer(rows)]) + "\n"
    results = {
        "reference": grid.reference,
        "comparisons": [asdict(comparison) for comparison in comparisons],
        "ood": [asdict(summary) for summary in ood],
        "rows": rows,
    }
    write_json(folder / RESULTS_FILE, results)
    write_text(folder / TABLE_FILE, text)
    if rows and find_spec("matplotlib"):
        from .plots import save_differences, save_ood

        save_differences(folder / PLOT_FILE, comparisons, grid.reference, Path(grid.path).stem)
        if ood:
            save_ood(folder / OOD_PLOT_FILE, ood, Path(grid.path).stem)
    return text


def footer(rows: list[dict[str, Any]]) -> str:
    """Return how to read the table, where its rows were computed, and the command of each row."""
    if not rows:
        return "No run is finished."
    sizes = sorted({(row["num_images"], row["num_questions"], row["subset"]) for row in rows})
    versions = [", ".join(f"{name} {number}" for name, number in row["versions"].items()) for row in rows]
    seconds = sum(sum(row["seconds"].values()) for row in rows)
    paragraphs = [
        TABLE_NOTE,
        *(
            f"Held out: {images} images, {questions} questions{' (a subset)' if subset else ''}."
            for images, questions, subset in sizes
        ),
        *sorted({f"Machine: {row['machine']}; commit {row['commit']}." for row in rows}),
        *sorted({f"Versions: {text}." for text in versions}),
        f"{len(rows)} runs, {seconds / 60:.1f} min. Shared stages are trained once.",
    ]
    commands = "\n".join(row["command"] for row in rows)
    return "\n\n".join(paragraphs) + f"\n\n```bash\n{commands}\n```"
