# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Report an analysis: a summary in sentences, tables in Markdown, and JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from vtlmm.data.markdown import markdown_table
from vtlmm.data.output_files import write_json, write_text
from vtlmm.evaluation.statistics import Estimate

from .accumulators import LabelAgreement


if TYPE_CHECKING:
    from .dataset_analysis import AnalysisResult

ANALYSIS_FILE, ANALYSIS_TABLE = "analysis.json", "analysis.md"
NEAR_UNIFORM = 0.9  # share of log(V) above which the entropy of a visual token counts as near-uniform
LENSES = {
    "vm_head": "VM head",
    "random_head": "random head",
    "cosine": "nearest word embedding to the image feature",
    "pseudo_cosine": "nearest word embedding to the pseudo image feature",
    "decoder": "decoder (hidden state left of the patch)",
}


# ---- The summary ----


def summarize_analysis(result: AnalysisResult) -> list[str]:
    """Return five to ten sentences that say what the visual tokens are worth, the verdict first."""
    sentences = [_verdict(result), *_label_sentences(result), _sharpness(result), _collapse(result)]
    if result.locality is not None:
        sentences.append(_locality(result.locality))
    sentences.append(_reconstruction(result))
    sentences += _failure_sentences(result.failure_modes)
    if result.about.get("subset"):
        sentences.append(f"This is a subset of the dataset: {result.about['subset']}.")
    return sentences


def _verdict(result: AnalysisResult) -> str:
    metric = _main_metric(result)
    if metric is None:
        return (
            f"Verdict: unknown. Only {result.num_labeled_images} of {result.num_images} images have a label word that "
            "is one token of the vocabulary, so the visual tokens cannot be compared with labels."
        )
    vm_head = result.lenses["vm_head"][metric]
    k = metric.removeprefix("hit@")
    numbers = (
        f"in {vm_head.agreement.value:.0%} of {vm_head.agreement.n} images one of its {k} likeliest words at some "
        f"patch is a label of the image, compared with {vm_head.shuffled:.0%} for the labels of another image"
    )
    if vm_head.lift.low > 0:
        return f"Verdict: the VM head names what is in the images better than chance; {numbers}."
    if vm_head.lift.high < 0:
        return f"Verdict: the VM head names the wrong things; {numbers}."
    return f"Verdict: the VM head does not name what is in the images better than chance; {numbers}."


def _main_metric(result: AnalysisResult) -> str | None:
    """Return the hit@k with the largest k up to 5, or None without labels."""
    metrics = [name for name in ("hit@5", "hit@1") if name in result.lenses["vm_head"]]
    return metrics[0] if metrics else None


def _label_sentences(result: AnalysisResult) -> list[str]:
    metric = _main_metric(result)
    if metric is None:
        return []
    vm_head, decoder = result.lenses["vm_head"][metric], result.lenses["decoder"][metric]
    prior = _compared(vm_head.lift_over_prior, "naming the same frequent words for every image")
    sentences = [f"On {metric} it is {prior}."]
    if vm_head.lift_over_random_head is not None:
        sentences[0] = f"On {metric} it is {prior}, and {_compared(vm_head.lift_over_random_head, 'a random head')}."
    sentences.append(
        f"The decoder's own prediction of a patch, which supervises the VM head, reaches "
        f"{decoder.agreement.value:.0%} ({decoder.shuffled:.0%} with the labels of another image)."
    )
    return sentences


def _compared(lift: Estimate, baseline: str) -> str:
    size = f"{100 * abs(lift.value):.0f} points"
    if lift.low > 0:
        return f"{size} better than {baseline}"
    if lift.high < 0:
        return f"{size} worse than {baseline}"
    return f"not measurably different from {baseline}"


def _sharpness(result: AnalysisResult) -> str:
    diversity = result.diversity["vm_head"]
    share = diversity["entropy"].value / math.log(result.vocab_size)
    text = (
        f"A visual token has an entropy of {diversity['entropy'].value:.2f} of at most "
        f"{math.log(result.vocab_size):.2f} nats and spreads over about "
        f"{diversity['effective_support'].value:.0f} of {result.vocab_size} words"
    )
    if share > NEAR_UNIFORM:
        return f"{text}: it is near-uniform, as in an untrained VM head."
    content = result.top_words["vm_head"]["other"].value
    return f"{text}; {content:.0%} of the likeliest words are content words."


def _collapse(result: AnalysisResult) -> str:
    diversity = result.diversity["vm_head"]
    numbers = (
        f"a word carries {diversity['information_patch'].value:.2f} nats of information about its patch and "
        f"{diversity['information_image'].value:.2f} about its image"
    )
    if result.warnings:
        return " ".join(result.warnings)
    return (
        f"The visual tokens are not collapsed: {numbers}, and {result.distinct_top_words['vm_head']} different words "
        "are the likeliest word of a patch."
    )


def _locality(auroc: Estimate) -> str:
    place = "where the labeled object is" if auroc.low > 0.5 else "at no particular place"
    return (
        f"The label's word is likeliest {place}: AUROC {auroc.value:.2f} of patches inside its boxes against patches "
        "outside (chance 0.50)."
    )


def _reconstruction(result: AnalysisResult) -> str:
    cosine = result.reconstruction["pseudo image features: cosine"].value
    close = "close to" if cosine > 0.8 else "similar to" if cosine > 0.4 else "far from"
    return f"Pseudo image features are {close} the image features (cosine {cosine:.2f})."


def _failure_sentences(modes: dict[str, Estimate | None]) -> list[str]:
    sentences = []
    score, gap = modes.get("vqa_score"), modes.get("pseudo_image_feature_gap")
    if score is not None and gap is not None:
        sentences.append(
            f"The model answers {score.value:.0%} of {score.n} questions exactly; image features are "
            f"{_compared(gap, 'pseudo image features')}."
        )
    if (rate := modes.get("hallucination_rate")) is not None:
        sentences.append(f'It answers "yes" to {rate.value:.0%} of {rate.n} questions whose answer is "no".')
    if (lost := modes.get("stage_instability")) is not None:
        sentences.append(f"It answers {lost.value:.0%} of the questions wrong that the previous stage has right.")
    return sentences


# ---- The tables ----


def format_analysis(result: AnalysisResult) -> str:
    """Return the summary and all tables in Markdown. Brackets hold 95 % intervals over images."""
    about = result.about
    lines = [f"# Visual tokens of {about.get('model') or 'the model'}", ""]
    if about.get("subset"):
        lines += [f"SUBSET: {about['subset']}", ""]
    lines += [f"- {sentence}" for sentence in summarize_analysis(result)]
    lines += [
        "",
        f"{result.num_images} images of {result.num_patches} patches; {result.num_labeled_images} images have a label "
        f"that is one token. The vocabulary of {result.vocab_size} words has "
        f"{result.num_label_words_in_vocabulary} of the {result.num_label_words} label words. Brackets hold 95 % "
        "intervals over images.",
        "",
        "## Agreement with the labels",
        "",
        *_label_tables(result),
        *_estimates("## Failure modes", "failure mode", result.failure_modes),
        *_estimates("## Words in common", "two lenses", result.overlap),
    ]
    if result.neighborhood:
        rows = [
            [
                name,
                _cell(agreement.mutual_neighbors),
                f"{agreement.chance:.3f}",
                f"{agreement.p_value:.3g}",
                _cell(agreement.cka),
            ]
            for name, agreement in result.neighborhood.items()
        ]
        head = ["two spaces", "shared neighbors", "chance", "p-value", "CKA"]
        lines += ["## Neighborhoods", "", markdown_table(head, rows), ""]
    lines += ["## Sharpness and diversity (nats, words)", "", _diversity_table(result), ""]
    lines += _estimates("## Image features as mixes of word embeddings", "mix", result.reconstruction)
    if result.locality is not None:
        lines += _estimates(
            "## Locality", "metric", {"AUROC inside against outside the boxes (chance 0.5)": result.locality}
        )
    return "\n".join(lines)


def _cell(estimate: Estimate | None, style: str = ".3f") -> str:
    return "–" if estimate is None else f"{estimate.value:{style}} [{estimate.low:{style}}, {estimate.high:{style}}]"


def _estimates(title: str, name: str, estimates: Mapping[str, Estimate | None]) -> list[str]:
    if not estimates:
        return []
    rows = [[key.replace("_", " "), _cell(estimate)] for key, estimate in estimates.items()]
    return [title, "", markdown_table([name, "value"], rows), ""]


def _label_tables(result: AnalysisResult) -> list[str]:
    metrics = dict.fromkeys(metric for lens in result.lenses.values() for metric in lens)
    lines = []
    for metric in metrics:
        head = ["lens", metric, "labels shuffled", "lift", "lift over frequent words", "lift over random head"]
        rows = [
            [LENSES.get(lens, lens), *_agreement_cells(agreements[metric])]
            for lens, agreements in result.lenses.items()
            if metric in agreements
        ]
        lines += [markdown_table(head, rows), ""]
    classes = list(result.top_words["vm_head"])
    rows = [
        [LENSES.get(lens, lens), *(_cell(shares[name]) for name in classes)]
        for lens, shares in result.top_words.items()
    ]
    head = ["class of the likeliest word", *("content" if name == "other" else name for name in classes)]
    return [*lines, markdown_table(head, rows), ""]


def _agreement_cells(agreement: LabelAgreement) -> list[str]:
    lifts = (agreement.lift, agreement.lift_over_prior, agreement.lift_over_random_head)
    return [_cell(agreement.agreement), f"{agreement.shuffled:.3f}", *(_cell(lift, "+.3f") for lift in lifts)]


def _diversity_table(result: AnalysisResult) -> str:
    names = list(result.diversity["vm_head"])
    rows = [
        [name.replace("_", " "), *(_cell(diversity[name]) for diversity in result.diversity.values())]
        for name in names
    ]
    rows.append(["distinct top words", *(str(number) for number in result.distinct_top_words.values())])
    return markdown_table(["", *(LENSES[lens] for lens in result.diversity)], rows)


# ---- Files ----


def analysis_json(result: AnalysisResult) -> dict:
    """Return the result as JSON-serializable dictionaries, with its summary and without the values per image."""
    content = asdict(result)
    for lens in content["lenses"].values():
        for agreement in lens.values():
            del agreement["images"]
    about = content.pop("about")
    return {**about, "summary": summarize_analysis(result), **content}


def check_analysis_output(output: str | Path, overwrite: bool = False) -> None:
    """Raise FileExistsError if the folder contains an analysis and `overwrite` is not set."""
    for path in (Path(output, ANALYSIS_FILE), Path(output, ANALYSIS_TABLE)):
        if path.exists() and not overwrite:
            raise FileExistsError(
                f"{path} exists. Choose another output folder, or set `overwrite=True` (`--overwrite`)."
            )


def save_analysis(result: AnalysisResult, output: str | Path, overwrite: bool = False) -> Path:
    """
    Write `analysis.json` and `analysis.md` and return their folder.

    Raises:
        FileExistsError: If the folder contains an analysis and `overwrite` is not set.
    """
    check_analysis_output(output, overwrite)
    folder = Path(output)
    write_json(folder / ANALYSIS_FILE, analysis_json(result))
    write_text(folder / ANALYSIS_TABLE, format_analysis(result))
    return folder
