# /// script
# dependencies = ["vtlmm"]
# ///
"""Compose a model from a vision tower and a decoder, and train the four stages.

python examples/train_four_stages.py facebook/dinov2-small HuggingFaceTB/SmolLM2-135M-Instruct rows.csv outputs/own
"""

import argparse

from vtlmm import VTLMMTrainer, VTLMMTrainingConfig, check_rows, compose_model, load_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("vision")
    parser.add_argument("text")
    parser.add_argument("dataset")
    parser.add_argument("output")
    parser.add_argument("--max-steps", type=int, default=-1)
    args = parser.parse_args()

    model, processor = compose_model(args.vision, args.text)
    rows = load_rows(args.dataset)
    check_rows(rows, processor, max_length=2048).raise_for_problems()
    for stage in ("projector", "decoder", "visual_head", "joint"):
        config = VTLMMTrainingConfig(f"{args.output}/{stage}", stage=stage, max_steps=args.max_steps, report_to="none")
        trainer = VTLMMTrainer(model, config, train_dataset=rows, processing_class=processor)
        trainer.train()
        trainer.save_model()
        model = trainer.model


if __name__ == "__main__":
    main()
