# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The metrics of visual tokens of the ablations, patch by patch from the logits of the model."""

import math

import pytest
import torch

from modeling_vtlmm.fused_losses_vtlmm import next_patch_loss
from vtlmm.ablations.metrics import visual_token_metrics
from vtlmm.inference.generation import conversation
from vtlmm.inference.prompt_encoding import encode_prompt


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("num_images", [3, 4, 5])
def test_losses_and_entropies_are_those_of_the_logits(build_model, processor, batch_size, num_images):
    model = build_model()
    features = torch.randn(num_images, 4, model.config.vision_feature_size, generator=torch.Generator().manual_seed(0))
    ids = encode_prompt(processor, conversation({"images": [None], "question": ""}))
    ids = torch.tensor([[id_ for id_ in ids for _ in range(4 if id_ == processor.image_token_id else 1)]])
    words, predictions = [], []
    for one in features:
        output = model(input_ids=ids, vision_features=one[None], output_visual_logits=True)
        positions = (ids[0] == processor.image_token_id).nonzero()[:, 0]
        words.append(output.visual_logits.double().log_softmax(-1))
        logits = output.logits[0, positions - 1, : model.config.visual_vocab_size]
        predictions.append(logits.double().log_softmax(-1))
    p, q = torch.stack(words), torch.stack(predictions)
    metrics = visual_token_metrics(model, processor, list(features), batch_size)

    def divergence(teacher, student):
        return (teacher.exp() * (teacher - student)).sum(-1).mean().item()

    assert metrics["visual loss of stage III, KL(q‖p)"] == pytest.approx(divergence(q, p), rel=1e-4)
    assert metrics["visual loss of stage IV, KL(p‖q)"] == pytest.approx(divergence(p, q), rel=1e-4)
    assert metrics["entropy of visual tokens"] == pytest.approx(-(p.exp() * p).sum(-1).mean().item(), rel=1e-4)
    entropy = -(q.exp() * q).sum(-1).mean().item()
    assert metrics["entropy of the decoder's predictions"] == pytest.approx(entropy, rel=1e-4)
    assert math.isfinite(metrics["visual loss, other image - own image"])
    if batch_size == 5:  # one batch: the other image is the next one
        other = divergence(p.roll(-1, 0), q) - divergence(p, q)
        assert metrics["visual loss, other image - own image"] == pytest.approx(other, rel=1e-3, abs=1e-5)
    assert model.visual_loss_function is next_patch_loss


def test_one_image_has_no_other(build_model, processor):
    model = build_model()
    metrics = visual_token_metrics(model, processor, [torch.randn(4, model.config.vision_feature_size)], 4)
    assert "visual loss, other image - own image" not in metrics and len(metrics) == 5
