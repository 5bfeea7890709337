# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""`vtlmm verify FOLDER_OR_ID`"""


def add_arguments(parser):
    parser.add_argument("checkpoint", help="VT-LMM, native twin or adapter: folder or Hub id")
    parser.add_argument("--revision", help="commit, tag or branch of a Hub id")
    parser.add_argument("--trust-remote-code", action="store_true", help="allow code of a Hub id to run")


def run(args) -> int:
    from vtlmm.hub.verify import verify_checkpoint

    report = verify_checkpoint(args.checkpoint, revision=args.revision, trust_remote_code=args.trust_remote_code)
    print(report.format())
    return 1 if report.problems else 0
