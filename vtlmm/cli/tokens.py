# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""`vtlmm tokens MODEL IMAGE …` or `vtlmm tokens MODEL --data rows`"""

from .load import add_model_arguments, check_vtlmm, load_model


def add_arguments(parser):
    parser.add_argument("model", help="VT-LMM: folder or Hub id")
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="images")
    parser.add_argument(
        "--data", help="or a data set: .json, .jsonl or .parquet file, folder or Hub id, as for training"
    )
    parser.add_argument("--split", default="train", help="split of the data; a file is one split, train (default)")
    parser.add_argument("--image-folder", help="where the images' paths start")
    parser.add_argument("--limit", type=int, default=32, help="the first so many rows of the data (default: 32)")
    parser.add_argument("--output", help="folder; by default outputs/tokens/ and the model's name")
    parser.add_argument("--top-k", type=int, default=5, help="words of a patch (default: 5)")
    parser.add_argument("--overwrite", action="store_true", help="replace existing results")
    add_model_arguments(parser)


def run(args) -> int:
    from pathlib import Path

    from vtlmm.analysis.visual_token_files import TOKENS_PAGE, images_of_rows, open_images, save_visual_tokens

    if bool(args.images) == bool(args.data):
        raise ValueError("Specify either images or a dataset with --data.")
    # read the images first: a wrong path must not wait for the model
    if args.data:
        names, images = images_of_rows(args.data, args.image_folder, args.split, args.limit)
    else:
        names, images = open_images(args.images)
    check_vtlmm(args.model, args, args.revision)
    model, processor = load_model(args)
    output = Path(args.output or Path("outputs", "tokens", Path(args.model).name))
    save_visual_tokens(
        model, processor, output, images=images, names=names, top_k=args.top_k, overwrite=args.overwrite
    )
    print(f"{len(images)} images: a PNG each, {TOKENS_PAGE} and JSON in {output}")
    return 0
