# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Raise the errors of the Hub and its client as ValueErrors of one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of the client's HTTP library, which depends on its version
    LocalEntryNotFoundError,  # raised by a download without a connection
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


@contextmanager
def hub_errors(repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Re-raise errors of the Hub and its client as one-line ValueErrors that say how to fix them."""
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise ValueError("No token for the Hub. Run `hf auth login` or set HF_TOKEN.") from error
    except RevisionNotFoundError as error:
        raise ValueError(f"{repo_id} has no branch, tag or commit {revision!r}.") from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{repo_id} does not exist on the Hub, or it is private and your token has no access to it."
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            raise ValueError("The Hub rejects your token. Run `hf auth login` or set HF_TOKEN.") from error
        if status == 403:
            raise ValueError(f"Your token has no write access to {repo_id}.") from error
        reason = error.server_message or str(error).splitlines()[0]
        raise ValueError(f"{repo_id}: the Hub answered {status}: {reason}") from error
    except RuntimeError as error:  # raised by the upload of a file
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ValueError(f"{repo_id}: {str(error).splitlines()[0]} {reason} Push again to complete it.") from error
    except (HTTPError, ConnectionError, LocalEntryNotFoundError) as error:
        raise ValueError(f"{repo_id}: the Hub cannot be reached: {str(error).splitlines()[0]}") from error


def download(name: str, revision: str | None = None, patterns: list[str] | None = None) -> Path:
    r"""
    Download the repository `name` and return its folder in the cache.

    Args:
        revision (`str`, *optional*): commit, tag or branch.
        patterns (`list[str]`, *optional*): names of the files to download.

    Raises:
        `ValueError`: if the download fails. `name` may also be a mistyped folder, so the message names the
            missing folder too.
    """
    try:
        with hub_errors(name, revision):
            return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except HFValidationError as error:
        raise ValueError(f"'{name}' is not a folder, and it is not a valid Hub id (user/name).") from error
    except ValueError as error:
        raise ValueError(f"{error} The local folder '{name}' does not exist either.") from error


def check_account(repo_id: str, tag: str | None) -> None:
    """
    Check that the token may write and that the tag is new.

    Raises:
        `ValueError`: if it may not, or the Hub cannot be reached.
    """
    api = HfApi()
    with hub_errors(repo_id):
        token = api.whoami().get("auth", {}).get("accessToken", {})
        tags = api.list_repo_refs(repo_id).tags if tag is not None and api.repo_exists(repo_id) else []
    if token.get("role") == "read":
        raise ValueError("Your token is read-only. Create a token with write access and run `hf auth login` with it.")
    if tag in [ref.name for ref in tags]:
        raise ValueError(f"The tag {tag} already exists in {repo_id}. Choose another tag.")
