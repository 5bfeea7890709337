# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Check the checkpoints that a function reads and the folder that it writes."""

import fnmatch
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from .hub_client import download
from .repository import ADAPTER_SETTINGS, CHECK_FILE, RUN_RECORD


# What a checkpoint folder holds. `overwrite=True` removes these files, so that the folder never mixes two checkpoints.
MODEL_FILES = (
    *("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "*.bin.index.json"),
    *("config.json", "generation_config.json", "adapter_config.json", "processor_config.json"),
    *("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json"),
    *("merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json"),
    *("*_vtlmm.py", "*.gguf", "Modelfile", "visual_tokens.onnx*", ADAPTER_SETTINGS, CHECK_FILE, RUN_RECORD),
)
FILE_SUFFIXES = (".json", ".jsonl", ".parquet", ".yaml", ".yml", ".safetensors", ".bin", ".gguf", ".csv", ".tsv")


def check_checkpoint(name: str | Path) -> str:
    r"""
    Check that `name` is an existing folder or a possible Hub id, without any request to the Hub.

    A name is a path if it is a `Path`, starts with `/`, `.` or `~`, ends with `/` or like a file, contains a backslash
    or more than one `/`, or if its first part is an existing folder (`outputs/model`).

    Returns:
        `str`: `name`.

    Raises:
        `FileNotFoundError`: if `name` is a path that does not exist.
        `NotADirectoryError`: if `name` is a file.
    """
    path, text = Path(name), str(name)
    if name == "":
        raise FileNotFoundError("The name of the checkpoint is empty. Specify a folder or a Hub id (user/name).")
    if path.is_dir():
        return text
    if path.is_file():
        raise NotADirectoryError(f"'{text}' is a file. Pass the folder of the checkpoint or a Hub id.")
    first = text.split("/")[0]
    is_path = (
        isinstance(name, Path)
        or text[0] in "/.~"
        or "\\" in text
        or text[-1] == "/"
        or text.count("/") > 1
        or path.suffix in FILE_SUFFIXES
        or ("/" in text and Path(first).is_dir())
    )
    if is_path:
        raise FileNotFoundError(f"The folder '{text}' does not exist. Fix the path, or pass a Hub id (user/name).")
    return text


def split_gguf_file(name: str) -> tuple[str, str | None]:
    """Return folder or Hub id, and file, of a GGUF file (`folder/model.gguf`); file is None for other names."""
    path = Path(name)
    if path.suffix != ".gguf":
        return name, None
    if path.parent.is_dir() and not path.is_file():
        raise FileNotFoundError(f"The file '{name}' does not exist. Fix the path.")
    return str(path.parent), path.name


def local_folder(checkpoint: str | Path, revision: str | None = None, patterns: list[str] | None = None) -> Path:
    r"""
    Return the folder of `checkpoint`: the folder itself, or the downloaded snapshot of a Hub id.

    Args:
        checkpoint (`str` or `Path`): folder or Hub id.
        revision (`str`, *optional*): commit, tag or branch of a Hub id.
        patterns (`list[str]`, *optional*): names of the files to download, such as `["*.json"]`.

    Raises:
        `FileNotFoundError`: if `checkpoint` is a path that does not exist.
        `ValueError`: if the Hub does not give the repository.
    """
    name = check_checkpoint(checkpoint)
    return Path(name) if Path(name).is_dir() else download(name, revision, patterns)


def check_output(output: str | Path, inputs: Iterable[str | Path | None] = (), overwrite: bool = False) -> Path:
    r"""
    Check that `output` can be written: it is not an input, and it is empty or `overwrite` is set.

    Call [`clear_output`] right before the first file is written.

    Args:
        inputs: folders or Hub ids that are read.

    Raises:
        `ValueError`: if `output` is an input or contains an input.
        `FileExistsError`: if `output` exists and is not empty, and `overwrite` is not set.
    """
    output = Path(output)
    resolved = output.resolve()
    for name in inputs:
        if name is None or not Path(name).is_dir():
            continue
        source = Path(name).resolve()
        if resolved == source or source.is_relative_to(resolved):
            raise ValueError(f"The output folder '{output}' is or contains the input '{name}'. Choose another folder.")
    if output.is_file():
        raise FileExistsError(f"The output '{output}' is a file. Choose a folder.")
    present = sorted(file.name for file in output.iterdir() if file.name[0] != ".") if output.is_dir() else []
    if present and not overwrite:
        more = ", …" if len(present) > 3 else ""
        raise FileExistsError(
            f"The output folder '{output}' already contains files ({', '.join(present[:3])}{more}). Choose another "
            "folder, or set `overwrite=True` (`--overwrite`)."
        )
    return output


def clear_output(output: Path) -> None:
    """Create `output` and remove the files of an earlier checkpoint from it. All other files stay."""
    output.mkdir(parents=True, exist_ok=True)
    for file in output.iterdir():
        if any(fnmatch.fnmatch(file.name, pattern) for pattern in MODEL_FILES) and not file.is_dir():
            file.unlink()


@contextmanager
def draft_output(output: Path) -> Iterator[Path]:
    """
    Give an empty temporary folder next to `output`, and move its files to `output` at the end of the `with` block.

    The files of an earlier checkpoint in `output` are removed right before the move. After an error, the temporary
    folder is deleted and `output` is unchanged.
    """
    target = output.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent) as draft:
        yield Path(draft)
        clear_output(target)
        for file in Path(draft).iterdir():
            shutil.move(file, target / file.name)
