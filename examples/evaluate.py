# /// script
# dependencies = ["vtlmm"]
# ///
"""Score a model on a dataset, with its own images and with shuffled images.

python examples/evaluate.py outputs/demo/model outputs/demo/held_out.parquet
"""

import argparse

from vtlmm import evaluate, load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("dataset")
    parser.add_argument("--limit", type=int, help="use the first rows only")
    args = parser.parse_args()

    model, processor = load_model(args.model)
    result = evaluate(model, processor, args.dataset, limit=args.limit)
    print(result.to_markdown())


if __name__ == "__main__":
    main()
