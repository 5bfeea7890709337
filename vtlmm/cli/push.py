# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""`vtlmm push FOLDER user/name`"""

FORMS = {
    "adapter": "refuse a folder that is no adapter",
    "nf4": "push the model with its decoder in 4 bits instead; loading it needs bitsandbytes",
    "int8": "the same with 8 bits",
    "twin": "push the native twin of the folder instead",
}


def add_arguments(parser):
    parser.add_argument("folder", help="VT-LMM, native twin or adapter")
    parser.add_argument("repo_id", metavar="user/name", help="repository; made if it does not exist")
    forms = parser.add_mutually_exclusive_group()
    for form, text in FORMS.items():
        forms.add_argument(f"--{form}", dest="form", action="store_const", const=form, help=text)
    parser.add_argument("--private", action="store_true", default=None, help="of a repository that is made")
    parser.add_argument("--revision", help="branch; made if it does not exist")
    parser.add_argument("--tag", help="name for the commit")
    parser.add_argument("--dry-run", action="store_true", help="all but the push; lists the files")
    parser.add_argument("--license", help="license of the weights by the Hub's name, such as apache-2.0 or llama2")
    parser.add_argument(
        "--base-model", dest="base_models", nargs="+", default=[], metavar="ID", help="if the folder names none"
    )
    parser.add_argument("--results", nargs="+", default=[], metavar="FILE", help="results.json of `vtlmm eval`")
    parser.add_argument("--images", nargs="+", default=[], metavar="PNG", help="for the card, as of `vtlmm tokens`")


def run(args) -> int:
    from vtlmm.hub.push import push_model

    result = push_model(**{key: value for key, value in vars(args).items() if key != "command"})
    print(result.format())
    return 1 if result.report.problems else 0
