# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""`vtlmm compose --vision … --text … --output …`"""


def add_arguments(parser):
    parser.add_argument("--vision", required=True, help="vision tower: folder or Hub id")
    parser.add_argument("--text", required=True, help="causal decoder: folder or Hub id")
    parser.add_argument("--output", required=True, help="folder for the VT-LMM")
    parser.add_argument("--projector-type", default="mlp2x_gelu", choices=["mlp2x_gelu", "linear"])
    parser.add_argument("--vm-head-type", default="linear", choices=["linear", "mlp", "attention"])
    parser.add_argument("--vm-head-init", default="lm_head", choices=["lm_head", "input_embeddings", "random"])
    parser.add_argument("--vision-feature-layer", type=int, help="default: -2 for a ViT, -1 for a convolutional tower")
    parser.add_argument("--chat-template", help="vicuna_v1, mistral or a .jinja file; default: the decoder's own")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16; default: the decoder's")
    parser.add_argument("--overwrite", action="store_true", help="replace the model in the output folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trust-remote-code", action="store_true", help="allow code of the two checkpoints to run")


def run(args) -> int:
    from vtlmm.hub.compose import compose_model

    options = {key: value for key, value in vars(args).items() if key != "command"}
    compose_model(**options)
    return 0
