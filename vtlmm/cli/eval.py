# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""`vtlmm eval MODEL --dataset …` and `vtlmm eval MODEL --tasks …`"""

from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import typer
from typer import Option

from . import options
from .load import load


EXAMPLES = (
    "vtlmm eval outputs/joint --dataset test.parquet --kind kind --output outputs/eval/joint",
    "vtlmm eval outputs/joint --tasks pope,gqa",
)

# Options that a harness uses; the others have no effect with --tasks
TASK_OPTIONS = {
    *("model", "tasks", "harness", "include_path", "dataset", "limit", "batch_size", "output"),
    *("dtype", "revision", "trust_remote_code"),
}


def eval(
    ctx: typer.Context,
    model: options.Model,
    dataset: options.Dataset = None,
    split: options.Split = "train",
    image_folder: options.ImageFolder = None,
    kind: Annotated[str | None, Option(metavar="COLUMN", help="Column with the kind of a question.")] = None,
    references: Annotated[
        str | None, Option(metavar="COLUMN", help="Column with all accepted answers of a question.")
    ] = None,
    id: Annotated[str | None, Option(metavar="COLUMN", help="Column with the id of a question.")] = None,
    scorer: Annotated[str, Option(help="exact, vqa, textvqa, gqa, pope, mme or scienceqa.")] = "exact",
    prompt: Annotated[
        str | None, Option(metavar="BENCHMARK", help="End questions as LLaVA does for vqav2, mmbench, …")
    ] = None,
    limit: options.Limit = None,
    batch_size: options.BatchSize = 8,
    max_new_tokens: Annotated[
        int | None, Option(min=1, help="Longest answer in tokens. Default: LLaVA's for the prompt, otherwise 128.")
    ] = None,
    seed: Annotated[int, Option(help="Seed of the shuffled images.")] = 0,
    output: Annotated[Path | None, Option(help="Folder for the results. Default: one in outputs/eval.")] = None,
    submission: Annotated[
        Literal["vqav2", "vizwiz"] | None, Option(help="Also write the file for this benchmark's server.")
    ] = None,
    tasks: Annotated[
        str | None, Option(metavar="TASK,…", help="Tasks of a harness. With --dataset: one local task.")
    ] = None,
    harness: Annotated[Literal["lm-eval", "lmms-eval"], Option(help="Harness of --tasks.")] = "lmms-eval",
    include_path: Annotated[Path | None, Option(help="Folder with more tasks of the harness, in YAML.")] = None,
    dtype: options.Dtype = "auto",
    load_in_4bit: options.LoadIn4Bit = False,
    load_in_8bit: options.LoadIn8Bit = False,
    device_map: options.DeviceMap = None,
    use_pseudo_image_features: options.PseudoImageFeatures = False,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Answer and score the questions of a dataset, and repeat it with shuffled images."""
    args = SimpleNamespace(**{name: value for name, value in locals().items() if name != "ctx"}, data=dataset)
    if not (dataset or tasks):
        raise ValueError("The questions are missing. Pass --dataset or --tasks.")
    if tasks:
        refuse_unused(ctx)
        run_tasks(args)
    else:
        evaluate(args)


def refuse_unused(ctx: typer.Context) -> None:
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


def run_tasks(args) -> None:
    from vtlmm.evaluation.harness import run_harness

    names = ("data", "include_path", "limit", "batch_size", "dtype", "revision", "trust_remote_code")
    tasks = args.tasks.split(",")
    output = Path(args.output or Path("outputs", "eval", f"{Path(args.model).name}_{args.harness}_{'_'.join(tasks)}"))
    table = run_harness(args.harness, args.model, tasks, output, **{name: getattr(args, name) for name in names})
    if args.limit is not None:
        print(f"SUBSET: the first {args.limit} questions of each task")
    print(table)
    print(f"Answers and results: {output}")


def evaluate(args) -> None:
    from importlib.metadata import version

    from vtlmm.evaluation.prompts import MAX_NEW_TOKENS, build_prompt
    from vtlmm.evaluation.questions import image_loader, read_questions, with_prompt
    from vtlmm.evaluation.report import SAMPLES_FILE, format_table, score_answers, summarize, write_report
    from vtlmm.evaluation.runner import run_questions
    from vtlmm.evaluation.submissions import JSON_SUBMISSIONS, write_submission
    from vtlmm.inference.resumable import digest, run_key

    if args.submission and not args.id:
        raise ValueError(f"--submission {args.submission} needs --id: the column {JSON_SUBMISSIONS[args.submission]}.")
    if args.prompt:
        build_prompt(args.prompt, "")
    rows, subset = read_rows(args, (args.kind, args.references, args.id))
    questions, places = read_questions(rows, args.kind, args.references, args.id)
    for check in (score_answers, summarize):  # a scorer that does not fit the rows: now, not after hours
        check(questions, [""] * len(questions), args.scorer)
    if args.submission:
        check_submission(questions, subset)
    model, processor = load(
        args.model,
        dtype=args.dtype,
        load_in_4bit=args.load_in_4bit,
        load_in_8bit=args.load_in_8bit,
        device_map=args.device_map,
        use_pseudo_image_features=args.use_pseudo_image_features,
        revision=args.revision,
        trust_remote_code=args.trust_remote_code,
    )
    max_new_tokens = args.max_new_tokens or MAX_NEW_TOKENS.get(args.prompt, 128)
    about = {"model": args.model, "data": args.data, "split": args.split, "subset": subset}
    key = run_key(model, processor, with_prompt(questions, args.prompt), args.prompt, max_new_tokens, args.seed)
    name = f"{Path(args.model).name}_{Path(args.data).stem}_{digest(key)[:8]}"
    output = Path(args.output) if args.output else Path("outputs", "eval", name)
    answers, blind = run_questions(
        model, processor, rows, questions, places, output, key, batch_size=args.batch_size, about=about
    )
    about |= {"num_questions": len(questions), "key": key}
    about["versions"] = {package: version(package) for package in ("vtlmm", "torch", "transformers")}
    asked = with_prompt(questions, args.prompt)
    results = write_report(output, asked, answers, blind, args.scorer, image_loader(rows, places), about)
    if args.submission:
        by_id = {question["id"]: answer for question, answer in zip(questions, answers, strict=True)}
        write_submission(output / "submission.json", args.submission, by_id)
    if subset:
        print(f"SUBSET: {subset}")
    print(format_table(results["kinds"]))
    if results["summary"]:
        print(results["summary"])
    print(f"Answers, tables and {SAMPLES_FILE}: {output}")


def check_submission(questions: list[dict], subset: str | None) -> None:
    """A server wants every question once, by its id."""
    if subset:
        raise ValueError(f"--submission wants the whole set, not {subset}: leave --limit out.")
    seen: dict[Any, int] = {}
    for number, question in enumerate(questions):
        if question["id"] is None:
            raise ValueError(f"--submission: question {number} ({question['question'][:60]!r}) has no id.")
        if question["id"] in seen:
            raise ValueError(
                f"--submission: questions {seen[question['id']]} and {number} have the same id {question['id']}."
            )
        seen[question["id"]] = number


def read_rows(args, columns):
    """Rows with the columns that are named, and what part of the data they are if not all."""
    from vtlmm.data.rows import load_rows

    keep_columns = [name for name in columns if name]
    rows = load_rows(args.data, split=args.split, image_folder=args.image_folder, keep_columns=keep_columns)
    if args.limit is None or args.limit >= len(rows):
        return rows, None
    return rows.select(range(args.limit)), f"the first {args.limit} of {len(rows)} rows"
