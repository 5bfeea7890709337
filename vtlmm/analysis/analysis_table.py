# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""An analysis as JSON, and as tables in Markdown."""

import json
from pathlib import Path


ANALYSIS_FILE, ANALYSIS_TABLE = "analysis.json", "analysis.md"


def _number(found: dict | None, style: str = ".3f") -> str:
    """Value and interval of an estimate."""
    if found is None:
        return "–"
    value = f"{found['value']:{style}}" if isinstance(found["value"], float) else str(found["value"])
    return value if "low" not in found else f"{value} [{found['low']:{style}}, {found['high']:{style}}]"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)]


def _lens_tables(lenses: dict) -> list[str]:
    names = dict.fromkeys(name for lens in lenses.values() for name in lens if name != "top_words")
    lines = []
    for name in names:
        head = ["lens", name, "labels shuffled", "lift over it", "lift over the frequent words", "over a random head"]
        rows = [
            [
                lens,
                _number(found[name]),
                f"{found[name]['shuffled']:.3f}",
                _number(found[name]["lift"], "+.3f"),
                _number(found[name]["lift_over_prior"], "+.3f"),
                _number(found[name].get("lift_over_random_head"), "+.3f"),
            ]
            for lens, found in lenses.items()
            if name in found
        ]
        lines += [*_table(head, rows), ""]
    kinds = list(next(iter(lenses.values()))["top_words"])
    rows = [[lens, *(_number(found["top_words"][kind]) for kind in kinds)] for lens, found in lenses.items()]
    return [*lines, *_table(["share of likeliest words", *(kind.replace("_", " ") for kind in kinds)], rows), ""]


def format_analysis(results: dict) -> str:
    """All tables; estimates with their 95 % intervals in brackets."""
    labels = results["labels"]
    lines = [f"# {results.get('model', 'Analysis')}", ""]
    if results.get("subset"):
        lines += [f"SUBSET: {results['subset']}", ""]
    lines += [f"**{warning}**\n" for warning in results["warnings"]]
    lines += [
        f"{results['images']} images, {labels['labeled']} of them with a label that the vocabulary has as one "
        f"token; so it has {labels['words_in_vocabulary']} of the {labels['words']} words of the labels. In brackets: "
        "95 %, over images.",
        "",
    ]
    if results.get("signatures"):
        rows = [[name.replace("_", " "), _number(found)] for name, found in results["signatures"].items()]
        lines += ["## Failure signatures", "", *_table(["", "number"], rows), ""]
    lines += ["## What the lenses say of the labels", "", *_lens_tables(results["lenses"])]
    rows = [[name, _number(found)] for name, found in results["overlap"].items()]
    lines += ["## Words in common", "", *_table(["lists of words", "share"], rows), ""]
    if results["neighborhood"]:
        head = ["spaces", "neighbors in common", "chance", "p", "CKA"]
        rows = []
        for name, found in results["neighborhood"].items():
            mutual = found["mutual_neighbors"]
            chance, p_value = f"{mutual['chance']:.3f}", f"{mutual['p_value']:.3g}"
            rows.append([name, _number(mutual), chance, p_value, _number(found["cka"])])
        lines += ["## Neighborhoods", "", *_table(head, rows), ""]
    rows = [
        [name.replace("_", " "), *(_number(found[name]) for found in results["diversity"].values())]
        for name in next(iter(results["diversity"].values()))
    ]
    lines += ["## Sharpness and diversity (nats, words)", "", *_table(["", *results["diversity"]], rows), ""]
    rows = [[name, _number(found)] for name, found in results["reconstruction"].items()]
    lines += ["## Image features as mixes of words", "", *_table(["mix", "number"], rows), ""]
    if results["locality"]:
        rows = [["AUROC of the label's probability, inside its boxes against outside (chance 0.5)"]]
        rows[0].append(_number(results["locality"]["auroc"]))
        lines += ["## Locality", "", *_table(["", "number"], rows), ""]
    return "\n".join(lines)


def write_analysis(folder: str | Path, results: dict) -> None:
    """`analysis.json` and `analysis.md`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=2, ensure_ascii=False)
    (folder / ANALYSIS_FILE).write_text(text + "\n", encoding="utf-8")
    (folder / ANALYSIS_TABLE).write_text(format_analysis(results), encoding="utf-8")
