# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""`vtlmm app MODEL`"""

import os

from . import options


EXAMPLES = ("vtlmm app outputs/joint", "vtlmm app user/name --port 7861")


def app(
    model: options.Model,
    host: options.Host = "127.0.0.1",
    port: options.Port = 7860,
    max_new_tokens: options.MaxNewTokens = 512,
    dtype: options.Dtype = "auto",
    load_in_4bit: options.LoadIn4Bit = False,
    load_in_8bit: options.LoadIn8Bit = False,
    device_map: options.DeviceMap = None,
    use_pseudo_image_features: options.PseudoImageFeatures = False,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Open a web page to chat about an image and see its visual tokens. Needs the extra `vtlmm[app]`."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio reads it when it is imported
    try:
        import gradio  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError("`vtlmm app` needs gradio: pip install 'vtlmm[app]'.") from error
    from vtlmm.analysis.app import build_page, launch

    from .load import load, require_vtlmm

    require_vtlmm(model, revision, trust_remote_code)
    loaded, processor = load(
        model,
        dtype=dtype,
        load_in_4bit=load_in_4bit,
        load_in_8bit=load_in_8bit,
        device_map=device_map,
        use_pseudo_image_features=use_pseudo_image_features,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    page = build_page(loaded, processor, model, max_new_tokens)
    print(f"The page for {model} is at http://{host}:{port}", flush=True)
    launch(page, host, port)
