# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The figures of one trained model. The tower sees each image once for all of them, and for all runs of a grid."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from vtlmm.data.encoding import starts_with_bos
from vtlmm.data.images import prepare_images
from vtlmm.data.rows import load_rows
from vtlmm.data.vision_feature_cache import VisionFeatureCache, tower_key, undecoded
from vtlmm.evaluation.questions import read_questions
from vtlmm.evaluation.report import by_kind, image_cluster, score_answers
from vtlmm.inference.generation import conversation, with_shuffled_images
from vtlmm.inference.resumable import asking_order

from .grid import EvaluateConfig
from .ood import OWN, measure_others, visual_token_diversity


@dataclass
class HeldOut:
    """Questions, and where the images are that they ask about; see `read_questions`. `others` are those about other
    kinds of images, by name."""

    rows: object
    questions: list[dict]
    places: dict
    others: dict[str, "HeldOut"] = field(default_factory=dict)

    def vision_features(self, model, processor, folder: str | Path, batch_size: int) -> dict[str, torch.Tensor]:
        """The tower's features of every image by its key, each `(num_patches, vision_feature_size)`."""
        cache = VisionFeatureCache(str(folder), tower_key(model, processor.image_processor, "no"))

        @torch.inference_mode()
        def encode(images):
            images = prepare_images(images, processor.image_processor)
            pixel_values = processor.image_processor(images, return_tensors="pt")["pixel_values"]
            return model.get_image_features(pixel_values.to(model.device, model.dtype)).vision_features

        cache.fill(self.rows, encode, batch_size)
        rows = undecoded(self.rows)
        return {key: cache[[rows[row]["images"][number]]][0] for key, (row, number) in self.places.items()}


def read_held_out(measures: EvaluateConfig) -> HeldOut:
    """
    Raises:
        `ValueError`: for an answer that no kind of `kinds` has.
    """
    rows = measures.load_rows(keep_columns=(measures.kind,) if measures.kind else ())
    questions, places = read_questions(rows, measures.kind)
    if measures.kinds:
        kinds = {answer: kind for kind, answers in measures.kinds.items() for answer in answers}
        for question in questions:
            if question["answer"] not in kinds:
                raise ValueError(f"evaluate.kinds: the answer {question['answer']!r} is of no kind.")
            question["kind"] = kinds[question["answer"]]
    found = HeldOut(rows, questions, places)
    for name, data in measures.others.items():
        rows = load_rows(data)
        found.others[name] = HeldOut(rows, *read_questions(rows))
    return found


def check_answers_fit(questions: list[dict], model: str, max_new_tokens: int) -> None:
    """
    Raises:
        `ValueError`: for a true answer of more tokens than are generated: it would count as wrong whatever is said.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    lengths = {answer: len(tokenizer.tokenize(answer)) for answer in {question["answer"] for question in questions}}
    longest = max(lengths, key=lengths.get)
    if lengths[longest] > max_new_tokens:
        raise ValueError(
            f"The answer {longest!r} has {lengths[longest]} tokens, but only {max_new_tokens} are generated: set "
            f"evaluate.max_new_tokens to {lengths[longest] + 1}, with one to end the answer."
        )


def measure(folder: str | Path, measures: EvaluateConfig, held_out: HeldOut, feature_folder: str | Path):
    r"""
    Returns:
        `tuple[dict[str, float], dict[str, list], dict[str, dict]]`: the figures by name; of each figure that is a mean
        over the questions, the score of every question, with the `answers`; and what [`measure_others`] gives.
    """
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="float32").eval()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    model = model.to(device)
    if measures.use_pseudo_image_features is not None:
        model.config.use_pseudo_image_features = measures.use_pseudo_image_features
    features = held_out.vision_features(model, processor, feature_folder, measures.batch_size)
    figures, details, others = {}, {}, {}
    asked = {"accuracy": held_out.questions, "blind": with_shuffled_images(held_out.questions)}
    for name, title in (("accuracy", "accuracy"), ("blind", "accuracy, images shuffled")):
        if name in measures.figures:
            figures |= _accuracy(title, model, processor, asked[name], features, measures, details)
    if "visual" in measures.figures:
        figures |= visual_figures(model, processor, list(features.values()), measures.batch_size)
    if "others" in measures.figures:
        size = measures.batch_size
        sets = {OWN: (held_out.questions, features)}
        for name, data in held_out.others.items():
            sets[name] = data.questions, data.vision_features(model, processor, feature_folder, size)
        others = measure_others(
            sets,
            lambda questions, own: answers_and_probabilities(
                model, processor, questions, own, size, measures.max_new_tokens
            ),
            lambda own: visual_token_diversity(model, own, size),
        )
        for name, own in others.items():  # a number without images is of the questions, not of the model
            figures |= {f"{figure}: {name}": found["value"] for figure, found in own.items() if "n" in found}
    if "text" in measures.figures:
        texts = Path(measures.text).read_text(encoding="utf-8").splitlines()
        figures["text perplexity"] = perplexity(model, processor, [text for text in texts if text.strip()])
    if "pseudo" in measures.figures:
        model.config.use_pseudo_image_features = True
        title = "accuracy, pseudo image features"
        figures |= _accuracy(title, model, processor, asked["accuracy"], features, measures, details)
    return figures, details, others


def _accuracy(title: str, model, processor, questions, features, measures: EvaluateConfig, details: dict):
    answers = answer_all(model, processor, questions, features, measures.batch_size, measures.max_new_tokens)
    scores = score_answers(questions, answers, measures.scorer)
    details[title] = {"answers": answers, "scores": scores}
    groups = by_kind(questions)
    found = {title: sum(scores) / len(scores)}
    if len(groups) > 1 and title == "accuracy":
        for kind, chosen in groups.items():
            if kind != "all":
                found[f"{title}: {kind}"] = sum(scores[i] for i in chosen) / len(chosen)
    return found


def answer_all(model, processor, questions, features: dict, batch_size: int, max_new_tokens: int) -> list[str]:
    """As `answers.answer`, from features that were computed before; `images` of the questions are keys of these."""
    return answers_and_probabilities(model, processor, questions, features, batch_size, max_new_tokens)[0]


def answers_and_probabilities(
    model, processor, questions: list[dict], features: dict, batch_size: int, max_new_tokens: int
) -> tuple[list[str], list[float]]:
    """As [`answer_all`], and the model's own probability of each answer: the product over its tokens and its end."""
    order, found = asking_order(questions), [("", 0.0)] * len(questions)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        texts, probabilities = _answer_batch(model, processor, [questions[i] for i in batch], features, max_new_tokens)
        for i, *own in zip(batch, texts, probabilities, strict=True):
            found[i] = tuple(own)
    return [text for text, _ in found], [probability for _, probability in found]


def _prompts(processor, questions: list[dict], num_patches: int, device):
    """Token ids and attention mask of the questions, image tokens for the patches in them; padding is on the left."""
    texts = processor.apply_chat_template(
        [conversation({**question, "images": [None] * len(question["images"])}) for question in questions],
        add_generation_prompt=True,
        tokenize=False,
    )
    inputs = processor.tokenizer(
        [text.replace(processor.image_token, processor.image_token * num_patches) for text in texts],
        add_special_tokens=not starts_with_bos(processor.tokenizer, texts[0]),
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    return inputs["input_ids"].to(device), inputs["attention_mask"].to(device)


@torch.inference_mode()
def _answer_batch(model, processor, questions: list[dict], features: dict, max_new_tokens: int):
    num_patches = len(next(iter(features.values())))
    ids, attention_mask = _prompts(processor, questions, num_patches, model.device)
    mask = model.model.get_image_token_mask(ids, None)
    inputs_embeds = model.get_input_embeddings()(ids.masked_fill(mask, 0))
    images = [features[key] for question in questions for key in question["images"]]
    if images:
        encoded = model.model.get_image_features(vision_features=torch.stack(images).to(model.device, model.dtype))
        inputs_embeds = inputs_embeds.masked_scatter(mask.unsqueeze(-1), torch.cat(list(encoded.pooler_output)))
    found = model.generate(
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    words, ends = found.sequences, torch.tensor(model.generation_config.eos_token_id, device=model.device)
    over = torch.isin(words, ends).cumsum(1).roll(1, 1)  # what stands behind the end is padding
    over[:, 0] = 0
    steps = zip(found.logits, words.T, strict=True)
    logprobs = [logits.float().log_softmax(-1).gather(1, word[:, None])[:, 0] for logits, word in steps]
    logprobs = torch.stack(logprobs, 1).masked_fill(over > 0, 0.0)
    texts = [text.strip() for text in processor.batch_decode(words, skip_special_tokens=True)]
    return texts, logprobs.sum(1).exp().tolist()


@torch.inference_mode()
def visual_figures(model, processor, features: list[torch.Tensor], batch_size: int) -> dict[str, float]:
    """
    Mean visual losses in both directions and entropies, in nats per patch, of images with the features `features`.

    Each stands at the start of a user's turn of its own; attention is causal, so that no question would change this.
    """
    totals = {}
    for start in range(0, len(features), batch_size):
        batch = torch.stack(features[start : start + batch_size]).to(model.device, model.dtype)
        ids, attention_mask = _prompts(processor, [{"images": [None], "question": ""}], batch.shape[1], model.device)
        inputs = {"input_ids": ids.expand(len(batch), -1), "attention_mask": attention_mask.expand(len(batch), -1)}
        for student in ("vm_head", "lm_head"):
            sums = model(**inputs, vision_features=batch, return_loss_sums=True, visual_student=student).loss_sums
            found = {student: sums["visual_loss"], "number": sums["num_visual_targets"], **sums["visual_tokens"]}
            for name, value in found.items():
                totals[name] = totals.get(name, 0) + value.double()
    number = totals["number"] / 2
    return {
        "visual loss of stage III, KL(q‖p)": (totals["vm_head"] / number).item(),
        "visual loss of stage IV, KL(p‖q)": (totals["lm_head"] / number).item(),
        "entropy of visual tokens": (totals["entropy"] / totals["num_patches"]).item(),
        "entropy of their mean": torch.special.entr(totals["probability"] / totals["num_patches"]).sum().item(),
    }


@torch.inference_mode()
def perplexity(model, processor, texts: list[str], batch_size: int = 32) -> float:
    """exp of the mean loss per token over all texts, each by itself and cut where the decoder's positions end."""
    tokenizer, loss, number = processor.tokenizer, 0.0, 0
    longest = getattr(model.config.text_config, "max_position_embeddings", None)
    encoded = sorted((tokenizer(text)["input_ids"][:longest] for text in texts), key=len)
    for start in range(0, len(encoded), batch_size):
        batch = encoded[start : start + batch_size]
        length = max(map(len, batch))
        labels = torch.tensor([ids + [-100] * (length - len(ids)) for ids in batch], device=model.device)
        mask = labels != -100
        inputs = {"input_ids": labels.masked_fill(~mask, 0), "attention_mask": mask.long()}
        sums = model(**inputs, labels=labels, return_loss_sums=True).loss_sums
        loss, number = loss + sums["lm_loss"].item(), number + sums["num_lm_targets"].item()
    return math.exp(loss / number)


def save_details(path: Path, held_out: HeldOut, details: dict) -> None:
    """The answers and scores of one run, and to which images each belongs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    clusters = [image_cluster(question) for question in held_out.questions]
    text = json.dumps({"clusters": clusters, "figures": details}, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
