# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""What the Hub or its client refuses, said in one line."""

from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of the client's library, which is another one in other versions
    LocalEntryNotFoundError,  # what a download raises when there is no connection
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


@contextmanager
def hub_errors(repo_id: str, revision: str | None = None):
    """What the Hub or its client says, in one line that says what to do."""
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise ValueError("There is no token for the Hub: run `hf auth login` or set HF_TOKEN.") from error
    except RevisionNotFoundError as error:
        raise ValueError(f"{repo_id} has no branch, tag or commit {revision!r}.") from error
    except RepositoryNotFoundError as error:
        raise ValueError(f"{repo_id} is not on the Hub, or it is private and your token may not see it.") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            raise ValueError("The Hub does not know your token: run `hf auth login` or set HF_TOKEN.") from error
        if status == 403:
            raise ValueError(f"Your token may not write to {repo_id}.") from error
        said = error.server_message or str(error).splitlines()[0]
        raise ValueError(f"{repo_id}: the Hub answered {status}: {said}") from error
    except RuntimeError as error:  # of a file's upload
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ValueError(f"{repo_id}: {str(error).splitlines()[0]} {reason} Push again to complete it.") from error
    except (HTTPError, ConnectionError, LocalEntryNotFoundError) as error:
        raise ValueError(f"{repo_id}: the Hub cannot be reached: {str(error).splitlines()[0]}") from error


def download(name: str, revision: str | None = None, patterns: list[str] | None = None) -> Path:
    r"""
    The repository `name` of the Hub, for one who gave a name that is no folder here.

    Args:
        patterns (`list[str]`, *optional*): of the files that are wanted.

    Raises:
        `ValueError`: when it cannot be had; it says that there is no such folder either.
    """
    try:
        with hub_errors(name, revision):
            return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except HFValidationError as error:
        raise ValueError(f"{name} is no folder here, and no repository of the Hub can have that name.") from error
    except ValueError as error:
        raise ValueError(f"{error} There is no folder {name} here either.") from error
