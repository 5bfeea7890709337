# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""`vtlmm serve MODEL`"""

from .load import add_model_arguments, load_model


def add_arguments(parser):
    parser.add_argument("model", help="VT-LMM or its native twin: folder or Hub id; requests name it so")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; default: this machine only")
    parser.add_argument("--port", type=int, default=8000, help="default: 8000")
    parser.add_argument("--compile", action="store_true", help="decode with a static cache, compiled on a GPU")
    add_model_arguments(parser)


def run(args) -> int:
    try:
        import uvicorn

        from vtlmm.inference.server import build_app
    except ImportError as error:
        raise ValueError(f"Serving needs transformers 5.24 and more: pip install 'vtlmm[serve]' ({error}).") from error
    app = build_app(args.model, *load_model(args), compile=args.compile)
    print(f"{args.model} answers at http://{args.host}:{args.port}/v1", flush=True)
    uvicorn.run(app, host=args.host, port=args.port, log_level="warning")
    return 0
