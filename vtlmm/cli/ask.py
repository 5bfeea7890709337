# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""`vtlmm ask MODEL IMAGE QUESTION` and `vtlmm ask MODEL --data … --output …`"""

from .load import add_model_arguments, load_model


def add_arguments(parser):
    parser.usage = (
        "vtlmm ask MODEL [IMAGE …] QUESTION [options]\n       vtlmm ask MODEL --data ROWS --output ANSWERS [options]"
    )
    parser.add_argument("model", help="VT-LMM or its native twin: folder or Hub id")
    parser.add_argument("asked", nargs="*", metavar="IMAGE … QUESTION", help="images, if any, then the question")
    parser.add_argument("--data", metavar="ROWS", help=".json, .jsonl or .parquet file of `question` and `image`")
    parser.add_argument("--output", metavar="ANSWERS", help=".jsonl file, appended to; a stopped run goes on there")
    parser.add_argument("--image-folder", help="where the images' paths start; default: beside the file of rows")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=512, help="longest answer (default: 512)")
    add_model_arguments(parser)


def run(args) -> int:
    if args.batch_size < 1 or args.max_new_tokens < 1:
        raise ValueError("--batch-size and --max-new-tokens must be 1 or more.")
    if args.data is not None:
        return ask_rows(args)
    for name in ("output", "image_folder"):
        if getattr(args, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} has no effect without --data: leave it out.")
    from os.path import isfile  # a long question is no file, where Path raises

    from vtlmm.data.images import open_image
    from vtlmm.inference.generation import answer_batch

    if not args.asked or (len(args.asked) == 1 and isfile(args.asked[0])):
        raise ValueError("There is no question: name images, if any, and then the question.")
    *paths, question = args.asked
    images = [open_image(path) for path in paths]
    model, processor = load_model(args)
    [answer] = answer_batch(model, processor, [{"images": images, "question": question}], args.max_new_tokens)
    print(answer)
    return 0


def ask_rows(args) -> int:
    from pathlib import Path

    from vtlmm.inference.batch_file import answer_rows, read_rows

    if args.asked:
        raise ValueError(f"With --data the questions are its rows; {args.asked[-1]!r} has no place.")
    if args.output is None:
        raise ValueError("--data needs --output, the file for the answers.")
    questions, load_image = read_rows(Path(args.data), args.image_folder)
    model, processor = load_model(args)
    answer_rows(
        Path(args.output), model, processor, questions, load_image, args.batch_size, args.max_new_tokens, args.model
    )
    print(f"{len(questions)} answers: {args.output}")
    return 0
