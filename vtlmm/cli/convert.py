# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""`vtlmm convert CHECKPOINT [--to llava] --output …`"""


def add_arguments(parser):
    parser.add_argument("checkpoint", help="folder or Hub id of a VW-LMM or a LLaVA-1.5; with --to llava of a VT-LMM")
    parser.add_argument("--output", required=True, help="folder for the result")
    parser.add_argument("--to", default="vtlmm", choices=["vtlmm", "llava"], help="default: vtlmm")
    parser.add_argument("--overwrite", action="store_true", help="replace the model in the output folder")
    start = parser.add_argument_group("only --to vtlmm")
    start.add_argument("--vision-tower", help="the CLIP tower, if not the one that the checkpoint names")
    start.add_argument("--tokenizer", help="the tokenizer, if the checkpoint has none")
    start.add_argument("--chat-template", help="vicuna_v1, mistral or a .jinja file; default: the checkpoint's")
    start.add_argument(
        "--pad-to-square", action="store_const", const=True, help="pad images, where a llava-hf folder crops them"
    )
    start.add_argument("--vm-head-init", choices=["lm_head", "input_embeddings", "random"], help="default: lm_head")


def run(args) -> int:
    given = ("vision_tower", "tokenizer", "chat_template", "pad_to_square", "vm_head_init")
    options = {name: getattr(args, name) for name in given if getattr(args, name) is not None}
    if args.to == "vtlmm":
        from vtlmm.hub.convert import convert_checkpoint

        convert_checkpoint(args.checkpoint, args.output, overwrite=args.overwrite, **options)
    else:
        from vtlmm.hub.export_llava import export_to_llava

        if options:
            raise ValueError(f"Only --to vtlmm takes {', '.join('--' + name.replace('_', '-') for name in options)}.")
        export_to_llava(args.checkpoint, args.output, overwrite=args.overwrite)
    return 0
