# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""`vtlmm convert CHECKPOINT --output …`"""

from typing import Annotated

from typer import Argument, Option

from . import options


EXAMPLES = (
    "vtlmm convert llava-hf/llava-1.5-7b-hf --chat-template vicuna_v1 --pad-to-square --output outputs/start",
    "vtlmm convert MYTH-Lab/VW-LMM-Vicuna-7b --output outputs/vw_lmm",
)


def convert(
    checkpoint: Annotated[str, Argument(help="LLaVA-1.5 or VW-LMM checkpoint: a folder or a Hub id.")],
    output: options.Output,
    vision_tower: Annotated[
        str | None, Option(help="CLIP tower: a folder or a Hub id. Default: the tower that the checkpoint names.")
    ] = None,
    tokenizer: Annotated[str | None, Option(help="Tokenizer, if the checkpoint has none.")] = None,
    chat_template: Annotated[
        str | None, Option(help="vicuna_v1, mistral or a .jinja file. Default: the checkpoint's own template.")
    ] = None,
    pad_to_square: Annotated[
        bool, Option("--pad-to-square", help="Pad images as LLaVA-1.5 was trained. A llava-hf folder crops them.")
    ] = False,
    vm_head_init: Annotated[options.VMHeadInit, Option(help="Start weights of a new VM head.")] = "lm_head",
    overwrite: options.Overwrite = False,
) -> None:
    """Make a VT-LMM from a LLaVA-1.5 or VW-LMM checkpoint."""
    from vtlmm.hub.convert import convert_checkpoint

    convert_checkpoint(
        checkpoint,
        output,
        vision_tower=vision_tower,
        tokenizer=tokenizer,
        chat_template=chat_template,
        pad_to_square=pad_to_square,
        vm_head_init=vm_head_init,
        overwrite=overwrite,
    )
