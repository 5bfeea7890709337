# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The kinds of models that a Hub repository can hold, and the files of a folder that are published."""

import fnmatch
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import modeling_vtlmm
from vtlmm.data.json_files import read_json, require_type


CARD_FILE, CHECK_FILE, RUN_RECORD = "README.md", "vtlmm_check.json", "vtlmm_run.json"
LICENSE_FILE, RESULTS_FOLDER = "LICENSE", "results"
PATCH_WORDS_FOLDER, PATCH_WORDS_FILE = "patch_words", "patch_words.png"  # of a training, and of the model card
HANDLER_FILE = "handler.py"  # of Inference Endpoints; a copy of the module of this name in this folder
ADAPTER_SETTINGS = "vtlmm_adapter.json"  # what the training of an adapter changed in the config of its base
VTLMM, LLAVA, ADAPTER, GGUF = "vtlmm", "llava", "adapter", "gguf"
# The Hub's `library_name` of each kind.
LIBRARIES = {VTLMM: "transformers", LLAVA: "transformers", ADAPTER: "peft", GGUF: "gguf"}

# Only files that match are published. Images are published if the model card shows them.
PUBLISHED = (
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"),
    *("model-*.gguf", "mmproj-*.gguf", "Modelfile"),
    *("config.json", "generation_config.json", "adapter_config.json", ADAPTER_SETTINGS),
    *("processor_config.json", "preprocessor_config.json", "chat_template.jinja", "tokenizer.json"),
    *("tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "*_vtlmm.py", HANDLER_FILE, CARD_FILE, CHECK_FILE, LICENSE_FILE, "LICENSE.txt", "LICENSE.md"),
    *("NOTICE", "NOTICE.txt", "NOTICE.md", f"{RESULTS_FOLDER}/*.json", ".eval_results/*.yaml"),
)
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5")


def checkpoint_kind(folder: Path) -> tuple[str, dict[str, Any]]:
    r"""
    Return the kind of model in `folder` and its `config.json` or `adapter_config.json`.

    Returns:
        `tuple`: `"vtlmm"`, `"llava"`, `"adapter"` or `"gguf"`, and the configuration, which is empty for GGUF files.

    Raises:
        `ValueError`: if the folder contains no model, or a model of another kind.
    """
    for file in ("adapter_config.json", "config.json"):
        if (folder / file).is_file():
            values = read_json(folder / file)
            kind = ADAPTER if file == "adapter_config.json" else values.get("model_type")
            if kind not in (VTLMM, LLAVA, ADAPTER):
                raise ValueError(f"{folder}/{file}: `model_type` is {kind!r}; it must be 'vtlmm' or 'llava'.")
            return kind, values
    if any(folder.glob("mmproj-*.gguf")):
        return GGUF, {}
    raise ValueError(f"'{folder}' contains no model: config.json and adapter_config.json are missing.")


def list_published_files(folder: Path, include: Sequence[str] = (), follow_links: bool = True) -> list[str]:
    r"""
    Return the names of the files in `folder` that are published, sorted.

    These are weights, configuration, tokenizer, processor, code, model card with its images, results and license. All
    other files stay on this machine.

    Args:
        include (`list[str]`, *optional*): glob patterns of further files. Hidden files and pickles never match.
        follow_links (`bool`, *optional*, defaults to `True`): whether symbolic links count as files.
    """
    names = {file.relative_to(folder).as_posix() for pattern in PUBLISHED for file in folder.glob(pattern)}
    card = folder / CARD_FILE
    if card.is_file():
        names |= {name for name in card_images(card.read_text(encoding="utf-8")) if (folder / name).is_file()}
    for pattern in include:
        for file in folder.glob(pattern):
            name = file.relative_to(folder)
            if not any(part.startswith(".") for part in name.parts) and file.suffix not in PICKLES:
                names.add(name.as_posix())
    return sorted(name for name in names if (folder / name).is_file() and (follow_links or not is_link(folder, name)))


def is_link(folder: Path, name: str) -> bool:
    """Return whether `name` or one of its parent folders inside `folder` is a symbolic link."""
    path = folder / name
    return path.is_symlink() or any((folder / parent).is_symlink() for parent in Path(name).parents)


def card_images(card: str) -> list[str]:
    """Return the names of the local PNG and JPEG files at the top level that a model card shows."""
    targets = (unquote(target) for target in re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", card))
    return [name for name in targets if "/" not in name and name.lower().endswith((".png", ".jpg", ".jpeg"))]


def foreign_code(folder: Path) -> list[str]:
    r"""
    Return which files in `folder` would run code that differs from the installed package, one line each.

    Loading with `trust_remote_code=True` runs the modules that an `auto_map` names. That is safe if each is equal to
    the installed module of the same name and no `auto_map` names a module elsewhere.
    """
    installed = {file.name: file.read_bytes() for file in Path(modeling_vtlmm.__file__).parent.glob("*_vtlmm.py")}
    installed[HANDLER_FILE] = Path(__file__).with_name(HANDLER_FILE).read_bytes()
    problems = [
        f"{file.name} differs from the installed package" if file.name in installed else f"{file.name} is unknown"
        for file in sorted(folder.glob("*.py"))
        if file.read_bytes() != installed.get(file.name)
    ]
    for config in sorted(folder.glob("*.json")):
        try:
            targets = list(_code_targets(json.loads(config.read_text(encoding="utf-8"))))
        except ValueError:  # a damaged file names no code; `check_json` reports it
            continue
        for target in targets:
            if f"{target.split('.')[0]}.py" not in installed:
                problems.append(f"{config.name} names the code {target}")
    return problems


def _code_targets(values: Any) -> Iterator[str]:
    """Yield each module path that an `auto_map` or `custom_pipelines` anywhere in `values` names."""
    if isinstance(values, dict):
        for key, value in values.items():
            if key in ("auto_map", "custom_pipelines"):
                yield from (text for text in _texts(value) if "." in text or "--" in text)
            else:
                yield from _code_targets(value)
    elif isinstance(values, list):
        for value in values:
            yield from _code_targets(value)


def _texts(values: Any) -> Iterator[str]:
    if isinstance(values, str):
        yield values
    elif isinstance(values, (dict, list)):
        for value in values.values() if isinstance(values, dict) else values:
            yield from _texts(value)


def is_hub_id(name: object) -> bool:
    """Return whether `name` has the form `user/name` and is not a local file or folder."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", name):
        return False
    return not Path(name).exists() and Path(name).suffix not in (".json", ".jsonl", ".parquet", ".yaml", ".csv")


def read_run_record(folder: str | Path) -> list[dict[str, Any]]:
    """
    Return the entries of `vtlmm_run.json` in a folder, one for each stage; an empty list without a record.

    Raises:
        `ValueError`: if the file is damaged. It names the file.
    """
    path = Path(folder, RUN_RECORD)
    entries = read_json(path, list) if path.is_file() else []
    for number, entry in enumerate(entries):
        require_type(entry, dict, f"{path}, entry {number}", {"stage": str, "settings": dict})
    return entries


def adapter_record(adapter: str | Path) -> list[dict[str, Any]]:
    """Return the run record of an adapter. The record of a checkpoint is in its parent folder."""
    return read_run_record(adapter) or read_run_record(Path(adapter).resolve().parent)


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Return whether a file name matches one of `patterns`."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
