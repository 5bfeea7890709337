# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""`vtlmm train [--config recipe.yaml] [--setting value …]`"""

from typing import Annotated

from typer import Context, Option


# Every option is a setting, written as for TRL (`--learning_rate`). `parse_arguments` reads them.
CONTEXT_SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}
EXAMPLES = (
    "vtlmm train --model_name_or_path outputs/start --dataset_name rows.json --stage projector --output_dir outputs/1",
    "vtlmm train --config recipes/easy_vqa_cpu.yaml --stages.joint.learning_rate 1e-4 --resume_from_checkpoint",
)


def train(
    context: Context,
    list_settings: Annotated[bool, Option("--list-settings", help="Print all settings and exit.")] = False,
) -> None:
    """Train one stage, or several, from a recipe (--config) and settings (--learning_rate 1e-4)."""
    from vtlmm.train.recipe import parse_arguments, settings_table
    from vtlmm.train.stage_runner import train_stages

    if list_settings:
        for setting in settings_table():
            print(f"{setting.group:9} {setting.name:38} {setting.type:15} {setting.default:24} {setting.help}")
        return
    train_stages(parse_arguments(context.args))
