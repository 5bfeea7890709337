# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""`vtlmm eval MODEL --dataset …` and `vtlmm eval MODEL --tasks …`"""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer import Option

from . import options


EXAMPLES = (
    "vtlmm eval outputs/joint --dataset test.parquet --kind kind --output outputs/eval/joint",
    "vtlmm eval outputs/joint --tasks pope,gqa",
)

Kind = Annotated[str | None, Option(metavar="COLUMN", help="Column with the kind of a question.")]
References = Annotated[str | None, Option(metavar="COLUMN", help="Column with all accepted answers of a question.")]
Id = Annotated[str | None, Option(metavar="COLUMN", help="Column with the id of a question.")]
Scorer = Annotated[str, Option(help="exact, vqa, textvqa, gqa, pope, mme, scienceqa or mmbench.")]
Prompt = Annotated[str | None, Option(metavar="BENCHMARK", help="End questions as LLaVA does for vqav2, mmbench, …")]
BadRows = Annotated[Literal["raise", "skip"], Option(help="skip: leave out invalid rows and report them.")]
MaxNewTokens = Annotated[
    int | None, Option(min=1, help="Longest answer in tokens. Default: LLaVA's for the prompt, otherwise 128.")
]
Seed = Annotated[int, Option(help="Seed of the shuffled images.")]
Output = Annotated[Path | None, Option(help="Folder for the results. Default: one in outputs/eval.")]
AnswersDataset = Annotated[
    Path | None, Option(metavar="FOLDER", help="Also write the images and answers as a dataset for the Hub.")
]
Submission = Annotated[
    Literal["vqav2", "vizwiz", "mmbench"] | None, Option(help="Also write the file for this benchmark's server.")
]
Tasks = Annotated[str | None, Option(metavar="TASK,…", help="Tasks of a harness. With --dataset: one local task.")]
Harness = Annotated[Literal["lm-eval", "lmms-eval"], Option(help="Harness of --tasks.")]
IncludePath = Annotated[Path | None, Option(help="Folder with more tasks of the harness, in YAML.")]

# Options that a harness uses; the others have no effect with --tasks
TASK_OPTIONS = {
    *("model", "tasks", "harness", "include_path", "dataset", "limit", "batch_size", "output"),
    *("dtype", "revision", "trust_remote_code"),
}


@options.with_loading_options
def eval(
    ctx: typer.Context,
    model: options.Model,
    dataset: options.Dataset = None,
    split: options.Split = "train",
    image_folder: options.ImageFolder = None,
    columns: options.Columns = None,
    kind: Kind = None,
    references: References = None,
    id: Id = None,
    scorer: Scorer = "exact",
    prompt: Prompt = None,
    bad_rows: BadRows = "raise",
    limit: options.Limit = None,
    batch_size: options.AutoBatchSize = 8,
    max_new_tokens: MaxNewTokens = None,
    seed: Seed = 0,
    output: Output = None,
    answers_dataset: AnswersDataset = None,
    submission: Submission = None,
    tasks: Tasks = None,
    harness: Harness = "lmms-eval",
    include_path: IncludePath = None,
    *,
    loading: options.LoadingOptions,
) -> None:
    """Answer and score the questions of a dataset, and repeat it with shuffled images."""
    if tasks:
        refuse_unused(ctx, batch_size)
        run_tasks(model, tasks.split(","), harness, output, dataset, include_path, limit, batch_size, loading)
        return
    if not dataset:
        raise ValueError("The questions are missing. Pass --dataset or --tasks.")
    from vtlmm.data.columns import parse_columns
    from vtlmm.data.dataset_files import require_new_folder
    from vtlmm.evaluation.answers_dataset import write_answers
    from vtlmm.evaluation.runner import evaluate

    output = output or Path("outputs", "eval", "_".join(filter(None, (Path(model).name, Path(dataset).stem, prompt))))
    mapping = parse_columns(columns)  # before the model is loaded
    if answers_dataset is not None:
        require_new_folder(answers_dataset)
    loaded, processor = loading.load(model)
    result = evaluate(
        loaded, processor, dataset, output=output, image_folder=image_folder, split=split, columns=mapping, kind=kind,
        references=references, row_id=id, scorer=scorer, prompt=prompt, submission=submission, bad_rows=bad_rows,
        limit=limit, batch_size=batch_size, max_new_tokens=max_new_tokens, seed=seed, name=model,
    )  # fmt: skip
    print(f"{result.to_markdown()}\nAnswers, tables and samples: {output}")
    if answers_dataset is not None:
        write_answers(result.to_dataset(), answers_dataset)
        print(f"Upload the answers: hf upload USER/NAME {answers_dataset} --repo-type dataset")


def run_tasks(
    model: str,
    tasks: list[str],
    harness: str,
    output: Path | None,
    dataset: str | None,
    include_path: Path | None,
    limit: int | None,
    batch_size: int,
    loading: options.LoadingOptions,
) -> None:
    """Run tasks of a harness and print their table."""
    from vtlmm.evaluation.harness import run_harness

    output = output or Path("outputs", "eval", f"{Path(model).name}_{harness}_{'_'.join(tasks)}")
    load: dict[str, Any] = {name: getattr(loading, name) for name in ("dtype", "revision", "trust_remote_code")}
    folder = None if include_path is None else str(include_path)
    table = run_harness(harness, model, tasks, output, dataset, folder, limit, batch_size, **load)
    if limit is not None:
        print(f"SUBSET: the first {limit} questions of each task")
    print(f"{table}\nAnswers and results: {output}")


def refuse_unused(ctx: typer.Context, batch_size: int | str) -> None:
    """
    Raises:
        `ValueError`: for options without effect with `--tasks`.
    """
    unused = [
        f"--{name.replace('_', '-')}"
        for name in ctx.params
        if name not in TASK_OPTIONS and getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE"
    ]
    if unused:
        raise ValueError(f"{', '.join(unused)} {'has' if len(unused) == 1 else 'have'} no effect with --tasks.")
    if batch_size == "auto":
        raise ValueError("--batch-size auto has no effect with --tasks. Write a number.")
