# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Whether a folder is what a Hub repository should be: looked at, then loaded in a process without this package."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from huggingface_hub.utils import filter_repo_objects
from transformers import GenerationConfig
from transformers.dynamic_module_utils import get_relative_imports

from modeling_vtlmm import VTLMMConfig
from modeling_vtlmm.configuration_vtlmm import AUTO_MAP

from . import isolated_load
from .checkpoint_files import check_tensors, list_tensors, model_without_weights, unpacked
from .paths import local_folder


CARD_FILE = "README.md"
CHECK_FILE = "vtlmm_check.json"
MAX_SHARD_BYTES = 5 * 10**9
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5")
# What training leaves beside the model and nobody loads. The record of the run names folders of the machine; what is
# in it stands in the card.
LEFT_OUT = ["checkpoint-*", "runs/*", "training_args.bin", "trainer_state.json", "vtlmm_run.json", "*__pycache__*"]
LEFT_OUT += [".cache/*", ".git/*", ".gitattributes"]
VTLMM, TWIN, ADAPTER = "vtlmm", "llava", "adapter"
TWIN_CLASSES = ["AutoModelForImageTextToText", "AutoModelForMultimodalLM"]
PROCESSOR_FILES = ("processor_config.json", "tokenizer_config.json", "tokenizer.json")


@dataclass
class VerificationReport:
    """
    What [`verify_checkpoint`] found.

    checkpoint (`str`), kind (`str`: `"vtlmm"`, `"llava"` for a twin, or `"adapter"`), num_files (`int`),
    num_bytes (`int`), num_parameters (`int`), problems (`list[str]`: each names its file or class).
    """

    checkpoint: str
    kind: str
    num_files: int
    num_bytes: int
    num_parameters: int
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def format(self) -> str:
        size = f"{self.num_files} files, {self.num_bytes / 1e9:.3g} GB, {self.num_parameters:,} parameters"
        state = f"{len(self.problems)} problems" if self.problems else "complete"
        return "\n".join([f"{self.checkpoint} ({self.kind}): {size}: {state}", *(f"  {p}" for p in self.problems)])


def verify_checkpoint(
    checkpoint: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> VerificationReport:
    r"""
    Look at everything that the repository of a VT-LMM, a native twin or an adapter should have. When that is in order,
    load it in a process that cannot import this package, by every Auto class and by the pipeline, and compare the
    logits with the recorded ones. An adapter is looked at and not loaded: its base lies elsewhere.

    Args:
        checkpoint (`str` or `Path`): folder or Hub id.
        revision (`str`, *optional*): commit, tag or branch of a Hub id.
        trust_remote_code (`bool`, *optional*, defaults to `False`): needed for a Hub id with code of its own, which
            is run. The code of a folder always is.

    Raises:
        `ValueError`: when there is no such folder or repository, or it holds none of the three.
    """
    folder, is_local = local_folder(checkpoint, revision), Path(checkpoint).is_dir()
    kind, config = kind_of(folder)
    if kind == VTLMM and not is_local and not trust_remote_code:
        raise ValueError(f"Verifying {checkpoint} runs the code in it: read that, then pass --trust-remote-code.")
    files = published_files(folder)
    weights, problems = read_weights(folder, files, kind)
    for check in CHECKS[kind]:
        problems += check(folder, files, config)
    if kind != ADAPTER and problems:
        problems.append("not loaded: first mend what is named above")
    elif kind != ADAPTER:
        # a branch may move on meanwhile: the commit of the snapshot
        where = (str(folder.resolve()), None) if is_local else (str(checkpoint), folder.name)
        problems += load_elsewhere(*where, kind, json.loads((folder / CHECK_FILE).read_text(encoding="utf-8")))
    num_bytes = sum((folder / file).stat().st_size for file in files)
    num_parameters = sum(tensor.meta.numel() for tensor in weights.values())
    return VerificationReport(str(checkpoint), kind, len(files), num_bytes, num_parameters, problems)


def kind_of(folder: Path) -> tuple[str, dict]:
    """What `folder` holds, and its adapter_config.json or config.json."""
    for file in ("adapter_config.json", "config.json"):
        if (folder / file).is_file():
            try:
                values = json.loads((folder / file).read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{folder}/{file} is not JSON: {error}.") from error
            kind = ADAPTER if file == "adapter_config.json" else values.get("model_type")
            if kind not in CHECKS:
                raise ValueError(f"{folder}/{file}: `model_type` is {kind!r}; it must be vtlmm, or llava for a twin.")
            return kind, values
    raise ValueError(f"{folder} has neither config.json nor adapter_config.json: no model is in it.")


def published_files(folder: Path) -> list[str]:
    """Names of the files that belong into a repository, without what training left beside them."""
    files = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    return list(filter_repo_objects(files, ignore_patterns=LEFT_OUT))


# ---- What is looked at. A problem begins with the file at fault ----


def read_weights(folder: Path, files: list[str], kind: str) -> tuple[dict, list[str]]:
    """All tensors by name, and what is wrong with them or their files."""
    problems = [f"{file}: only safetensors are published: remove it" for file in files if file.endswith(PICKLES)]
    shards = [file for file in files if file.endswith(".safetensors")]
    if kind == ADAPTER:
        return {}, problems + ([] if "adapter_model.safetensors" in shards else ["adapter_model.safetensors: missing"])
    if not shards:
        return {}, [*problems, "model.safetensors: missing, and there are no shards of it"]
    for file in shards:
        size = (folder / file).stat().st_size
        if size > MAX_SHARD_BYTES:
            problems.append(f"{file}: {size / 1e9:.1f} GB; save it with `max_shard_size='5GB'`")
    try:
        tensors = unpacked(list_tensors(folder))
        unused = sorted({*shards} - {tensor.file.relative_to(folder).as_posix() for tensor in tensors.values()})
        problems += [f"{file}: the index does not name it: remove it" for file in unused]
        if kind == VTLMM:
            check_tensors(dict(tensors), model_without_weights(VTLMMConfig.from_pretrained(folder)), folder)
    except ValueError as error:
        return {}, [*problems, f"weights: {error}"]
    return tensors, problems


def check_code(folder: Path, files: list[str], config: dict) -> Iterator[str]:
    """The auto_map's entries, the files and classes that they name, and the files that those import."""
    maps = {"config.json": AUTO_MAP, "processor_config.json": {"AutoProcessor": AUTO_MAP["AutoProcessor"]}}
    for file, expected in maps.items():
        found = _read_json(folder / file).get("auto_map", {})
        for name, target in expected.items():
            if found.get(name) != target and file in files:
                yield f"{file}: auto_map should have {name}: {target}, and has {found.get(name)}"
    modules = list(dict.fromkeys(target.split(".")[0] for target in AUTO_MAP.values()))
    for module in modules:  # which grows meanwhile
        if f"{module}.py" not in files:
            yield f"{module}.py: this code file is missing; `save_pretrained` of the model writes them all"
            continue
        modules += [name for name in get_relative_imports(folder / f"{module}.py") if name not in modules]
        text = (folder / f"{module}.py").read_text(encoding="utf-8")
        for target in sorted(set(AUTO_MAP.values())):
            file, name = target.split(".")
            if file == module and f"class {name}(" not in text:
                yield f"{module}.py: the class {name}, which the auto_map names, is not in it"


def check_processor(folder: Path, files: list[str], config: dict) -> Iterator[str]:
    for file in PROCESSOR_FILES:
        if file not in files:
            yield f"{file}: missing; `save_pretrained` of the processor writes it"
    if "chat_template.jinja" not in files:
        yield "chat_template.jinja: missing, so nobody can ask the model as it was trained"
    elif "message" not in (folder / "chat_template.jinja").read_text(encoding="utf-8"):
        yield "chat_template.jinja: it prints no messages"


def check_generation(folder: Path, files: list[str], config: dict) -> Iterator[str]:
    """That answers end, at a token that exists."""
    file = "generation_config.json"
    if file not in files:
        yield f"{file}: missing, so an answer does not end"
        return
    try:
        generation = GenerationConfig.from_pretrained(folder)
        generation.validate(strict=True)
    except (ValueError, OSError) as error:
        yield f"{file}: {str(error).splitlines()[0]}"
        return
    num_words = config.get("text_config", {}).get("vocab_size", 32000)
    if generation.eos_token_id is None:
        yield f"{file}: it has no eos_token_id, so an answer does not end"
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = getattr(generation, name)
        for token_id in ids if isinstance(ids, list) else [ids]:
            if token_id is not None and not 0 <= token_id < num_words:
                yield f"{file}: {name} is {token_id}, and the decoder has {num_words} words"


def check_card(folder: Path, files: list[str], config: dict) -> Iterator[str]:
    """What the Hub reads from the front matter, by its own client's classes."""
    if CARD_FILE not in files:
        yield f"{CARD_FILE}: missing; `vtlmm push` writes it"
        return
    try:
        data = ModelCard.load(folder / CARD_FILE).data
    except (ValueError, TypeError, yaml.YAMLError) as error:
        yield f"{CARD_FILE}: the front matter cannot be read: {' '.join(str(error).split())}"
        return
    library = "transformers" if "model_type" in config else "peft"
    for name, expected in (("library_name", library), ("pipeline_tag", "image-text-to-text")):
        if data.get(name) != expected:
            yield f"{CARD_FILE}: `{name}` of the front matter is {data.get(name)!r}, not {expected!r}"
    if not data.get("license"):
        yield f"{CARD_FILE}: the front matter has no `license`; `vtlmm push --license` writes it"
    bases = data.get("base_model", [])
    for base in [bases] if isinstance(bases, str) else bases:
        if not is_hub_id(base):
            yield f"{CARD_FILE}: the base model {base!r} is no Hub id"
    for file in files:
        if file.startswith(".eval_results/"):
            try:
                parse_eval_result_entries(yaml.safe_load((folder / file).read_text(encoding="utf-8")))
            except (ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
                yield f"{file}: no list of evaluation results: {' '.join(str(error).split())}"


def check_record(folder: Path, files: list[str], config: dict) -> Iterator[str]:
    record = _read_json(folder / CHECK_FILE)
    if "logits" not in record or "input_ids" not in record:
        yield f"{CHECK_FILE}: no recorded logits to compare with; `vtlmm push` records them"


def check_base(folder: Path, files: list[str], config: dict) -> Iterator[str]:
    base = config.get("base_model_name_or_path")
    if not is_hub_id(base):
        yield (
            f"adapter_config.json: the base is {base!r}, which is no Hub id: train with `base_id: user/name`, or set "
            "`base_model_name_or_path`"
        )


CHECKS = {
    VTLMM: (check_code, check_processor, check_generation, check_card, check_record),
    TWIN: (check_processor, check_generation, check_card, check_record),
    ADAPTER: (check_base, check_processor, check_card),
}


def is_hub_id(name) -> bool:
    """Whether `name` reads like `user/name`, and is no folder or file of this machine."""
    if not isinstance(name, str) or name.count("/") != 1 or name[0] in "./~" or Path(name).exists():
        return False
    return Path(name).suffix not in (".json", ".jsonl", ".parquet", ".yaml")


def _read_json(file: Path) -> dict:
    """What `file` holds; nothing when it is missing or no JSON."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


# ---- The process without this package ----


def load_elsewhere(name: str, revision: str | None, kind: str, recorded: dict) -> list[str]:
    """The problems of loading Hub id or folder `name` where this package cannot be imported."""
    classes = [name for name in AUTO_MAP if name.startswith("AutoModel")] if kind == VTLMM else TWIN_CLASSES
    task = {"name": name, "revision": revision, "classes": classes, "recorded": recorded}
    task["trust_remote_code"] = kind == VTLMM
    code = Path(isolated_load.__file__).read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as empty:
        # code files of an earlier folder with the same name must not be taken for these
        environment = {**os.environ, "HF_MODULES_CACHE": empty}
        if Path(name).is_dir():
            environment["HF_HUB_OFFLINE"] = "1"
        command = [sys.executable, "-c", code]
        task = json.dumps(task)
        result = subprocess.run(command, input=task, capture_output=True, text=True, env=environment, cwd=empty)
    if isolated_load.MARK not in result.stdout:
        last = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
        return [f"the process that loads it ended early: {last}"]
    return json.loads(result.stdout.split(isolated_load.MARK)[-1])
