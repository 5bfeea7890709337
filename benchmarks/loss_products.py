# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Only the matrix products of the fused losses: a lower bound of their time, and the share of the chunks.

The whole products have new logits for all rows. The products in chunks have the chunks, buffers and recomputation of
the fused losses, and no other work.
"""

import torch

from modeling_vtlmm.fused_losses_vtlmm import _add_product, _chunks, _logits_tile, _multiply


def visual_loss_products(student, weight, teacher, teacher_weight, needs_features):
    logits = torch.mm(student, weight.t())
    del logits
    gradient = torch.mm(teacher, teacher_weight.t())
    if needs_features:
        torch.mm(gradient, weight)
    torch.mm(gradient.t(), student)


def visual_loss_products_in_chunks(student, weight, teacher, teacher_weight, needs_features):
    tiles = _logits_tile(student, weight), _logits_tile(student, weight)
    grad_student, grad_weight = (tiles[0].new_empty(tensor.shape) for tensor in (student, weight))
    for rows in _chunks(student):
        inputs, size = student[rows], len(student[rows])
        gradient = _multiply(inputs, weight.t(), tiles[0][:size]).to(student.dtype)
        _multiply(teacher[rows], teacher_weight.t(), tiles[1][:size])
        if needs_features:
            _multiply(gradient, weight, grad_student[rows])
        _add_product(grad_weight, gradient.t(), inputs, beta=1 if rows.start else 0)


def pseudo_feature_products(features, weight, embeddings):
    for _ in range(2):  # each of the two products of the forward has two gradients
        logits = torch.mm(features, weight.t())
        torch.mm(logits, embeddings)
        torch.mm(logits.t(), features)


def pseudo_feature_products_in_chunks(features, weight, embeddings):
    tiles = _logits_tile(features, weight), _logits_tile(features, weight)
    outputs, gradients = torch.empty_like(features), [tiles[0].new_zeros(weight.shape) for _ in range(2)]
    for is_backward in (False, True):
        for rows in _chunks(features):
            inputs, size = features[rows], len(features[rows])
            probs = _multiply(inputs, weight.t(), tiles[0][:size]).to(features.dtype)  # again in the backward
            _multiply(probs, embeddings, outputs[rows])
            if is_backward:
                _multiply(inputs, embeddings.t(), tiles[1][:size])
                for gradient in gradients:
                    _add_product(gradient, probs.t(), inputs)
