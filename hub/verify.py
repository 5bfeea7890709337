# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Check that a folder is a complete Hub repository, then load it in a process that cannot import this package."""

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modeling_vtlmm.configuration_vtlmm import AUTO_MAP
from vtlmm.data.json_files import read_json

from . import isolated_load
from .paths import local_folder
from .repository import (
    CARD_FILE,
    CHECK_FILE,
    LLAVA,
    PICKLES,
    VTLMM,
    checkpoint_kind,
    foreign_code,
    list_published_files,
)
from .repository_checks import MODEL_CHECKS, check_card, check_json, check_weights, has_license


LOADED = (VTLMM, LLAVA)  # the base of an adapter is elsewhere, and llama.cpp reads GGUF files
UNKNOWN_CODE = (
    "code differs from the installed package ({}). Read the code, then set `trust_remote_code=True` "
    "(`--trust-remote-code`) to run it"
)
LLAVA_CLASSES = ["AutoModelForImageTextToText", "AutoModelForMultimodalLM"]


@dataclass
class VerificationReport:
    """
    The return value of [`verify_checkpoint`].

    checkpoint (`str`), kind (`str`: `"vtlmm"`, `"llava"` for an exported LLaVA, `"gguf"` or `"adapter"`),
    num_files (`int`), num_bytes (`int`), num_parameters (`int`),
    problems (`list[str]`: each starts with the file or class at fault),
    warnings (`list[str]`: what a published repository should have; the model works without it).
    """

    checkpoint: str
    kind: str
    num_files: int
    num_bytes: int
    num_parameters: int
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def format(self) -> str:
        """Return the report as text: one summary line, then one line per problem and warning."""
        size = f"{self.num_files} files, {self.num_bytes / 1e9:.3g} GB, {self.num_parameters:,} parameters"
        state = _count(self.problems, "problem") if self.problems else "OK"
        state += f", {_count(self.warnings, 'warning')}" if self.warnings else ""
        lines = [f"{self.checkpoint} ({self.kind}): {size}: {state}", *(f"  {text}" for text in self.problems)]
        return "\n".join([*lines, *(f"  warning: {text}" for text in self.warnings)])


def _count(items: list[str], noun: str) -> str:
    return f"{len(items)} {noun}{'s' if len(items) > 1 else ''}"


def verify_checkpoint(
    checkpoint: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> VerificationReport:
    r"""
    Check that a repository of a VT-LMM, an exported LLaVA, GGUF files or an adapter is complete, and that it loads.

    If no file of the model is missing or invalid, a process that cannot import this package loads the model by each
    Auto class and by the pipeline. The logits are compared with the recorded ones (`vtlmm_check.json`). Adapters,
    whose base model is elsewhere, and GGUF files are checked but not loaded.

    Args:
        checkpoint (`str` or `Path`): folder or Hub id.
        revision (`str`, *optional*): commit, tag or branch of a Hub id.
        trust_remote_code (`bool`, *optional*, defaults to `False`): run the checkpoint's code if it differs from the
            installed package. Equal code runs without this setting.

    Returns:
        [`VerificationReport`]

    Raises:
        `FileNotFoundError`: if `checkpoint` is a path that does not exist.
        `ValueError`: if the Hub does not give the repository, or the folder contains no such model.
    """
    folder, is_local = local_folder(checkpoint, revision), Path(checkpoint).is_dir()
    kind, config = checkpoint_kind(folder)
    files = list_published_files(folder)
    num_parameters, problems = 0, list(check_json(folder, files))
    if not problems:  # the other checks read these files
        num_parameters, problems = check_weights(folder, files, kind)
        for check in MODEL_CHECKS[kind]:
            problems += check(folder, files, config)
    loadable = not problems
    warnings = []
    for file in sorted(file.relative_to(folder).as_posix() for file in folder.glob("*") if file.suffix in PICKLES):
        text = f"{file}: a pickle can run code; only safetensors files are published"
        warnings.append(text) if is_local else problems.append(text)
    if CARD_FILE not in files:
        warnings.append(f"{CARD_FILE}: missing; `vtlmm push` writes it")
    else:
        problems += check_card(folder, files, kind)
        if not has_license(folder):
            warnings.append(f"{CARD_FILE}: `license` is missing in the front matter; pass `--license` to `vtlmm push`")
    recorded = read_json(folder / CHECK_FILE) if loadable and CHECK_FILE in files else {}
    if kind in LOADED and loadable and not {"logits", "input_ids"} <= recorded.keys():
        warnings.append(f"{CHECK_FILE}: no recorded logits to compare with; `vtlmm push` records them")
    if kind in LOADED and not loadable:
        problems.append("not loaded: fix the problems above first")
    elif kind in LOADED:
        # The commit of the snapshot, since a branch can change in the meantime.
        source = (str(folder.resolve()), None) if is_local else (str(checkpoint), folder.name)
        problems += _load_if_trusted(folder, source, kind, recorded, trust_remote_code)
    num_bytes = sum((folder / file).stat().st_size for file in files)
    return VerificationReport(str(checkpoint), kind, len(files), num_bytes, num_parameters, problems, warnings)


def _load_if_trusted(
    folder: Path, source: tuple[str, str | None], kind: str, recorded: dict[str, Any], trust_remote_code: bool
) -> list[str]:
    """Load the model of `source` in a new process, unless its code is unknown and not trusted."""
    unknown = foreign_code(folder) if kind == VTLMM else []
    if unknown and not trust_remote_code:
        return [f"not loaded: its {UNKNOWN_CODE.format('; '.join(unknown))}"]
    return load_in_new_process(*source, kind, recorded if "logits" in recorded else None)


def load_in_new_process(name: str, revision: str | None, kind: str, recorded: dict[str, Any] | None) -> list[str]:
    r"""
    Load a model in a process that cannot import this package.

    Args:
        name (`str`): folder or Hub id.
        recorded (`dict` or `None`): recorded logits, see [`isolated_load.probe`].

    Returns:
        `list[str]`: the problems.
    """
    classes = [name for name in AUTO_MAP if name.startswith("AutoModel")] if kind == VTLMM else LLAVA_CLASSES
    task: dict[str, Any] = {"name": name, "revision": revision, "classes": classes, "recorded": recorded}
    task["trust_remote_code"] = kind == VTLMM
    code = Path(isolated_load.__file__).read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as empty:
        offline = Path(name).is_dir()
        result = isolated_load.run_without_package(code, folder=empty, input=json.dumps(task), offline=offline)
    if isolated_load.MARK not in result.stdout:
        last = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
        return [f"the process that loads the model ended early: {last}"]
    return json.loads(result.stdout.split(isolated_load.MARK)[-1])
