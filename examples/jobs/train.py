# /// script
# dependencies = ["vtlmm", "bitsandbytes"]
# ///
"""Train one stage on the Hub's GPUs and push the model.

    hf jobs uv run --flavor a10g-large --secrets HF_TOKEN examples/jobs/train.py user/start user/rows \
        --stage joint --output-repo user/joint --license apache-2.0 --setting num_train_epochs=1

--setting takes any setting of `vtlmm train`, e.g. --setting use_peft=true. An adapter is pushed as an adapter.
"""

import argparse

from vtlmm import push_model
from vtlmm.train.recipe import change_settings
from vtlmm.train.stage_runner import train_stages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="Hub id of a VT-LMM")
    parser.add_argument("dataset", help="Hub id of a dataset")
    parser.add_argument("--stage", default="joint", choices=["projector", "decoder", "visual_head", "joint"])
    parser.add_argument("--output-repo", required=True, help="user/name; it is created if it does not exist")
    parser.add_argument("--license", required=True, help="license of the weights")
    parser.add_argument("--setting", action="append", default=[], metavar="NAME=VALUE")
    args = parser.parse_args()

    settings = {"model_name_or_path": args.model, "dataset_name": args.dataset, "stage": args.stage}
    settings |= {"output_dir": "outputs/job", "save_strategy": "no", "report_to": "none"}
    change_settings(settings, args.setting)
    folder = train_stages(settings)
    result = push_model(folder, args.output_repo, license=args.license, private=True)
    print(result.format())
    raise SystemExit(1 if result.report.problems else 0)


if __name__ == "__main__":
    main()
