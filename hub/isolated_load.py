# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Load a model in a process that cannot import this package, so that all code comes from the model's folder.

[`run_without_package`] starts the process. `vtlmm verify` runs the text of this file in it, so this file imports
nothing from this package.
"""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from transformers import AutoConfig, AutoProcessor, pipeline


# A locally registered class takes precedence over the folder's class, so the package must not be importable.
HIDE_PACKAGE = """
import importlib.abc, sys

class NotInstalled(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if path is None and name in ("modeling_vtlmm", "vtlmm"):
            raise ImportError(f"{name} is hidden in this process")

sys.meta_path.insert(0, NotInstalled())
"""
QUESTION = "What is in this image?"
# Largest difference of logits relative to the largest logit. Other machines sum in another order.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# Precedes the result on stdout, since libraries print too.
MARK = "RESULT OF VTLMM VERIFY "


def run_without_package(
    code: str, *arguments: str | Path, folder: str | Path, input: str | None = None, offline: bool = True
) -> subprocess.CompletedProcess[str]:
    r"""
    Run Python code in a process that cannot import `vtlmm` and `modeling_vtlmm`.

    Args:
        code (`str`): Python code.
        arguments (`str` or `Path`): become `sys.argv[1:]`.
        folder (`str` or `Path`): working directory, and cache of remote code. It should be empty, so that cached code
            of another model with the same name is not used.
        input (`str`, *optional*): standard input.
        offline (`bool`, *optional*, defaults to `True`): whether the Hub may not be used.
    """
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder)}
    if offline:
        environment["HF_HUB_OFFLINE"] = "1"
    command = [sys.executable, "-c", HIDE_PACKAGE + code, *map(str, arguments)]
    return subprocess.run(command, input=input, capture_output=True, text=True, env=environment, cwd=folder)


def question() -> list[dict[str, Any]]:
    """Return a conversation of one turn about a generated image that contains many colors."""
    gradient = Image.linear_gradient("L")
    image = Image.merge("RGB", (gradient, Image.radial_gradient("L"), gradient.transpose(Image.Transpose.ROTATE_90)))
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]}]


@torch.no_grad()
def probe(model: Any, processor: Any) -> dict[str, Any]:
    r"""
    Return the logits of `model` for [`question`], to six digits.

    Returns:
        `dict`: `input_ids`; `logits` `(vocab_size,)` of the first token of the answer; of a VT-LMM `visual_logits`
        `(visual_vocab_size,)`, the mean over the patches. So every row of both heads is checked.
    """
    inputs = processor.apply_chat_template(
        question(), tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    input_ids = inputs["input_ids"][0].tolist()
    inputs = inputs.to(model.device, model.dtype)
    is_vtlmm = model.config.model_type == "vtlmm"
    outputs = model.eval()(**inputs, **({"output_visual_logits": True} if is_vtlmm else {}))
    logits = {"logits": outputs.logits[0, -1]}
    if is_vtlmm:
        logits["visual_logits"] = outputs.visual_logits.float().mean(0)
    return {"input_ids": input_ids} | {k: [float(f"{x:.6g}") for x in v.float().tolist()] for k, v in logits.items()}


def differences(values: dict[str, Any], recorded: dict[str, Any], dtype: torch.dtype) -> list[str]:
    """Return how the result of a [`probe`] differs from the recorded one. An exported LLaVA may have more tokens."""
    if values["input_ids"] != recorded["input_ids"]:
        return ["the token ids of the recorded question differ: the tokenizer or the chat template was changed"]
    problems = []
    for name in ("logits", "visual_logits"):
        if name not in recorded:
            continue
        expected = torch.tensor(recorded[name])
        logits = torch.tensor(values.get(name, []))[: len(expected)]
        if logits.shape != expected.shape:
            problems.append(f"{name}: {len(logits)} values, but {len(expected)} were recorded")
            continue
        difference, largest = (logits - expected).abs().max().item(), expected.abs().max().item()
        if not difference <= TOLERANCE.get(dtype, 5e-2) * largest:  # NaN is a difference too
            problems.append(
                f"{name} differ from the recorded ones by up to {difference:.2g} of {largest:.2g}: a weight, the code "
                "or the image preprocessing was changed"
            )
    return problems


def load(task: dict[str, Any]) -> list[str]:
    r"""
    Load a model by each Auto class and by the pipeline.

    Args:
        task (`dict`): `name`, `revision`, `trust_remote_code`, `classes` (names of Auto classes) and `recorded` (the
            result of [`probe`], or None).

    Returns:
        `list[str]`: the problems.
    """
    name, recorded, problems = task["name"], task["recorded"], []
    options = {"revision": task["revision"], "trust_remote_code": task["trust_remote_code"]}

    def attempt(what: str, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:  # any error that a user would get
            lines = str(error).strip().splitlines() or [""]
            problems.append(f"{what}: {type(error).__name__}: {lines[0]}")

    config = attempt("AutoConfig", lambda: AutoConfig.from_pretrained(name, **options))
    processor = attempt("AutoProcessor", lambda: AutoProcessor.from_pretrained(name, **options))

    def load_model(auto_class: str) -> Any:
        loader = getattr(transformers, auto_class)
        model, info = loader.from_pretrained(name, dtype="auto", output_loading_info=True, **options)
        wrong = {kind: keys for kind, keys in info.items() if keys}
        problems.extend(f"{auto_class}: {kind}: {', '.join(map(str, keys))}" for kind, keys in wrong.items())
        return model

    for auto_class in task["classes"]:
        model = attempt(auto_class, lambda auto_class=auto_class: load_model(auto_class))  # type: ignore[misc]
        if model is not None and processor is not None and recorded is not None:
            values = attempt(auto_class, lambda model=model: probe(model, processor))  # type: ignore[misc]
            problems.extend(differences(values, recorded, model.dtype) if values else [])
            recorded = None  # one comparison is enough
        del model
        gc.collect()

    def ask() -> str:
        # On the CPU like the classes above, since a GPU may be too small. Quantized models choose their device.
        device = None if getattr(config, "quantization_config", None) else "cpu"
        answer: Any = pipeline("image-text-to-text", model=name, dtype="auto", device=device, **options)
        return answer(text=question(), max_new_tokens=2, do_sample=False)[0]["generated_text"][-1]["content"]

    attempt("pipeline", ask)
    return problems


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    gc.freeze()  # the imported modules; otherwise each collection in `load` visits them for 0.3 s
    print(MARK + json.dumps(load(json.loads(sys.stdin.read()))))
