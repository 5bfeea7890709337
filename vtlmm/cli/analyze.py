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
    parser.add_argument("--previous", metavar="MODEL", help="model of the previous stage, for stage_instability")
    parser.add_argument("--layers", action="store_true", help="also read every layer of the decoder")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0, help="of the random head, sampled patches and permutations")
    parser.add_argument("--output", help="folder; by default outputs/analysis/ and the model's name")
    parser.add_argument("--overwrite", action="store_true", help="replace existing results")
    add_model_arguments(parser)


def run(args) -> int:
    import argparse
    from pathlib import Path

    from vtlmm.analysis.dataset_analysis import analyze

    check_vtlmm(args.model, args, args.revision)
    previous = None
    if args.previous:
        check_vtlmm(args.previous, args)
        previous = load_model(argparse.Namespace(**{**vars(args), "model": args.previous, "revision": None}))
    model, processor = load_model(args)
    result = analyze(
        model,
        processor,
        args.data,
        image_folder=args.image_folder,
        split=args.split,
        labels=args.labels,
        limit=args.limit,
        num_questions=args.questions,
        previous=previous,
        layers=args.layers,
        batch_size=args.batch_size,
        seed=args.seed,
    )
    output = result.save(args.output or Path("outputs", "analysis", Path(args.model).name), args.overwrite)
    print(result.summary())
    print(f"Tables and JSON: {output}")
    return 0
