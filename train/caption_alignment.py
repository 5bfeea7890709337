# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""
Closed-form start of the projector and the VM head from captions, without gradient steps.

A ridge regression predicts from the mean vision feature of an image which words its caption has. The projector places
each patch at the sum of the embeddings of the words, weighted by their predicted scores. A second ridge regression
gives the VM head, which predicts the words from the image features.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from datasets import Dataset
from tqdm.auto import tqdm

from vtlmm.analysis.captions import CaptionedImage, captioned_images
from vtlmm.analysis.vocabulary import whole_words
from vtlmm.data.images import prepare_images
from vtlmm.data.rows import load_rows
from vtlmm.data.setting_values import require_integers
from vtlmm.data.validation import check_rows
from vtlmm.hub.paths import check_output, clear_output
from vtlmm.hub.repository import CHECK_FILE, RUN_RECORD
from vtlmm.inference.loading import load_model

from .word_regression import WordRegression


MAX_HELD_OUT_IMAGES = 256  # their vision features are kept in memory
MIN_IMAGES = 32
# Visual logit of every token that is not a candidate word
EXCLUDED_LOGIT = -30.0
# Standard deviations of the visual logits over patches and candidate words
LOGIT_SPREADS = (0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.7, 8.0)


@dataclass
class CaptionAlignment:
    """
    Result of [`align_captions`].

    Args:
        num_images (`int`): images with a candidate word in their captions.
        num_candidates (`int`): words that the VM head can give. All other tokens have a probability near 0.
        logit_spread (`float`): standard deviation of the visual logits. A larger one gives sharper visual tokens.
        negative_log_likelihood (`float`): of the caption words under the mean visual token of an image, in nats per
            word, on images that the regression was not fitted on. `logit_spread` was chosen on them.
    """

    num_images: int
    num_candidates: int
    logit_spread: float
    negative_log_likelihood: float


@torch.inference_mode()
def align_captions(
    model,
    processor,
    rows: Dataset,
    *,
    keep_projector: bool = False,
    min_word_images: int = 5,
    frequency_exponent: float = 0.35,
    projector_penalty: float = 6.0,
    head_penalty: float = 2.0,
    logit_spread: float | None = None,
    batch_size: int = 16,
) -> CaptionAlignment:
    r"""
    Set the projector and the VM head of `model` from captioned images. The vision tower and the decoder do not change.

    The cost is one pass of the vision tower over the images. The regression takes P² multiplications per image and
    the memory of P · (P + K) float64 numbers, for K candidate words and P inputs: the channels of a vision feature,
    with `keep_projector` those of an image feature. The image features of up to 256 images are kept in float32, and
    their products with the VM head's rows are computed once.

    Args:
        model ([`VTLMMForConditionalGeneration`]): with a linear VM head.
        processor ([`VTLMMProcessor`])
        rows ([`~datasets.Dataset`]): rows of [`load_rows`] with one image each. The answers are the captions. Rows
            about one image are merged.
        keep_projector (`bool`, *optional*, defaults to `False`): solve the VM head alone. Use it for a model whose
            projector is trained, such as LLaVA-1.5.
        min_word_images (`int`, *optional*, defaults to 5): fewest images with a candidate word in their captions.
        frequency_exponent (`float`, *optional*, defaults to 0.35): see [`WordRegression`]. A larger value gives more
            specific and less reliable words.
        projector_penalty, head_penalty (`float`, *optional*, defaults to 6.0 and 2.0): ridge penalties of the two
            regressions, relative to the variance of each input.
        logit_spread (`float`, *optional*): see [`CaptionAlignment`]. By default the value of `LOGIT_SPREADS` with the
            largest likelihood of the caption words of held-out images.
        batch_size (`int`, *optional*, defaults to 16): images per pass of the vision tower.

    Raises:
        `ValueError`: if the VM head has a residual block, the projector no biases, or too few images a candidate word.
    """
    _check_settings(model, keep_projector, batch_size=batch_size, min_word_images=min_word_images)
    captions = _Captions(model, processor.tokenizer, rows, min_word_images)
    encode = _Encoder(model, processor, keep_projector)
    held_out, fitted = _split(len(captions.images))
    regression = WordRegression(encode.num_inputs, len(captions.token_ids), frequency_exponent)
    _add_images(regression, captions, encode, fitted, batch_size)
    sample = [encode([captions.images[index].image])[0] for index in tqdm(held_out, desc="Held-out images")]
    if keep_projector:
        constant = regression.constant_direction()
    else:
        weight, bias = _write_projector(model, sample, *regression.solve(projector_penalty), captions)
        regression = regression.mapped(weight, bias)
        sample = [patches @ weight.float() + bias.float() for patches in sample]
        constant = captions.center.double() / captions.center.double().norm() ** 2
    head = _solve_head(regression, constant, sample, head_penalty)
    word_ids = [captions.word_ids[index] for index in held_out]
    values = LOGIT_SPREADS if logit_spread is None else (logit_spread,)
    likelihood, logit_spread = min(zip(_negative_log_likelihoods(sample, head, word_ids, values), values, strict=True))
    _write_head(model.model.vm_head, captions.token_ids, logit_spread * head, constant.float())
    return CaptionAlignment(len(captions.images), len(captions.token_ids), logit_spread, likelihood)


def _solve_head(regression: WordRegression, constant: torch.Tensor, sample: list, penalty: float) -> torch.Tensor:
    """Return the rows of the VM head, `(num_words, hidden_size)`. The logits of `sample` have a spread of 1."""
    weight, bias = regression.solve(penalty)
    head = (weight + torch.outer(constant, bias)).T.float()
    return head / torch.cat([patches @ head.T for patches in sample[:: max(1, len(sample) // 32)]]).std()


def _split(num_images: int) -> tuple[Sequence[int], list[int]]:
    """Return the indices of the images that choose the logit spread, and of the images to fit the regression on."""
    held_out = range(0, num_images, max(4, math.ceil(num_images / MAX_HELD_OUT_IMAGES)))
    return held_out, sorted(set(range(num_images)) - set(held_out))


def _add_images(regression: WordRegression, captions, encode, indices: list[int], batch_size: int) -> None:
    """Add the mean features of images and the words of their captions to the regression."""
    for start in tqdm(range(0, len(indices), batch_size), desc="Aligning captions"):
        batch = indices[start : start + batch_size]
        features = encode([captions.images[index].image for index in batch])
        regression.add(features.mean(1), [captions.word_ids[index] for index in batch])


def align_checkpoint(
    checkpoint: str | Path,
    dataset: str | Path,
    output: str | Path | None = None,
    *,
    image_folder: str | Path | None = None,
    columns: Mapping[str, Any] | None = None,
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
        columns (`dict`, *optional*): names of the dataset's columns, see [`load_rows`].
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
    rows = cast(Dataset, load_rows(str(dataset), image_folder=image_folder, columns=columns))
    model, processor = load_model(str(checkpoint), dtype=dtype)
    check_rows(rows, processor, require_marks=False).raise_for_problems(advice=f"Fix these rows of {dataset}.")
    result = align_captions(model, processor, rows, keep_projector=keep_projector)
    clear_output(output)
    for name in (CHECK_FILE, RUN_RECORD):  # they describe the weights before
        (output / name).unlink(missing_ok=True)
    model.save_pretrained(output)
    processor.save_pretrained(output)
    return result


def _check_settings(model, keep_projector: bool, **integers: int) -> None:
    require_integers(**integers)
    if not isinstance(model.model.vm_head.residual_block, torch.nn.Identity):
        raise ValueError(
            f"Caption alignment needs a linear VM head, but vm_head_type is {model.config.vm_head_type!r}. Compose "
            "the model with `vm_head_type='linear'`."
        )
    if not keep_projector and not model.config.multimodal_projector_bias:
        raise ValueError("Caption alignment needs a projector with biases: set `multimodal_projector_bias=True`.")


class _Captions:
    """
    The candidate words of the captions, and their embeddings.

    The direction of a word is its input embedding minus the mean embedding of all candidates, normalized and without
    its part along the mean. So the mean is a constant that all image features share.
    """

    def __init__(self, model, tokenizer, rows: Dataset, min_word_images: int):
        vocabulary = whole_words(tokenizer, model.config.visual_vocab_size)
        images = captioned_images(rows)
        counts = Counter(word for image in images for word in image.words & vocabulary.keys())
        candidates = sorted(word for word, count in counts.items() if count >= min_word_images)
        position = {word: number for number, word in enumerate(candidates)}
        self.images: list[CaptionedImage] = [image for image in images if image.words & position.keys()]
        if len(self.images) < MIN_IMAGES:
            raise ValueError(
                f"{len(self.images)} images have a caption with a candidate word: a word of the vocabulary in the "
                f"captions of at least {min_word_images} images. Caption alignment needs at least {MIN_IMAGES} such "
                "images. Add captioned images."
            )
        self.word_ids = [sorted(position[word] for word in image.words & position.keys()) for image in self.images]
        self.token_ids = torch.tensor([vocabulary[word] for word in candidates])
        embeddings = model.get_input_embeddings().weight.detach()[self.token_ids].float().cpu()
        self.center = embeddings.mean(0)
        self.embedding_size = (embeddings - self.center).norm(dim=-1).mean()
        axis = F.normalize(self.center, dim=0)
        directions = F.normalize(embeddings - self.center, dim=-1)
        self.directions = directions - torch.outer(directions @ axis, axis)


class _Encoder:
    """Compute the inputs of the regression for a list of images, `(num_images, num_patches, num_inputs)`."""

    def __init__(self, model, processor, keep_projector: bool):
        self.model, self.processor, self.keep_projector = model, processor, keep_projector
        config = model.config
        self.num_inputs = config.text_config.hidden_size if keep_projector else config.vision_feature_size

    def __call__(self, images: list) -> torch.Tensor:
        image_processor = self.processor.image_processor
        pixel_values = image_processor(prepare_images(images, image_processor), return_tensors="pt")["pixel_values"]
        features = self.model.get_image_features(pixel_values.to(self.model.device, self.model.dtype))
        return (features.image_features if self.keep_projector else features.vision_features).float().cpu()


def _write_projector(model, sample: list[torch.Tensor], weight: torch.Tensor, bias: torch.Tensor, captions: _Captions):
    r"""
    Write the projector x → center + s · (x W + b) E, where E holds the directions of the words.

    s gives the image features the mean size of a centered word embedding. A projector with two layers computes a
    linear map of half its rank, since act(x) − act(−x) = x for GELU, SiLU and ReLU: `linear_1` is (A, −A) and
    `linear_2` is (B, −B). The rank is cut by a singular value decomposition.

    Args:
        sample (`list[torch.Tensor]`): vision features of images, each `(num_patches, vision_feature_size)`.
        weight, bias: of shape `(vision_feature_size, num_words)` and `(num_words,)`, in float64.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: weight `(vision_feature_size, hidden_size)` and bias `(hidden_size,)` of
        the projector as one linear map.
    """
    # 32 images are enough for the spread of the features
    features = torch.cat(sample[:: max(1, len(sample) // 32)]).double()
    projector = model.model.multi_modal_projector
    weight, bias = weight @ captions.directions.double(), bias @ captions.directions.double()
    mean, spread = features.mean(0), features.std(0).clamp_min(1e-6)
    bias = bias + mean @ weight  # the mean of the features is subtracted before the activation
    left, sizes, right = torch.linalg.svd(spread[:, None] * weight, full_matrices=False)
    rank = len(sizes) if not projector.two_layers else min(projector.linear_1.out_features // 2, len(sizes))
    inward, outward = left[:, :rank] / spread[:, None], sizes[:rank, None] * right[:rank]
    units = (features @ inward).std(0).clamp_min(1e-6)  # hidden units get a standard deviation of 1
    inward, outward = inward / units, outward * units[:, None]
    scale = captions.embedding_size.double() / ((features - mean) @ inward @ outward + bias).norm(dim=-1).mean()
    outward, offset = scale * outward, mean @ inward
    bias = scale * bias + captions.center.double()
    weight = inward @ outward
    if projector.two_layers:
        for linear in (projector.linear_1, projector.linear_2):
            linear.weight.zero_()
        projector.linear_1.bias.zero_()
        projector.linear_1.weight[: 2 * rank] = torch.cat([inward.T, -inward.T]).to(projector.linear_1.weight)
        projector.linear_1.bias[: 2 * rank] = torch.cat([-offset, offset]).to(projector.linear_1.bias)
        columns = torch.cat([outward.T, -outward.T], dim=1)
        projector.linear_2.weight[:, : 2 * rank] = columns.to(projector.linear_2.weight)
        projector.linear_2.bias.copy_(bias)
    else:
        projector.linear_1.weight.copy_(weight.T)
        projector.linear_1.bias.copy_(bias - mean @ weight)
    return weight, bias - mean @ weight


def _write_head(vm_head, token_ids: torch.Tensor, rows: torch.Tensor, constant: torch.Tensor) -> None:
    """Write the rows of the candidate words `(num_words, hidden_size)`; all other tokens get `EXCLUDED_LOGIT`."""
    vm_head.weight.copy_((EXCLUDED_LOGIT * constant).expand(len(vm_head.weight), -1))
    vm_head.weight[token_ids.to(vm_head.weight.device)] = rows.to(vm_head.weight)


def _negative_log_likelihoods(
    features: list[torch.Tensor], head: torch.Tensor, word_ids: list[list[int]], spreads: Sequence[float]
) -> list[float]:
    """
    Return the mean of -log p over the caption words of each image, in nats, for each spread of the logits.

    p is the mean visual token of the image.

    Args:
        features (`list[torch.Tensor]`): image features, each `(num_patches, hidden_size)`.
        head (`torch.Tensor` of shape `(num_candidates, hidden_size)`): rows of the VM head for a spread of 1.
    """
    losses = torch.zeros(len(spreads))
    for patches, ids in zip(tqdm(features, desc="Spread of the logits"), word_ids, strict=True):
        logits = patches @ head.T
        for i, spread in enumerate(spreads):
            log_probabilities = (spread * logits).log_softmax(-1).logsumexp(0) - math.log(len(patches))
            losses[i] -= log_probabilities[ids].mean()
    return (losses / len(features)).tolist()
