# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""`vtlmm push FOLDER user/name`"""

from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Exit, Option

from . import options


EXAMPLES = (
    "vtlmm push outputs/joint user/name --license apache-2.0 --dry-run",
    "vtlmm push outputs/joint user/name-llava --form llava --license apache-2.0",
)


def push(
    folder: Annotated[Path, Argument(help="Folder of a VT-LMM, an exported LLaVA or an adapter.")],
    repo_id: Annotated[str, Argument(metavar="USER/NAME", help="Repository. It is created if it does not exist.")],
    form: Annotated[
        Literal["adapter", "nf4", "int8", "llava", "gguf"] | None,
        Option(
            help="Push another form of the model: its LLaVA export (llava), GGUF files (gguf), or a quantized decoder "
            "(nf4, int8). adapter: refuse a folder that is not an adapter."
        ),
    ] = None,
    private: Annotated[bool | None, Option("--private", help="Create a private repository.")] = None,
    revision: Annotated[str | None, Option(help="Branch. It is created if it does not exist.")] = None,
    tag: Annotated[str | None, Option(help="Tag for the commit.")] = None,
    include: Annotated[
        list[str] | None, Option(metavar="PATTERN", help="Upload further files, e.g. 'docs/*.md'; repeat it.")
    ] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Verify and list the files, but push nothing.")] = False,
    trust_remote_code: options.TrustRemoteCode = False,
    license: Annotated[str | None, Option(help="License of the weights, e.g. apache-2.0 or llama2.")] = None,
    base_model: Annotated[list[str] | None, Option(metavar="ID", help="Base model; repeat it for several.")] = None,
    results: Annotated[
        list[Path] | None, Option(metavar="FILE", help="results.json of `vtlmm eval`; repeat it for several.")
    ] = None,
    image: Annotated[list[Path] | None, Option(metavar="PNG", help="Image for the card; repeat it.")] = None,
    handler: Annotated[bool, Option("--handler", help="Add handler.py for Inference Endpoints.")] = False,
    space: Annotated[
        str | None, Option(metavar="USER/NAME", help="Also write a Space with the page of `vtlmm app` for the model.")
    ] = None,
) -> None:
    """Verify a model and push it to the Hub in one commit, with a generated model card."""
    from vtlmm.hub.push import push_model

    result = push_model(
        folder,
        repo_id,
        form=form,
        private=private,
        revision=revision,
        tag=tag,
        include=include or [],
        dry_run=dry_run,
        trust_remote_code=trust_remote_code,
        license=license,
        base_models=base_model or [],
        results=results or [],
        images=image or [],
        handler=handler,
        space=space,
    )
    print(result.format())
    raise Exit(1 if result.report.problems else 0)
