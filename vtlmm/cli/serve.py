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
    name: Annotated[str | None, Option(help="Name of the model in requests. Default: MODEL.")] = None,
    api_key: Annotated[str | None, Option(envvar="VTLMM_API_KEY", help="Key that clients must send.")] = None,
    allow_origin: Annotated[
        list[str] | None, Option(help="Origin whose web pages may call the server, or *. May be repeated.")
    ] = None,
    allow_remote_images: Annotated[
        bool, Option("--allow-remote-images", help="Fetch images from https URLs with public addresses.")
    ] = False,
    max_body_bytes: Annotated[int, Option(min=1, help="Size of a request.")] = 20_000_000,
    max_images: Annotated[int, Option(min=0, help="Images in a request.")] = 8,
    max_image_pixels: Annotated[int, Option(min=1, help="Width times height of an image.")] = 4096 * 3072,
    max_prompt_tokens: Annotated[int, Option(min=1, help="Tokens of a prompt with its images.")] = 8192,
    max_answer_tokens: Annotated[int, Option(min=1, help="Tokens of an answer.")] = 1024,
    max_batch_size: Annotated[int, Option(min=1, help="Answers that are generated at the same time.")] = 32,
    max_queue: Annotated[int, Option(min=1, help="Waiting requests. One more gets status 429.")] = 128,
    request_seconds: Annotated[float, Option(min=0.001, help="Time for a request, with its time in the queue.")] = 300,
    shutdown_seconds: Annotated[int, Option(min=0, help="Time for running requests at shutdown.")] = 30,
    *,
    loading: options.LoadingOptions,
) -> None:
    """Serve OpenAI's chat API with images over HTTP. Needs the extra `vtlmm[serve]`."""
    try:
        from vtlmm.inference.server.app import build_app, run_server
        from vtlmm.inference.server.settings import ServerSettings
    except ImportError as error:
        raise ValueError(f"`vtlmm serve` needs more packages: pip install 'vtlmm[serve]' ({error}).") from error

    settings = ServerSettings(
        max_body_bytes=max_body_bytes,
        max_images=max_images,
        max_image_pixels=max_image_pixels,
        max_prompt_tokens=max_prompt_tokens,
        max_answer_tokens=max_answer_tokens,
        max_batch_size=max_batch_size,
        max_queue=max_queue,
        request_seconds=request_seconds,
        allow_remote_images=allow_remote_images,
        api_key=api_key,
        allow_origins=tuple(allow_origin or ()),
    )
    loaded, processor = loading.load(model)
    run_server(build_app(name or model, loaded, processor, settings, host), host, port, shutdown_seconds)
