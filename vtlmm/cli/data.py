# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""`vtlmm data check --config recipe.yaml` or `vtlmm data check --dataset … --model …`"""


def add_arguments(parser):
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    text = "look at every row and image; exit code 1 when one is broken"
    check = actions.add_parser("check", help=text, description=text[0].upper() + text[1:] + ".")
    check.add_argument("--config", help="recipe in YAML, as for training; the options below go before it")
    check.add_argument("--dataset", help=".json, .jsonl or .parquet file, folder or Hub id")
    check.add_argument("--model", help="VT-LMM whose processor and chat template are used: folder or Hub id")
    check.add_argument("--image-folder", "--image_folder", help="where the images' paths start")
    check.add_argument("--max-length", "--max_length", type=int, help="longest row in tokens")


def run(args) -> int:
    from dataclasses import fields

    from transformers import AutoProcessor

    import modeling_vtlmm  # noqa: F401 - registers the processor
    from vtlmm.data.rows import DataConfig
    from vtlmm.data.validation import check_rows
    from vtlmm.train.config import VTLMMTrainingConfig
    from vtlmm.train.recipe import read_settings, split_stages

    settings = read_settings(args.config) if args.config else {}
    given = {key: getattr(args, key) for key in ("dataset", "model", "image_folder", "max_length")}
    settings.update({key: value for key, value in given.items() if value is not None})
    if "model" not in settings:
        raise ValueError("`model` is not set: its processor counts the tokens. Pass --model or a recipe.")
    processor = AutoProcessor.from_pretrained(
        settings["model"],
        revision=settings.get("revision"),
        trust_remote_code=settings.get("trust_remote_code", False),
    )
    num_problems, checked = 0, []
    for run in split_stages(settings):  # stages may have data of their own
        config = DataConfig(**{f.name: run[f.name] for f in fields(DataConfig) if f.name in run})
        max_length = run.get("max_length", VTLMMTrainingConfig.max_length)
        if (config, max_length) in checked:
            continue
        checked.append((config, max_length))
        for split in ("train", "eval"):
            rows = config.load_rows(split)
            if rows is not None:
                report = check_rows(rows, processor, max_length)
                num_problems += len(report.problems)
                print(f"{split}\n{report.format()}")
    return 1 if num_problems else 0
