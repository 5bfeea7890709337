# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""`vtlmm ablate grid.yaml --output … [key=value …]`"""


def add_arguments(parser):
    parser.add_argument("grid", help="grid in YAML; see recipes/ablations/")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings on top of the grid's, for all arms")
    parser.add_argument("--output", required=True, help="folder of the results; grids with one output share stages")
    parser.add_argument("--seeds", nargs="+", type=int, help="instead of the grid's")
    parser.add_argument("--only", nargs="+", metavar="ARM", help="run these arms only")


def run(args) -> int:
    from vtlmm.ablations.run import run_grid

    print(run_grid(args.grid, args.output, args.settings, args.seeds, args.only))
    return 0
