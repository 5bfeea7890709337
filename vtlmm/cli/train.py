# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""`vtlmm train --config recipe.yaml [key=value …]`"""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option


EXAMPLES = (
    "vtlmm train --config recipes/qlora_24gb.yaml model=outputs/start dataset=rows.json image_folder=images",
    "vtlmm train --config recipes/easy_vqa_cpu.yaml resume_from_checkpoint=true",
)


def train(
    config: Annotated[Path, Option(help="Recipe in YAML.")],
    settings: Annotated[
        list[str] | None, Argument(metavar="KEY=VALUE", help="Settings that replace the recipe's.")
    ] = None,
) -> None:
    """Train one stage, or several, from a recipe."""
    from vtlmm.train.recipe import read_settings
    from vtlmm.train.stage_runner import run_stages

    run_stages(read_settings(config, settings or []))
