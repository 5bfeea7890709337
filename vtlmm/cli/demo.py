# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""`vtlmm demo [--output …]`"""


def add_arguments(parser):
    parser.add_argument("--output", default="outputs/demo", help="folder for models, tables and images")
    parser.add_argument("--seed", type=int, default=0)


def run(args) -> int:
    from vtlmm.demo.run import run_demo

    run_demo(args.output, seed=args.seed)
    return 0
