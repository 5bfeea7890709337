# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""`vtlmm serve MODEL`"""

from typing import Annotated

from typer import Option

from . import options


EXAMPLES = ("vtlmm serve outputs/joint", "vtlmm serve user/name --port 8080 --load-in-4bit")


@options.with_loading_options
def serve(
    model: options.Model,
    host: options.Host = "127.0.0.1",
    port: options.Port = 8000,
    compile: Annotated[bool, Option("--compile", help="Decode with a static cache, compiled on a GPU.")] = False,
    *,
    loading: options.LoadingOptions,
) -> None:
    """Serve OpenAI's chat API with images over HTTP. Needs the extra `vtlmm[serve]`."""
    try:
        import uvicorn

        from vtlmm.inference.server import build_app
    except ImportError as error:
        raise ValueError(f"`vtlmm serve` needs more packages: pip install 'vtlmm[serve]' ({error}).") from error

    loaded, processor = loading.load(model)
    api = build_app(model, loaded, processor, compile=compile)
    print(f"{model} answers at http://{host}:{port}/v1", flush=True)
    uvicorn.run(api, host=host, port=port, log_level="warning")
