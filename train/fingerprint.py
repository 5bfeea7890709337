# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""What the weights of a run depend on: settings, rows and start weights, to compare when a run is resumed."""

import hashlib
import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from datasets import Dataset, Image, IterableDataset, List
from peft import PeftModel

from vtlmm.hub.weights_digest import weights_digest


# Settings that may change when a run is resumed: logging, saving, evaluation, total steps and loading speed.
HARMLESS = (
    "output_dir", "overwrite", "resume_from_checkpoint", "do_*", "eval_*", "per_device_eval_batch_size",
    "batch_eval_metrics", "prediction_loss_only", "include_for_metrics", "log_*", "logging_*", "report_to", "run_name",
    "project", "trackio_*", "disable_tqdm", "debug", "save_*", "enable_jit_checkpoint", "hub_*", "push_to_hub",
    "max_steps", "num_train_epochs", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_p*_workers",
    "dataloader_prefetch_factor", "dataloader_multiprocessing_context", "dataset_num_proc", "use_cpu", "local_rank",
    "ddp_*", "fsdp*", "deepspeed", "skip_memory_metrics", "cache_image_features", "_n_gpu", "mp_parameters",
    "include_num_input_tokens_seen", "*_token", "ignore_data_skip", "tf32", "torch_empty_cache_steps",
)  # fmt: skip
IGNORED_CONFIG = ("_name_or_path", "transformers_version", "architectures", "auto_map", "dtype", "torch_dtype")


def is_harmless(name: str) -> bool:
    """Return whether a setting may differ between a run and its continuation."""
    return any(fnmatch(name, pattern) for pattern in HARMLESS)


def run_fingerprint(trainer) -> dict[str, Any]:
    """
    Return what the final weights of a run depend on, as JSON.

    Returns:
        `dict`: the settings that matter, by name; `processes`; `data` and `start weights` as digests.
    """
    settings = {name: value for name, value in trainer.args.to_dict().items() if not is_harmless(name)}
    base = trainer.model
    if isinstance(base, PeftModel):
        adapter = base.peft_config[base.active_adapter].to_dict()
        for name in ("base_model_name_or_path", "revision", "inference_mode", "peft_version"):
            adapter.pop(name, None)
        settings["adapter"] = _plain(adapter)
    config = {name: value for name, value in base.config.to_dict().items() if name not in IGNORED_CONFIG}
    settings |= {f"model.{name}": value for name, value in config.items()}
    settings["processes"] = trainer.args.world_size
    settings["training data"] = data_digest(trainer.train_dataset)
    settings["start weights"] = weights_digest(base)
    return json.loads(json.dumps(_plain(settings)))


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return one text for each entry of two fingerprints that differs, such as `learning_rate: 0.1 → 0.2`."""
    texts = []
    for name in sorted(before.keys() & now.keys()):
        if before[name] != now[name]:
            short = all(len(str(value)) <= 60 for value in (before[name], now[name]))
            digest = name in ("training data", "start weights")
            texts.append(f"{name}: {before[name]} → {now[name]}" if short and not digest else f"{name} differs")
    return texts


def _plain(value: Any) -> Any:
    """A JSON value; sets are sorted, so that equal ones are equal texts."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return (
        value if isinstance(value, str | int | float | bool) or value is None else str(getattr(value, "value", value))
    )


def data_digest(dataset: Any) -> str:
    """
    Return a digest of the rows of a dataset: all columns, and of each image its file name and size.

    Rows of a stream are not known before training. Its digest covers the columns only.
    """
    digest = hashlib.sha256()
    if not isinstance(dataset, Dataset):
        columns = getattr(dataset, "column_names", None) if isinstance(dataset, IterableDataset) else None
        return hashlib.sha256(json.dumps([type(dataset).__name__, columns]).encode()).hexdigest()[:16]
    columns = [name for name in dataset.column_names if name != "length"]
    rows = dataset.select_columns(columns).with_format(None)
    for name, feature in dataset.features.items():
        if isinstance(feature, Image):
            rows = rows.cast_column(name, Image(decode=False))
        elif isinstance(feature, List) and isinstance(feature.feature, Image):
            rows = rows.cast_column(name, List(Image(decode=False)))
    for batch in rows.iter(batch_size=1000):
        digest.update(json.dumps(_described(batch), sort_keys=True, ensure_ascii=False, default=str).encode())
    return digest.hexdigest()[:16]


def _described(value: Any) -> Any:
    """A value of a row; an image as its name and size."""
    if isinstance(value, dict) and value.keys() == {"bytes", "path"}:
        data, path = value["bytes"], value["path"]
        if data is not None:
            return [len(data), hashlib.sha256(data).hexdigest()]
        file = Path(path) if path else None
        return [file.name, file.stat().st_size if file.is_file() else None] if file else None
    if isinstance(value, dict):
        return {key: _described(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_described(item) for item in value]
    return value
