# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""`vtlmm analyze MODEL --data …`"""

from .load import add_model_arguments, check_vtlmm, load_model


def add_arguments(parser):
    parser.add_argument("model", help="VT-LMM: folder or Hub id")
    parser.add_argument("--data", required=True, help=".json, .jsonl or .parquet file, folder or Hub id")
    parser.add_argument("--split", default="train", help="split of the data; a file is one split, train (default)")
    parser.add_argument("--image-folder", help="where the images' paths start")
    parser.add_argument(
        "--labels",
        metavar="COLUMN",
        help="column with what is in the image: a text, a list, or a list of {label, bbox}; default: the answers",
    )
    parser.add_argument("--limit", type=int, help="only the first so many rows; marked as a subset everywhere")
    parser.add_argument("--questions", type=int, default=200, help="asked for the failure signatures (default: 200)")
    parser.add_argument("--before", metavar="MODEL", help="the model of the stage before, for stage_instability")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0, help="of the random head, sampled patches and permutations")
    parser.add_argument("--output", help="folder; by default outputs/analysis/ and the model's name")
    add_model_arguments(parser)


def run(args) -> int:
    import argparse
    from importlib.metadata import version
    from pathlib import Path

    from vtlmm.analysis.analysis_table import format_analysis, write_analysis
    from vtlmm.analysis.dataset_analysis import analyze_images, read_labels
    from vtlmm.analysis.failure_modes import evenly, failure_signatures
    from vtlmm.evaluation.questions import image_loader, read_questions

    from .eval import read_rows

    if args.batch_size < 1 or args.questions < 0 or (args.limit is not None and args.limit < 1):
        raise ValueError("--batch-size and --limit must be 1 or more, --questions 0 or more.")
    rows, subset = read_rows(args, (args.labels,))
    questions, places = read_questions(rows, row_id=args.labels)
    if not places:
        raise ValueError(f"{args.data} has no image.")
    check_vtlmm(args.model, args, args.revision)
    if args.before:  # now, not after the analysis
        check_vtlmm(args.before, args)
    images, load = read_labels(questions, args.labels is not None), image_loader(rows, places)
    model, processor = load_model(args)
    results = {"model": args.model, "data": args.data, "split": args.split, "subset": subset, "seed": args.seed}
    results["versions"] = {package: version(package) for package in ("vtlmm", "torch", "transformers")}
    results |= analyze_images(model, processor, images, load, args.batch_size, args.seed)
    asked = evenly(questions, args.questions)
    if asked:
        before = None
        if args.before:
            before = load_model(argparse.Namespace(**{**vars(args), "model": args.before, "revision": None}))
        results["before"] = args.before
        results["signatures"] = failure_signatures(model, processor, asked, load, before, args.batch_size)
    output = Path(args.output or Path("outputs", "analysis", Path(args.model).name))
    write_analysis(output, results)
    print(format_analysis(results))
    print(f"JSON and Markdown: {output}")
    return 0
