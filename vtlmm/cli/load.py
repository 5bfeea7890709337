# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""How every command that uses a model loads it."""


def add_model_arguments(parser):
    parser.add_argument(
        "--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"], help="default: the model's"
    )
    parser.add_argument(
        "--quantization", default="none", choices=["none", "nf4", "int8"], help="of the decoder; default: none"
    )
    parser.add_argument(
        "--device-map",
        metavar="WHERE",
        help="cpu, cuda:1, …, or auto: over all GPUs, and what they cannot hold in memory; default: the first GPU",
    )
    parser.add_argument("--pseudo", action="store_true", help="pseudo image features in place of image features")
    parser.add_argument("--revision", help="commit, tag or branch of a Hub id")
    parser.add_argument("--trust-remote-code", action="store_true", help="allow code of the model's folder to run")


def check_vtlmm(name: str, args, revision: str | None = None) -> None:
    """
    Raises:
        `ValueError`: for another kind of model, as the native twin: it has no visual tokens.
    """
    from transformers import AutoConfig

    import modeling_vtlmm  # noqa: F401 - registers the model

    config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=args.trust_remote_code)
    if config.model_type != "vtlmm":
        raise ValueError(f"{name} is a {config.model_type}: only a VT-LMM has visual tokens.")


def load_model(args):
    """
    Model, in evaluation mode, and processor.

    Raises:
        `ValueError`: for pseudo image features of a model without a VM head.
    """
    import torch
    from transformers import AutoConfig

    from vtlmm.inference import loading  # registers the model

    load = {"revision": args.revision, "trust_remote_code": args.trust_remote_code}
    config = AutoConfig.from_pretrained(args.model, **load)
    settings = {"config": config}
    if args.pseudo:
        if config.model_type != "vtlmm":
            raise ValueError(f"{args.model} is a {config.model_type}: only a VT-LMM has pseudo image features.")
        config.use_pseudo_image_features = True
    if args.device_map:
        settings["device_map"] = args.device_map
    if args.quantization != "none":
        from vtlmm.hub.quantize import quantization_config

        dtype = config.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
        settings["quantization_config"] = quantization_config(args.quantization, dtype or torch.float32)
    return loading.load_model(args.model, args.dtype, **load, **settings)
