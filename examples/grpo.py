# /// script
# dependencies = ["vtlmm"]
# ///
"""Train LoRA on the decoder with a reward for correct answers, with TRL's GRPOTrainer.

    python examples/grpo.py --model_name_or_path outputs/own/joint --dataset_name questions \
        --output_dir outputs/grpo --max_completion_length 32

`questions` is a Hub id or a folder of JSON or parquet files; docs/preference.md shows a row.
"""

from datasets import Image, List, load_dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer, ModelConfig, ScriptArguments, TrlParser

from vtlmm import load_model


def reward_correct_answers(completions, answer, **columns) -> list[float]:
    return [float(word in message[0]["content"]) for message, word in zip(completions, answer, strict=True)]


def main() -> None:
    script, args, model_config = TrlParser((ScriptArguments, GRPOConfig, ModelConfig)).parse_args_and_config()
    rows = load_dataset(script.dataset_name, split=script.dataset_train_split).cast_column("images", List(Image()))
    model, processor = load_model(model_config.model_name_or_path, dtype="float32")
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward_correct_answers,
        args=args,
        train_dataset=rows,
        processing_class=processor,
        peft_config=LoraConfig(target_modules=r".*language_model.*_proj", task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model(args.output_dir)


if __name__ == "__main__":
    main()
