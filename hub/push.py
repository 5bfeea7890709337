# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""A folder to the Hub: its card and recorded logits, then `vtlmm verify`, then one commit with everything."""

import glob
import json
import logging
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import HfApi, ModelCard

from modeling_vtlmm import VTLMMForConditionalGeneration, VTLMMProcessor

from .export_llava import export_to_llava
from .hub_client import hub_errors
from .isolated_load import probe
from .model_card import (
    CARD_MARK,
    LICENSE_FILE,
    RESULTS_FOLDER,
    RUN_RECORD,
    check_files,
    is_generated,
    license_text,
    write_card,
)
from .quantize import QUANTIZATIONS, write_quantized
from .verify import (
    ADAPTER,
    CARD_FILE,
    CHECK_FILE,
    LEFT_OUT,
    VTLMM,
    VerificationReport,
    kind_of,
    published_files,
    verify_checkpoint,
)


logger = logging.getLogger(__name__)

# What an earlier push left of these and this one does not have would be taken for a part of the model.
REPLACED = ["*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json"]


@dataclass
class PushResult:
    """
    The return value of [`push_model`].

    repo_id (`str`), report ([`VerificationReport`]), files (`dict[str, int]`: name to size in bytes of each file to
    publish), url (`str` or `None`: the commit; `None` if nothing was pushed).
    """

    repo_id: str
    report: VerificationReport
    files: dict[str, int]
    url: str | None = None

    def format(self) -> str:
        """Return the report, the list of files with their sizes, and what was pushed."""
        lines = [self.report.format(), *(f"{size:>15,}  {file}" for file, size in self.files.items())]
        if self.report.problems:
            lines.append("Nothing was pushed: fix the problems first.")
        else:
            lines.append(self.url or f"Dry run: nothing was pushed to {self.repo_id}.")
        return "\n".join(lines)


def push_model(
    folder: str | Path,
    repo_id: str,
    *,
    form: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    tag: str | None = None,
    dry_run: bool = False,
    license: str | None = None,
    base_models: Sequence[str] = (),
    results: Sequence[str | Path] = (),
    images: Sequence[str | Path] = (),
) -> PushResult:
    r"""
    Verify the model in `folder` and push it to the Hub in one commit.

    Writes the model card and the recorded logits first. A model with problems is not pushed. The commit is atomic;
    nothing is uploaded if nothing changed.

    Args:
        folder (`str` or `Path`): a VT-LMM, a native twin, or an adapter.
        repo_id (`str`): `user/name`; made if it does not exist.
        form (`str`, *optional*): push another form of the VT-LMM in `folder` instead: its native `"twin"`, or one with
            the decoder in `"nf4"` or `"int8"`. With `"adapter"` the folder itself, and nothing but an adapter.
        private (`bool`, *optional*): whether a repository that is made is private; by default what the account says.
        revision (`str`, *optional*): branch; made if it does not exist.
        tag (`str`, *optional*): name for the commit.
        dry_run (`bool`, *optional*, defaults to `False`): all but the push.
        license, base_models, results, images: see [`write_card`].

    Returns:
        [`PushResult`]

    Raises:
        `ValueError`: when `folder` is not what `form` needs, and when the Hub refuses, in one line.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"The folder '{folder}' does not exist. Pass a folder that contains a model.")
    if form not in (None, "adapter", "twin", *QUANTIZATIONS):
        raise ValueError(f"`form` is {form!r}; it must be adapter, twin, {' or '.join(QUANTIZATIONS)}.")
    if form == "adapter" and kind_of(folder)[0] != ADAPTER:
        raise ValueError(f"{folder} is no adapter (it has no adapter_config.json): push it without `--adapter`.")
    license = license or _license_of(folder)
    if not license:
        raise ValueError(
            "Nothing says under which license the weights are: pass `license` (`--license apache-2.0`), or write "
            f"`license:` into the front matter of a {CARD_FILE} of your own."
        )
    check_files(results, images)
    card = {"license": license, "base_models": base_models, "results": results, "images": images}
    if not dry_run:
        with hub_errors(repo_id):
            _check_account(repo_id, tag)  # now, not after minutes
    if form not in (None, "adapter"):
        with tempfile.TemporaryDirectory() as place:
            _make_form(form, folder, Path(place, form))
            options = {"private": private, "revision": revision, "tag": tag, "dry_run": dry_run}
            return push_model(Path(place, form), repo_id, **options, **card)
    write_card(folder, repo_id, **card)
    if kind_of(folder)[0] == VTLMM and not (folder / CHECK_FILE).is_file():
        record_logits(folder)
    report = verify_checkpoint(folder)
    result = PushResult(repo_id, report, {name: (folder / name).stat().st_size for name in published_files(folder)})
    if not report.problems and not dry_run:
        with hub_errors(repo_id, revision):
            result.url = _upload(folder, repo_id, private, revision, tag)
    return result


def _check_account(repo_id: str, tag: str | None) -> None:
    """A wrong token is told apart from a repository that it may not see."""
    api = HfApi()
    token = api.whoami().get("auth", {}).get("accessToken", {})
    if token.get("role") == "read":
        raise ValueError("Your token may read only: make one that may write, and run `hf auth login` with it.")
    if tag is not None and api.repo_exists(repo_id) and tag in [ref.name for ref in api.list_repo_refs(repo_id).tags]:
        raise ValueError(f"{repo_id} has a tag {tag} already: choose another.")


def record_logits(folder: Path) -> None:
    """Record the logits of one question, computed with the installed code, for [`verify_checkpoint`] to compare."""
    model = VTLMMForConditionalGeneration.from_pretrained(folder, dtype="auto")
    found = probe(model, VTLMMProcessor.from_pretrained(folder))
    (folder / CHECK_FILE).write_text(json.dumps(found, separators=(",", ":")) + "\n", encoding="utf-8")


def _make_form(form: str, folder: Path, output: Path) -> None:
    """The native twin or the quantized model of `folder`, with what its card tells about."""
    if form in QUANTIZATIONS:
        write_quantized(folder, output, form)
    else:
        _make_twin(folder, output)
    # What was measured is true of a twin; of a quantized model it is to be measured again.
    taken = [RUN_RECORD, *(file.name for file in folder.glob("*.png"))]
    for name in taken:
        if (folder / name).is_file():
            shutil.copy(folder / name, output)
    if form not in QUANTIZATIONS and (folder / RESULTS_FOLDER).is_dir():
        shutil.copytree(folder / RESULTS_FOLDER, output / RESULTS_FOLDER)


def _make_twin(folder: Path, output: Path) -> None:
    """The twin with its part of the recorded logits: it has to give the same."""
    if not (folder / CHECK_FILE).is_file():
        record_logits(folder)
    export_to_llava(folder, output)
    record = json.loads((folder / CHECK_FILE).read_text(encoding="utf-8"))
    record.pop("visual_logits")
    (output / CHECK_FILE).write_text(json.dumps(record, separators=(",", ":")) + "\n", encoding="utf-8")


def _license_of(folder: Path) -> str | None:
    """What the card in `folder` says."""
    card = folder / CARD_FILE
    try:
        return ModelCard.load(card, ignore_metadata_errors=True).data.license if card.is_file() else None
    except yaml.YAMLError as error:
        raise ValueError(f"{card}: the front matter cannot be read: {error}") from error


def _upload(folder: Path, repo_id: str, private: bool | None, revision: str | None, tag: str | None) -> str:
    """Where the commit is."""
    api = HfApi()
    api.create_repo(repo_id, private=private, exist_ok=True)
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    files, replaced = published_files(folder), list(REPLACED)
    if "adapter_config.json" not in files:  # of an earlier push: a folder with one is loaded as an adapter
        replaced += ["adapter_config.json"]
    there = {file: _read_on_hub(api, repo_id, file, revision) for file in (CARD_FILE, LICENSE_FILE)}
    written = CARD_MARK in (folder / CARD_FILE).read_text(encoding="utf-8")
    if written and there[CARD_FILE] is not None and not is_generated(there[CARD_FILE]):
        logger.info("The card on the Hub was written by hand and stays.")
        files.remove(CARD_FILE)
    if there[LICENSE_FILE] == license_text():  # of an earlier push; these weights may be under another
        replaced.append(LICENSE_FILE)
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        revision=revision,
        commit_message="Upload with vtlmm push",
        allow_patterns=[glob.escape(file) for file in files],
        ignore_patterns=LEFT_OUT,
        delete_patterns=replaced,
    )
    if tag is not None:
        api.create_tag(repo_id, tag=tag, revision=commit.oid)
    return commit.commit_url


def _read_on_hub(api: HfApi, repo_id: str, file: str, revision: str | None) -> str | None:
    """The text of `file`, if it is there."""
    if not api.file_exists(repo_id, file, revision=revision):
        return None
    return Path(api.hf_hub_download(repo_id, file, revision=revision)).read_text(encoding="utf-8")
