# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Compose a model for real photos, align it, train it in two orders of stages, and measure the words after each stage.

    make real PARTS=../shared

The output folder gets the rows, the models, the words of the photos and `results.md`. An interrupted run resumes.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch
from datasets import concatenate_datasets

from vtlmm import align_captions, compose_model, load_model, load_rows
from vtlmm.analysis.caption_matching import measure_caption_matching
from vtlmm.analysis.caption_words import measure_caption_words
from vtlmm.analysis.plots import save_patch_words
from vtlmm.analysis.visual_tokens import read_visual_tokens
from vtlmm.data.environment import commit_of_code, machine
from vtlmm.data.images import open_image
from vtlmm.data.markdown import markdown_table
from vtlmm.data.output_files import write_json, write_text
from vtlmm.train.recipe import read_recipe
from vtlmm.train.stage_runner import train_stages


RECIPES = Path(__file__).parents[1] / "recipes"
ORDERS = {"aligned": "smollm2_mobilenet_v2.yaml", "paper": "smollm2_paper_order.yaml"}
CAPTIONS_PER_PHOTO = 5
NUM_TEXTS = 500  # for the perplexity of text without an image
HELD_OUT_PHOTOS = 150  # for the words of the patches; caption matching uses the same number of other photos


def write_data(parts: Path, output: Path, seed: int) -> None:
    """
    Write the texts, and split the photos: rows to train on, held-out photos with five captions, and held-out photos
    with one caption.
    """
    piqa = (parts / "data/piqa/validation.jsonl").read_text(encoding="utf-8").splitlines()[:NUM_TEXTS]
    texts = (f"{row['goal']} {row['sol1' if row['label'] == 0 else 'sol2']}" for row in map(json.loads, piqa))
    write_text(output / "texts.txt", "".join(" ".join(text.split()) + "\n" for text in texts))
    if (output / "matching.parquet").is_file():
        return
    photos = load_rows(str(parts / "data/flickr8k_700/flickr8k_700.parquet"))
    images = parts / "data/llava_pretrain_2k"
    chats = load_rows(str(images / "chat.json"), image_folder=str(images / "images"))
    number = len(photos) // CAPTIONS_PER_PHOTO
    order = torch.randperm(number, generator=torch.Generator().manual_seed(seed)).tolist()

    def rows_of(numbers: list[int], captions: int) -> list[int]:
        return [CAPTIONS_PER_PHOTO * photo + caption for photo in numbers for caption in range(captions)]

    matching, words = order[:HELD_OUT_PHOTOS], order[HELD_OUT_PHOTOS : 2 * HELD_OUT_PHOTOS]
    training = order[2 * HELD_OUT_PHOTOS :]
    train = concatenate_datasets([chats, photos.select(rows_of(training, CAPTIONS_PER_PHOTO))])
    train.to_parquet(output / "train.parquet")
    photos.select(rows_of(words, CAPTIONS_PER_PHOTO)).to_parquet(output / "words.parquet")
    photos.select(rows_of(matching, 1)).to_parquet(output / "matching.parquet")


def write_start(vision: str, decoder: str, output: Path) -> None:
    """Compose the model and align it with the training captions."""
    if (output / "start/config.json").is_file():
        return
    model, processor = compose_model(vision, decoder, dtype="float32", drop_system_prompt=True)
    print(align_captions(model, processor, load_rows(str(output / "train.parquet"))))
    model.save_pretrained(output / "start")
    processor.save_pretrained(output / "start")


def write_photos(photos: list[Path], output: Path) -> None:
    """Draw photos with the words of their patches, by the aligned model, into `photos.png`."""
    model, processor = load_model(output / "start", dtype="float32")
    images = [open_image(str(photo)) for photo in photos]
    tokens = read_visual_tokens(model, processor, images)
    titles = []
    for photo, one in zip(photos, tokens, strict=True):
        titles.append(f"{photo.stem}: " + ", ".join(word for word, _ in one.summary[:3]))
    save_patch_words(output / "photos.png", processor, images, tokens, titles)


def measure(folder: Path, output: Path) -> dict:
    """Return the words and the caption matching of one model, measured once."""
    path = output / "measured" / f"{folder.relative_to(output)}.json".replace("/", "-")
    if not path.is_file():
        model, processor = load_model(folder, dtype="float32")
        words = measure_caption_words(model, processor, load_rows(str(output / "words.parquet")))
        matching = measure_caption_matching(model, processor, load_rows(str(output / "matching.parquet")))
        path.parent.mkdir(exist_ok=True)
        write_json(path, {"words": asdict(words), "matching": asdict(matching)})
    return json.loads(path.read_text(encoding="utf-8"))


def table_row(name: str, measured: dict) -> list[str]:
    def percent(estimate: dict) -> str:
        return f"{100 * estimate['value']:.1f}"

    words, matching = measured["words"], measured["matching"]
    return [
        name,
        *(
            f"{percent(words[key])} ({percent(words[f'{key}_shuffled'])})"
            for key in ("top_word", "top_10", "patch_word")
        ),
        f"{words['entropy']['value']:.2f}",
        str(words["num_patch_words"]),
        "{} ({} to {})".format(*(f"{100 * matching['accuracy'][key]:.1f}" for key in ("value", "low", "high"))),
        f"{matching['loss']['value']:.2f}",
        f"{matching['loss_lift']['value']:.2f}",
    ]


def write_results(output: Path, rows: list[list[str]]) -> None:
    """Write the table of all measured models."""
    header = ["model", "image's word", "one of ten", "patch's word", "entropy", "patch words", "matching"]
    table = markdown_table([*header, "caption loss", "other − own"], rows)
    about = (
        "Percent, with another photo's captions in parentheses; entropy and losses in nats. Matching: share of "
        "captions with a lower loss with their own photo, with 95 % intervals. "
        f"{machine()}, commit {commit_of_code()}."
    )
    write_text(output / "results.md", f"{table}\n\n{about}\n")
    print(f"\n{table}\n\n{about}")


def check_options(args: argparse.Namespace) -> None:
    """
    Check that an output that resumes has the same seed, decoder and steps. Its measurements are not repeated.

    An output without training steps may get them later.

    Raises:
        `ValueError`: names the options of the output.
    """
    path, options = args.output / "options.json", {"seed": args.seed, "decoder": args.decoder}
    steps = {"max_steps": args.max_steps} if args.max_steps else {}
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if any(earlier.get(name, value) != value for name, value in {**options, **steps}.items()):
        raise ValueError(f"{args.output} has the options {earlier}. Choose them, or another output.")
    write_json(path, {**earlier, **options, **steps})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", type=Path, help="folder with weights/mobilenet_v2 and data")
    parser.add_argument("decoder", help="folder or Hub id of SmolLM2-135M-Instruct")
    parser.add_argument("output", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="split of the photos")
    parser.add_argument("--max-steps", type=int, default=20, help="steps of each stage; 0 stops after the alignment")
    parser.add_argument("--photos", type=Path, nargs="+", help="draw the words of these photos")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    check_options(args)
    write_data(args.parts, args.output, args.seed)
    write_start(str(args.parts / "weights/mobilenet_v2"), args.decoder, args.output)
    if args.photos:
        write_photos(args.photos, args.output)
    rows = [table_row("aligned, not trained", measure(args.output / "start", args.output))]
    write_results(args.output, rows)
    for order, recipe in ORDERS.items() if args.max_steps else ():
        settings = read_recipe(
            RECIPES / recipe,
            model_name_or_path=str(args.output / "start"),
            dataset_name=str(args.output / "train.parquet"),
            image_folder=None,
            output_dir=str(args.output / order),
            max_steps=args.max_steps,
            seed=args.seed,
            resume_from_checkpoint=True,
            disable_tqdm=True,
        )
        train_stages(settings)
        for stage in settings["stages"]:
            rows.append(table_row(f"{order}: {stage}", measure(args.output / order / stage, args.output)))
            write_results(args.output, rows)


if __name__ == "__main__":
    main()
