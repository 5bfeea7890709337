# /// script
# dependencies = ["vtlmm"]
# ///
"""Train LoRA on the decoder with preferred and rejected answers, with TRL's DPOTrainer.

    python examples/dpo.py --model_name_or_path outputs/own/joint --dataset_name preferences \
        --output_dir outputs/dpo --learning_rate 1e-5

`preferences` is a Hub id or a folder of JSON or parquet files; docs/preference.md shows a row.
"""

from datasets import Image, List, load_dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer, ModelConfig, ScriptArguments, TrlParser

from vtlmm import load_model


def main() -> None:
    script, args, model_config = TrlParser((ScriptArguments, DPOConfig, ModelConfig)).parse_args_and_config()
    rows = load_dataset(script.dataset_name, split=script.dataset_train_split)
    model, processor = load_model(model_config.model_name_or_path, dtype="float32")
    # The projections of the decoder alone: the vision tower, the projector and the VM head stay as they are
    peft_config = LoraConfig(target_modules=r".*language_model.*_proj", task_type="CAUSAL_LM")
    trainer = DPOTrainer(
        model=model,
        args=args,
        train_dataset=rows.cast_column("images", List(Image())),
        processing_class=processor,
        peft_config=peft_config,
    )
    trainer.train()
    trainer.save_model(args.output_dir)


if __name__ == "__main__":
    main()
