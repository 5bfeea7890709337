# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Analyze the visual tokens of a model over the images of a dataset."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from datasets import Dataset
from tqdm.auto import tqdm

from vtlmm.data.encoding import position_limit
from vtlmm.data.environment import package_versions
from vtlmm.data.output_files import require_other_place
from vtlmm.data.rows import load_rows
from vtlmm.data.setting_values import require_integers
from vtlmm.data.validation import check_rows
from vtlmm.evaluation.questions import image_loader, read_questions
from vtlmm.evaluation.statistics import DIFFERENCE_BOUNDS, SCORE_BOUNDS, Estimate, auroc, mean_estimate
from vtlmm.inference.loading import LoadedModel, require_visual_tokens

from .accumulators import (
    TOP_KS,
    Diversity,
    LabelAgreement,
    Lens,
    Neighborhood,
    SpaceAgreement,
)
from .failure_modes import evenly_spaced, measure_failure_modes
from .labels import Labels, read_labels
from .metrics import best_mix, cosine_scores, reconstruction, top_word_overlap, word_probabilities
from .patch_features import Patches, heads, patches_inside, read_patches
from .report import check_analysis_output, format_analysis, save_analysis, summarize_analysis
from .vocabulary import content_words, label_ids, vocabulary_words, word_classes


PACKAGES = ("vtlmm", "torch", "transformers")  # whose versions are recorded
WORD_LISTS = (
    ("vm_head", "cosine"),
    ("vm_head", "pseudo_cosine"),
    ("cosine", "pseudo_cosine"),
    ("vm_head", "decoder"),
)


@dataclass
class AnalysisResult:
    """
    Metrics of the visual tokens of a model over a dataset. `print(result.summary())` states the main results.

    Args:
        num_images, num_patches, vocab_size (`int`): Images, patches per image, and words of a visual token.
        num_labeled_images (`int`): Images with a label word that is one token of the vocabulary.
        num_label_words, num_label_words_in_vocabulary (`int`): Different words of the labels.
        lenses (`dict[str, dict[str, LabelAgreement]]`): Lens to metric (`hit@1`, `hit@5`, `hit@10`, `mass`) to its
            agreement with the labels. Lenses are `vm_head`, `random_head`, `cosine` (nearest word embeddings),
            `pseudo_cosine`, `decoder` and, on request, `layer_0`, `layer_1`, ….
        top_words (`dict[str, dict[str, Estimate]]`): Lens to word class to its share of the patches' top words.
        overlap (`dict[str, Estimate]`): Share of the top words that two lenses have in common.
        neighborhood (`dict[str, SpaceAgreement]`): Agreement of pairs of feature spaces; empty for few images.
        diversity (`dict[str, dict[str, Estimate]]`): Entropies and information of `vm_head` and `decoder`, in nats.
        distinct_top_words (`dict[str, int]`): Number of different top words of `vm_head` and `decoder`.
        reconstruction (`dict[str, Estimate]`): Image features as mixes of word embeddings.
        locality ([`Estimate`], *optional*): AUROC of the label's probability inside its boxes; None without boxes.
        failure_modes (`dict[str, Estimate | None]`): See [`~failure_modes.measure_failure_modes`].
        warnings (`list[str]`): One sentence for each kind of collapse.
        about (`dict`): Model, dataset, subset, seed and versions.
    """

    num_images: int
    num_patches: int
    vocab_size: int
    num_labeled_images: int
    num_label_words: int
    num_label_words_in_vocabulary: int
    lenses: dict[str, dict[str, LabelAgreement]]
    top_words: dict[str, dict[str, Estimate]]
    overlap: dict[str, Estimate]
    neighborhood: dict[str, SpaceAgreement]
    diversity: dict[str, dict[str, Estimate]]
    distinct_top_words: dict[str, int]
    reconstruction: dict[str, Estimate]
    locality: Estimate | None
    failure_modes: dict[str, Estimate | None] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    about: dict = field(default_factory=dict)

    def summary(self) -> str:
        """Return the main results in five to ten sentences, one per line."""
        return "\n".join(summarize_analysis(self))

    def to_markdown(self) -> str:
        """Return the summary and all tables in Markdown."""
        return format_analysis(self)

    def save(self, output: str | Path, overwrite: bool = False) -> Path:
        """
        Write `analysis.json` and `analysis.md` and return their folder.

        Raises:
            FileExistsError: If the folder contains an analysis and `overwrite` is not set.
        """
        return save_analysis(self, output, overwrite)


class Analysis:
    """
    All metrics over the images added so far.

    Args:
        model ([`VTLMMForConditionalGeneration`]), processor ([`VTLMMProcessor`])
        images (`list[Labels]`): Labels of each image, in the order in which the images are added.
        seed (`int`, *optional*, defaults to 0): Seed of the random head, sampled patches and permutations.
        layers (`bool`, *optional*, defaults to `False`): Also read every layer of the decoder through `lm_head`.
    """

    def __init__(self, model, processor, images: list[Labels], seed: int = 0, layers: bool = False):
        self.processor, self.images, self.seed, self.layers = processor, images, seed, layers
        self.vm_weight, self.lm_weight, self.embeddings = heads(model)
        self.vocab_size, device = len(self.vm_weight), self.vm_weight.device
        generator = torch.Generator().manual_seed(seed)
        directions = F.normalize(torch.randn(self.vm_weight.shape, generator=generator), dim=1).to(self.vm_weight)
        self.random_weight = directions * self.vm_weight.norm(dim=1, keepdim=True)
        self.random_words = torch.randperm(self.vocab_size, generator=generator)[: max(TOP_KS)].to(device)
        words = vocabulary_words(processor.tokenizer, self.vocab_size)
        self.classes = word_classes(words, set(processor.tokenizer.all_special_ids)).to(device)
        self._set_labels([content_words(image.texts) for image in images], words)
        self.lenses: dict[str, Lens] = {}
        self.diversity = {name: Diversity(self.vocab_size, device) for name in ("vm_head", "decoder")}
        self.neighborhood = Neighborhood(len(images), seed)
        self.overlaps: dict[str, list[float]] = {}
        self.mixes: dict[str, list[float]] = {}
        self.localities: list[float] = []
        self.num_seen, self.num_patches = 0, 0

    def _set_labels(self, wanted: list[set[str]], words: list[str]) -> None:
        """Map the label words of each image to tokens: `labels` is (num_images, num_words)."""
        self.ids = label_ids(words, set().union(*wanted))
        columns = {token: i for i, token in enumerate(sorted({i for ids in self.ids.values() for i in ids}))}
        self.token_ids = torch.tensor(list(columns), dtype=torch.long, device=self.vm_weight.device)
        self.labels = torch.zeros(len(wanted), len(columns), dtype=torch.bool)
        for row, image_words in enumerate(wanted):
            self.labels[row, [columns[token] for word in image_words for token in self.ids[word]]] = True

    def add(self, image, patches: Patches, i: int) -> None:
        """Add image `i` of a batch of patches; `image` is that image from PIL."""
        features, mixed = patches.image_features[i], patches.mixed_features[i]
        probabilities = word_probabilities(mixed, self.vm_weight)
        pseudo = probabilities.to(self.embeddings.dtype) @ self.embeddings
        top = {"vm_head": self._add_lens("vm_head", probabilities)}
        self._add_lens("random_head", word_probabilities(mixed, self.random_weight))
        top["cosine"] = self._add_lens("cosine", cosine_scores(features, self.embeddings), False)
        top["pseudo_cosine"] = self._add_lens("pseudo_cosine", cosine_scores(pseudo, self.embeddings), False)
        top["decoder"] = self._add_lens("decoder", word_probabilities(patches.left_states[i], self.lm_weight))
        if self.layers:
            for layer, states in patches.layer_states.items():
                self._add_lens(f"layer_{layer}", word_probabilities(states[i], self.lm_weight))
        for first, second in WORD_LISTS:
            self._add_overlap(first, second, top)
        self._add_mixes(features, pseudo, top["vm_head"])
        self.neighborhood.add(vision=patches.vision_features[i], features=features, mixed=mixed, pseudo=pseudo)
        self._add_locality(image, probabilities, self.images[self.num_seen])
        self.num_seen, self.num_patches = self.num_seen + 1, len(features)

    def _add_lens(self, name: str, scores: torch.Tensor, is_distribution: bool = True) -> torch.Tensor:
        if name not in self.lenses:
            self.lenses[name] = Lens(self.vocab_size, self.token_ids, self.classes, is_distribution)
        if name in self.diversity:
            self.diversity[name].add(scores)
        return self.lenses[name].add(scores)

    def _add_overlap(self, first: str, second: str, top: dict[str, torch.Tensor]) -> None:
        for k in (k for k in TOP_KS if k <= top[first].shape[1]):
            share = top_word_overlap(top[first][:, :k], top[second][:, :k]).mean().item()
            self.overlaps.setdefault(f"{first} ~ {second}, top {k}", []).append(share)

    def _add_mixes(self, features: torch.Tensor, pseudo: torch.Tensor, top: torch.Tensor) -> None:
        random_words = self.random_words.expand(len(features), -1)
        mixes = {
            "pseudo image features": pseudo,
            "best mix of the same ten words": best_mix(features, self.embeddings, top),
            "best mix of ten random words": best_mix(features, self.embeddings, random_words),
        }
        for name, mix in mixes.items():
            for metric, values in zip(("cosine", "relative error"), reconstruction(features, mix), strict=True):
                self.mixes.setdefault(f"{name}: {metric}", []).append(values.mean().item())

    def _add_locality(self, image, probabilities: torch.Tensor, labels: Labels) -> None:
        scores = []
        for label, boxes in labels.boxes.items():
            ids = sorted({token for word in content_words([label]) for token in self.ids[word]})
            inside = patches_inside(self.processor, image, boxes, len(probabilities)).cpu()
            if ids and inside.any() and not inside.all():
                mass = probabilities[:, ids].sum(1).cpu()
                scores.append(auroc(mass[inside].numpy(), mass[~inside].numpy()))
        if scores:
            self.localities.append(sum(scores) / len(scores))

    def result(self) -> AnalysisResult:
        """Return the metrics of all images added so far."""
        lenses = {name: lens.agreement(self.labels) for name, lens in self.lenses.items()}
        for metric, agreement in lenses["vm_head"].items():
            pairs = zip(agreement.images, lenses["random_head"][metric].images, strict=True)
            agreement.lift_over_random_head = mean_estimate((a - b for a, b in pairs), bounds=DIFFERENCE_BOUNDS)
        return AnalysisResult(
            num_images=self.num_seen,
            num_patches=self.num_patches,
            vocab_size=self.vocab_size,
            num_labeled_images=int(self.labels.any(1).sum()),
            num_label_words=len(self.ids),
            num_label_words_in_vocabulary=sum(bool(ids) for ids in self.ids.values()),
            lenses=lenses,
            top_words={name: lens.word_class_shares() for name, lens in self.lenses.items()},
            overlap={name: mean_estimate(values, bounds=SCORE_BOUNDS) for name, values in self.overlaps.items()},
            neighborhood=self.neighborhood.result(self.vm_weight, self.seed),
            diversity={name: diversity.result() for name, diversity in self.diversity.items()},
            distinct_top_words={name: diversity.distinct_top_words for name, diversity in self.diversity.items()},
            reconstruction={name: mean_estimate(values) for name, values in self.mixes.items()},
            locality=mean_estimate(self.localities, bounds=SCORE_BOUNDS) if self.localities else None,
            warnings=[text for name, diversity in self.diversity.items() for text in diversity.warnings(name)],
        )


def analyze_images(
    model,
    processor,
    labels_by_image: dict[str, Labels],
    load_image: Callable,
    *,
    batch_size: int = 4,
    seed: int = 0,
    layers: bool = False,
) -> AnalysisResult:
    r"""
    Compute all metrics that need images and labels but no generated answers.

    Args:
        model ([`VTLMMForConditionalGeneration`]), processor ([`VTLMMProcessor`])
        labels_by_image (`dict[str, Labels]`): Image key to its labels.
        load_image (`Callable`): Function of an image key that returns the image from PIL, in RGB.
        batch_size (`int`, *optional*, defaults to 4): Images per forward pass.
        seed (`int`, *optional*, defaults to 0): Seed of the random head, sampled patches and permutations.
        layers (`bool`, *optional*, defaults to `False`): Also read every layer of the decoder through `lm_head`.
    """
    analysis = Analysis(model, processor, list(labels_by_image.values()), seed, layers)
    keys = list(labels_by_image)
    for start in tqdm(range(0, len(keys), batch_size), desc="analyzing images"):
        images = [load_image(key) for key in keys[start : start + batch_size]]
        patches = read_patches(model, processor, images)
        with torch.inference_mode():
            for i, image in enumerate(images):
                analysis.add(image, patches, i)
    return analysis.result()


def analyze(
    model,
    processor,
    dataset: str | Path | Dataset,
    *,
    image_folder: str | None = None,
    split: str = "train",
    columns: Mapping[str, Any] | None = None,
    labels: str | None = None,
    limit: int | None = None,
    num_questions: int = 200,
    previous: LoadedModel | None = None,
    layers: bool = False,
    batch_size: int = 4,
    seed: int = 0,
    output: str | Path | None = None,
    overwrite: bool = False,
) -> AnalysisResult:
    r"""
    Analyze the visual tokens of a model over a dataset.

    Args:
        model ([`VTLMMForConditionalGeneration`]), processor ([`VTLMMProcessor`])
        dataset (`str`, `Path` or [`~datasets.Dataset`]): A .json, .jsonl or .parquet file, a folder, a Hub id, or rows
            from [`~vtlmm.data.rows.load_rows`].
        image_folder, split, columns (*optional*): See [`~vtlmm.data.rows.load_rows`].
        labels (`str`, *optional*): Column of labels: texts or `{"label", "bbox"}`. The default is the answers.
        limit (`int`, *optional*): Use the first `limit` rows only. The report marks such a subset.
        num_questions (`int`, *optional*, defaults to 200): Number of questions to answer for the failure modes.
        previous ([`~vtlmm.inference.loading.LoadedModel`], *optional*): The previous stage, for `stage_instability`.
        layers, batch_size, seed: See [`analyze_images`]. A batch of questions has the same size.
        output (`str` or `Path`, *optional*): Folder to save the result to, see [`AnalysisResult.save`].
        overwrite (`bool`, *optional*, defaults to `False`): Replace an analysis that `output` contains.

    Returns:
        [`AnalysisResult`]

    Raises:
        FileExistsError: If `output` contains an analysis and `overwrite` is not set.
        ValueError: If the model has no VM head, if a row or a setting is invalid, or if no row has an image.
    """
    if output is not None:
        check_analysis_output(output, overwrite)
    require_other_place(output, dataset=dataset, image_folder=image_folder)
    _check_numbers(batch_size, limit, num_questions, seed)
    rows, about = _read_rows(dataset, image_folder, split, columns, labels, limit)
    _check_rows(model, processor, rows, about["data"] or "the dataset")
    questions, image_positions = read_questions(rows, row_id=labels)
    if not image_positions:
        raise ValueError(f"{about['data'] or 'The dataset'} contains no image.")
    load_image = image_loader(rows, image_positions)
    images = read_labels(questions, from_column=labels is not None)
    result = analyze_images(model, processor, images, load_image, batch_size=batch_size, seed=seed, layers=layers)
    if chosen := evenly_spaced(questions, num_questions):
        result.failure_modes = measure_failure_modes(model, processor, chosen, load_image, previous, batch_size)
    models = {"model": model.name_or_path, "previous": previous[0].name_or_path if previous else None}
    result.about = {**models, **about, "seed": seed, "versions": package_versions(PACKAGES)}
    if output is not None:
        result.save(output, overwrite)
    return result


def _check_numbers(batch_size: int, limit: int | None, num_questions: int, seed: int) -> None:
    require_integers(batch_size=batch_size, limit=limit)
    require_integers(0, num_questions=num_questions, seed=seed)


def _check_rows(model, processor, rows: Dataset, name: str) -> None:
    require_visual_tokens(model.config, model.name_or_path or "The model")
    report = check_rows(rows, processor, require_marks=False, max_positions=position_limit(model.config))
    report.raise_for_problems(advice=f"Fix these rows of {name}.")


def _read_rows(
    dataset: str | Path | Dataset,
    image_folder: str | None,
    split: str,
    columns: Mapping[str, Any] | None,
    labels: str | None,
    limit: int | None,
) -> tuple[Dataset, dict[str, str | None]]:
    """Return the rows to analyze, and which rows they are for the report."""
    if isinstance(dataset, Dataset):
        name, rows = None, dataset
    else:
        name = str(dataset)
        options: dict[str, Any] = {"image_folder": image_folder, "split": split, "columns": columns}
        rows = cast(Dataset, load_rows(dataset, keep_columns=(labels,) if labels else (), **options))
    subset = None
    if limit is not None and limit < len(rows):
        subset = f"the first {limit} of {len(rows)} rows"
        rows = rows.select(range(limit))
    return rows, {"data": name, "split": split, "subset": subset}
