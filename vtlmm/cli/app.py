# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""`vtlmm app MODEL`"""

from .load import add_model_arguments, load_model


def add_arguments(parser):
    parser.add_argument("model", help="VT-LMM: folder or Hub id")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; default: this machine only")
    parser.add_argument("--port", type=int, default=7860, help="default: 7860")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="longest answer (default: 512)")
    add_model_arguments(parser)


def run(args) -> int:
    import os

    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read where gradio is imported
    try:
        import gradio  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError("The page needs gradio: pip install 'vtlmm[app]'.") from error
    from vtlmm.analysis.app import build_page, launch

    model, processor = load_model(args)
    if model.config.model_type != "vtlmm":
        raise ValueError(f"{args.model} is a {model.config.model_type}, whose patches say nothing: name a VT-LMM.")
    page = build_page(model, processor, args.model, args.max_new_tokens)
    print(f"{args.model} has its page at http://{args.host}:{args.port}", flush=True)
    launch(page, args.host, args.port)
    return 0
