# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""
Run tasks of lm-evaluation-harness and lmms-eval on a VT-LMM, and functions of the local tasks in `tasks/`.

Neither harness is a dependency: they are imported when they run. Their response caches are never used, because they
identify an answer by its question and the name of the model, not by its weights.
"""

import importlib
import json
from pathlib import Path

import yaml
from datasets import Dataset, Features, Image, List, Value

from vtlmm.data.environment import package_versions
from vtlmm.data.images import open_image
from vtlmm.data.output_files import finite, write_json, write_text
from vtlmm.data.setting_values import require_integers
from vtlmm.inference.loading import best_device

from .scorers import exact_match


TASKS = Path(__file__).parent / "tasks"
PACKAGES = {"lm-eval": "lm_eval", "lmms-eval": "lmms_eval"}


# ---- Functions that the YAML of the local tasks calls ----


def one_question_each(rows: Dataset) -> Dataset:
    """Return rows with `images`, `question` and `answer` from rows with `image(s)`, `questions` and `answers`."""
    images = "images" if "images" in rows.column_names else "image"
    undecoded = Image(decode=False)
    rows = rows.cast_column(images, undecoded if images == "image" else List(undecoded))

    def split(batch: dict) -> dict:
        columns: dict[str, list] = {"images": [], "question": [], "answer": []}
        for image, questions, answers in zip(batch[images], batch["questions"], batch["answers"], strict=True):
            for question, answer in zip(questions, answers, strict=True):
                columns["images"].append(image if images == "images" else [image])
                columns["question"].append(question)
                columns["answer"].append(answer)
        return columns

    features = Features({"images": List(Image()), "question": Value("string"), "answer": Value("string")})
    # `datasets` identifies this function by its name and would reuse rows of an older version
    options = {"remove_columns": rows.column_names, "features": features, "load_from_cache_file": False}
    return rows.map(split, batched=True, **options)


def images(doc: dict) -> list:
    """Return the images of a row in RGB, as in training."""
    return [open_image(image) for image in doc["images"]]


def score(doc: dict, results: list[str]) -> dict[str, float]:
    """Return the exact match of an answer."""
    return {"exact": exact_match(results[0], doc["answer"])}


# ---- Running ----


def lmms_eval_manifest():
    """
    Return the manifest for the entry point `lmms_eval.models`.

    It is not in the module of the class: lmms-eval calls it during its own import, when the class cannot be imported.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="vtlmm", chat_class_path="vtlmm.evaluation.lmms_eval_model.VTLMMForLmmsEval")


def task_on_data(harness: str, tasks: list[str], data: str, folder: Path) -> Path:
    r"""
    Write a copy of a local task that reads the file `data` into `folder`, and return `folder`.

    Raises:
        `ValueError`: for more than one task, and for a task that is not local.
        `FileNotFoundError`: if the file does not exist.
    """
    local = {path.stem: path for path in (TASKS / PACKAGES[harness]).glob("*.yaml")}
    if len(tasks) != 1 or tasks[0] not in local:
        raise ValueError(f"--dataset needs one local task ({', '.join(sorted(local))}), not {', '.join(tasks)}.")
    if not Path(data).is_file():
        raise FileNotFoundError(f"The file {data} does not exist (--dataset).")
    folder.mkdir(parents=True, exist_ok=True)
    task = {"include": str(local[tasks[0]]), "dataset_kwargs": {"data_files": {"test": str(Path(data).resolve())}}}
    # lm-eval reads the name before the include
    (folder / local[tasks[0]].name).write_text(yaml.safe_dump({"task": tasks[0], **task}), encoding="utf-8")
    return folder


def run_harness(
    harness: str,
    model: str,
    tasks: list[str],
    output: str | Path,
    data: str | None = None,
    include_path: str | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    **load,
) -> str:
    r"""
    Run tasks of a harness. Write `results.json` and the answers of each task, `TASK.jsonl`, into `output`.

    Args:
        harness (`str`): `"lm-eval"` or `"lmms-eval"`.
        model (`str`): folder or Hub id.
        output (`str` or `Path`): folder for the results.
        tasks (`list[str]`): tasks and groups of the harness, local tasks in `tasks/`, or tasks in `include_path`.
        data (`str`, *optional*): parquet file for one local task. The path in its YAML is relative to the working
            directory.
        include_path (`str`, *optional*): folder with more tasks in YAML.
        limit (`int`, *optional*): number of questions of each task, from the first.
        batch_size (`int`, *optional*, defaults to 8)
        load: `dtype`, `revision` and `trust_remote_code`, see [`load_model`].

    Returns:
        `str`: the table of the harness.

    Raises:
        `ValueError`: if the harness is not installed, does not have a task, or returns no results.
        Errors of the harness pass through. The command of lmms-eval would end with exit code 0.
    """
    require_integers(limit=limit, batch_size=batch_size)
    output = Path(output)
    try:
        importlib.import_module(PACKAGES[harness])
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{harness} does not load ({error}). docs/evaluation.md describes how to install it."
        ) from error
    local = task_on_data(harness, tasks, data, output / "tasks") if data else TASKS / PACKAGES[harness]
    include = [str(path) for path in (local, include_path) if path]
    run = _run_lm_eval if harness == "lm-eval" else _run_lmms_eval
    results, table = run(model, tasks, include, limit, batch_size, load)
    if not results or not results.get("results"):
        raise ValueError(f"{harness} returned no results for {', '.join(tasks)}.")
    for task, samples in results["samples"].items():
        lines = [json.dumps(finite(_record(sample)), ensure_ascii=False, default=str) + "\n" for sample in samples]
        write_text(output / f"{task}.jsonl", "".join(lines))
    subset = None if limit is None else f"the first {limit} questions of each task"
    about = {"model": model, "harness": harness, "tasks": tasks, "data": data, "subset": subset}
    versions = package_versions((harness.replace("-", "_"), "vtlmm", "torch", "transformers"))
    kept = {name: results[name] for name in ("results", "groups", "n-samples", "configs") if name in results}
    write_json(output / "results.json", {**about, "versions": versions, **kept})
    return table


def _record(sample: dict) -> dict:
    """Return what a harness saves of a question, without the image and the prompt."""
    kept = {"index": sample["doc_id"], "truth": sample["target"], "answers": sample["filtered_resps"]}
    scores = {name: value for name, value in sample.items() if isinstance(value, int | float) and name != "doc_id"}
    return {**kept, **scores}


def _check_names(tasks: list[str], manager) -> None:
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise ValueError(f"The harness does not have the task {', '.join(unknown)}. --include-path adds a folder.")


def _run_lm_eval(model: str, tasks: list[str], include: list[str], limit, batch_size, load: dict):
    """Run tasks with images in the chat template, and tasks of texts without it."""
    from lm_eval import evaluate
    from lm_eval.api.registry import get_model
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    import modeling_vtlmm  # noqa: F401 - registers the model

    manager = TaskManager(include_path=include)
    _check_names(tasks, manager)
    loaded = manager.load(tasks)
    with_images = {task.get_config("doc_to_image") is not None for task in loaded["tasks"].values()}
    if len(with_images) > 1:
        raise ValueError(f"{', '.join(tasks)}: run tasks with images and tasks without images in two commands.")
    chat = with_images == {True}
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=1234)  # the default of the harness
    load = {**load, "revision": load["revision"] or "main", "device": best_device()}
    lm = get_model("hf-multimodal" if chat else "hf")(pretrained=model, batch_size=batch_size, **load)
    results = evaluate(lm=lm, task_dict=loaded, limit=limit, apply_chat_template=chat)
    return results, make_table(results)


def _run_lmms_eval(model: str, tasks: list[str], include: list[str], limit, batch_size, load: dict):
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.models import get_model
    from lmms_eval.tasks import TaskManager
    from lmms_eval.utils import make_table

    manager = TaskManager(include_path=include, model_name="vtlmm")
    _check_names(tasks, manager)
    lm = get_model("vtlmm")(pretrained=model, batch_size=batch_size, **load)
    results = simple_evaluate(model=lm, tasks=tasks, task_manager=manager, limit=limit, batch_size=batch_size)
    return results, make_table(results)
