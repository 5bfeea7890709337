# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Check training data."""

from pathlib import Path
from typing import Annotated

from typer import Exit, Option

from . import options


EXAMPLES = (
    "vtlmm data check --model outputs/start --dataset rows.json --image-folder images",
    "vtlmm data check --config recipes/qlora_24gb.yaml --dataset rows.json",
)


def check(
    config: Annotated[Path | None, Option(help="Recipe in YAML. The other options replace its settings.")] = None,
    dataset: options.Dataset = None,
    model: Annotated[str | None, Option(help="VT-LMM whose processor and chat template are used.")] = None,
    image_folder: options.ImageFolder = None,
    max_length: Annotated[int | None, Option(min=1, help="Longest row in tokens.")] = None,
) -> None:
    """Check every row and image of the training data. The exit code is 1 if a row has a problem."""
    from dataclasses import fields

    from transformers import AutoConfig, AutoProcessor

    import modeling_vtlmm  # noqa: F401 - registers the processor
    from vtlmm.data.validation import check_rows, position_limit
    from vtlmm.train.config import VTLMMTrainingConfig
    from vtlmm.train.recipe import DatasetConfig, read_recipe, split_stages

    settings = read_recipe(config) if config else {}
    given = {
        "dataset_name": dataset,
        "model_name_or_path": model,
        "image_folder": None if image_folder is None else str(image_folder),
        "max_length": max_length,
    }
    settings.update({key: value for key, value in given.items() if value is not None})
    if "model_name_or_path" not in settings:
        raise ValueError("The model is missing: its processor counts the tokens. Pass --model or a recipe.")
    processor = AutoProcessor.from_pretrained(
        settings["model_name_or_path"],
        revision=settings.get("model_revision"),
        trust_remote_code=settings.get("trust_remote_code", False),
    )
    model_config = AutoConfig.from_pretrained(
        settings["model_name_or_path"],
        revision=settings.get("model_revision"),
        trust_remote_code=settings.get("trust_remote_code", False),
    )
    max_positions = position_limit(model_config)
    num_problems, checked = 0, []
    for run in split_stages(settings):  # stages may have data of their own
        data_config = DatasetConfig(**{f.name: run[f.name] for f in fields(DatasetConfig) if f.name in run})
        length = run.get("max_length", VTLMMTrainingConfig.max_length)
        if (data_config, length) in checked:
            continue
        checked.append((data_config, length))
        for split in ("train", "eval"):
            rows = data_config.load(split)
            if rows is not None:
                report = check_rows(rows, processor, length, max_positions=max_positions)
                num_problems += len(report.problems)
                print(f"{split}\n{report.format()}")
    raise Exit(1 if num_problems else 0)
