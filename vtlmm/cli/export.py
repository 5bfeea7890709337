# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""`vtlmm export MODEL --to llava|gguf|onnx --output …`"""

from typing import Annotated, Literal

from typer import Option

from . import options


EXAMPLES = (
    "vtlmm export outputs/joint --to llava --output outputs/joint_llava",
    "vtlmm export user/name --to gguf --type q8_0 --output outputs/gguf --overwrite",
)


def export(
    model: options.Model,
    to: Annotated[
        Literal["llava", "gguf", "onnx"],
        Option(
            help="llava: a LlavaForConditionalGeneration with the same logits. gguf: files for llama.cpp and Ollama. "
            "onnx: tower, projector and VM head, for visual tokens without torch."
        ),
    ],
    output: options.Output,
    type: Annotated[
        Literal["f32", "f16", "bf16", "q8_0"] | None, Option(help="Type of the weights in GGUF files. Default: f16.")
    ] = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Write a VT-LMM as a stock LLaVA, as GGUF files or to ONNX, for engines that run no remote code."""
    if to == "gguf":
        from vtlmm.hub.export_gguf import export_gguf

        export_gguf(model, output, type or "f16", overwrite=overwrite)
        return
    if type is not None:
        raise ValueError("--type is for --to gguf. Leave it out.")
    if to == "onnx":
        from vtlmm.hub.export_onnx import export_onnx

        export_onnx(model, output, overwrite=overwrite)
        return
    from vtlmm.hub.export_llava import export_to_llava

    export_to_llava(model, output, overwrite=overwrite)
