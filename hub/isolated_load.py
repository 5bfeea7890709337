# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""What `vtlmm verify` runs in a process of its own, where this package cannot be imported.

The text of this file is handed to `python -c`: it imports nothing of ours.
"""

import gc
import importlib.abc
import json
import sys

import torch
import transformers
from PIL import Image
from transformers import AutoConfig, AutoProcessor, pipeline


QUESTION = "What is in this image?"
# Largest difference of two logits beside the largest logit: other machines add in another order.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# What is printed before the answer, since libraries print too.
MARK = "FOUND BY VTLMM VERIFY "


class NotInstalled(importlib.abc.MetaPathFinder):
    """Hides this package: a class that is registered locally wins over the folder's own."""

    def find_spec(self, name, path=None, target=None):
        if path is None and name in ("modeling_vtlmm", "vtlmm"):
            raise ImportError(f"{name} is not to be used here")


def question() -> list[dict]:
    """One turn about a image that is the same everywhere, in all colors."""
    gradient = Image.linear_gradient("L")
    image = Image.merge("RGB", (gradient, Image.radial_gradient("L"), gradient.transpose(Image.Transpose.ROTATE_90)))
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]}]


@torch.no_grad()
def probe(model, processor) -> dict:
    r"""
    What `model` says to [`question`], to six digits.

    Returns:
        `dict`: `input_ids`; `logits` of the first word of the answer; of a VT-LMM `visual_logits`, the mean over the
        patches. Every row of both heads takes part.
    """
    inputs = processor.apply_chat_template(
        question(), tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    input_ids = inputs["input_ids"][0].tolist()
    inputs = inputs.to(model.device, model.dtype)
    is_vtlmm = model.config.model_type == "vtlmm"
    outputs = model.eval()(**inputs, **({"output_visual_logits": True} if is_vtlmm else {}))
    found = {"logits": outputs.logits[0, -1]}
    if is_vtlmm:
        found["visual_logits"] = outputs.visual_logits.float().mean(0)
    return {"input_ids": input_ids} | {k: [float(f"{x:.6g}") for x in v.float().tolist()] for k, v in found.items()}


def differences(found: dict, recorded: dict, dtype: torch.dtype) -> list[str]:
    """In words, where a [`probe`] differs from the one that was recorded. A twin may have more words."""
    if found["input_ids"] != recorded["input_ids"]:
        return ["the processor makes other tokens of the recorded question: tokenizer or chat template were changed"]
    problems = []
    for name in ("logits", "visual_logits"):
        if name not in recorded:
            continue
        expected = torch.tensor(recorded[name])
        values = torch.tensor(found.get(name, []))[: len(expected)]
        if values.shape != expected.shape:
            problems.append(f"{len(values)} {name}, but {len(expected)} were recorded")
            continue
        difference, size = (values - expected).abs().max().item(), expected.abs().max().item()
        if not difference <= TOLERANCE.get(dtype, 5e-2) * size:  # not a number differs too
            problems.append(
                f"{name} differ from the recorded ones by up to {difference:.2g} of {size:.2g}: a weight, the code or "
                "what is done to a image was changed"
            )
    return problems


def load(task: dict) -> list[str]:
    """Everything that a user would load, by `task`: name, revision, classes, recorded. Gives the problems."""
    name = task["name"]
    options = {"revision": task["revision"], "trust_remote_code": task["trust_remote_code"]}
    problems, recorded, processor = [], task["recorded"], None

    def attempt(what, action):
        try:
            return action()
        except Exception as error:  # whatever stops a user
            lines = str(error).strip().splitlines() or [""]
            problems.append(f"{what}: {type(error).__name__}: {lines[0]}")

    config = attempt("AutoConfig", lambda: AutoConfig.from_pretrained(name, **options))
    processor = attempt("AutoProcessor", lambda: AutoProcessor.from_pretrained(name, **options))

    def load_model(auto_class):
        loader = getattr(transformers, auto_class)
        model, info = loader.from_pretrained(name, dtype="auto", output_loading_info=True, **options)
        wrong = {kind: keys for kind, keys in info.items() if keys}
        problems.extend(f"{auto_class}: {kind}: {', '.join(map(str, keys))}" for kind, keys in wrong.items())
        return model

    for auto_class in task["classes"]:
        model = attempt(auto_class, lambda auto_class=auto_class: load_model(auto_class))
        if model is not None and processor is not None and recorded is not None:
            found = attempt(auto_class, lambda model=model: probe(model, processor))
            problems.extend(differences(found, recorded, model.dtype) if found else [])
            recorded = None  # once is enough
        del model
        gc.collect()

    def ask():
        # As the classes above: a GPU may be too small for what is right. Quantised weights choose their own place.
        device = None if getattr(config, "quantization_config", None) else "cpu"
        answer = pipeline("image-text-to-text", model=name, dtype="auto", device=device, **options)
        return answer(text=question(), max_new_tokens=2, do_sample=False)[0]["generated_text"][-1]["content"]

    attempt("pipeline", ask)
    return problems


if __name__ == "__main__":
    sys.meta_path.insert(0, NotInstalled())
    transformers.utils.logging.set_verbosity_error()
    print(MARK + json.dumps(load(json.loads(sys.stdin.read()))))
