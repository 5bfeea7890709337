# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""`vtlmm compose --vision … --text … --output …`"""

from typing import Annotated, Literal

from typer import Option

from . import options


EXAMPLES = (
    "vtlmm compose --vision openai/clip-vit-large-patch14-336 --text lmsys/vicuna-7b-v1.5 --output outputs/start",
    "vtlmm compose --vision facebook/dinov2-small --text HuggingFaceTB/SmolLM2-135M-Instruct --output outputs/start",
)


def compose(
    vision: Annotated[str, Option(help="Vision tower: a folder or a Hub id.")],
    text: Annotated[str, Option(help="Causal decoder with its tokenizer: a folder, a Hub id or a GGUF file.")],
    output: options.Output,
    projector_type: Annotated[Literal["mlp2x_gelu", "linear"], Option(help="Projector.")] = "mlp2x_gelu",
    vm_head_type: Annotated[Literal["linear", "mlp", "attention"], Option(help="VM head.")] = "linear",
    vm_head_init: Annotated[options.VMHeadInit, Option(help="Start weights of the VM head.")] = "lm_head",
    vision_feature_layer: Annotated[
        int | None, Option(help="Layer of the tower. Default: -2 for a ViT, -1 for a convolutional tower.")
    ] = None,
    chat_template: Annotated[
        str | None, Option(help="vicuna_v1, mistral or a .jinja file. Default: the decoder's own template.")
    ] = None,
    drop_system_prompt: Annotated[
        bool, Option("--drop-system-prompt", help="Leave out the default system prompt of the decoder's template.")
    ] = False,
    align_captions: Annotated[
        str | None, Option(help="Captioned images that solve the projector and the VM head, as `vtlmm align` does.")
    ] = None,
    image_folder: options.ImageFolder = None,
    columns: options.Columns = None,
    dtype: Annotated[options.DtypeName, Option(help="dtype of the model. auto: the decoder's dtype.")] = "auto",
    seed: options.Seed = 0,
    trust_remote_code: options.TrustRemoteCode = False,
    overwrite: options.Overwrite = False,
) -> None:
    """Make an untrained VT-LMM from a vision tower and a decoder."""
    for option, value in {"--image-folder": image_folder, "--columns": columns}.items():
        if align_captions is None and value is not None:
            raise ValueError(f"{option} has no effect without --align-captions. Remove it.")
    if align_captions is not None and vm_head_type != "linear":
        raise ValueError(f"--align-captions needs --vm-head-type linear, not {vm_head_type}.")

    from vtlmm.data.columns import parse_columns
    from vtlmm.data.rows import load_rows
    from vtlmm.hub.compose import compose_model

    mapping = parse_columns(columns)
    if align_captions is not None:  # find a wrong path before the model is written
        load_rows(align_captions, image_folder=image_folder, columns=mapping)
    compose_model(
        vision,
        text,
        output,
        projector_type=projector_type,
        vm_head_type=vm_head_type,
        vm_head_init=vm_head_init,
        vision_feature_layer=vision_feature_layer,
        chat_template=chat_template,
        drop_system_prompt=drop_system_prompt,
        dtype=None if dtype == "auto" else dtype,
        seed=seed,
        trust_remote_code=trust_remote_code,
        overwrite=overwrite,
    )
    if align_captions is not None:
        from vtlmm.train.caption_alignment import align_checkpoint

        align_checkpoint(output, align_captions, image_folder=image_folder, columns=mapping)
