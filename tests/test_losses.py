# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The equations of the losses, with values by hand and gradients in float64."""

import torch

from modeling_vtlmm.losses_vtlmm import language_loss_sum, predicted_positions, visual_loss_sum


def test_losses_by_hand():
    """Two words. p = (0.8, 0.2), q = (0.5, 0.5): KL(p‖q) = 0.8 ln 1.6 + 0.2 ln 0.4 = 0.192745; KL(q‖p) = 0.223144."""
    p_features, q_features = torch.tensor([[1.0]]), torch.tensor([[1.0]])
    p_weight, q_weight = torch.tensor([[0.8], [0.2]]).log(), torch.tensor([[0.5], [0.5]]).log()
    torch.testing.assert_close(visual_loss_sum(q_features, q_weight, p_features, p_weight), torch.tensor(0.192745))
    torch.testing.assert_close(visual_loss_sum(p_features, p_weight, q_features, q_weight), torch.tensor(0.223144))
    loss = language_loss_sum(p_features.repeat(2, 1), p_weight, torch.tensor([0, 1]))
    torch.testing.assert_close(loss, -torch.tensor([0.8, 0.2]).log().sum())


def test_losses_against_float64_autograd():
    """In both directions, the gradient at the student's logits is softmax(student) − softmax(teacher)."""
    generator = torch.Generator().manual_seed(0)
    x, t = (torch.randn(7, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    w, v = (torch.randn(11, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    for student, student_weight, teacher, teacher_weight in ((x, w, t, v), (t, v, x, w)):
        student, student_weight = student.clone().requires_grad_(), student_weight.clone().requires_grad_()
        visual_loss_sum(student, student_weight, teacher, teacher_weight).backward()
        difference = ((student @ student_weight.T).softmax(-1) - (teacher @ teacher_weight.T).softmax(-1)).detach()
        torch.testing.assert_close(student.grad, difference @ student_weight.detach(), atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(student_weight.grad, difference.T @ student.detach(), atol=1e-9, rtol=1e-9)


def test_predicted_positions():
    mask = torch.tensor([[1, 1, 0, 1, 1, 0], [0, 1, 1, 0, 0, 1]]).bool()
    assert predicted_positions(mask).tolist()[0] == [False, True, False, True, True, False]
    left_padded = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]])
    assert predicted_positions(mask, left_padded)[1].tolist() == [False, False, True, False, False, True]
    packed = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 0]])
    assert predicted_positions(mask, None, packed).tolist() == [
        [False, True, False, False, True, False],
        [False, True, True, False, False, False],
    ]
