# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""`vtlmm ask MODEL IMAGE QUESTION` and `vtlmm ask MODEL --dataset … --output …`"""

from os.path import isfile  # `Path.is_file` raises an error for a long question
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from . import options


EXAMPLES = (
    'vtlmm ask outputs/joint image.jpg "What is in the image?"',
    "vtlmm ask outputs/joint --dataset questions.jsonl --output answers.jsonl",
)


@options.with_loading_options
def ask(
    model: options.Model,
    prompt: Annotated[
        list[str] | None, Argument(metavar="[IMAGE]... QUESTION", help="Images, if any, then the question.")
    ] = None,
    dataset: Annotated[str | None, Option(help="Answer the questions of this file instead.")] = None,
    output: Annotated[
        Path | None, Option(help="With --dataset: a .jsonl file for the answers. An interrupted run resumes.")
    ] = None,
    image_folder: options.ImageFolder = None,
    columns: options.Columns = None,
    batch_size: options.AutoBatchSize = 8,
    max_new_tokens: options.MaxNewTokens = 512,
    *,
    loading: options.LoadingOptions,
) -> None:
    """Answer one question on stdout, or the questions of a file into a file."""
    prompt = prompt or []
    if dataset is not None and prompt:
        raise ValueError(f"With --dataset the questions come from its rows. Remove {prompt[-1]!r}.")
    if dataset is not None and output is None:
        raise ValueError("--dataset needs --output, the file for the answers.")
    for option, value in {"--output": output, "--image-folder": image_folder, "--columns": columns}.items():
        if dataset is None and value is not None:
            raise ValueError(f"{option} has no effect without --dataset. Remove it.")
    if dataset is None and (not prompt or (len(prompt) == 1 and isfile(prompt[0]))):
        raise ValueError("The question is missing. Pass images, if any, and then the question.")

    from vtlmm.data.columns import parse_columns
    from vtlmm.data.images import open_image
    from vtlmm.inference.generation import answer_batch

    mapping = parse_columns(columns)
    if dataset is None:
        *paths, question = prompt
        images = [open_image(path) for path in paths]
        loaded, processor = loading.load(model)
        [answer] = answer_batch(loaded, processor, [{"images": images, "question": question}], max_new_tokens)
        print(answer)
        return
    from vtlmm.inference.batch_file import answer_file

    assert output is not None  # checked above
    loaded, processor = loading.load(model)
    answers = answer_file(
        loaded,
        processor,
        dataset,
        output,
        image_folder=image_folder,
        columns=mapping,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        name=model,
    )
    print(f"{len(answers)} answers: {output}")
