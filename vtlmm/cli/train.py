# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""`vtlmm train --config recipe.yaml [key=value …]`"""


def add_arguments(parser):
    parser.add_argument("--config", required=True, help="recipe in YAML; see recipes/")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings on top of the recipe's")


def run(args) -> int:
    from vtlmm.train.recipe import read_settings
    from vtlmm.train.stage_runner import run_stages

    run_stages(read_settings(args.config, args.settings))
    return 0
