# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Ridge regression from one vector per image to the words of its caption, from sums over the images."""

import torch


class WordRegression:
    r"""
    Sums of a ridge regression in float64. Their size does not depend on the number of images.

    The target of word k is t_k = (y_k − p_k) / (p_k (1 − p_k))^a. y_k is 1 if word k is in the caption of the image
    and 0 otherwise. p_k is the share of images whose caption has the word. The exponent a decides how much rare words
    count: 0 gives the best predictions of frequent words, 0.5 gives all words the same variance.

    Args:
        num_inputs (`int`), num_words (`int`)
        exponent (`float`): a.
    """

    def __init__(self, num_inputs: int, num_words: int, exponent: float):
        self.exponent = exponent
        self.count = 0
        self.inputs = torch.zeros(num_inputs, dtype=torch.float64)
        self.gram = torch.zeros(num_inputs, num_inputs, dtype=torch.float64)
        self.words = torch.zeros(num_words, dtype=torch.float64)
        self.products = torch.zeros(num_words, num_inputs, dtype=torch.float64)

    def add(self, inputs: torch.Tensor, word_ids: list[list[int]]) -> None:
        """Add images, given `inputs` of shape `(num_images, num_inputs)` and the words of each image."""
        inputs = inputs.double()
        self.count += len(inputs)
        self.inputs += inputs.sum(0)
        self.gram += inputs.T @ inputs
        for vector, ids in zip(inputs, word_ids, strict=True):
            self.words[ids] += 1
            self.products[ids] += vector

    def solve(self, penalty: float) -> tuple[torch.Tensor, torch.Tensor]:
        r"""
        Return the weight W `(num_inputs, num_words)` and the bias b `(num_words,)` that minimize

            mean |x W + b − t|² + penalty · Σ_j var(x_j) |W_j|²
        """
        mean, shares = self.inputs / self.count, self.words / self.count
        scales = (shares * (1 - shares)).clamp_min(1 / self.count**2) ** self.exponent
        covariance = self.gram / self.count - torch.outer(mean, mean)
        products = (self.products.T / self.count - torch.outer(mean, shares)) / scales
        ridge = penalty * covariance.diagonal() + 1e-9 * covariance.diagonal().mean()
        weight = torch.linalg.solve(covariance + torch.diag(ridge), products)
        return weight, -mean @ weight

    def mapped(self, weight: torch.Tensor, bias: torch.Tensor) -> "WordRegression":
        """Return the sums for the inputs x A + c, given A `(num_inputs, num_outputs)` and c `(num_outputs,)`."""
        result = WordRegression(weight.shape[1], len(self.words), self.exponent)
        sums = self.inputs @ weight
        result.count, result.words = self.count, self.words
        result.inputs = sums + self.count * bias
        outer = torch.outer(sums, bias)
        result.gram = weight.T @ self.gram @ weight + outer + outer.T + self.count * torch.outer(bias, bias)
        result.products = self.products @ weight + torch.outer(self.words, bias)
        return result

    def constant_direction(self) -> torch.Tensor:
        """Return the vector whose product with an input is nearest to 1 in the least squares sense."""
        second_moment = self.gram / self.count
        ridge = 1e-3 * second_moment.diagonal().mean() * torch.eye(len(second_moment), dtype=torch.float64)
        return torch.linalg.solve(second_moment + ridge, self.inputs / self.count)
