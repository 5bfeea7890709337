# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The evaluation results in a model card, from the files `results.json` of `vtlmm eval`."""

import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml

from vtlmm.data.json_files import read_json, require_type
from vtlmm.data.output_files import write_json

from .private_values import escape_cell, published_name, remove_private_values
from .repository import RESULTS_FOLDER, is_hub_id


logger = logging.getLogger(__name__)

Results = dict[str, Any]

TASK = "image-text-to-text"
RESULT_KEYS = ("split", "subset", "scorer", "num_questions", "empty_answers", "kinds", "summary", "versions")
# Columns of the table: score and its interval, of the images and of shuffled images.
SCORES = (
    ("score", "low", "high"),
    ("score_shuffled_images", "low_shuffled_images", "high_shuffled_images"),
)


def read_results(path: str | Path) -> Results:
    """
    Return the content of a `results.json`, with the entry of all questions as `"all"`.

    Raises:
        `ValueError`: if `path` is not a results file of `vtlmm eval`.
    """
    try:
        table = read_json(path, entries={"data": str, "scorer": str, "kinds": list})
        for line in table["kinds"]:
            require_type(line, dict, f"{path}, `kinds`", {"kind": str, "n": int})
            for name in (name for names in SCORES for name in names if line.get(name) is not None):
                require_type(line[name], (int, float), f"{path}, `{name}`")
        return {**table, "all": next(line for line in table["kinds"] if line["kind"] == "all")}
    except (OSError, ValueError, StopIteration) as error:
        raise ValueError(f"{path} contains no results. Pass a results.json that `vtlmm eval` wrote.") from error


def find_results(folder: Path) -> list[Path]:
    """
    Return the `results.json` files of the model, in `folder`, its subfolders and its sibling folders.

    Results older than the weights belong to earlier weights and are left out.
    """
    newest = max((file.stat().st_mtime for file in folder.glob("*.safetensors")), default=0.0)
    candidates = [*folder.glob("results.json"), *folder.glob("*/results.json"), *folder.parent.glob("*/results.json")]
    files = {}
    for path in candidates:
        try:
            model = read_results(path).get("model")
        except ValueError:
            continue
        if isinstance(model, str) and Path(model).resolve() == folder.resolve():
            if path.stat().st_mtime < newest:
                logger.warning("%s is older than the weights in %s and is not published.", path, folder)
                continue
            files[path.resolve()] = path
    return list(files.values())


def add_results(folder: Path, files: Iterable[str | Path], strict: bool = True) -> None:
    r"""
    Write the published part of each results file into `folder/results/`.

    Args:
        strict (`bool`, *optional*, defaults to `True`): reject two files of one data set and scorer; otherwise the
            last is used.

    Raises:
        `ValueError`: if a file contains no results, or two files would get the same name.
    """
    tables: dict[str, Results] = {}
    for table in map(read_results, files):
        name = _file_name(table)
        if name in tables and strict:
            raise ValueError(f"Two results files would both be published as {name}. Pass only one of them.")
        tables[name] = table
    for name, table in tables.items():
        write_json(folder / RESULTS_FOLDER / name, _published(table))


def _published(table: Results) -> Results:
    """Return the entries that are published, without local paths."""
    kept = remove_private_values({key: table[key] for key in RESULT_KEYS if key in table})
    kept["data"] = published_name(table["data"])
    if not is_hub_id(table["data"]):
        kept.pop("split", None)  # a local file is one split, which the loader always calls train
    return kept


def _file_name(table: Results) -> str:
    kept = _published(table)
    parts = [kept["data"], kept.get("split"), table["scorer"], table.get("subset")]
    return re.sub(r"\W+", "_", "_".join(str(part) for part in parts if part)) + ".json"


def results_section(table: Results) -> dict[str, Any]:
    """Return title and rows of one results table for the card's template."""
    title = f"**{escape_cell(published_name(table['data']))}**"
    title += f", split {escape_cell(table['split'])}" if table.get("split") else ""
    title += f", scorer {escape_cell(table['scorer'])}"
    title += f", subset: {escape_cell(table['subset'])}" if table.get("subset") else ""
    rows = []
    for line in table["kinds"]:
        row = [escape_cell(line["kind"]), str(line["n"])]
        for name, low, high in SCORES:
            known = line.get(name) is not None
            row += [f"{line[name]:.1%}", f"{line[low]:.1%} – {line[high]:.1%}"] if known else ["not measured", ""]
        rows.append(row)
    return {"title": title, "rows": rows}


def eval_results(tables: Sequence[Results]) -> list[EvalResult]:
    """Return score and control of each whole data set, as the card's front matter lists them."""
    results = []
    for table in filter(is_whole_data_set, tables):
        name = published_name(table["data"])
        metrics = {"score": table["scorer"], "score_shuffled_images": f"{table['scorer']}, shuffled images"}
        results += [
            EvalResult(
                task_type=TASK,
                dataset_type=name,
                dataset_name=name,
                dataset_split=table.get("split"),
                metric_type=table["scorer"],
                metric_name=metric,
                metric_value=table["all"][key],
            )
            for key, metric in metrics.items()
            if table["all"].get(key) is not None
        ]
    return results


def is_whole_data_set(table: Results) -> bool:
    """Return whether a score covers a whole split that is not the training split."""
    split = table.get("split") or ""
    return not table.get("subset") and "[" not in split and split != "train"


def write_eval_results(folder: Path, tables: Sequence[Results]) -> None:
    """Write `.eval_results/*.yaml` for each data set on the Hub, so that its page can show the results."""
    entries: dict[str, list[EvalResultEntry]] = {}
    for table in filter(is_whole_data_set, tables):
        if is_hub_id(table["data"]):
            control = table["all"].get("score_shuffled_images")
            notes = ", ".join(f"{name} {table[name]}" for name in ("split", "scorer") if table.get(name))
            notes += "" if control is None else f"; shuffled images: {control:.4f}"
            entry = EvalResultEntry(table["data"], "default", round(table["all"]["score"], 4), notes=notes)
            entries.setdefault(table["data"], []).append(entry)
    for data, of_data in entries.items():
        file = folder / ".eval_results" / (re.sub(r"\W+", "_", data) + ".yaml")
        file.parent.mkdir(exist_ok=True)
        file.write_text(yaml.safe_dump(eval_result_entries_to_yaml(of_data)), encoding="utf-8")
