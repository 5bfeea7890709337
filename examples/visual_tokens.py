# /// script
# dependencies = ["vtlmm"]
# ///
"""Print the most likely words of each image patch.

python examples/visual_tokens.py outputs/demo/model outputs/demo/image.png
"""

import argparse

from PIL import Image

from vtlmm import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("image")
    parser.add_argument("--top-k", type=int, default=3)
    args = parser.parse_args()

    model, processor = load_model(args.model)
    image = Image.open(args.image).convert("RGB")
    pixel_values = processor.image_processor(image, return_tensors="pt")["pixel_values"].to(model.device)
    tokens = model.get_visual_tokens(pixel_values, top_k=args.top_k)
    for patch, token_ids in enumerate(tokens.token_ids[0]):
        print(patch, " ".join(processor.visual_words(token_ids)))


if __name__ == "__main__":
    main()
