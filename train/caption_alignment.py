# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""
Closed-form start of the projector and the VM head from captions, without gradient steps.

A ridge regression maps the mean vision feature of an image to the mean direction of the word embeddings of its
caption. The projector then places each patch near the embeddings of the words that describe it, and the VM head
scores a patch by the cosine between its image feature and each word direction.
"""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import Dataset, Image, List
from tqdm.auto import tqdm

from vtlmm.analysis.vocabulary import content_words, whole_words
from vtlmm.data.images import prepare_images
from vtlmm.data.rows import load_rows
from vtlmm.hub.paths import check_output
from vtlmm.inference.loading import load_model


# Images whose vision features are kept in memory, to set the sizes of the projector and the VM head
NUM_SAMPLE_IMAGES = 256
MIN_ROWS = 32
# Visual logit of every token that is not a candidate word
EXCLUDED_LOGIT = -30.0
SIMILARITY_SCALES = (8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0, 96.0)
UNDECODED = List(Image(decode=False))


@dataclass
class CaptionAlignment:
    """
    Result of [`align_captions`].

    Args:
        num_images (`int`): images with a caption word.
        num_words (`int`): different words of the captions that the tokenizer writes as one token.
        num_candidates (`int`): words that the VM head can give. All other tokens have a probability near 0.
        similarity_scale (`float`): factor of the cosines in the VM head. A larger factor gives sharper visual tokens.
        negative_log_likelihood (`float`): of the caption words under the mean visual token of an image, in nats per
            word, on images that the regression was not fitted on. `similarity_scale` was chosen on them.
    """

    num_images: int
    num_words: int
    num_candidates: int
    similarity_scale: float
    negative_log_likelihood: float


@torch.inference_mode()
def align_captions(
    model,
    processor,
    rows: Dataset,
    *,
    keep_projector: bool = False,
    penalty: float = 1.7,
    frequency_exponent: float = 0.5,
    caption_words_only: bool = True,
    similarity_scale: float | None = None,
    batch_size: int = 16,
) -> CaptionAlignment:
    r"""
    Set the projector and the VM head of `model` from captioned images. The vision tower and the decoder do not change.

    The cost is one pass of the vision tower over the images and P · (P + D) multiplications per image. P is the input
    size of the regression: the channels of a vision feature, with `keep_projector` of an image feature. D is the
    hidden size of the decoder. The memory is P · (P + D) float64 numbers (at most 268 MB for a 7B decoder) and the
    vision features of 256 images.

    Args:
        model ([`VTLMMForConditionalGeneration`]): with a linear VM head.
        processor ([`VTLMMProcessor`])
        rows ([`~datasets.Dataset`]): rows of [`load_rows`] with one image each. The answers are the caption.
        keep_projector (`bool`, *optional*, defaults to `False`): solve the VM head alone. Use it for a model whose
            projector is trained, such as LLaVA-1.5.
        penalty (`float`, *optional*, defaults to 1.7): ridge penalty relative to the variance of each input.
        frequency_exponent (`float`, *optional*, defaults to 0.5): a word in the captions of `k` of `N` images has the
            weight ``log(N / k) ** frequency_exponent`` in the target of an image.
        caption_words_only (`bool`, *optional*, defaults to `True`): whether only words of the captions are
            candidates. Otherwise all whole words of the vocabulary are.
        similarity_scale (`float`, *optional*): factor of the cosines. By default the value of `SIMILARITY_SCALES`
            with the largest likelihood of the caption words of held-out images.
        batch_size (`int`, *optional*, defaults to 16): images per pass of the vision tower.

    Raises:
        `ValueError`: if the VM head has a residual block, the projector has no biases, or too few rows have one image
            and a caption word.
    """
    _check_model(model, keep_projector)
    captions = _Captions(model, processor.tokenizer, rows, frequency_exponent, caption_words_only)
    images = rows.select_columns("images").cast_column("images", UNDECODED)
    projector = model.model.multi_modal_projector

    def vision_features(indices: list[int]) -> torch.Tensor:
        batch = prepare_images([images[index]["images"][0] for index in indices], processor.image_processor)
        pixel_values = processor.image_processor(batch, return_tensors="pt")["pixel_values"]
        return model.get_image_features(pixel_values.to(model.device, model.dtype)).vision_features

    step = max(1, len(captions.rows) // NUM_SAMPLE_IMAGES)
    held_out = captions.rows[::step][: min(NUM_SAMPLE_IMAGES, len(captions.rows) // 4)]
    fitted = sorted(set(captions.rows) - set(held_out))
    num_inputs = model.config.text_config.hidden_size if keep_projector else model.config.vision_feature_size
    sums = _RegressionSums(num_inputs, model.config.text_config.hidden_size)
    for start in tqdm(range(0, len(fitted), batch_size), desc="Aligning captions"):
        indices = fitted[start : start + batch_size]
        features = vision_features(indices)
        inputs = projector(features) if keep_projector else features
        sums.add(inputs.mean(1).cpu(), captions.targets(indices))
    sample = torch.cat([vision_features([index]) for index in held_out])
    word_rows, constant = _fit_parts(model, captions, sums, sample, penalty, keep_projector)
    features = projector(sample).float().cpu()
    word_ids = [captions.word_ids[index] for index in held_out]
    values = SIMILARITY_SCALES if similarity_scale is None else (similarity_scale,)
    likelihoods = {value: _negative_log_likelihood(features, value * word_rows, word_ids) for value in values}
    similarity_scale = min(likelihoods, key=likelihoods.__getitem__)
    vm_weight = model.model.vm_head.weight
    vm_weight.copy_((EXCLUDED_LOGIT * constant).expand(len(vm_weight), -1))
    vm_weight[captions.token_ids.to(vm_weight.device)] = (similarity_scale * word_rows).to(vm_weight)
    return CaptionAlignment(
        num_images=len(captions.rows),
        num_words=captions.num_words,
        num_candidates=len(captions.token_ids),
        similarity_scale=similarity_scale,
        negative_log_likelihood=likelihoods[similarity_scale],
    )


def _check_model(model, keep_projector: bool) -> None:
    if not isinstance(model.model.vm_head.residual_block, torch.nn.Identity):
        raise ValueError(
            f"Caption alignment needs a linear VM head, but vm_head_type is {model.config.vm_head_type!r}. Compose "
            "the model with `vm_head_type='linear'`."
        )
    if not keep_projector and not model.config.multimodal_projector_bias:
        raise ValueError("Caption alignment needs a projector with biases: set `multimodal_projector_bias=True`.")


def _fit_parts(model, captions, sums, sample: torch.Tensor, penalty: float, keep_projector: bool):
    r"""
    Write the projector, unless it is kept, and return the VM head's rows for a `similarity_scale` of 1.

    Args:
        sample (`torch.Tensor` of shape `(num_images, num_patches, vision_feature_size)`): vision features.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: rows of shape `(num_candidates, hidden_size)`, whose products with the
        image features are about the cosine similarities; and a vector of shape `(hidden_size,)` whose product with
        every image feature is about 1. A linear layer without bias needs it for a constant.
    """
    weight, bias = sums.solve(penalty)
    directions, projector = captions.orthogonal_directions(), model.model.multi_modal_projector
    if keep_projector:
        constant = sums.constant_direction()
        to_direction = (weight + torch.outer(constant, bias)).float()
        mapped = projector(sample).float().cpu() @ to_direction
        return directions @ to_direction.T / mapped.norm(dim=-1).mean(), constant.float()
    _write_projector(projector, sample, weight, bias, captions)
    return directions / captions.embedding_size, captions.center / captions.center.norm() ** 2


def align_checkpoint(
    checkpoint: str | Path,
    dataset: str | Path,
    output: str | Path | None = None,
    *,
    image_folder: str | Path | None = None,
    keep_projector: bool = False,
    dtype: str = "auto",
    overwrite: bool = False,
) -> CaptionAlignment:
    r"""
    Apply [`align_captions`] to a model folder and save the result.

    Args:
        checkpoint (`str` or `Path`): folder or Hub id of a VT-LMM.
        dataset (`str` or `Path`): captioned images, in any format of [`load_rows`].
        output (`str` or `Path`, *optional*): folder for the result. By default the checkpoint's folder is changed.
        image_folder (`str` or `Path`, *optional*): folder of the image paths.
        keep_projector (`bool`, *optional*, defaults to `False`): solve the VM head alone.
        dtype (`str`, *optional*, defaults to `"auto"`): dtype of the weights while they are aligned and saved.
        overwrite (`bool`, *optional*, defaults to `False`): replace the model that `output` contains.

    Raises:
        `FileNotFoundError`, `FileExistsError`, `ValueError`: see [`load_model`], [`load_rows`] and
            [`align_captions`]. Without `output`, `checkpoint` must be a folder.
    """
    if output is None:
        output = Path(checkpoint)
        if not output.is_dir():
            raise ValueError(f"'{checkpoint}' is not a folder, so it cannot be changed. Specify an output folder.")
    else:
        output = check_output(output, [checkpoint], overwrite)
    rows = load_rows(str(dataset), image_folder=image_folder)
    model, processor = load_model(str(checkpoint), dtype=dtype)
    result = align_captions(model, processor, rows, keep_projector=keep_projector)
    output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(output)
    processor.save_pretrained(output)
    return result


class _Captions:
    """
    The words of each caption and the regression target of each image.

    The direction of a word is its input embedding minus the mean embedding of all caption words, normalized. The
    target of an image is the weighted mean direction of its words.
    """

    def __init__(self, model, tokenizer, rows: Dataset, frequency_exponent: float, caption_words_only: bool):
        embeddings = model.get_input_embeddings().weight.detach().float().cpu()
        vocabulary = whole_words(tokenizer, model.config.visual_vocab_size)
        words_of_rows = {}
        for index, row in enumerate(rows.select_columns(["messages", "images"]).cast_column("images", UNDECODED)):
            words = sorted(content_words(_answers(row["messages"])) & vocabulary.keys())
            if words and len(row["images"]) == 1:
                words_of_rows[index] = words
        if len(words_of_rows) < MIN_ROWS:
            raise ValueError(
                f"{len(words_of_rows)} of {len(rows)} rows have one image and an answer with a word of the "
                f"vocabulary. Caption alignment needs at least {MIN_ROWS} captioned images."
            )
        counts = Counter(word for words in words_of_rows.values() for word in words)
        candidates = sorted(counts) if caption_words_only else sorted(vocabulary)
        position = {word: number for number, word in enumerate(candidates)}
        self.rows, self.num_words = list(words_of_rows), len(counts)
        self.word_ids = {index: [position[word] for word in words] for index, words in words_of_rows.items()}
        self.token_ids = torch.tensor([vocabulary[word] for word in candidates])
        self.center = embeddings[[vocabulary[word] for word in counts]].mean(0)
        centered = embeddings[self.token_ids] - self.center
        self.embedding_size = centered.norm(dim=-1).mean()
        self.directions = F.normalize(centered, dim=-1)
        self.weights = torch.zeros(len(candidates))
        for word, count in counts.items():
            self.weights[position[word]] = max(1e-6, math.log(len(words_of_rows) / count)) ** frequency_exponent

    def targets(self, indices: list[int]) -> torch.Tensor:
        """Return the regression targets of rows, `(len(indices), hidden_size)`."""
        word_ids = [self.word_ids[index] for index in indices]
        weights = [self.weights[ids] / self.weights[ids].sum() for ids in word_ids]
        return torch.stack([weight @ self.directions[ids] for weight, ids in zip(weights, word_ids, strict=True)])

    def orthogonal_directions(self) -> torch.Tensor:
        """Return the directions without their part along the center, which all image features share."""
        axis = F.normalize(self.center, dim=0)
        return self.directions - torch.outer(self.directions @ axis, axis)


class _RegressionSums:
    """Sums of a ridge regression in float64. Their size does not depend on the number of rows."""

    def __init__(self, num_inputs: int, num_targets: int):
        self.count = 0
        self.inputs = torch.zeros(num_inputs, dtype=torch.float64)
        self.targets = torch.zeros(num_targets, dtype=torch.float64)
        self.gram = torch.zeros(num_inputs, num_inputs, dtype=torch.float64)
        self.products = torch.zeros(num_inputs, num_targets, dtype=torch.float64)

    def add(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        """Add rows of inputs `(N, num_inputs)` and targets `(N, num_targets)`."""
        inputs, targets = inputs.double(), targets.double()
        self.count += len(inputs)
        self.inputs += inputs.sum(0)
        self.targets += targets.sum(0)
        self.gram += inputs.T @ inputs
        self.products += inputs.T @ targets

    def solve(self, penalty: float) -> tuple[torch.Tensor, torch.Tensor]:
        r"""
        Return the weight W `(num_inputs, num_targets)` and the bias b that minimize

            mean |x W + b - t|² + penalty · sum_j var(x_j) |W_j|²
        """
        mean, target_mean = self.inputs / self.count, self.targets / self.count
        covariance = self.gram / self.count - torch.outer(mean, mean)
        products = self.products / self.count - torch.outer(mean, target_mean)
        ridge = penalty * covariance.diagonal() + 1e-9 * covariance.diagonal().mean()
        weight = torch.linalg.solve(covariance + torch.diag(ridge), products)
        return weight, target_mean - mean @ weight

    def constant_direction(self) -> torch.Tensor:
        """Return the vector whose product with an input is nearest to 1 in the least squares sense."""
        second_moment = self.gram / self.count
        ridge = 1e-3 * second_moment.diagonal().mean() * torch.eye(len(second_moment), dtype=torch.float64)
        return torch.linalg.solve(second_moment + ridge, self.inputs / self.count)


def _write_projector(projector, sample: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, captions) -> None:
    r"""
    Write the regression into the projector: image feature = center + scale · (f W + b).

    `scale` gives the image features the mean size of a centered word embedding. A projector with two layers computes
    a linear map of half its rank, since act(x) - act(-x) = x for GELU, SiLU and ReLU: `linear_1` is (A, -A) and
    `linear_2` is (B, -B). The rank is cut by a singular value decomposition.

    Args:
        sample (`torch.Tensor` of shape `(num_images, num_patches, vision_feature_size)`): vision features.
        weight, bias: of shape `(vision_feature_size, hidden_size)` and `(hidden_size,)`, in float64.
    """
    features = sample.flatten(0, 1).double().cpu()
    scale = captions.embedding_size.double() / (features @ weight + bias).norm(dim=-1).mean()
    weight, bias = scale * weight, scale * bias + captions.center.double()
    if not projector.two_layers:
        projector.linear_1.weight.copy_(weight.T)
        projector.linear_1.bias.copy_(bias)
        return
    mean, spread = features.mean(0), features.std(0).clamp_min(1e-6)
    left, sizes, right = torch.linalg.svd(spread[:, None] * weight, full_matrices=False)
    rank = min(projector.linear_1.out_features // 2, len(sizes))
    inward, outward = left[:, :rank] / spread[:, None], sizes[:rank, None] * right[:rank]
    units = (features @ inward).std(0).clamp_min(1e-6)  # hidden units get a standard deviation of 1
    inward, outward = inward / units, outward * units[:, None]
    bias = bias + mean @ weight  # the mean of the features is taken off before the activation
    offset = mean @ inward
    for linear in (projector.linear_1, projector.linear_2):
        linear.weight.zero_()
    projector.linear_1.bias.zero_()
    projector.linear_1.weight[: 2 * rank] = torch.cat([inward.T, -inward.T]).to(projector.linear_1.weight)
    projector.linear_1.bias[: 2 * rank] = torch.cat([-offset, offset]).to(projector.linear_1.bias)
    projector.linear_2.weight[:, : 2 * rank] = torch.cat([outward.T, -outward.T], dim=1).to(projector.linear_2.weight)
    projector.linear_2.bias.copy_(bias)


def _answers(messages: list[dict]) -> list[str]:
    """Return the texts of the assistant's turns."""
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    return [part["text"] for content in answers for part in content if part["text"]]


def _negative_log_likelihood(features: torch.Tensor, head: torch.Tensor, word_ids: list[list[int]]) -> float:
    """
    Return the mean of -log p over the caption words of each image, in nats, where p is the image's mean visual token.

    Args:
        features (`torch.Tensor` of shape `(num_images, num_patches, hidden_size)`): image features.
        head (`torch.Tensor` of shape `(num_candidates, hidden_size)`): rows of the VM head.
    """
    losses = []
    for patches, ids in zip(features, word_ids, strict=True):
        log_probabilities = (patches @ head.T).log_softmax(-1).logsumexp(0) - math.log(len(patches))
        losses.append(-log_probabilities[ids].mean())
    return torch.stack(losses).mean().item()
