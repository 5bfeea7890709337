# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""`vtlmm verify MODEL`"""

from typer import Exit

from . import options


EXAMPLES = ("vtlmm verify outputs/joint", "vtlmm verify user/name --trust-remote-code")


def verify(
    model: options.Model, revision: options.Revision = None, trust_remote_code: options.TrustRemoteCode = False
) -> None:
    """Check that a model is complete and loads without this package."""
    from vtlmm.hub.verify import verify_checkpoint

    report = verify_checkpoint(model, revision=revision, trust_remote_code=trust_remote_code)
    print(report.format())
    raise Exit(1 if report.problems else 0)
