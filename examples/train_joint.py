# /// script
# dependencies = ["vtlmm", "bitsandbytes"]
# ///
"""Train stage IV with LoRA, as with TRL's SFTTrainer. All settings of SFTConfig are options.

    python examples/train_joint.py --model_name_or_path outputs/start --dataset_name rows.json \
        --output_dir outputs/joint --use_peft --num_train_epochs 1
"""

from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config

import modeling_vtlmm  # noqa: F401 - registers the model
from vtlmm import VTLMMTrainer, VTLMMTrainingConfig, load_rows


def main() -> None:
    parser = TrlParser((ScriptArguments, VTLMMTrainingConfig, ModelConfig))
    script, args, model_config = parser.parse_args_and_config()

    trainer = VTLMMTrainer(
        model=AutoModelForImageTextToText.from_pretrained(model_config.model_name_or_path, dtype="float32"),
        args=args,
        train_dataset=load_rows(script.dataset_name, split=script.dataset_train_split),
        processing_class=AutoProcessor.from_pretrained(model_config.model_name_or_path),
        peft_config=get_peft_config(model_config),
    )
    trainer.train()
    trainer.save_model(args.output_dir)


if __name__ == "__main__":
    main()
