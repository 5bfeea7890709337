# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Measure the visual tokens and the decoder of photo models on images of other domains.

    python benchmarks/real_domains.py ../shared outputs/real outputs/real/aligned/joint --output outputs/real_domains

`outputs/real` is the output of `make real`. The visual tokens are those of its aligned model. The decoder is measured
for every model: is the label of an image likelier with its image than with an image of another label?
"""

import argparse
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import torch
from datasets import Dataset, Features, Image, Value

from vtlmm import load_model, load_rows
from vtlmm.analysis.caption_matching import measure_caption_matching
from vtlmm.analysis.caption_words import measure_caption_words
from vtlmm.analysis.ood_metrics import detection_auroc
from vtlmm.analysis.visual_tokens import read_visual_tokens
from vtlmm.data.environment import commit_of_code, machine
from vtlmm.data.markdown import markdown_table
from vtlmm.data.output_files import write_json, write_text


NUM_IMAGES = 100  # of each domain
# File, and the column with the content of the image
DOMAINS = {
    "photos of objects (ImageNet)": ("imagenet_sample/imagenet_sample.parquet", "label"),
    "blood cells (BCCD)": ("bccd/bccd.parquet", None),
    "radiology (VQA-RAD)": ("vqa_rad/test.parquet", "organ"),
    "satellite (RSSCN7)": ("rsscn7/rsscn7.parquet", "label"),
    "tangrams (KiloGram)": ("kilogram/kilogram.parquet", "descriptions"),
    "icons (Noto emoji)": ("noto_emoji/emoji.parquet", "caption"),
}
ORGANS = {"HEAD": "head brain", "CHEST": "chest lungs", "ABD": "abdomen"}
COLUMNS = {"image": Image(), "question": Value("string"), "answer": Value("string")}


def domain_rows(data: Path, name: str, folder: Path) -> Dataset:
    """Return one row per image of a random sample, such that neighbors have different labels where labels differ."""
    file, column = DOMAINS[name]
    images = Dataset.from_parquet(str(data / file)).cast_column("image", Image(decode=False))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).tolist()[:NUM_IMAGES]
    rows = [{"image": row["image"], "answer": label(row, column)} for row in images.select(order)]
    by_label = {text: [row for row in rows if row["answer"] == text] for text in {row["answer"] for row in rows}}
    turns = [(i / len(group), text) for text, group in sorted(by_label.items()) for i in range(len(group))]
    rows = [by_label[text].pop() | {"question": "Describe the image."} for _, text in sorted(turns)]
    path = folder / f"{Path(file).stem}.parquet"
    Dataset.from_list(rows, features=Features(COLUMNS)).to_parquet(path)
    return load_rows(str(path))


def label(row: dict, column: str | None) -> str:
    """Return the content of an image as a text."""
    if column is None:
        return "blood cells"
    if column == "descriptions":
        return ", ".join(row[column][:5])
    return ORGANS.get(row[column], row[column])


def measure_words(model, processor, rows: Dataset, photo_entropies: list[float]) -> dict:
    """Return the entropies, the most frequent words, and how often words are in the label."""
    tokens = [read_visual_tokens(model, processor, images)[0] for images in rows["images"]]
    entropies = [one.mean_entropy for one in tokens]
    frequent = Counter(one.summary[0][0] for one in tokens if one.summary).most_common(4)
    words = asdict(measure_caption_words(model, processor, rows))
    return {
        "entropies": entropies,
        "auroc": asdict(detection_auroc(photo_entropies, entropies)) if photo_entropies else None,
        "frequent": [[word, number / len(tokens)] for word, number in frequent],
        **{name: words[name] for name in ("top_word", "top_word_shuffled", "top_10", "top_10_shuffled")},
    }


def words_row(name: str, measured: dict) -> list[str]:
    hits = [
        f"{100 * measured[key]['value']:.0f} ({100 * measured[f'{key}_shuffled']['value']:.0f})"
        for key in ("top_word", "top_10")
    ]
    auroc = measured["auroc"]
    detection = "–" if auroc is None else f"{auroc['value']:.2f} ({auroc['low']:.2f} to {auroc['high']:.2f})"
    mean = sum(measured["entropies"]) / len(measured["entropies"])
    words = ", ".join(f"{word} {100 * share:.0f} %" for word, share in measured["frequent"])
    return [name, str(len(measured["entropies"])), *hits, f"{mean:.2f}", detection, words]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", type=Path, help="folder with data/")
    parser.add_argument("real", type=Path, help="output of real_photos.py: start/ and words.parquet")
    parser.add_argument("models", nargs="*", help="trained models whose decoder is measured")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    domains = {name: domain_rows(args.parts / "data", name, args.output) for name in DOMAINS}

    model, processor = load_model(args.real / "start", dtype="float32")
    photos = load_rows(str(args.real / "words.parquet")).select(range(0, 5 * NUM_IMAGES, 5))
    words = {"photos (Flickr8k)": measure_words(model, processor, photos, [])}
    photo_entropies = words["photos (Flickr8k)"]["entropies"]
    for name, rows in domains.items():
        words[name] = measure_words(model, processor, rows, photo_entropies)
    header = [
        "images",
        "number",
        "top word in label",
        "one of ten",
        "entropy",
        "AUROC of the entropy",
        "frequent words",
    ]
    tables = [markdown_table(header, [words_row(*item) for item in words.items()])]

    matching: dict[str, dict] = {}
    for folder in args.models:
        model, processor = load_model(folder, dtype="float32")
        matching[folder] = {
            name: asdict(measure_caption_matching(model, processor, rows))
            for name, rows in domains.items()
            if len(set(map(str, rows["messages"]))) > 1
        }
    if matching:
        names = list(next(iter(matching.values())))
        rows = [
            [folder, *(percent(results[name]["accuracy"]) for name in names)] for folder, results in matching.items()
        ]
        tables.append(markdown_table(["label matching, %", *names], rows))
    write_json(args.output / "results.json", {"words": words, "matching": matching})
    text = "\n\n".join(tables) + f"\n\n{machine()}, commit {commit_of_code()}."
    write_text(args.output / "results.md", f"{text}\n")
    print(text)


def percent(estimate: dict) -> str:
    return "{:.0f} ({:.0f} to {:.0f})".format(*(100 * estimate[key] for key in ("value", "low", "high")))


if __name__ == "__main__":
    main()
