# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Processes that tests start: with the helpers, or without this package."""

import json
import os
import textwrap
from pathlib import Path

from vtlmm.hub.isolated_load import run_without_package


LOAD = textwrap.dedent(
    """
    import json
    import torch
    import transformers
    from PIL import Image
    from transformers import AutoConfig, AutoProcessor, pipeline

    folder, again = sys.argv[1:]
    trust = {"trust_remote_code": True}
    found = {"config": type(AutoConfig.from_pretrained(folder, **trust)).__name__}
    processor = AutoProcessor.from_pretrained(folder, **trust)
    image = Image.new("RGB", (40, 30), (200, 30, 30))
    content = [{"type": "image", "image": image}, {"type": "text", "text": "what is it"}]
    messages = [{"role": "user", "content": content}]
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    for name in ("AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModelForCausalLM"):
        model = getattr(transformers, name).from_pretrained(folder, **trust)
        assert not type(model).__module__.startswith("modeling_vtlmm"), type(model).__module__
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        found[name] = ids[0, -4:].tolist()
    found["logits"] = model(**inputs).logits[0, -1].tolist()
    asked = pipeline("image-text-to-text", model=folder, **trust)(text=messages, max_new_tokens=4, do_sample=False)
    found["pipeline"] = asked[0]["generated_text"][-1]["content"]
    found["decoded"] = processor.decode(ids[0, -4:], skip_special_tokens=True)
    model.save_pretrained(again)
    processor.save_pretrained(again)
    print("FOUND" + json.dumps(found))
    """
)


def in_clean_process(code: str, *arguments, cache) -> dict:
    result = run_without_package(code, *arguments, folder=cache)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.split("FOUND")[-1])


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a process that imports the helpers and the package of this checkout."""
    tests = Path(__file__).parents[1]
    return {**os.environ, "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}", **more}
