# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""`vtlmm merge ADAPTER --output FOLDER [--base …] [--dequantize]`"""


def add_arguments(parser):
    parser.add_argument("adapter", help="folder that `vtlmm train` wrote with `adapter: lora` or `dora`")
    parser.add_argument("--output", required=True, help="folder for the whole VT-LMM")
    parser.add_argument("--base", help="folder or Hub id of the base; default: what the adapter names")
    parser.add_argument(
        "--dequantize", action="store_true", help="merge into the base as nf4 or int8 rounded it in training"
    )
    parser.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of the folder's weights"
    )


def run(args) -> int:
    from vtlmm.train.merge import merge

    merge(args.adapter, args.output, base=args.base, dequantize=args.dequantize, dtype=args.dtype)
    return 0
