# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Running statistics of an analysis. Each keeps a few numbers per image and sums over the vocabulary.

The distributions of a whole dataset, (patches, V), are never in memory together.
"""

import random
from dataclasses import dataclass, field

import torch

from vtlmm.evaluation.statistics import DIFFERENCE_BOUNDS, SCORE_BOUNDS, Estimate, mean_estimate

from .metrics import (
    best_ranks,
    entropy,
    gram,
    jackknife_interval,
    label_hits,
    label_mass,
    mutual_information,
    mutual_neighbors,
    unbiased_cka,
    visual_token_gram,
)
from .vocabulary import WORD_CLASSES


TOP_KS = (1, 5, 10)
NUM_GROUPS = 20  # groups of images for the jackknife
NUM_NEIGHBORS = 10
MAX_SAMPLE = 2048  # images that contribute a patch to the neighborhood metrics
MIN_SAMPLE = 12  # the neighborhood metrics need at least this number of images
# Visual tokens count as collapsed if a word carries less information (nats) about its patch or its image.
COLLAPSE_NATS = {"patch": 0.1, "image": 0.01}


@dataclass
class LabelAgreement:
    """
    Agreement of a lens with the labels (hit@k or probability mass), and its controls.

    Args:
        agreement ([`Estimate`]): With the image's own labels.
        shuffled (`float`): With the labels of another image, averaged over all other images.
        lift ([`Estimate`]): `agreement` minus `shuffled`, per image.
        lift_over_prior ([`Estimate`]): `agreement` minus the agreement of the lens's most frequent words.
        lift_over_random_head ([`Estimate`], *optional*): `agreement` minus that of a random head. VM head only.
        images (`list[float]`): `agreement` of each image. Not part of a report.
    """

    agreement: Estimate
    shuffled: float
    lift: Estimate
    lift_over_prior: Estimate
    lift_over_random_head: Estimate | None = None
    images: list[float] = field(default_factory=list, repr=False)


@dataclass
class SpaceAgreement:
    """Agreement of two feature spaces: shared nearest neighbors (`k` each; `chance` and a p-value) and CKA."""

    mutual_neighbors: Estimate
    k: int
    chance: float
    p_value: float
    cka: Estimate


class Lens:
    """
    Agreement of one scoring of patches over the vocabulary with the labels, over all images added so far.

    Args:
        vocab_size (`int`): Number of words V.
        token_ids (`torch.LongTensor` of shape `(num_words,)`): Tokens of the label words.
        classes (`torch.LongTensor` of shape `(V,)`): Class of each word, see [`~vocabulary.word_classes`].
        is_distribution (`bool`): Whether the scores of a patch are probabilities.
    """

    def __init__(self, vocab_size: int, token_ids: torch.Tensor, classes: torch.Tensor, is_distribution: bool):
        self.token_ids, self.classes, self.is_distribution = token_ids, classes, is_distribution
        self.total = torch.zeros(vocab_size, dtype=torch.float64, device=token_ids.device)
        self.ranks: list[torch.Tensor] = []
        self.mass: list[torch.Tensor] = []
        self.class_shares: list[list[float]] = []

    def add(self, scores: torch.Tensor) -> torch.Tensor:
        """Add the scores (P, V) of one image. Return its top words (P, K), best first."""
        top = scores.topk(min(max(TOP_KS), scores.shape[1])).indices
        self.ranks.append(best_ranks(top, self.token_ids, scores.shape[1]).to(torch.int8).cpu())
        mean = scores.mean(0)
        self.total += mean
        self.mass.append(mean[self.token_ids].cpu())
        kinds = self.classes[top[:, 0]]
        self.class_shares.append([(kinds == i).float().mean().item() for i in range(len(WORD_CLASSES))])
        return top

    def word_class_shares(self) -> dict[str, Estimate]:
        """Return the share of each word class among the patches' top words."""
        return {
            name: mean_estimate([row[i] for row in self.class_shares], bounds=SCORE_BOUNDS)
            for i, name in enumerate(WORD_CLASSES)
        }

    def agreement(self, labels: torch.Tensor) -> dict[str, LabelAgreement]:
        """
        Return hit@k and, for distributions, the probability mass of the labels.

        Args:
            labels (`torch.BoolTensor` of shape `(num_images, num_words)`): Images without a label word are left out.
        """
        used = labels.any(1)
        if used.sum() < 2:
            return {}
        ranks, mass, labels = torch.stack(self.ranks)[used], torch.stack(self.mass)[used], labels[used]
        prior = self.total / len(self.ranks)
        agreements = {}
        for k in (k for k in TOP_KS if k <= len(prior)):
            frequent = torch.isin(self.token_ids, prior.topk(k).indices).cpu()
            by_prior = (labels & frequent).any(1).float()
            agreements[f"hit@{k}"] = _with_controls(*label_hits(ranks, labels, k), by_prior)
        if self.is_distribution:
            by_prior = labels.double() @ prior[self.token_ids].cpu()
            agreements["mass"] = _with_controls(*label_mass(mass, labels), by_prior)
        return agreements


def _with_controls(values: torch.Tensor, shuffled: torch.Tensor, prior: torch.Tensor) -> LabelAgreement:
    return LabelAgreement(
        agreement=mean_estimate(values, bounds=SCORE_BOUNDS),
        shuffled=shuffled.mean().item(),
        lift=mean_estimate(values - shuffled, bounds=DIFFERENCE_BOUNDS),
        lift_over_prior=mean_estimate(values - prior, bounds=DIFFERENCE_BOUNDS),
        images=values.tolist(),
    )


class Diversity:
    """Sharpness of the distributions, and how much they differ between patches and between images."""

    def __init__(self, vocab_size: int, device):
        self.probability = torch.zeros(NUM_GROUPS, vocab_size, dtype=torch.float64, device=device)
        self.entropies: list[list[float]] = []  # per image: mean of H(p), H(mean p), mean of exp H(p)
        self.leading = torch.zeros(vocab_size, dtype=torch.bool, device=device)

    def add(self, probabilities: torch.Tensor) -> None:
        """Add the distributions (P, V) of one image."""
        of_patches, mean = entropy(probabilities), probabilities.mean(0, dtype=torch.float64)
        self.probability[len(self.entropies) % NUM_GROUPS] += mean
        self.entropies.append([of_patches.mean().item(), entropy(mean).item(), of_patches.exp().mean().item()])
        self.leading[probabilities.argmax(1)] = True

    @property
    def distinct_top_words(self) -> int:
        """Return the number of different words that are the top word of a patch."""
        return int(self.leading.sum())

    def _overall(self, left_out: int | None = None) -> dict[str, float]:
        """Return the statistics of all images, or of all but one group for the jackknife."""
        kept = [row for i, row in enumerate(self.entropies) if i % NUM_GROUPS != left_out]
        total = self.probability.sum(0) - (0 if left_out is None else self.probability[left_out])
        mean = total.clamp_min(0) / len(kept)
        return {
            "entropy_of_mean": entropy(mean).item(),
            "effective_words": entropy(mean).exp().item(),
            "information_image": mutual_information(mean, sum(row[1] for row in kept) / len(kept)),
            "information_patch": mutual_information(mean, sum(row[0] for row in kept) / len(kept)),
        }

    def result(self) -> dict[str, Estimate]:
        """Return entropy and effective support of a patch, and the statistics over all images."""
        estimates = {
            "entropy": mean_estimate(row[0] for row in self.entropies),
            "effective_support": mean_estimate(row[2] for row in self.entropies),
        }
        groups = min(NUM_GROUPS, len(self.entropies))
        without = [self._overall(i) for i in range(groups)] if groups > 1 else []
        for name, value in self._overall().items():
            interval = jackknife_interval(value, [row[name] for row in without]) if without else (value, value)
            estimates[name] = Estimate(value, *interval, len(self.entropies))
        return estimates

    def warnings(self, name: str) -> list[str]:
        """Return a warning if all patches, or all images, get the same words."""
        overall = self._overall()
        return [
            f"The visual tokens of {name} are collapsed: a word carries {overall[f'information_{unit}']:.3f} nats of "
            f"information about its {unit} (less than {threshold}), so every {unit} gets the same words."
            for unit, threshold in COLLAPSE_NATS.items()
            if overall[f"information_{unit}"] < threshold and (unit == "patch" or len(self.entropies) > 1)
        ]


class Neighborhood:
    """Neighborhoods of one random patch per image in several feature spaces."""

    def __init__(self, num_images: int, seed: int):
        self.random = random.Random(seed)
        self.chosen = set(self.random.sample(range(num_images), min(MAX_SAMPLE, num_images)))
        self.rows: dict[str, list[torch.Tensor]] = {"vision": [], "features": [], "mixed": [], "pseudo": []}
        self.index = 0

    def add(self, **spaces: torch.Tensor) -> None:
        """Add the features (P, D) of one image in each space."""
        patch = self.random.randrange(len(spaces["features"]))
        if self.index in self.chosen:
            for name, features in spaces.items():
                self.rows[name].append(features[patch].clone())
        self.index += 1

    def result(self, vm_weight: torch.Tensor, seed: int) -> dict[str, SpaceAgreement]:
        """Return the agreement of each pair of spaces; empty for fewer than `MIN_SAMPLE` images."""
        number = len(self.rows["features"])
        if number < MIN_SAMPLE:
            return {}
        spaces = {name: torch.stack(rows) for name, rows in self.rows.items()}
        products = {name: gram(spaces[name]) for name in ("vision", "features", "pseudo")}
        products["visual tokens"] = visual_token_gram(spaces["mixed"], vm_weight)
        pairs = [("features", "visual tokens"), ("vision", "visual tokens"), ("features", "pseudo")]
        k = min(NUM_NEIGHBORS, (number - 1) // 2)
        agreements = {}
        for first, second in pairs:
            a, b = products[first], products[second]
            mutual = mutual_neighbors(a, b, k, seed)
            cka = unbiased_cka(a, b)
            groups = [torch.arange(number) % NUM_GROUPS != i for i in range(min(NUM_GROUPS, number // 4))]
            interval = jackknife_interval(cka, [unbiased_cka(a[kept][:, kept], b[kept][:, kept]) for kept in groups])
            agreements[f"{first} ~ {second}"] = SpaceAgreement(
                mean_estimate(mutual["overlap"], bounds=SCORE_BOUNDS),
                k,
                mutual["chance"],
                mutual["p_value"],
                Estimate(cka, *interval, number),
            )
        return agreements
