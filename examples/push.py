# /// script
# dependencies = ["vtlmm"]
# ///
"""Verify a model and push it to the Hub. With --dry-run, list the files and push nothing.

python examples/push.py outputs/demo/model user/name --license apache-2.0 --dry-run
"""

import argparse

from vtlmm import push_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder")
    parser.add_argument("repo_id")
    parser.add_argument("--license", default="apache-2.0")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()

    result = push_model(args.folder, args.repo_id, license=args.license, dry_run=args.dry_run)
    print(result.format())


if __name__ == "__main__":
    main()
