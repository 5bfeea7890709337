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
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--output", help="folder; by default outputs/tokens/ and the model's name")
    parser.add_argument("--top-k", type=int, default=5, help="words of a patch (default: 5)")
    add_model_arguments(parser)


def run(args) -> int:
    from pathlib import Path

    from tqdm.auto import tqdm

    from vtlmm.analysis.patch_features import shown_image
    from vtlmm.analysis.visual_tokens import TOKENS_PAGE, patch_tokens, save_tokens

    if bool(args.images) == bool(args.data):
        raise ValueError("Name images, or a data set by --data.")
    if args.batch_size < 1 or args.limit < 1:
        raise ValueError("--batch-size and --limit must be 1 or more.")
    names, images = images_of_rows(args) if args.data else images_of_files(args.images)
    try:
        from vtlmm.analysis.plots import save_tokens_figure
    except ModuleNotFoundError as error:
        raise ValueError("Drawing needs matplotlib: pip install 'vtlmm[figures]'.") from error
    check_vtlmm(args.model, args, args.revision)
    model, processor = load_model(args)
    tokens = []
    for start in tqdm(range(0, len(images), args.batch_size), desc="images", disable=len(images) <= args.batch_size):
        tokens += patch_tokens(model, processor, images[start : start + args.batch_size], args.top_k)
    output = Path(args.output or Path("outputs", "tokens", Path(args.model).name))
    output.mkdir(parents=True, exist_ok=True)
    shown = [shown_image(processor, image) for image in images]
    save_tokens(output, names, shown, tokens, {"model": args.model, "top_k": args.top_k})
    for i, (name, image, own) in enumerate(zip(names, shown, tokens, strict=True)):
        save_tokens_figure(output / f"{i}_{Path(name).stem}.png", image, own, name)
    print(f"{len(images)} images: a PNG each, {TOKENS_PAGE} and JSON in {output}")
    return 0


def images_of_files(paths) -> tuple[list[str], list]:
    from vtlmm.data.images import open_image

    return list(map(str, paths)), [open_image(path) for path in paths]


def images_of_rows(args) -> tuple[list[str], list]:
    """The different images of the rows, each by the first row that has it."""
    from vtlmm.evaluation.questions import image_loader, read_questions

    from .eval import read_rows

    rows, _ = read_rows(args, ())
    _, places = read_questions(rows)
    if not places:
        raise ValueError(f"{args.data} has no image.")
    load = image_loader(rows, places)
    names = [f"row {row}" + (f", image {position}" if position else "") for row, position in places.values()]
    return names, [load(key) for key in places]
