# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""`vtlmm export MODEL --to llava --output …`"""

from typing import Annotated, Literal

from typer import Option

from . import options


EXAMPLES = (
    "vtlmm export outputs/joint --to llava --output outputs/joint_llava",
    "vtlmm export user/name --to llava --output outputs/llava --overwrite",
)


def export(
    model: options.Model,
    to: Annotated[Literal["llava"], Option(help="llava: a LlavaForConditionalGeneration with the same logits.")],
    output: options.Output,
    overwrite: options.Overwrite = False,
) -> None:
    """Write a VT-LMM as a stock LLaVA, for engines that run no remote code."""
    from vtlmm.hub.export_llava import export_to_llava

    export_to_llava(model, output, overwrite=overwrite)
