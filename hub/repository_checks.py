# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Checks of the files in a repository. Each check returns problems; a problem starts with the file at fault."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from transformers import GenerationConfig
from transformers.dynamic_module_utils import get_relative_imports

from modeling_vtlmm import VTLMMConfig
from modeling_vtlmm.configuration_vtlmm import AUTO_MAP
from vtlmm.data.json_files import read_json, require_type

from .checkpoint_files import check_tensors, list_tensors, model_without_weights, without_quantization_state
from .gguf_file import import_gguf
from .repository import ADAPTER, CARD_FILE, CHECK_FILE, GGUF, LIBRARIES, LLAVA, VTLMM, is_hub_id


MAX_SHARD_BYTES = 5 * 10**9
PROCESSOR_FILES = ("processor_config.json", "tokenizer_config.json", "tokenizer.json")
Check = Callable[[Path, list[str], dict[str, Any]], Iterator[str]]


CONFIG_FILES = (
    *("config.json", "generation_config.json", "adapter_config.json", "processor_config.json"),
    *("preprocessor_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    "model.safetensors.index.json",
)
JSON_ENTRIES: dict[str, dict[str, type]] = {
    "config.json": {"text_config": dict, "vision_config": dict, "auto_map": dict},
    "processor_config.json": {"auto_map": dict},
    "model.safetensors.index.json": {"weight_map": dict},
    CHECK_FILE: {"input_ids": list, "logits": list, "visual_logits": list},
}


def check_json(folder: Path, files: list[str]) -> Iterator[str]:
    """Check that the JSON files are objects, whose entries in `JSON_ENTRIES`, if present, have the right type."""
    for file in files:
        if not file.endswith(".json") or "/" in file:  # `write_card` reads the results
            continue
        try:
            values = read_json(folder / file)
            entries = {name: kind for name, kind in JSON_ENTRIES.get(file, {}).items() if name in values}
            require_type(values, dict, file, entries)
            for name in entries if file == CHECK_FILE else ():
                for value in values[name]:
                    require_type(value, (int, float), f"{file}, `{name}`")
        except ValueError as error:
            yield f"{file}: {str(error).removeprefix(f'{folder}/').removeprefix(file).removeprefix(':').strip()}"


def require_json(folder: str | Path) -> None:
    """
    Check the JSON files of a model before transformers reads them. Its errors do not name a file of a wrong type.

    Raises:
        `ValueError`: naming the first damaged file. Nothing happens for a Hub id.
    """
    files = [name for name in CONFIG_FILES if Path(folder, name).is_file()]
    for problem in check_json(Path(folder), files):
        raise ValueError(f"{folder}/{problem}")


def check_weights(folder: Path, files: list[str], kind: str) -> tuple[int, list[str]]:
    """Return the number of parameters in the safetensors files of `folder`, and the problems of these files."""
    if kind == GGUF:
        return check_gguf(folder, files)
    shards = [file for file in files if file.endswith(".safetensors")]
    if kind == ADAPTER:
        return 0, [] if "adapter_model.safetensors" in shards else ["adapter_model.safetensors: missing"]
    if not shards:
        return 0, ["model.safetensors: missing, and no shards were found"]
    problems = []
    for file in shards:
        size = (folder / file).stat().st_size
        if size > MAX_SHARD_BYTES:
            problems.append(f"{file}: {size / 1e9:.1f} GB; save the model with `max_shard_size='5GB'`")
    try:
        tensors = without_quantization_state(list_tensors(folder))
        unused = sorted({*shards} - {tensor.file.relative_to(folder).as_posix() for tensor in tensors.values()})
        problems += [f"{file}: the index does not name this file; remove it" for file in unused]
        if kind == VTLMM:
            check_tensors(dict(tensors), model_without_weights(VTLMMConfig.from_pretrained(folder)), folder)
    except ValueError as error:
        return 0, [*problems, f"weights: {error}"]
    return sum(tensor.meta.numel() for tensor in tensors.values()), problems


def check_gguf(folder: Path, files: list[str]) -> tuple[int, list[str]]:
    """Return the number of parameters in the GGUF files of `folder`, and the problems of these files."""
    gguf_files = [file for file in files if file.endswith(".gguf")]
    expected = {file.replace("mmproj-", "model-") for file in gguf_files if file.startswith("mmproj-")}
    problems = [f"{file}: missing, the decoder of the mmproj file" for file in sorted(expected - {*gguf_files})]
    if "Modelfile" not in files:
        problems.append("Modelfile: missing; `vtlmm export --to gguf` writes it")
    num_parameters = 0
    for file in gguf_files:
        try:
            tensors = import_gguf().GGUFReader(folder / file).tensors
        except (ValueError, IndexError, KeyError, OSError) as error:
            problems.append(f"{file}: cannot be read: {error}")
            continue
        num_parameters += sum(int(tensor.n_elements) for tensor in tensors)
    return num_parameters, problems


def check_code(folder: Path, files: list[str], config: dict[str, Any]) -> Iterator[str]:
    """Check the entries of each `auto_map`, the files and classes that they name, and the files that those import."""
    maps = {"config.json": AUTO_MAP, "processor_config.json": {"AutoProcessor": AUTO_MAP["AutoProcessor"]}}
    for file, expected in maps.items():
        if file not in files:
            continue
        auto_map = read_json(folder / file).get("auto_map", {})
        for name, target in expected.items():
            if auto_map.get(name) != target:
                yield f"{file}: `auto_map` must map {name} to {target}, but has {auto_map.get(name)}"
    modules = list(dict.fromkeys(target.split(".")[0] for target in AUTO_MAP.values()))
    for module in modules:  # the list grows while it is read
        if f"{module}.py" not in files:
            yield f"{module}.py: this code file is missing; `save_pretrained` of the model writes it"
            continue
        modules += [name for name in get_relative_imports(folder / f"{module}.py") if name not in modules]
        text = (folder / f"{module}.py").read_text(encoding="utf-8")
        for target in sorted(set(AUTO_MAP.values())):
            file, name = target.split(".")
            if file == module and not re.search(rf"class {name}\(", text):
                yield f"{module}.py: the class {name}, which `auto_map` names, is missing"


def check_processor(folder: Path, files: list[str], config: dict[str, Any]) -> Iterator[str]:
    """Check that processor, tokenizer and chat template are there."""
    for file in PROCESSOR_FILES:
        if file not in files:
            yield f"{file}: missing; `save_pretrained` of the processor writes it"
    if "chat_template.jinja" not in files:
        yield "chat_template.jinja: missing; without it prompts differ from those in training"
    elif "message" not in (folder / "chat_template.jinja").read_text(encoding="utf-8"):
        yield "chat_template.jinja: the template does not use the messages"


def check_generation(folder: Path, files: list[str], config: dict[str, Any]) -> Iterator[str]:
    """Check that generation stops at an existing token."""
    file = "generation_config.json"
    if file not in files:
        yield f"{file}: missing; without it answers do not end"
        return
    try:
        generation = GenerationConfig.from_pretrained(folder)
        generation.validate(strict=True)
    except (ValueError, OSError) as error:
        yield f"{file}: {str(error).splitlines()[0]}"
        return
    vocab_size = config.get("text_config", {}).get("vocab_size", 32000)
    if generation.eos_token_id is None:
        yield f"{file}: `eos_token_id` is missing; without it answers do not end"
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = getattr(generation, name)
        for token_id in ids if isinstance(ids, list) else [ids]:
            if token_id is not None and not 0 <= token_id < vocab_size:
                yield f"{file}: `{name}` is {token_id}, but the vocabulary has {vocab_size} tokens"


def check_base(folder: Path, files: list[str], config: dict[str, Any]) -> Iterator[str]:
    """Check that an adapter names a base model on the Hub."""
    base = config.get("base_model_name_or_path")
    if not is_hub_id(base):
        yield (
            f"adapter_config.json: the base model {base!r} is not a Hub id; train with `base_id: user/name`, or set "
            "`base_model_name_or_path`"
        )


def check_card(folder: Path, files: list[str], kind: str) -> Iterator[str]:
    """Check the front matter of the model card and the evaluation results, as the Hub's client reads them."""
    try:
        data = ModelCard.load(folder / CARD_FILE).data
    except (ValueError, TypeError, yaml.YAMLError) as error:
        yield f"{CARD_FILE}: the front matter is invalid: {' '.join(str(error).split())}"
        return
    for name, expected in (("library_name", LIBRARIES[kind]), ("pipeline_tag", "image-text-to-text")):
        if data.get(name) != expected:
            yield f"{CARD_FILE}: `{name}` in the front matter is {data.get(name)!r}; it must be {expected!r}"
    bases = data.get("base_model") or []
    for base in [bases] if isinstance(bases, str) else bases:
        if not is_hub_id(base):
            yield f"{CARD_FILE}: the base model {base!r} is not a Hub id"
    for file in files:
        if file.startswith(".eval_results/"):
            try:
                parse_eval_result_entries(yaml.safe_load((folder / file).read_text(encoding="utf-8")))
            except (ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
                yield f"{file}: not a list of evaluation results: {' '.join(str(error).split())}"


def has_license(folder: Path) -> bool:
    """Return whether the front matter of the card names a license. An invalid card is reported by [`check_card`]."""
    try:
        return bool(ModelCard.load(folder / CARD_FILE, ignore_metadata_errors=True).data.get("license"))
    except (ValueError, TypeError, yaml.YAMLError):
        return True


MODEL_CHECKS: dict[str, tuple[Check, ...]] = {
    VTLMM: (check_code, check_processor, check_generation),
    LLAVA: (check_processor, check_generation),
    ADAPTER: (check_base, check_processor),
    GGUF: (),
}
