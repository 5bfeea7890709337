# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Metrics of visual tokens, on inputs with known results."""

import math

import pytest
import torch
from helpers.tiny_models import build_processor

from vtlmm.analysis.labels import read_labels
from vtlmm.analysis.metrics import (
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
from vtlmm.analysis.vocabulary import WORD_CLASSES, content_words, label_ids, vocabulary_words, word_classes
from vtlmm.evaluation.statistics import mean_estimate


def normal(*shape, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rotation(size: int) -> torch.Tensor:
    return torch.linalg.qr(normal(size, size, seed=9))[0]


# ---- Labels ----


def test_embeddings_as_features_hit_their_words():
    embeddings, words = normal(50, 16), torch.tensor([[7, 30], [11, 2], [49, 7]])
    all_words = torch.arange(50)
    ranks = []
    for own in words:
        scores = cosine_scores(3 * embeddings[own], embeddings)
        assert torch.allclose(scores.amax(1), torch.ones(2))
        ranks.append(best_ranks(scores.topk(10).indices, all_words, 50))
    labels = torch.zeros(3, 50, dtype=torch.bool).scatter_(1, words, True)
    own, shuffled = label_hits(torch.stack(ranks), labels, 1)
    assert own.tolist() == [1, 1, 1]
    assert shuffled.tolist() == [0.5, 0, 0.5]  # images 0 and 2 share word 7


def test_best_ranks_by_hand():
    top = torch.tensor([[3, 1, 0], [1, 4, 5]])
    assert best_ranks(top, torch.tensor([0, 1, 2, 3, 4, 5]), 6).tolist() == [2, 0, 3, 0, 1, 2]


def test_shuffled_labels_average_over_other_images():
    generator = torch.Generator().manual_seed(0)
    ranks = torch.randint(0, 11, (300, 20), generator=generator)  # more images than a tile
    labels = torch.rand(300, 20, generator=generator) < 0.1
    mass = torch.rand(300, 20, generator=generator)
    hits, shuffled = label_hits(ranks, labels, 5)
    masses, shuffled_mass = label_mass(mass, labels)
    for i in (0, 17, 299):
        others = [j for j in range(300) if j != i]
        wanted = [float((ranks[i][labels[j]] < 5).any()) for j in others]
        assert shuffled[i].item() == pytest.approx(sum(wanted) / 299, abs=1e-6)
        assert hits[i].item() == float((ranks[i][labels[i]] < 5).any())
        assert masses[i].item() == pytest.approx(mass[i][labels[i]].sum().item(), rel=1e-5)
        wanted = sum(mass[i][labels[j]].sum().item() for j in others) / 299
        assert shuffled_mass[i].item() == pytest.approx(wanted, rel=1e-4)


def test_permuted_labels_have_no_lift():
    """Correct labels have a lift. With permuted labels its interval contains 0."""
    words = torch.arange(200) % 8
    labels = torch.nn.functional.one_hot(words, 8).bool()
    ranks = torch.where(labels & (torch.arange(200) % 4 > 0)[:, None], 0, 10)
    own, shuffled = label_hits(ranks, labels, 1)
    assert mean_estimate(own - shuffled).low > 0.5
    permuted = labels[torch.randperm(200, generator=torch.Generator().manual_seed(1))]
    own, shuffled = label_hits(ranks, permuted, 1)
    lift = mean_estimate(own - shuffled)
    assert lift.low < 0 < lift.high and abs(lift.value) < 0.1


def test_label_words_in_every_form():
    vocabulary = ["cat", "Cat", "cats", "cat", "box", "boxes", "berry", "BERRIES", "glass", "glas", "s", "dog"]
    found = label_ids(vocabulary, {"cat", "boxes", "berry", "glass", "zebra"})
    assert found["cat"] == [0, 1, 2, 3] and found["boxes"] == [4, 5] and found["berry"] == [6, 7]
    assert found["glass"] == [8] and found["zebra"] == []
    assert content_words(["A red circle, on the left.", "yes", "x 12"]) == {"red", "circle", "left", "12"}


def test_word_classes():
    tokenizer = build_processor().tokenizer
    words = vocabulary_words(tokenizer, len(tokenizer) - 1)
    classes = word_classes(words, set(tokenizer.all_special_ids))
    found = {word: WORD_CLASSES[kind] for word, kind in zip(words, classes.tolist(), strict=True)}
    assert [found[word] for word in ("<s>", ".", "the", "circle")] == [
        "punctuation",
        "punctuation",
        "function",
        "other",
    ]
    assert word_classes(["<0xE5>", "\ufffd", ""], {}).tolist() == [2, 2, 3]


def test_labels_come_from_answers_or_a_column():
    boxes = [{"label": "cell", "bbox": [0, 0, 4, 4]}, {"label": "cell", "bbox": [5, 5, 9, 9]}, {"label": "wall"}]
    questions = [
        {"images": ["a", "b"], "question": "?", "answer": "red", "id": boxes},
        {"images": ["a"], "question": "?", "answer": "circle", "id": "a cell"},
    ]
    assert read_labels(questions, from_column=False)["a"].texts == ["red", "circle"]
    found = read_labels(questions, from_column=True)
    assert found["a"].texts == ["cell", "wall", "a cell"] and found["b"].texts == ["cell", "wall"]
    assert found["a"].boxes == {"cell": [[0, 0, 4, 4], [5, 5, 9, 9]]}
    with pytest.raises(ValueError, match="has the label 3"):
        read_labels([{**questions[0], "id": [3]}], from_column=True)


def test_top_word_overlap_by_hand():
    first, second = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[3, 2, 9], [6, 4, 5]])
    assert top_word_overlap(first, second).tolist() == pytest.approx([2 / 3, 1])


# ---- Neighborhoods ----


def test_rotated_copy_has_all_neighbors_and_cka_1():
    features = normal(120, 16)
    copy = 5 * features @ rotation(16)
    found = mutual_neighbors(gram(features), gram(copy), 10)
    assert found["overlap"].tolist() == [1.0] * 120 and found["p_value"] == pytest.approx(1 / 200)
    assert unbiased_cka(gram(features), gram(copy)) == pytest.approx(1, abs=1e-6)


def test_noise_has_chance_neighbors_and_cka_0():
    """With fewer patches than dimensions biased CKA is far from 0. Averages over several draws."""
    overlaps, ckas, p_values, biased = [], [], [], []
    for seed in range(20):
        a, b = gram(normal(64, 256, seed=2 * seed)), gram(normal(64, 256, seed=2 * seed + 1))
        found = mutual_neighbors(a, b, 10, seed)
        overlaps.append(found["overlap"].mean().item())
        p_values.append(found["p_value"])
        ckas.append(unbiased_cka(a, b))
        centring = torch.eye(64) - 1 / 64
        x, y = centring @ a @ centring, centring @ b @ centring
        biased.append(((x * y).sum() / x.norm() / y.norm()).item())
    assert found["chance"] == 10 / 63
    for values, expected in ((overlaps, 10 / 63), (ckas, 0), (p_values, 0.5)):
        values = torch.tensor(values)
        assert abs(values.mean().item() - expected) < 3 * values.std().item() / 20**0.5
    assert max(map(abs, ckas)) < 0.1 and min(biased) > 0.5


def test_cka_of_equal_patches_is_nan():
    assert math.isnan(unbiased_cka(torch.ones(8, 8), gram(normal(8, 4))))


def test_tiles_do_not_change_visual_token_gram(monkeypatch):
    monkeypatch.setattr("vtlmm.analysis.metrics.TILE_ROWS", 7)
    features, weight = normal(20, 8), normal(30, 8, seed=1)
    roots = word_probabilities(features, weight).sqrt()
    products = visual_token_gram(features, weight)
    torch.testing.assert_close(products, roots @ roots.T)
    torch.testing.assert_close(products.diagonal(), torch.ones(20))


def test_jackknife_of_a_mean_equals_its_interval():
    values = normal(40).tolist()
    without = [(sum(values) - value) / 39 for value in values]
    low, high = jackknife_interval(sum(values) / 40, without)
    assert (high - low) / 2 == pytest.approx(1.96 * torch.tensor(values).std().item() / 40**0.5, rel=1e-4)


# ---- Sharpness, mixes ----


def test_information_by_hand():
    certain = torch.eye(4)
    assert entropy(certain).tolist() == [0] * 4
    assert entropy(torch.full((1, 8), 1 / 8)).item() == pytest.approx(math.log(8))
    assert mutual_information(certain.mean(0), 0.0) == pytest.approx(math.log(4))
    same = torch.tensor([0.7, 0.2, 0.1]).expand(5, 3)
    assert mutual_information(same.mean(0), entropy(same).mean().item()) == pytest.approx(0, abs=1e-6)


def test_best_mix_is_least_squares():
    embeddings, words = normal(30, 12), torch.tensor([[0, 3, 5], [7, 8, 9]])
    features = torch.stack([2 * embeddings[0] - embeddings[5], normal(12, seed=3)])
    mixes = best_mix(features, embeddings, words)
    cosine, error = reconstruction(features, mixes)
    assert cosine[0].item() == pytest.approx(1, abs=1e-5) and error[0].item() == pytest.approx(0, abs=1e-5)
    solved = torch.linalg.lstsq(embeddings[words[1]].T, features[1][:, None]).solution
    torch.testing.assert_close(mixes[1], (embeddings[words[1]].T @ solved).squeeze(1), atol=1e-5, rtol=1e-5)
    # the same word twice, or a word with a zero embedding, works
    embeddings[3] = 0
    again = best_mix(features, embeddings, torch.tensor([[0, 3, 5], [7, 7, 3]]))
    torch.testing.assert_close(again[0], features[0], atol=1e-5, rtol=1e-5)
    assert again.isfinite().all()
