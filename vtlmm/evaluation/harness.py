# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""
Tasks of lm-evaluation-harness and lmms-eval on a VT-LMM, and what the local tasks in `tasks/` are made of.

Neither harness is a dependency: they are imported when they run. Their response caches are never used, since they know
an answer by its question and the model's name, not by its weights.
"""

import importlib
import json
from importlib.metadata import version
from pathlib import Path

import yaml
from datasets import Dataset, Features, Image, List, Value

from vtlmm.data.images import open_image
from vtlmm.inference.loading import best_device

from .scorers import exact_match


TASKS = Path(__file__).parent / "tasks"
PACKAGES = {"lm-eval": "lm_eval", "lmms-eval": "lmms_eval"}


# ---- What the YAML of the local tasks calls ----


def one_question_each(rows: Dataset) -> Dataset:
    """Rows with `image` or `images`, `questions` and `answers` as rows with `images`, `question` and `answer`."""
    images = "images" if "images" in rows.column_names else "image"
    undecoded = Image(decode=False)
    rows = rows.cast_column(images, undecoded if images == "image" else List(undecoded))

    def split(batch: dict) -> dict:
        found = {"images": [], "question": [], "answer": []}
        for own, questions, answers in zip(batch[images], batch["questions"], batch["answers"], strict=True):
            for question, answer in zip(questions, answers, strict=True):
                found["images"].append(own if images == "images" else [own])
                found["question"].append(question)
                found["answer"].append(answer)
        return found

    features = Features({"images": List(Image()), "question": Value("string"), "answer": Value("string")})
    # `datasets` would know this function by its name, and after a change of it go on with old rows
    options = {"remove_columns": rows.column_names, "features": features, "load_from_cache_file": False}
    return rows.map(split, batched=True, **options)


def images(doc: dict) -> list:
    """In RGB, as the training has them."""
    return [open_image(image) for image in doc["images"]]


def score(doc: dict, results: list[str]) -> dict[str, float]:
    return {"exact": exact_match(results[0], doc["answer"])}


# ---- Running ----


def lmms_eval_manifest():
    """What the entry point `lmms_eval.models` gives. Not beside the class: lmms-eval asks for it while it is itself
    being imported, and a failure then is a warning only."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="vtlmm", chat_class_path="vtlmm.evaluation.lmms_eval_model.VTLMMForLmmsEval")


def task_on_data(harness: str, tasks: list[str], data: str, folder: Path) -> Path:
    r"""
    Writes the local task that is named as one on other rows, for the harness to find in `folder`.

    Raises:
        `ValueError`: for more than one task, or one that is not a local one.
        `FileNotFoundError`: for missing data.
    """
    local = {path.stem: path for path in (TASKS / PACKAGES[harness]).glob("*.yaml")}
    if len(tasks) != 1 or tasks[0] not in local:
        raise ValueError(f"--data belongs to one local task ({', '.join(sorted(local))}), not to {', '.join(tasks)}.")
    if not Path(data).is_file():
        raise FileNotFoundError(f"{data}: there is no such file (--data).")
    folder.mkdir(parents=True, exist_ok=True)
    task = {"include": str(local[tasks[0]]), "dataset_kwargs": {"data_files": {"test": str(Path(data).resolve())}}}
    # the index of lm-eval reads the name before it follows the include
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
    Runs tasks of a harness and writes `results.json`, and for each task `TASK.jsonl` with its answers, into `output`.

    Args:
        harness (`str`): `"lm-eval"` or `"lmms-eval"`.
        model (`str`): folder or Hub id.
        tasks (`list[str]`): names of the harness' tasks and groups, of those in `tasks/`, or in `include_path`.
        data (`str`, *optional*): parquet file for a task in `tasks/`, whose own path is relative to the folder in
            which the command runs.
        limit (`int`, *optional*): only the first so many questions of each task.
        load: `dtype`, `revision` and `trust_remote_code`, see [`load_model`].

    Returns:
        `str`: the harness' own table.

    Raises:
        `ValueError`: when the harness is not installed, does not know a task, or gave no results.
        Whatever the harness raises: lmms-eval's own command would end with exit code 0.
    """
    output = Path(output)
    try:
        importlib.import_module(PACKAGES[harness])
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{harness} does not load ({error}): see docs/evaluation.md for how to install it."
        ) from error
    local = task_on_data(harness, tasks, data, output / "tasks") if data else TASKS / PACKAGES[harness]
    include = [str(path) for path in (local, include_path) if path]
    run = _run_lm_eval if harness == "lm-eval" else _run_lmms_eval
    results, table = run(model, tasks, include, limit, batch_size, load)
    if not results or not results.get("results"):
        raise ValueError(f"{harness} gave no results for {', '.join(tasks)}.")
    output.mkdir(parents=True, exist_ok=True)
    for task, samples in results["samples"].items():
        lines = [json.dumps(_record(sample), ensure_ascii=False, default=str) + "\n" for sample in samples]
        (output / f"{task}.jsonl").write_text("".join(lines), encoding="utf-8")
    subset = None if limit is None else f"the first {limit} questions of each task"
    packages = (harness.replace("-", "_"), "vtlmm", "torch", "transformers")
    about = {"model": model, "harness": harness, "tasks": tasks, "data": data, "subset": subset}
    about["versions"] = {package: version(package) for package in packages}
    found = {name: results[name] for name in ("results", "groups", "n-samples", "configs") if name in results}
    text = json.dumps({**about, **found}, indent=2, ensure_ascii=False, default=str)
    (output / "results.json").write_text(text + "\n", encoding="utf-8")
    return table


def _record(sample: dict) -> dict:
    """Of what a harness keeps of a question, all but the image and the prompt."""
    kept = {"index": sample["doc_id"], "truth": sample["target"], "answers": sample["filtered_resps"]}
    scores = {name: value for name, value in sample.items() if isinstance(value, int | float) and name != "doc_id"}
    return {**kept, **scores}


def _check_names(tasks: list[str], manager) -> None:
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise ValueError(f"The harness does not know the task {', '.join(unknown)}; --include-path names a folder.")


def _run_lm_eval(model: str, tasks: list[str], include: list[str], limit, batch_size, load: dict):
    """Questions about images are asked in the chat template, texts continued as they stand."""
    from lm_eval import evaluate
    from lm_eval.api.registry import get_model
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    import modeling_vtlmm  # noqa: F401 - registers the model

    manager = TaskManager(include_path=include)
    _check_names(tasks, manager)
    found = manager.load(tasks)
    with_images = {task.get_config("doc_to_image") is not None for task in found["tasks"].values()}
    if len(with_images) > 1:
        raise ValueError(f"{', '.join(tasks)}: run tasks with images and tasks without in two commands.")
    chat = with_images == {True}
    for task in found["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=1234)  # the harness' own
    load = {**load, "revision": load["revision"] or "main", "device": best_device()}
    lm = get_model("hf-multimodal" if chat else "hf")(pretrained=model, batch_size=batch_size, **load)
    results = evaluate(lm=lm, task_dict=found, limit=limit, apply_chat_template=chat)
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
