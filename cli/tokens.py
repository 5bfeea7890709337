# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""`vtlmm tokens MODEL IMAGE …`"""

from .load import add_model_arguments, check_vtlmm, load_model


def add_arguments(parser):
    parser.add_argument("model", help="VT-LMM: folder or Hub id")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="pictures")
    parser.add_argument("--output", help="folder; by default outputs/tokens/ and the model's name")
    parser.add_argument("--top-k", type=int, default=5, help="words of a patch (default: 5)")
    add_model_arguments(parser)


def run(args) -> int:
    from pathlib import Path

    from vtlmm.evaluation.answers import open_picture
    from vtlmm.evaluation.patches import shown_image
    from vtlmm.evaluation.visual_tokens import TOKENS_PAGE, patch_tokens, save_tokens

    images = [open_picture(path) for path in args.images]
    try:
        from vtlmm.evaluation.figures import save_tokens_figure
    except ModuleNotFoundError as error:
        raise ValueError("Drawing needs matplotlib: pip install 'vtlmm[figures]'.") from error
    check_vtlmm(args.model, args, args.revision)
    model, processor = load_model(args)
    tokens = patch_tokens(model, processor, images, args.top_k)
    output = Path(args.output or Path("outputs", "tokens", Path(args.model).name))
    output.mkdir(parents=True, exist_ok=True)
    names, shown = list(map(str, args.images)), [shown_image(processor, image) for image in images]
    save_tokens(output, names, shown, tokens, {"model": args.model, "top_k": args.top_k})
    for i, (name, image, own) in enumerate(zip(names, shown, tokens, strict=True)):
        save_tokens_figure(output / f"{i}_{Path(name).stem}.png", image, own, name)
    print(f"{len(images)} pictures: a PNG each, {TOKENS_PAGE} and JSON in {output}")
    return 0
