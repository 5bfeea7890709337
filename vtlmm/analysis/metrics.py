# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Metrics of visual tokens: pure functions of the patches of one image, or of a sample of patches.

Shapes: N patches, V words, D hidden size, K top words. p_n = softmax(W_vm v_n) is the visual token of patch n.
"""

import math

import torch
import torch.nn.functional as F


NUM_PERMUTATIONS = 199
TILE_ROWS = 256  # patches whose distributions over the vocabulary are in memory at the same time


def word_probabilities(features: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return softmax(W x) in float32, (N, V), for features (N, D) and the weight (V, D) of a head."""
    return F.linear(features, weight).float().softmax(-1)


def cosine_scores(features: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
    """Return the cosine of features (N, D) to every row of the embeddings (V, D), in float32, (N, V)."""
    return F.linear(F.normalize(features.float(), dim=-1), F.normalize(embeddings.float(), dim=-1))


def entropy(probabilities: torch.Tensor) -> torch.Tensor:
    """Return H(p) = −Σ p log p over the last dimension, in nats."""
    return torch.special.entr(probabilities).sum(-1)


# ---- Agreement with labels, and between two lists of words ----


def best_ranks(top_words: torch.Tensor, word_ids: torch.Tensor, vocab_size: int) -> torch.Tensor:
    r"""
    Return the best rank of each of `word_ids` in the top words of any patch: 0 is the top word, K means not included.

    Args:
        top_words (`torch.LongTensor` of shape `(N, K)`): best first.
        word_ids (`torch.LongTensor` of shape `(num_words,)`), vocab_size (`int`)

    Returns:
        `torch.LongTensor` of shape `(num_words,)`
    """
    num_patches, k = top_words.shape
    ranks = torch.arange(k, device=top_words.device).expand(num_patches, k)
    best = torch.full((vocab_size,), k, dtype=torch.long, device=top_words.device)
    return best.scatter_reduce_(0, top_words.flatten(), ranks.flatten(), "amin")[word_ids]


def label_hits(ranks: torch.Tensor, labels: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    Return hit@k of each image, and the same with shuffled labels.

    hit@k is 1 if a label word of the image is among the top k words of any of its patches. The control averages over
    the labels of all other images, which has less noise than one shuffle.

    Args:
        ranks (`torch.Tensor` of shape `(num_images, num_words)`): One row of [`best_ranks`] per image.
        labels (`torch.BoolTensor` of shape `(num_images, num_words)`): the words of each image's labels.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: both of shape `(num_images,)`.
    """
    reached, wanted = (ranks < k).float(), labels.float().T
    own_hits = ((ranks < k) & labels).any(1).float()
    with_all = torch.cat([(part @ wanted > 0).sum(1) for part in reached.split(TILE_ROWS)])
    return own_hits, (with_all - own_hits) / (len(own_hits) - 1)


def label_mass(mass: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what [`label_hits`] does, for the probability of the label words, `mass` (num_images, num_words)."""
    own_mass = (mass * labels).sum(1)
    return own_mass, (mass @ labels.to(mass.dtype).sum(0) - own_mass) / (len(own_mass) - 1)


def top_word_overlap(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return the share of words that two lists of top words (N, K) have in common, per patch, (N,)."""
    return (first[:, :, None] == second[:, None, :]).any(-1).float().mean(-1)


# ---- Neighborhoods, from the inner products of a sample of patches ----


def gram(features: torch.Tensor) -> torch.Tensor:
    """Return the inner products (N, N) of features (N, D), in float32."""
    features = features.float()
    return features @ features.T


def visual_token_gram(features: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    r"""
    Return Σ_k √(p_n[k] p_m[k]) of all pairs of visual tokens (the Bhattacharyya coefficient), (N, N).

    It is the inner product of √p, which has length 1. At most two tiles of distributions are in memory. They are
    recomputed for every pair of tiles.

    Args:
        features (`torch.Tensor` of shape `(N, D)`): Input of the head's matrix, after its `residual_block`.
        weight (`torch.Tensor` of shape `(V, D)`)
    """
    products = torch.empty(len(features), len(features), device=features.device)
    tiles = range(0, len(features), TILE_ROWS)
    for i in tiles:
        left = word_probabilities(features[i : i + TILE_ROWS], weight).sqrt_()
        for j in (j for j in tiles if j >= i):
            right = left if i == j else word_probabilities(features[j : j + TILE_ROWS], weight).sqrt_()
            products[i : i + TILE_ROWS, j : j + TILE_ROWS] = left @ right.T
            products[j : j + TILE_ROWS, i : i + TILE_ROWS] = (left @ right.T).T
    return products


def neighbors(products: torch.Tensor, k: int) -> torch.Tensor:
    """Return a boolean matrix (N, N) of the k nearest neighbors by cosine, from inner products (N, N)."""
    lengths = products.diagonal().clamp_min(torch.finfo(products.dtype).tiny).sqrt()
    cosine = (products / lengths[:, None] / lengths[None, :]).fill_diagonal_(-math.inf)
    return torch.zeros_like(cosine, dtype=torch.bool).scatter_(1, cosine.topk(k, dim=1).indices, True)


def mutual_neighbors(first: torch.Tensor, second: torch.Tensor, k: int, seed: int = 0) -> dict:
    r"""
    Return the share of the k nearest neighbors of a patch that two spaces have in common (Huh et al. 2024,
    https://arxiv.org/abs/2405.07987). Chance is k / (N − 1).

    Args:
        first, second (`torch.Tensor` of shape `(N, N)`): Inner products in the two spaces.
        seed (`int`, *optional*, defaults to 0): Seed of the permutations.

    Returns:
        `dict`: `overlap` (N,) of each patch; `chance`; and `p_value` of a permutation test that the spaces are
        unrelated.
    """
    a, b = neighbors(first, k), neighbors(second, k)
    overlap = (a & b).sum(1).float() / k
    generator = torch.Generator().manual_seed(seed)
    as_large = 0
    for _ in range(NUM_PERMUTATIONS):
        order = torch.randperm(len(b), generator=generator).to(b.device)
        as_large += int((a & b[order][:, order]).sum() >= (a & b).sum())
    p_value = (1 + as_large) / (1 + NUM_PERMUTATIONS)
    return {"overlap": overlap, "chance": k / (len(a) - 1), "p_value": p_value}


def unbiased_cka(first: torch.Tensor, second: torch.Tensor) -> float:
    r"""
    Return linear CKA (Kornblith et al. 2019, https://arxiv.org/abs/1905.00414) with the unbiased HSIC of Song et al.
    2012.

    It is 1 for spaces that differ by a rotation and a scale, about 0 for unrelated spaces of any dimension, and NaN if
    all patches of one space are equal.

    Args:
        first, second (`torch.Tensor` of shape `(N, N)`): Inner products of at least four patches.
    """
    number = len(first)
    a, b = (products.double().clone().fill_diagonal_(0) for products in (first, second))

    def hsic(x, y):
        inner = (x * y).sum() + x.sum() * y.sum() / ((number - 1) * (number - 2))
        return inner - 2 / (number - 2) * (x.sum(0) @ y.sum(0))

    self_similarities = [hsic(x, x) / (x * x).sum() for x in (a, b)]
    if min(self_similarities) < 1e-9:  # all patches are equal, up to rounding
        return math.nan
    return (hsic(a, b) / (hsic(a, a) * hsic(b, b)).sqrt()).item()


def jackknife_interval(estimate: float, without: list[float]) -> tuple[float, float]:
    r"""
    Return the 95 % interval of an estimate from its values without each group of images (Tukey's jackknife).

    A bootstrap would be wrong: an image that is drawn twice is its own neighbor, and mutual information is biased.
    """
    values = torch.tensor(without, dtype=torch.float64)
    variance = (len(values) - 1) / len(values) * (values - values.mean()).square().sum()
    return estimate - 1.96 * variance.sqrt().item(), estimate + 1.96 * variance.sqrt().item()


# ---- Sharpness and diversity ----


def mutual_information(mean_probabilities: torch.Tensor, mean_entropy: float) -> float:
    r"""
    Return I(source; word) = H(mean p) − mean H(p) in nats: the information of a word about its patch or image.

    It is 0 if all distributions are equal, even if they are sharp.

    Args:
        mean_probabilities (`torch.Tensor` of shape `(V,)`): Mean of the distributions.
        mean_entropy (`float`): Mean of their entropies.
    """
    return max(0.0, entropy(mean_probabilities.double()).item() - mean_entropy)


# ---- Image features as mixes of words ----


def reconstruction(features: torch.Tensor, mixes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cosine of mixes to features, both (N, D), and the relative error ‖mix − f‖ / ‖f‖, each (N,)."""
    features, mixes = features.float(), mixes.float()
    return F.cosine_similarity(features, mixes, dim=-1), (mixes - features).norm(dim=-1) / features.norm(dim=-1)


def best_mix(features: torch.Tensor, embeddings: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    r"""
    Return the linear mix of a patch's K words that is nearest to its features (least squares), (N, D).

    A mix of all V words would always fit, because V ≥ D embeddings span the space.

    Args:
        features (`torch.Tensor` of shape `(N, D)`), embeddings (`torch.Tensor` of shape `(V, D)`)
        words (`torch.LongTensor` of shape `(N, K)`)
    """
    bases = embeddings[words].double()  # (N, K, D)
    products = (bases @ features.double().unsqueeze(-1)).squeeze(-1)
    weights = torch.linalg.pinv(bases @ bases.mT, hermitian=True) @ products.unsqueeze(-1)
    return (weights.mT @ bases).squeeze(1).float()
