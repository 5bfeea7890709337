# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""A Space with the page of `vtlmm app` for a model on the Hub."""

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi

from .hub_client import hub_errors


README = """---
title: {title}
sdk: gradio
sdk_version: {gradio}
app_file: app.py
pinned: false
models: [{model}]
---

Chat about an image and see the words of its patches. The model is [{model}](https://huggingface.co/{model}).
"""
APP = '''"""The page of `vtlmm app` for one model."""

from vtlmm import load_model
from vtlmm.analysis.app import build_page, launch

MODEL = {model}

if __name__ == "__main__":
    page = build_page(*load_model(MODEL, trust_remote_code=True), MODEL, max_new_tokens=256)
    launch(page, "0.0.0.0", 7860)
'''
GRADIO = "6.0.0"  # if gradio is not installed here


def space_files(model: str, title: str) -> dict[str, str]:
    """Return the text of each file of a Space for the model with the Hub id `model`."""
    try:
        gradio = version("gradio")
    except PackageNotFoundError:
        gradio = GRADIO
    return {
        "README.md": README.format(title=json.dumps(title), gradio=gradio, model=model),
        "requirements.txt": f"vtlmm[app]>={version('vtlmm')}\n",
        "app.py": APP.format(model=json.dumps(model)),
    }


def write_space(folder: str | Path, model: str, title: str) -> None:
    """Write the files of [`space_files`] to `folder`, to look at them or to run `app.py` on this machine."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, text in space_files(model, title).items():
        Path(folder, name).write_text(text, encoding="utf-8")


def push_space(space_id: str, model: str, private: bool | None = None) -> str:
    """
    Write the Space `space_id` for a model on the Hub in one commit and return the URL of the commit.

    A private model needs the secret `HF_TOKEN` in the settings of the Space.

    Raises:
        `ValueError`: if the Hub rejects the push.
    """
    api, files = HfApi(), space_files(model, title=space_id.partition("/")[2])
    with hub_errors(space_id):
        api.create_repo(space_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
        commit = api.create_commit(
            space_id,
            [CommitOperationAdd(path_in_repo=name, path_or_fileobj=text.encode()) for name, text in files.items()],
            commit_message="Write with vtlmm push --space",
            repo_type="space",
        )
    return commit.commit_url
