# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Push a model to the Hub: write its card, verify it, and upload a fixed list of files in one commit."""

import logging
import math
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from modeling_vtlmm import VTLMMForConditionalGeneration, VTLMMProcessor
from vtlmm.data.json_files import read_json
from vtlmm.data.output_files import write_json

from .card_results import add_results, find_results
from .export_gguf import export_gguf
from .export_llava import export_to_llava
from .hub_client import check_account, hub_errors
from .isolated_load import probe
from .model_card import CARD_MARK, check_files, is_generated, license_of, license_text, write_card
from .paths import check_checkpoint
from .quantize import QUANTIZATIONS, write_quantized
from .repository import (
    ADAPTER,
    ADAPTER_SETTINGS,
    CARD_FILE,
    CHECK_FILE,
    GGUF,
    HANDLER_FILE,
    LICENSE_FILE,
    LLAVA,
    RESULTS_FOLDER,
    RUN_RECORD,
    VTLMM,
    card_images,
    checkpoint_kind,
    foreign_code,
    is_link,
    list_published_files,
    matches,
)
from .space import push_space
from .verify import UNKNOWN_CODE, VerificationReport, verify_checkpoint


logger = logging.getLogger(__name__)

FORMS = (ADAPTER, LLAVA, GGUF, *QUANTIZATIONS)
# Files of an earlier push that would be loaded as a part of this model.
REPLACED = ["*.gguf", "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json"]


@dataclass
class PushResult:
    """
    The return value of [`push_model`].

    repo_id (`str`), report ([`VerificationReport`]), files (`dict[str, int]`: name to size in bytes of each file to
    publish), url (`str` or `None`: the commit; `None` if nothing was pushed), space_url (the same of the Space).
    """

    repo_id: str
    report: VerificationReport
    files: dict[str, int]
    url: str | None = None
    space_url: str | None = None

    def format(self) -> str:
        """Return the report, the list of files with their sizes, and what was pushed."""
        lines = [self.report.format(), *(f"{size:>15,}  {file}" for file, size in self.files.items())]
        if self.report.problems:
            lines.append("Nothing was pushed: fix the problems first.")
        else:
            lines.append(self.url or f"Dry run: nothing was pushed to {self.repo_id}.")
            lines += [self.space_url] if self.space_url else []
        return "\n".join(lines)


def push_model(
    folder: str | Path,
    repo_id: str,
    *,
    form: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    tag: str | None = None,
    include: Sequence[str] = (),
    dry_run: bool = False,
    trust_remote_code: bool = False,
    license: str | None = None,
    base_models: Sequence[str] = (),
    results: Sequence[str | Path] = (),
    images: Sequence[str | Path] = (),
    handler: bool = False,
    space: str | None = None,
) -> PushResult:
    r"""
    Verify the model in `folder` and push it to the Hub in one commit.

    Only weights, configuration, tokenizer, processor, code, card, results and license are uploaded, and nothing if the
    verification finds problems. The same commit deletes weights and results of an earlier push. A handwritten card on
    the Hub is kept. The generated files are also copied to `folder`, unless `form` converted the model.

    Args:
        folder (`str` or `Path`): a VT-LMM, an exported LLaVA, or an adapter.
        repo_id (`str`): `user/name`. The repository is created if it does not exist.
        form (`str`, *optional*): push the VT-LMM in another form: `"llava"`, `"gguf"` (float16), or with the decoder
            in `"nf4"` or `"int8"`. `"adapter"` pushes an adapter, and is an error for another folder.
        private (`bool`, *optional*): whether a new repository is private; by default the account's setting.
        revision, tag (`str`, *optional*): branch, created if it does not exist, and tag of the commit.
        include (`list[str]`, *optional*): patterns of further files to upload; never hidden files, links or pickles.
        dry_run (`bool`, *optional*, defaults to `False`): verify and list the files only.
        license, base_models, results, images: see [`write_card`]; for `trust_remote_code` see [`verify_checkpoint`].
        handler (`bool`, *optional*, defaults to `False`): add `handler.py` for Inference Endpoints.
        space (`str`, *optional*): `user/name` of a Space with the page of `vtlmm app`; see [`push_space`].

    Raises:
        `FileNotFoundError`, `ValueError`: for a missing folder or license, an invalid setting, or a rejected push.
    """
    check_repo_id(repo_id)
    folder = Path(check_checkpoint(Path(folder)))
    _check_form(folder, form, trust_remote_code, handler, space)
    license = license or license_of(folder)
    check_files(results, images)
    if not dry_run:  # before minutes of verification
        check_account(repo_id, tag)
    with tempfile.TemporaryDirectory() as place:
        source, staging = _convert_form(form, folder, Path(place, "form")), Path(place, "model")
        files = _copy_form(form, folder, source, staging, include, handler)
        card: dict[str, Any] = {"license": license, "base_models": base_models, "results": results, "images": images}
        write_card(staging, repo_id, **card, kind_and_config=_kind_on_card(form, folder))
        record_logits(staging, trust_remote_code)
        result = _verify_staged(staging, folder, repo_id, files, trust_remote_code)
        if not result.report.problems and not dry_run:
            _publish(result, staging, repo_id, private, revision, tag, space)
            if source == folder:
                _copy_back(staging, folder, list(result.files))
    return result


def _publish(result: PushResult, staging: Path, repo_id: str, private, revision, tag, space: str | None) -> None:
    """Upload the files of `staging`, and the Space, and write their addresses into `result`."""
    with hub_errors(repo_id, revision):
        result.url = _upload(staging, repo_id, list(result.files), private, revision, tag)
    if space:
        result.space_url = push_space(space, repo_id, private)


def _verify_staged(staging: Path, folder: Path, repo_id: str, files: list[str], trust_remote_code: bool) -> PushResult:
    """Verify the files in the folder `staging`, and return those to upload: `files` and the generated ones."""
    report = verify_checkpoint(staging, trust_remote_code=trust_remote_code)
    report.checkpoint = str(folder)
    names = sorted({*(name for name in files if (staging / name).is_file()), *list_published_files(staging)})
    return PushResult(repo_id, report, {name: (staging / name).stat().st_size for name in names})


def check_repo_id(repo_id: str) -> None:
    """
    Check that a repository id has the form `user/name` and valid characters.

    Raises:
        `ValueError`: if it does not.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"The repository id {repo_id!r} is invalid: {error}") from error
    if repo_id.count("/") != 1:
        raise ValueError(f"The repository id {repo_id!r} is invalid: it must have the form user/name.")


def _check_form(folder: Path, form: str | None, trust_remote_code: bool, handler: bool, space: str | None) -> None:
    if form not in (None, *FORMS):
        raise ValueError(f"`form` is {form!r}; it must be {', '.join(FORMS[:-1])} or {FORMS[-1]}.")
    if form is None and checkpoint_kind(folder)[0] == GGUF:
        raise ValueError(
            f"'{folder}' contains GGUF files. Push the VT-LMM they were exported from with `form='gguf'`."
        )
    if form == ADAPTER and checkpoint_kind(folder)[0] != ADAPTER:
        raise ValueError(f"'{folder}' is not an adapter: adapter_config.json is missing. Leave out `form`.")
    unknown = foreign_code(folder) if form not in (None, ADAPTER) and not trust_remote_code else []
    if unknown:  # other pushes verify the model
        raise ValueError(f"{folder}: its {UNKNOWN_CODE.format('; '.join(unknown))}")
    if space is not None:
        check_repo_id(space)
    kind = form if form in (ADAPTER, LLAVA, GGUF) else checkpoint_kind(folder)[0]
    if handler and kind not in (VTLMM, LLAVA):
        raise ValueError(f"`handler` needs a whole model for transformers, not {kind}. Merge an adapter first.")
    if space is not None and kind != VTLMM:
        raise ValueError(f"`space` shows visual tokens, so it needs a VT-LMM, not {kind}. Leave it out.")


def record_logits(folder: Path, trust_remote_code: bool = False) -> None:
    """
    Record the logits of one question, computed with the installed code, for [`verify_checkpoint`] to compare.

    Recorded logits are kept, and only those of a VT-LMM are recorded.
    """
    if checkpoint_kind(folder)[0] != VTLMM or (folder / CHECK_FILE).is_file():
        return
    if not trust_remote_code and foreign_code(folder):  # `verify_checkpoint` reports it
        return
    model = VTLMMForConditionalGeneration.from_pretrained(folder, dtype="auto")
    values = probe(model, VTLMMProcessor.from_pretrained(folder))
    _write_record(folder, values)


def _write_record(folder: Path, values: dict[str, Any]) -> None:
    if not all(map(math.isfinite, values["logits"])):
        raise ValueError(f"{folder}: the logits of the model are not finite, so it gives no answers.")
    write_json(folder / CHECK_FILE, values, indent=None)


# ---- The files of a push ----


def copy_to_staging(folder: Path, staging: Path, include: Sequence[str] = ()) -> list[str]:
    r"""
    Put the files to publish into the new folder `staging`: weights as links, all others as copies that may be changed.

    Returns:
        `list[str]`: their names.

    Raises:
        `ValueError`: if one of them is a symbolic link, which could lead to a private file.
    """
    files = list_published_files(folder, include)
    links = [name for name in files if is_link(folder, name)]
    if links:
        raise ValueError(
            f"{folder}: {', '.join(links)} {'is a symbolic link' if len(links) == 1 else 'are symbolic links'}, which "
            "are not published. Copy the files into the folder."
        )
    staging.mkdir(parents=True)
    for name in [*files, *([RUN_RECORD] if (folder / RUN_RECORD).is_file() else [])]:
        target = staging / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not name.endswith((".safetensors", ".gguf")) or not _link(folder / name, target):
            shutil.copy(folder / name, target)
    return files


def _link(source: Path, target: Path) -> bool:
    """Create a hard link, or a symbolic link to another file system, and return whether that was possible."""
    for link in (target.hardlink_to, target.symlink_to):
        try:
            link(source.resolve())
            return True
        except OSError:
            continue
    return False


def _copy_back(staging: Path, folder: Path, files: Sequence[str]) -> None:
    """Copy all files but the weights to the user's folder, so that the next push finds them. Remove an old license."""
    for name in files:
        if not name.endswith(".safetensors"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(staging / name, folder / name)
    license_file = folder / LICENSE_FILE
    if license_file.is_file() and LICENSE_FILE not in files:
        license_file.unlink()  # the license has changed


def _kind_on_card(form: str | None, folder: Path) -> tuple[str, dict[str, Any]] | None:
    """Return kind and configuration for the card of GGUF files, which contain no config.json, else None."""
    return (GGUF, checkpoint_kind(folder)[1]) if form == GGUF else None


def _copy_form(form: str | None, folder: Path, source: Path, staging: Path, include, handler: bool) -> list[str]:
    """Copy the files of `source` to `staging`. Add the results of `folder` if the form gives the same answers."""
    files = copy_to_staging(source, staging, include)
    if handler:
        shutil.copy(Path(__file__).with_name(HANDLER_FILE), staging)
    if form not in (GGUF, *QUANTIZATIONS):
        add_results(staging, find_results(folder), strict=False)
    return files


def _convert_form(form: str | None, folder: Path, output: Path) -> Path:
    """Return the folder of the model in another form: `output`, with the files that its card needs, or `folder`."""
    if form in (None, ADAPTER):
        return folder
    if form == GGUF:
        export_gguf(folder, output)
    elif form in QUANTIZATIONS:
        write_quantized(folder, output, form)
    else:
        _write_llava(folder, output)
    card = folder / CARD_FILE
    names = [RUN_RECORD, *(card_images(card.read_text(encoding="utf-8")) if card.is_file() else [])]
    for name in names:
        if (folder / name).is_file():
            shutil.copy(folder / name, output)
    # The results hold for an exported LLaVA, which gives the same answers. A quantized model has others.
    if form == LLAVA and (folder / RESULTS_FOLDER).is_dir():
        shutil.copytree(folder / RESULTS_FOLDER, output / RESULTS_FOLDER)
    return output


def _write_llava(folder: Path, output: Path) -> None:
    """Write the exported LLaVA with the recorded logits of the VT-LMM, which must be equal."""
    if (folder / CHECK_FILE).is_file():
        record = read_json(folder / CHECK_FILE, entries={"input_ids": list, "logits": list})
    else:
        model = VTLMMForConditionalGeneration.from_pretrained(folder, dtype="auto")
        record = probe(model, VTLMMProcessor.from_pretrained(folder))
    export_to_llava(folder, output)
    record.pop("visual_logits", None)
    _write_record(output, record)


# ---- Upload ----


def _upload(
    folder: Path, repo_id: str, files: list[str], private: bool | None, revision: str | None, tag: str | None
) -> str:
    """Upload `files`, and delete the files that they replace, in one commit. Return its URL."""
    api = HfApi()
    api.create_repo(repo_id, private=private, exist_ok=True)
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    on_hub = api.list_repo_files(repo_id, revision=revision)
    if "Modelfile" in files and any(file.endswith(".safetensors") for file in on_hub):
        raise ValueError(f"{repo_id} contains a model for transformers. Push GGUF files to a separate repository.")
    replaced = list(REPLACED)
    if "adapter_config.json" not in files:  # a folder with this file is loaded as an adapter
        replaced += ["adapter_config.json", ADAPTER_SETTINGS]
    if LICENSE_FILE in on_hub and _read_on_hub(api, repo_id, LICENSE_FILE, revision) == license_text():
        replaced.append(LICENSE_FILE)
    if CARD_FILE in on_hub and CARD_MARK in (folder / CARD_FILE).read_text(encoding="utf-8"):
        if not is_generated(_read_on_hub(api, repo_id, CARD_FILE, revision)):
            logger.info("The card on the Hub was written by hand and is kept.")
            files = [file for file in files if file != CARD_FILE]
    logger.info("Uploading to %s:", repo_id)
    for file in files:
        logger.info("%15s  %s", f"{(folder / file).stat().st_size:,}", file)
    stale = [file for file in on_hub if file not in files]
    deleted = [file for file in stale if "/" not in file and matches(file, replaced)]
    deleted += [file for file in stale if file.startswith((f"{RESULTS_FOLDER}/", ".eval_results/"))]  # other weights
    commit = api.create_commit(
        repo_id,
        [*_additions(folder, files), *(CommitOperationDelete(path_in_repo=file) for file in deleted)],
        commit_message="Upload with vtlmm push",
        revision=revision,
    )
    if tag is not None:
        api.create_tag(repo_id, tag=tag, revision=commit.oid)
    return commit.commit_url


def upload_published_files(
    folder: str | Path,
    repo_id: str,
    *,
    also_in: str | None = None,
    commit_message: str,
    revision: str | None = None,
    token: str | None = None,
    follow_links: bool = False,
    run_as_future: bool = False,
) -> CommitInfo | Future[CommitInfo]:
    r"""
    Upload the publishable files of `folder` without verification, as a trainer does while it trains.

    Args:
        also_in (`str`, *optional*): folder in the repository that receives the same files, such as `last-checkpoint`.
        follow_links (`bool`, *optional*, defaults to `False`): whether symbolic links are uploaded, for a folder of
            [`copy_to_staging`].
        commit_message, revision, token, run_as_future: see [`~huggingface_hub.HfApi.create_commit`].
    """
    folder = Path(folder)
    files = list_published_files(folder, follow_links=follow_links)
    operations = _additions(folder, files)
    if also_in is not None:
        operations += _additions(folder, files, f"{also_in}/")
    options = {"commit_message": commit_message, "revision": revision, "token": token}
    create_commit: Callable[..., CommitInfo | Future[CommitInfo]] = HfApi().create_commit
    return create_commit(repo_id, operations, run_as_future=run_as_future, **options)


def _additions(folder: Path, files: Sequence[str], prefix: str = "") -> list[CommitOperationAdd]:
    paths = {file: (folder / file).resolve() for file in files}
    return [CommitOperationAdd(path_in_repo=prefix + file, path_or_fileobj=path) for file, path in paths.items()]


def _read_on_hub(api: HfApi, repo_id: str, file: str, revision: str | None) -> str:
    return Path(api.hf_hub_download(repo_id, file, revision=revision)).read_text(encoding="utf-8")
