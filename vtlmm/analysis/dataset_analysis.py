# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""What the visual tokens of a data set mean: the measures of `measures.py`, image by image, and their intervals.

Of a image a few numbers are kept, and of the data set sums over the vocabulary: never (patches, V) of all of it.
"""

import random
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from vtlmm.evaluation.statistics import bootstrap_interval

from .metrics import (
    auroc,
    best_mix,
    best_ranks,
    cosine_scores,
    entropy,
    gram,
    jackknife_interval,
    label_hits,
    label_mass,
    mutual_information,
    mutual_neighbors,
    reconstruction,
    top_word_overlap,
    unbiased_cka,
    visual_token_gram,
    word_probabilities,
)
from .patch_features import heads, patches_inside, read_patches
from .vocabulary import WORD_CLASSES, content_words, label_ids, vocabulary_words, word_classes


TOP_KS = (1, 5, 10)
NUM_GROUPS = 20  # of images, for the jackknife
NUM_NEIGHBOURS = 10
MAX_SAMPLE = 2048  # images that give a patch to the neighborhoods
MIN_SAMPLE = 12  # below it there is no neighborhood to speak of
# A mean information below these says that patches, or images, all get the same words
COLLAPSE_NATS = {"patch": 0.1, "image": 0.01}


@dataclass
class Labels:
    """What is known of a image: `texts`, labels or captions, and label to boxes `[left, top, right, bottom]`."""

    texts: list[str] = field(default_factory=list)
    boxes: dict[str, list] = field(default_factory=dict)


def read_labels(questions: list[dict], from_column: bool) -> dict[str, Labels]:
    r"""
    Image to its labels, of all rows that have it.

    Args:
        questions (`list[dict]`): of `run.read_questions`, with the column of labels as `id`.
        from_column (`bool`): take that column: a text, a list of texts, or a list of `{"label", "bbox"}`, with the box
            in pixels. Otherwise the answers are the labels.

    Raises:
        `ValueError`: for a column of another form.
    """
    images = {}
    for question in questions:
        entries = question["id"] if from_column else question["answer"]
        for key in question["images"]:
            labels = images.setdefault(key, Labels())
            for entry in entries if isinstance(entries, list) else [] if entries is None else [entries]:
                if isinstance(entry, dict) and isinstance(entry.get("label"), str):
                    text = entry["label"]
                    if entry.get("bbox") is not None and entry["bbox"] not in labels.boxes.setdefault(text, []):
                        labels.boxes[text].append(entry["bbox"])
                elif isinstance(entry, str):
                    text = entry
                else:
                    raise ValueError(
                        f"{question['question'][:60]!r} has the label {entry!r}: labels are texts, or objects with "
                        "`label` and, if known, `bbox`."
                    )
                if text not in labels.texts:
                    labels.texts.append(text)
    return images


def estimate(values) -> dict:
    """Mean of one number a image, with its 95 % interval by bootstrap over images."""
    values = [float(value) for value in values]
    low, high = bootstrap_interval(values, range(len(values)))
    return {"value": sum(values) / len(values), "low": low, "high": high, "n": len(values)}


# ---- What is kept of the images seen so far ----


class Lens:
    """A way to give every patch scores of all words (distributions or not): what it says of the labels."""

    def __init__(self, vocab_size: int, token_ids: torch.Tensor, classes: torch.Tensor, is_distribution: bool):
        self.token_ids, self.classes, self.is_distribution = token_ids, classes, is_distribution
        self.total = torch.zeros(vocab_size, dtype=torch.float64, device=token_ids.device)
        self.ranks, self.mass, self.shares = [], [], []

    def add(self, scores: torch.Tensor) -> torch.Tensor:
        """One image, scores (P, V). Gives its top words (P, K)."""
        top = scores.topk(min(max(TOP_KS), scores.shape[1])).indices
        self.ranks.append(best_ranks(top, self.token_ids, scores.shape[1]).to(torch.int8).cpu())
        mean = scores.mean(0)
        self.total += mean
        self.mass.append(mean[self.token_ids].cpu())
        kinds = self.classes[top[:, 0]]
        self.shares.append([(kinds == i).float().mean().item() for i in range(len(WORD_CLASSES))])
        return top

    def result(self, labels: torch.BoolTensor) -> dict:
        """`labels` (num_images, num_words): images without a label that the vocabulary has do not count."""
        shares = {f"{name}_words": estimate(row[i] for row in self.shares) for i, name in enumerate(WORD_CLASSES)}
        used = labels.any(1)
        if used.sum() < 2:
            return {"top_words": shares}
        ranks, mass, labels = torch.stack(self.ranks)[used], torch.stack(self.mass)[used], labels[used]
        prior = self.total / len(self.ranks)
        found = {}
        for k in (k for k in TOP_KS if k <= len(prior)):
            frequent = torch.isin(self.token_ids, prior.topk(k).indices).cpu()
            by_prior = (labels & frequent).any(1).float()
            found[f"hit@{k}"] = _beside_controls(*label_hits(ranks, labels, k), by_prior)
        if self.is_distribution:
            by_prior = labels.double() @ prior[self.token_ids].cpu()
            found["mass"] = _beside_controls(*label_mass(mass, labels), by_prior)
        return {**found, "top_words": shares}


def _beside_controls(own: torch.Tensor, shuffled: torch.Tensor, prior: torch.Tensor) -> dict:
    return {
        **estimate(own),
        "shuffled": shuffled.mean().item(),
        "lift": estimate(own - shuffled),
        "lift_over_prior": estimate(own - prior),
        "images": own.tolist(),
    }


class Diversity:
    """How sharp distributions are, and how different from patch to patch and from image to image."""

    def __init__(self, vocab_size: int, device):
        self.probability = torch.zeros(NUM_GROUPS, vocab_size, dtype=torch.float64, device=device)
        self.entropies = []  # of a image: mean of H(p), H(mean p), mean of exp H(p)
        self.leading = torch.zeros(vocab_size, dtype=torch.bool, device=device)

    def add(self, probabilities: torch.Tensor) -> None:
        of_patches, mean = entropy(probabilities), probabilities.mean(0, dtype=torch.float64)
        self.probability[len(self.entropies) % NUM_GROUPS] += mean
        self.entropies.append([of_patches.mean().item(), entropy(mean).item(), of_patches.exp().mean().item()])
        self.leading[probabilities.argmax(1)] = True

    def _overall(self, left_out: int | None = None) -> dict:
        """Without one group of images, for the jackknife."""
        kept = [row for i, row in enumerate(self.entropies) if i % NUM_GROUPS != left_out]
        total = self.probability.sum(0) - (0 if left_out is None else self.probability[left_out])
        mean = total.clamp_min(0) / len(kept)
        return {
            "entropy_of_mean": entropy(mean).item(),
            "effective_words": entropy(mean).exp().item(),
            "information_image": mutual_information(mean, sum(row[1] for row in kept) / len(kept)),
            "information_patch": mutual_information(mean, sum(row[0] for row in kept) / len(kept)),
        }

    def result(self) -> dict:
        found = {
            "entropy": estimate(row[0] for row in self.entropies),
            "effective_support": estimate(row[2] for row in self.entropies),
            "distinct_top_words": {"value": int(self.leading.sum())},
        }
        groups = min(NUM_GROUPS, len(self.entropies))
        without = [self._overall(i) for i in range(groups)] if groups > 1 else []
        for name, value in self._overall().items():
            found[name] = {"value": value, "n": len(self.entropies)}
            if without:
                low, high = jackknife_interval(value, [row[name] for row in without])
                found[name] |= {"low": low, "high": high}
        return found

    def warnings(self, name: str) -> list[str]:
        overall = self._overall()
        return [
            f"Collapse of {name}: a word tells {overall[f'information_{unit}']:.3f} nats of the {unit} it comes from, "
            f"below {threshold}: every {unit} says the same."
            for unit, threshold in COLLAPSE_NATS.items()
            if overall[f"information_{unit}"] < threshold and (unit == "patch" or len(self.entropies) > 1)
        ]


class Neighborhood:
    """One patch of each image, at random, in several spaces."""

    def __init__(self, num_images: int, seed: int):
        self.random = random.Random(seed)
        self.chosen = set(self.random.sample(range(num_images), min(MAX_SAMPLE, num_images)))
        self.rows = {"vision": [], "features": [], "mixed": [], "pseudo": []}
        self.index = 0

    def add(self, **spaces: torch.Tensor) -> None:
        """The features (P, D) of one image in each space."""
        patch = self.random.randrange(len(spaces["features"]))
        if self.index in self.chosen:
            for name, features in spaces.items():
                self.rows[name].append(features[patch].clone())
        self.index += 1

    def result(self, vm_weight: torch.Tensor, seed: int) -> dict:
        number = len(self.rows["features"])
        if number < MIN_SAMPLE:
            return {}
        spaces = {name: torch.stack(rows) for name, rows in self.rows.items()}
        products = {name: gram(spaces[name]) for name in ("vision", "features", "pseudo")}
        products["visual tokens"] = visual_token_gram(spaces["mixed"], vm_weight)
        pairs = [("features", "visual tokens"), ("vision", "visual tokens"), ("features", "pseudo")]
        k = min(NUM_NEIGHBOURS, (number - 1) // 2)
        found = {}
        for first, second in pairs:
            a, b = products[first], products[second]
            mutual = mutual_neighbors(a, b, k, seed)
            cka = unbiased_cka(a, b)
            groups = [torch.arange(number) % NUM_GROUPS != i for i in range(min(NUM_GROUPS, number // 4))]
            low, high = jackknife_interval(cka, [unbiased_cka(a[kept][:, kept], b[kept][:, kept]) for kept in groups])
            found[f"{first} ~ {second}"] = {
                "mutual_neighbors": {
                    **estimate(mutual["overlap"]),
                    **{"k": k, "chance": mutual["chance"], "p_value": mutual["p_value"]},
                },
                "cka": {"value": cka, "low": low, "high": high, "n": number},
            }
        return found


# ---- The whole ----


class Analysis:
    """The measures over the images that are added, one at a time."""

    def __init__(self, model, processor, images: list[Labels], seed: int = 0):
        self.processor, self.images, self.seed = processor, images, seed
        self.vm_weight, self.lm_weight, self.embeddings = heads(model)
        vocab_size, device = len(self.vm_weight), self.vm_weight.device
        generator = torch.Generator().manual_seed(seed)
        directions = F.normalize(torch.randn(self.vm_weight.shape, generator=generator), dim=1).to(self.vm_weight)
        self.random_weight = directions * self.vm_weight.norm(dim=1, keepdim=True)
        self.random_words = torch.randperm(vocab_size, generator=generator)[: max(TOP_KS)].to(device)
        words = vocabulary_words(processor.tokenizer, vocab_size)
        self.classes = word_classes(words, set(processor.tokenizer.all_special_ids)).to(device)
        wanted = [content_words(image.texts) for image in images]
        self.ids = label_ids(words, set().union(*wanted))
        columns = {token: i for i, token in enumerate(sorted({i for ids in self.ids.values() for i in ids}))}
        self.token_ids = torch.tensor(list(columns), dtype=torch.long, device=device)
        self.labels = torch.zeros(len(images), len(columns), dtype=torch.bool)
        for row, own in enumerate(wanted):
            self.labels[row, [columns[token] for word in own for token in self.ids[word]]] = True
        self.lenses: dict[str, Lens] = {}
        self.diversity = {name: Diversity(vocab_size, device) for name in ("vm_head", "decoder")}
        self.neighborhood = Neighborhood(len(images), seed)
        self.overlaps: dict[str, list[float]] = {}
        self.mixes: dict[str, list[float]] = {}
        self.localities: list[float] = []
        self.num_seen = 0

    def _look(self, name: str, scores: torch.Tensor, is_distribution: bool = True) -> torch.Tensor:
        if name not in self.lenses:
            self.lenses[name] = Lens(len(self.vm_weight), self.token_ids, self.classes, is_distribution)
        if name in self.diversity:
            self.diversity[name].add(scores)
        return self.lenses[name].add(scores)

    def add(self, image, patches, i: int) -> None:
        """Image `i` of a batch that [`~patches.read_patches`] has read; `image` is that image from PIL."""
        features, mixed = patches.image_features[i], patches.mixed_features[i]
        probabilities = word_probabilities(mixed, self.vm_weight)
        pseudo = probabilities.to(self.embeddings.dtype) @ self.embeddings
        top = {"vm_head": self._look("vm_head", probabilities)}
        self._look("random_head", word_probabilities(mixed, self.random_weight))
        top["cosine"] = self._look("cosine", cosine_scores(features, self.embeddings), False)
        top["pseudo_cosine"] = self._look("pseudo_cosine", cosine_scores(pseudo, self.embeddings), False)
        top["decoder"] = self._look("decoder", word_probabilities(patches.left_states[i], self.lm_weight))
        for layer, states in patches.layer_states.items():
            self._look(f"layer_{layer}", word_probabilities(states[i], self.lm_weight))
        for first, second in (("vm_head", "cosine"), ("vm_head", "pseudo_cosine"), ("cosine", "pseudo_cosine")):
            self._overlap(first, second, top)
        self._overlap("vm_head", "decoder", top)
        self._mix(features, pseudo, top["vm_head"])
        self.neighborhood.add(vision=patches.vision_features[i], features=features, mixed=mixed, pseudo=pseudo)
        self._locate(image, probabilities, self.images[self.num_seen])
        self.num_seen += 1

    def _overlap(self, first: str, second: str, top: dict) -> None:
        for k in (k for k in TOP_KS if k <= top[first].shape[1]):
            share = top_word_overlap(top[first][:, :k], top[second][:, :k]).mean().item()
            self.overlaps.setdefault(f"{first} ~ {second}, top {k}", []).append(share)

    def _mix(self, features, pseudo, top) -> None:
        mixes = {
            "pseudo image features": pseudo,
            "best mix of the same ten words": best_mix(features, self.embeddings, top),
            "best mix of ten random words": best_mix(
                features, self.embeddings, self.random_words.expand(len(features), -1)
            ),
        }
        for name, mix in mixes.items():
            for measure, values in zip(("cosine", "relative error"), reconstruction(features, mix), strict=True):
                self.mixes.setdefault(f"{name}: {measure}", []).append(values.mean().item())

    def _locate(self, image, probabilities, labels: Labels) -> None:
        found = []
        for label, boxes in labels.boxes.items():
            ids = sorted({token for word in content_words([label]) for token in self.ids[word]})
            inside = patches_inside(self.processor, image, boxes, len(probabilities)).to(probabilities.device)
            if ids and inside.any() and not inside.all():
                found.append(auroc(probabilities[:, ids].sum(1), inside))
        if found:
            self.localities.append(sum(found) / len(found))

    def result(self) -> dict:
        lenses = {name: lens.result(self.labels) for name, lens in self.lenses.items()}
        for name, found in lenses["vm_head"].items():
            if name != "top_words":
                pairs = zip(found["images"], lenses["random_head"][name]["images"], strict=True)
                found["lift_over_random_head"] = estimate(a - b for a, b in pairs)
        for lens in lenses.values():
            for found in lens.values():
                found.pop("images", None)
        with_tokens = sum(bool(ids) for ids in self.ids.values())
        return {
            "images": self.num_seen,
            "labels": {
                "words": len(self.ids),
                "words_in_vocabulary": with_tokens,
                "labeled": int(self.labels.any(1).sum()),
            },
            "lenses": lenses,
            "overlap": {name: estimate(values) for name, values in self.overlaps.items()},
            "neighborhood": self.neighborhood.result(self.vm_weight, self.seed),
            "diversity": {name: diversity.result() for name, diversity in self.diversity.items()},
            "reconstruction": {name: estimate(values) for name, values in self.mixes.items()},
            "locality": {"auroc": estimate(self.localities)} if self.localities else {},
            "warnings": [text for name, found in self.diversity.items() for text in found.warnings(name)],
        }


def analyze_images(
    model, processor, labels_by_image: dict[str, Labels], load_image, batch_size: int = 4, seed: int = 0
) -> dict:
    r"""
    All measures over a data set.

    Args:
        labels_by_image (`dict[str, Labels]`): key of a image to what is known of it.
        load_image (callable): key to image from PIL, in RGB.
        batch_size (`int`, *optional*, defaults to 4): images that go through the model together.
        seed (`int`, *optional*, defaults to 0): of the random head, the sampled patches and the permutations.

    Returns:
        `dict`: see [`Analysis.result`]; an estimate has `value`, its 95 % interval `low`, `high`, and `n` images.
    """
    analysis, keys = Analysis(model, processor, list(labels_by_image.values()), seed), list(labels_by_image)
    for start in tqdm(range(0, len(keys), batch_size), desc="analysing"):
        images = [load_image(key) for key in keys[start : start + batch_size]]
        patches = read_patches(model, processor, images)
        with torch.inference_mode():
            for i, image in enumerate(images):
                analysis.add(image, patches, i)
    return analysis.result()
