# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""A model on images of other kinds than it was trained on, beside the held-out ones of its own kind."""

from dataclasses import asdict

import numpy as np
import torch

from vtlmm.analysis.accumulators import Diversity
from vtlmm.analysis.metrics import word_probabilities
from vtlmm.analysis.ood_metrics import calibration_error, detection_auroc
from vtlmm.analysis.patch_features import heads
from vtlmm.evaluation.report import image_cluster, score_answers
from vtlmm.evaluation.statistics import bootstrap_interval
from vtlmm.inference.generation import with_shuffled_images


OWN = "held out"
OTHERS_NOTE = (
    "Intervals are each seed's over images, their ends averaged. The calibration error is never below 0, and chance "
    "alone lifts it, the more the fewer questions. AUROC: strange images against the held-out ones; 0.5 is chance."
)


@torch.inference_mode()
def visual_token_diversity(model, features: list[torch.Tensor], batch_size: int) -> Diversity:
    """Entropies of the visual tokens of images with the tower's features `features`, image by image."""
    vm_weight, _, _ = heads(model)
    diversity = Diversity(len(vm_weight), vm_weight.device)
    for start in range(0, len(features), batch_size):
        batch = torch.stack(features[start : start + batch_size]).to(model.device, model.dtype)
        encoded = model.model.get_image_features(vision_features=batch)
        for mixed in model.model.vm_head.residual_block(encoded.image_features):
            diversity.add(word_probabilities(mixed, vm_weight))
    return diversity


def measure_others(sets: dict[str, tuple], ask, diversity_of) -> dict[str, dict]:
    r"""
    The figures of each set of images, with intervals by bootstrap over its images (the entropy of the mean: by a
    jackknife over groups of them).

    Only questions with the answer yes or no are asked, of all sets alike: a model can hardly know the other answers of
    another kind of image, and two sets are to be compared.

    Args:
        sets (`dict[str, tuple]`): name → questions and tower features by image; the first is the model's own kind.
        ask (callable): questions and features to answers and their probabilities.
        diversity_of (callable): features to [`Diversity`].

    Returns:
        `dict[str, dict]`: name → figure → `value`, `low`, `high`, `n`.
    """
    found, inside = {}, None
    for name, (questions, features) in sets.items():
        figures = found[name] = {}
        asked = [question for question in questions if str(question["answer"]).strip().lower() in ("yes", "no")]
        if asked:
            clusters = [image_cluster(question) for question in asked]
            answers, probabilities = ask(asked, features)
            scores = score_answers(asked, answers, "exact")
            blind, _ = ask(with_shuffled_images(asked), features)
            yes = np.mean([question["answer"].strip().lower() == "yes" for question in asked])
            figures["accuracy, yes or no"] = _mean(scores, clusters)
            figures["accuracy, yes or no, images shuffled"] = _mean(score_answers(asked, blind, "exact"), clusters)
            figures["accuracy, yes or no, of the commoner answer"] = {"value": float(max(yes, 1 - yes))}
            figures["calibration error"] = asdict(calibration_error(probabilities, scores, clusters))
        diversity = diversity_of(list(features.values()))
        result, entropies = diversity.result(), [row[0] for row in diversity.entropies]
        figures["entropy of visual tokens"] = asdict(result["entropy"])
        figures["entropy of their mean"] = asdict(result["entropy_of_mean"])
        if inside is None:
            inside = entropies
        else:
            figures["AUROC of the entropy"] = asdict(detection_auroc(inside, entropies))
    return found


def _mean(scores: list[float], clusters: list[str]) -> dict:
    low, high = bootstrap_interval(scores, clusters)
    return {"value": sum(scores) / len(scores), "low": low, "high": high, "n": len(set(clusters))}


def summarize_others(rows: list[dict], arms: list[str]) -> list[dict]:
    r"""
    Each figure of each set and arm over the seeds.

    Returns:
        `list[dict]`: `figure`, `set`, `arm`, `values` by seed, `mean`, `sd`, `n` images, `low` and `high`: the ends
        of the seeds' intervals over images, averaged.
    """
    lines = []
    names = dict.fromkeys((figure, name) for row in rows for name, own in row["others"].items() for figure in own)
    for figure, name in sorted(names, key=lambda pair: list(dict.fromkeys(f for f, _ in names)).index(pair[0])):
        for arm in arms:
            own = {row["seed"]: row["others"][name][figure] for row in rows if row["arm"] == arm}
            if not own:
                continue
            values = {seed: estimate["value"] for seed, estimate in own.items()}
            sd = float(np.std(list(values.values()), ddof=1)) if len(own) > 1 else None
            line = {"figure": figure, "set": name, "arm": arm, "values": values, "sd": sd}
            line["mean"] = float(np.mean(list(values.values())))
            for end in ("low", "high"):
                ends = [estimate[end] for estimate in own.values() if end in estimate]
                line[end] = float(np.mean(ends)) if ends else None
            line["n"] = next(iter(own.values())).get("n")
            lines.append(line)
    return lines


def format_others(lines: list[dict]) -> str:
    """The lines of [`summarize_others`] in Markdown."""
    text = [
        "| figure | images | number | arm | seeds | mean (sd) | 95 % over images |",
        "|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        form = ".1%" if line["figure"].startswith("accuracy") else ".3f"
        spread = "–" if line["sd"] is None else f"{line['sd']:{form}}"
        ends = "–" if line["low"] is None else f"{line['low']:{form}} – {line['high']:{form}}"
        cells = [line["figure"], line["set"], str(line["n"] or "–"), line["arm"], str(len(line["values"]))]
        cells += [f"{line['mean']:{form}} ({spread})", ends]
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text)
