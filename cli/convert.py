# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""`vtlmm convert CHECKPOINT --output …`"""


def add_arguments(parser):
    parser.add_argument("checkpoint", help="folder or Hub id of a released VW-LMM")
    parser.add_argument("--output", required=True, help="folder for the VT-LMM")
    parser.add_argument("--vision-tower", help="the CLIP tower, if not the one that the checkpoint names")
    parser.add_argument("--tokenizer", help="the tokenizer, if the checkpoint has none")


def run(args) -> int:
    from vtlmm.hub.convert import convert

    convert(args.checkpoint, args.output, vision_tower=args.vision_tower, tokenizer=args.tokenizer)
    return 0
