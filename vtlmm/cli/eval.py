# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""`vtlmm eval MODEL --data …`, `vtlmm eval MODEL --tasks …` and `vtlmm eval --compare RUN RUN`"""

from argparse import ArgumentParser

from .load import add_model_arguments, load_model


def add_arguments(parser):
    parser.add_argument("model", nargs="?", help="VT-LMM: folder or Hub id")
    parser.add_argument("--data", help=".json, .jsonl or .parquet file, folder or Hub id, as for training")
    parser.add_argument("--split", default="train", help="split of the data; a file is one split, train (default)")
    parser.add_argument("--image-folder", help="where the images' paths start")
    parser.add_argument("--kind", metavar="COLUMN", help="column with the kind of a question, for the table")
    parser.add_argument("--references", metavar="COLUMN", help="column with all accepted answers of a row's question")
    parser.add_argument("--id", metavar="COLUMN", help="column by which others know the question")
    parser.add_argument("--scorer", default="exact", help="exact (default), vqa, textvqa, gqa, pope, mme or scienceqa")
    parser.add_argument("--prompt", metavar="BENCHMARK", help="end questions as LLaVA does for it: vqav2, mmbench, …")
    parser.add_argument("--limit", type=int, help="only the first so many rows; marked as a subset everywhere")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, help="longest answer; default: LLaVA's for the prompt, else 128")
    parser.add_argument("--seed", type=int, default=0, help="of the shuffled images")
    parser.add_argument("--output", help="folder of the run; by default outputs/eval/ and a name that says which run")
    parser.add_argument("--submission", choices=["vqav2", "vizwiz"], help="also write the file that its server wants")
    add_model_arguments(parser)
    parser.add_argument("--tasks", metavar="TASK,…", help="tasks of a harness instead, or with --data one local task")
    parser.add_argument("--harness", default="lmms-eval", choices=["lm-eval", "lmms-eval"], help="default: lmms-eval")
    parser.add_argument("--include-path", help="folder with further tasks of the harness, as YAML")
    parser.add_argument("--compare", nargs=2, metavar="RUN", help="the second of two finished runs against the first")


def run(args) -> int:
    if args.compare:
        refuse_unused(args, "with --compare", ("compare", "output"))
        return compare(args)
    if not args.model or not (args.data or args.tasks):
        raise ValueError("Name a model and --data or --tasks, or two finished runs to --compare.")
    for name in ("batch_size", "limit", "max_new_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be 1 or more.")
    return run_tasks(args) if args.tasks else evaluate(args)


def refuse_unused(args, what: str, used: tuple[str, ...]) -> None:
    """
    Raises:
        `ValueError`: for arguments that `what` would ignore.
    """
    parser = ArgumentParser()
    add_arguments(parser)
    ignored = [
        action.option_strings[0] if action.option_strings else action.dest.upper()
        for action in parser._actions
        if action.dest not in ("help", *used) and getattr(args, action.dest) != action.default
    ]
    if ignored:
        raise ValueError(f"{', '.join(ignored)} {'has' if len(ignored) == 1 else 'have'} no effect {what}: leave out.")


def run_tasks(args) -> int:
    from pathlib import Path

    from vtlmm.evaluation.harness import run_harness

    names = ("data", "include_path", "limit", "batch_size", "dtype", "revision", "trust_remote_code")
    refuse_unused(args, "with --tasks", ("model", "tasks", "harness", "output", *names))
    tasks = args.tasks.split(",")
    output = Path(args.output or Path("outputs", "eval", f"{Path(args.model).name}_{args.harness}_{'_'.join(tasks)}"))
    table = run_harness(args.harness, args.model, tasks, output, **{name: getattr(args, name) for name in names})
    if args.limit is not None:
        print(f"SUBSET: the first {args.limit} questions of each task")
    print(table)
    print(f"Answers and results: {output}")
    return 0


def evaluate(args) -> int:
    from importlib.metadata import version
    from pathlib import Path

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
    model, processor = load_model(args)
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
    return 0


def check_submission(questions: list[dict], subset: str | None) -> None:
    """A server wants every question once, by its id."""
    if subset:
        raise ValueError(f"--submission wants the whole set, not {subset}: leave --limit out.")
    seen = {}
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


def compare(args) -> int:
    import json
    from pathlib import Path

    from vtlmm.evaluation.compare import compare_runs, format_comparison

    comparison = compare_runs(*args.compare)
    if args.output:
        Path(args.output).mkdir(parents=True, exist_ok=True)
        path = Path(args.output, "comparison.json")
        path.write_text(json.dumps(comparison, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(format_comparison(comparison))
    for flip in comparison["flips"]:
        question = flip["question"].partition("\n")[0]
        print(f"{flip['index']}: {question} ({flip['truth']}): {flip['first']!r} → {flip['second']!r}")
    return 0
