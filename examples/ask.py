# /// script
# dependencies = ["vtlmm"]
# ///
"""Ask a question about an image.

python examples/ask.py outputs/demo/model outputs/demo/image.png "how many shapes are there?"
"""

import argparse

from vtlmm import generate, load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="model folder, adapter folder or Hub id")
    parser.add_argument("image")
    parser.add_argument("question")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    args = parser.parse_args()

    model, processor = load_model(args.model)
    [answer] = generate(model, processor, args.question, args.image, max_new_tokens=args.max_new_tokens)
    print(answer)


if __name__ == "__main__":
    main()
