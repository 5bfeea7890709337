# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""`vtlmm app MODEL`"""

import os
from tempfile import mkdtemp

from . import options


EXAMPLES = (
    "vtlmm app outputs/joint",
    "vtlmm app outputs/joint --dataset test.jsonl --port 7861",
)


@options.with_loading_options
def app(
    model: options.Model,
    host: options.Host = "127.0.0.1",
    port: options.Port = 7860,
    max_new_tokens: options.MaxNewTokens = 512,
    dataset: options.Dataset = None,
    split: options.Split = "train",
    image_folder: options.ImageFolder = None,
    columns: options.Columns = None,
    *,
    loading: options.LoadingOptions,
) -> None:
    """Open a web page to chat about an image and see its visual tokens. Needs the extra `vtlmm[app]`.

    The example images are those of the first rows of the dataset, or three photos.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio reads it when it is imported
    try:
        import gradio  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError("`vtlmm app` needs gradio: pip install 'vtlmm[app]'.") from error
    from vtlmm.analysis.app import EXAMPLES as PHOTOS
    from vtlmm.analysis.app import build_page, examples_of_rows, launch
    from vtlmm.data.columns import parse_columns
    from vtlmm.data.rows import load_rows

    examples = list(PHOTOS)
    if dataset:
        rows = load_rows(dataset, image_folder=image_folder, split=split, columns=parse_columns(columns))
        examples = examples_of_rows(rows, mkdtemp(prefix="vtlmm_examples_"))
    loading.require_visual_tokens(model)
    loaded, processor = loading.load(model)
    page = build_page(loaded, processor, model, max_new_tokens, examples)
    print(f"The page for {model} is at http://{host}:{port}", flush=True)
    launch(page, host, port)
