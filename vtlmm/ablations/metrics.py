# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Compute the metrics of one trained model. All metrics but caption matching use cached vision features."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset

from modeling_vtlmm.fused_losses_vtlmm import next_patch_loss
from vtlmm.analysis.caption_matching import check_matching_rows, measure_caption_matching
from vtlmm.analysis.metrics import TILE_ROWS, entropy, word_probabilities
from vtlmm.data.encoding import position_limit
from vtlmm.data.images import prepare_images
from vtlmm.data.rows import load_rows
from vtlmm.data.validation import check_rows
from vtlmm.data.vision_feature_cache import VisionFeatureCache, tower_key, undecoded
from vtlmm.evaluation.questions import read_questions
from vtlmm.evaluation.report import by_kind
from vtlmm.evaluation.scorers import score_answers
from vtlmm.evaluation.shuffled_images import with_shuffled_images
from vtlmm.evaluation.statistics import Estimate
from vtlmm.inference.batch_inputs import model_inputs
from vtlmm.inference.generation import Answer, conversation, generate_answers
from vtlmm.inference.loading import load_model
from vtlmm.inference.prompt_encoding import Prompt
from vtlmm.train.visual_targets import other_image_loss

from .grid import EvaluateConfig
from .ood import IN_DISTRIBUTION, OODEvaluator, is_model_metric


ACCURACY = "accuracy"
ACCURACY_SHUFFLED_IMAGES = "accuracy, shuffled images"
ACCURACY_PSEUDO_IMAGE_FEATURES = "accuracy, pseudo image features"
CAPTION_MATCHING = {"caption_matching": "caption matching", "hard_caption_matching": "hard caption matching"}


@dataclass
class QuestionSet:
    r"""
    Questions about the images of a dataset.

    Attributes:
        rows ([`~datasets.Dataset`]): rows of [`load_rows`].
        questions (`list[dict]`): from [`read_questions`]. `images` are image keys.
        image_positions (`dict[str, tuple[int, int]]`): image key → row and position in the row.
    """

    rows: Dataset
    questions: list[dict]
    image_positions: dict[str, tuple[int, int]]

    def vision_features(self, model, processor, folder: str | Path, batch_size: int) -> dict[str, torch.Tensor]:
        """Return the tower's features of each image, `(num_patches, vision_feature_size)`, from the cache `folder`."""
        cache = VisionFeatureCache(str(folder), tower_key(model, processor.image_processor, "no"))

        @torch.inference_mode()
        def encode(images: list) -> torch.Tensor:
            images = prepare_images(images, processor.image_processor)
            pixel_values = processor.image_processor(images, return_tensors="pt")["pixel_values"]
            return model.get_image_features(pixel_values.to(model.device, model.dtype)).vision_features

        cache.fill(self.rows, encode, batch_size)
        rows = undecoded(self.rows)
        return {key: cache[[rows[row]["images"][number]]][0] for key, (row, number) in self.image_positions.items()}


@dataclass
class HeldOutData:
    """The held-out questions of a grid, and the questions about each set of out-of-distribution images by its name."""

    held_out: QuestionSet
    ood: dict[str, QuestionSet] = field(default_factory=dict)


@dataclass
class ScoredAnswers:
    """The answer to each question and its score."""

    answers: list[str]
    scores: list[float]


@dataclass
class Measurement:
    r"""
    The metrics of one trained model.

    Attributes:
        metrics (`dict[str, float]`)
        scored_answers (`dict[str, ScoredAnswers]`): for each metric that is a mean over the held-out questions.
        ood (`dict[str, dict[str, Estimate]]`): set of images → metric → estimate, see [`OODEvaluator`].
    """

    metrics: dict[str, float] = field(default_factory=dict)
    scored_answers: dict[str, ScoredAnswers] = field(default_factory=dict)
    ood: dict[str, dict[str, Estimate]] = field(default_factory=dict)


def read_held_out_data(config: EvaluateConfig, processor) -> HeldOutData:
    """
    Load and check the questions and images that a grid is evaluated on.

    Raises:
        `ValueError`: for invalid rows, an answer without a kind, or a scorer that does not fit the rows.
    """
    rows = config.load_rows(keep_columns=(config.kind,) if config.kind else ())
    _check(rows, processor, "evaluate.dataset")
    questions, image_positions = read_questions(rows, config.kind)
    if config.kinds:
        kinds = {answer: kind for kind, answers in config.kinds.items() for answer in answers}
        for question in questions:
            if question["answer"] not in kinds:
                raise ValueError(f"evaluate.kinds: no kind lists the answer {question['answer']!r}. Add it to one.")
            question["kind"] = kinds[question["answer"]]
    score_answers(questions, [""] * len(questions), config.scorer)  # find a scorer that does not fit before training
    if any(metric in CAPTION_MATCHING for metric in config.metrics):
        check_matching_rows(rows)
        if len(questions) != len(rows):
            raise ValueError("Caption matching needs one answer per row of evaluate.dataset.")
    data = HeldOutData(QuestionSet(rows, questions, image_positions))
    for name, dataset in config.ood_datasets.items():
        rows = load_rows(dataset)
        _check(rows, processor, f"evaluate.ood_datasets.{name}")
        data.ood[name] = QuestionSet(rows, *read_questions(rows))
    return data


def _check(rows: Dataset, processor, setting: str) -> None:
    report = check_rows(rows, processor)
    if report.problems:
        raise ValueError(f"{setting} has invalid rows. Fix or remove them.\n{report.format()}")


def check_answer_lengths(questions: list[dict], tokenizer, max_new_tokens: int) -> None:
    """
    Check that every ground truth can be generated.

    Raises:
        `ValueError`: if an answer has more than `max_new_tokens` tokens. It would always count as wrong.
    """
    lengths = {answer: len(tokenizer.tokenize(answer)) for answer in {question["answer"] for question in questions}}
    longest = max(lengths, key=lambda answer: lengths[answer])
    if lengths[longest] > max_new_tokens:
        raise ValueError(
            f"The answer {longest!r} has {lengths[longest]} tokens, but at most {max_new_tokens} are generated. Set "
            f"evaluate.max_new_tokens={lengths[longest] + 1}, which includes the end of the answer."
        )


def measure(
    model_name: str | Path, config: EvaluateConfig, data: HeldOutData, cache_folder: str | Path
) -> Measurement:
    r"""
    Compute the metrics of a trained model.

    Args:
        model_name (`str` or `Path`): folder or Hub id of the model.
        config ([`EvaluateConfig`])
        data ([`HeldOutData`])
        cache_folder (`str` or `Path`): folder of the [`VisionFeatureCache`].
    """
    model, processor = load_model(model_name, dtype="float32")
    if config.use_pseudo_image_features is not None:
        model.config.use_pseudo_image_features = config.use_pseudo_image_features
    evaluator = Evaluator(model, processor, config, cache_folder)
    features = evaluator.vision_features(data.held_out)
    result = Measurement()
    if "accuracy" in config.metrics:
        evaluator.add_accuracy(result, ACCURACY, data.held_out, features)
    if "accuracy_shuffled_images" in config.metrics:
        evaluator.add_accuracy(result, ACCURACY_SHUFFLED_IMAGES, data.held_out, features, shuffle_images=True)
    for metric, name in CAPTION_MATCHING.items():
        if metric in config.metrics:
            hard = metric == "hard_caption_matching"
            evaluator.add_caption_matching(result, name, data.held_out.rows, hard)
    if "visual_tokens" in config.metrics:
        result.metrics |= visual_token_metrics(model, processor, list(features.values()), config.batch_size)
    if "ood" in config.metrics:
        ood = OODEvaluator(model, evaluator.answer, config.batch_size)
        result.ood[IN_DISTRIBUTION] = ood.measure_in_distribution(data.held_out.questions, features)
        for name, question_set in data.ood.items():
            result.ood[name] = ood.measure_ood(question_set.questions, evaluator.vision_features(question_set))
        for name, estimates in result.ood.items():
            models = {metric: estimate for metric, estimate in estimates.items() if is_model_metric(metric)}
            result.metrics |= {f"{metric}: {name}": estimate.value for metric, estimate in models.items()}
    if "text_perplexity" in config.metrics:
        texts = Path(str(config.text_file)).read_text(encoding="utf-8").splitlines()
        result.metrics["text perplexity"] = perplexity(model, processor, [text for text in texts if text.strip()])
    if "accuracy_pseudo_image_features" in config.metrics:
        model.config.use_pseudo_image_features = True
        evaluator.add_accuracy(result, ACCURACY_PSEUDO_IMAGE_FEATURES, data.held_out, features)
    return result


@dataclass
class Evaluator:
    """Answer questions with one model from cached vision features."""

    model: torch.nn.Module
    processor: object
    config: EvaluateConfig
    cache_folder: str | Path

    def vision_features(self, question_set: QuestionSet) -> dict[str, torch.Tensor]:
        """See [`QuestionSet.vision_features`]."""
        return question_set.vision_features(self.model, self.processor, self.cache_folder, self.config.batch_size)

    def answer(self, questions: Sequence[dict], features: dict[str, torch.Tensor]) -> list[Answer]:
        """Return the answer to each question and its log probability. `features` has the features of all images."""
        return generate_answers(
            self.model,
            self.processor,
            [Prompt(conversation(question), question["images"]) for question in questions],
            features.__getitem__,
            max_new_tokens=self.config.max_new_tokens,
            batch_size=self.config.batch_size,
            vision_features=features,
        )

    def add_accuracy(
        self,
        result: Measurement,
        name: str,
        question_set: QuestionSet,
        features: dict[str, torch.Tensor],
        shuffle_images: bool = False,
    ) -> None:
        """Add the accuracy, and its values by kind for the metric `"accuracy"`, to `result`."""
        questions = question_set.questions
        answers = self.answer(with_shuffled_images(questions) if shuffle_images else questions, features)
        texts = [answer.text for answer in answers]
        scores = score_answers(questions, texts, self.config.scorer)
        result.scored_answers[name] = ScoredAnswers(texts, scores)
        result.metrics[name] = sum(scores) / len(scores)
        groups = by_kind(questions)
        if len(groups) > 1 and name == ACCURACY:
            for kind, indices in groups.items():
                if kind != "all":
                    result.metrics[f"{name}: {kind}"] = sum(scores[i] for i in indices) / len(indices)

    def add_caption_matching(self, result: Measurement, name: str, rows: Dataset, hard: bool) -> None:
        """Add caption matching and the mean losses of the captions to `result`."""
        matching = measure_caption_matching(
            self.model, self.processor, rows, hard=hard, batch_size=self.config.batch_size
        )
        other = "similar image" if hard else "other image"
        result.metrics |= {
            name: matching.accuracy.value,
            "caption loss": matching.loss.value,
            f"caption loss, {other} - own image": matching.loss_lift.value,
        }
        result.scored_answers[name] = ScoredAnswers([""] * len(matching.scores), matching.scores)


@torch.inference_mode()
def visual_token_metrics(model, processor, features: Sequence[torch.Tensor], batch_size: int) -> dict[str, float]:
    r"""
    Return the mean visual losses in both directions and the entropies, in nats per patch.

    The visual loss with the visual tokens of another image minus the visual loss is near 0 if both heads agree only on
    what all images have in common.

    Each image is in a user turn without text. Attention is causal, so a question after the image would not change the
    result.

    Args:
        features (`Sequence[torch.Tensor]`): vision features of each image, `(num_patches, vision_feature_size)`.
    """
    prompt = Prompt(conversation({"images": [None], "question": ""}), ["image"])
    inputs = model_inputs(model, processor, [prompt], {}.__getitem__, {"image": features[0]})
    ids, attention_mask = inputs["input_ids"], inputs["attention_mask"]
    totals: dict[str, torch.Tensor] = {}
    original, model.visual_loss_function = model.visual_loss_function, _all_visual_losses
    # Batches of nearly equal sizes of two images or more
    for batch in torch.stack(list(features)).tensor_split(max(1, len(features) // max(2, batch_size))):
        sums = model(
            input_ids=ids.expand(len(batch), -1),
            attention_mask=attention_mask.expand(len(batch), -1),
            vision_features=batch.to(model.device, model.dtype),
            return_loss_sums=True,
            visual_student="lm_head",
        ).loss_sums
        values = {"losses": sums["visual_loss"], "number": sums["num_visual_targets"], **sums["visual_tokens"]}
        for name, value in values.items():
            totals[name] = totals.get(name, torch.zeros((), dtype=torch.float64)) + value.cpu().double()
    model.visual_loss_function = original
    mean_visual_token = totals["probability"] / totals["num_patches"]
    reverse, forward, other_image, prediction_entropy = (totals["losses"] / totals["number"]).tolist()
    metrics = {
        "visual loss of stage III, KL(q‖p)": reverse,
        "visual loss of stage IV, KL(p‖q)": forward,
        "visual loss, other image - own image": other_image - forward,
        "entropy of visual tokens": (totals["entropy"] / totals["num_patches"]).item(),
        "entropy of the decoder's predictions": prediction_entropy,
        "entropy of the mean visual token": torch.special.entr(mean_visual_token).sum().item(),
    }
    return {name: value for name, value in metrics.items() if not math.isnan(value)}


def _all_visual_losses(text_features, text_weight, image_features, image_weight, **kwargs) -> torch.Tensor:
    """Return the sums of KL(q‖p), KL(p‖q), KL(p‖q) with another image's p (NaN for one image), and H(q), `(4,)`."""
    text_side, image_side = (text_features, text_weight), (image_features, image_weight)
    several = kwargs["outputs"].image_features.shape[0] > 1
    other = other_image_loss(*text_side, *image_side, **kwargs) if several else text_features.new_tensor(math.nan)
    predictions = (word_probabilities(part, text_weight) for part in text_features.split(TILE_ROWS))
    losses = [
        next_patch_loss(*image_side, *text_side, **kwargs),
        next_patch_loss(*text_side, *image_side, **kwargs),
        other,
        sum(entropy(part).sum() for part in predictions),
    ]
    return torch.stack([torch.as_tensor(loss).float() for loss in losses])


@torch.inference_mode()
def perplexity(model, processor, texts: list[str], batch_size: int = 32) -> float:
    """Return exp of the mean loss per token over all texts. A text is cut where the decoder's positions end."""
    tokenizer, loss, number = processor.tokenizer, 0.0, 0
    max_positions = position_limit(model.config)
    encoded = sorted((tokenizer(text)["input_ids"][:max_positions] for text in texts), key=len)
    for start in range(0, len(encoded), batch_size):
        batch = encoded[start : start + batch_size]
        length = max(map(len, batch))
        labels = torch.tensor([ids + [-100] * (length - len(ids)) for ids in batch], device=model.device)
        mask = labels != -100
        inputs = {"input_ids": labels.masked_fill(~mask, 0), "attention_mask": mask.long()}
        sums = model(**inputs, labels=labels, return_loss_sums=True).loss_sums
        loss, number = loss + sums["lm_loss"].item(), number + sums["num_lm_targets"].item()
    return math.exp(loss / number)
