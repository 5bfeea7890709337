# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The model card of a folder, from what is in it: config, record of the training, results of `vtlmm eval`."""

import json
import re
import shutil
from importlib.metadata import distributions
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml

from modeling_vtlmm import VTLMMConfig

from .checkpoint_files import embeddings_name, model_without_weights
from .curves import CURVES_FILE, draw_curves
from .export_llava import obstacle
from .verify import ADAPTER, CARD_FILE, VTLMM, is_hub_id, kind_of


TEMPLATE = Path(__file__).with_name("model_card.jinja")
RUN_RECORD = "vtlmm_run.json"
RESULTS_FOLDER = "results"
LICENSE_FILE, OUR_LICENSE = "LICENSE", "apache-2.0"
# In a card that may be written anew, the trainer's too. UNFILLED is in the Hub's own template till it is filled in.
CARD_MARK = "<!-- Written by vtlmm, anew at every push. Take this line out to keep your own changes. -->"
UNFILLED = "[More Information Needed]"
# Settings that stand in the table of stages, or say where things are and not what is learnt.
NOT_LISTED = ("model", "revision", "dataset", "eval_dataset", "image_folder", "output_dir", "stage", "learning_rate")
NOT_LISTED += ("resume_from_checkpoint", "cache_image_features", "disable_tqdm", "report_to")
RESULT_KEYS = ("split", "subset", "scorer", "num_questions", "empty_answers", "kinds", "summary", "versions")
SIZES = {"hidden_size": "channels", "num_hidden_layers": "layers", "image_size": "pixels", "vocab_size": "words"}
TASK = "image-text-to-text"
RELATIONS = {ADAPTER: "adapter", VTLMM: "finetune", "quantized": "quantized"}


def is_generated(card: str) -> bool:
    """Whether nobody wrote this card by hand."""
    return CARD_MARK in card or UNFILLED in card


def write_card(
    folder: str | Path,
    repo_id: str,
    *,
    license: str | None = None,
    base_models: list[str] = (),
    results: list[str | Path] = (),
    images: list[str | Path] = (),
) -> None:
    r"""
    Write README.md into `folder`, with the curves of the training where matplotlib is installed, the results into
    `results/`, of those on data sets of the Hub `.eval_results/*.yaml`, and the text of the Apache license if that is
    the weights'. A card that somebody wrote, or took the mark out of, stays; of one that was written here license,
    base models, results and images are kept.

    Args:
        repo_id (`str`): where the folder is going to be.
        license (`str`, *optional*): the Hub's name for the license of the weights.
        base_models (`list[str]`, *optional*): Hub ids, when the folder does not name them or names others.
        results (`list`, *optional*): files `results.json` that `vtlmm eval` wrote.
        images (`list`, *optional*): PNG files to show first, such as `vtlmm tokens` writes.

    Raises:
        `ValueError`: when a file of results or a image is none.
    """
    folder = Path(folder)
    path = folder / CARD_FILE
    check_files(results, images)
    _add_images(folder, images)
    _add_results(folder, results)
    tables = [_read_results(file) for file in sorted(folder.glob(f"{RESULTS_FOLDER}/*.json"))]
    _write_eval_results(folder, [table for table in tables if _of_data_set(table)])
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    if before and not is_generated(before):
        return
    kind, config = kind_of(folder)
    runs = _read_runs(folder)
    earlier = ModelCard(before, ignore_metadata_errors=True).data if CARD_MARK in before else ModelCardData()
    license = license or earlier.get("license")
    base_models = list(base_models) or earlier.get("base_model") or find_base_models(kind, config, runs)
    base_models = [base_models] if isinstance(base_models, str) else base_models
    _write_license(folder, license)
    form = "quantized" if quantization_of(config) else kind
    data = front_matter(form, repo_id, license, base_models, runs, tables)
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        mark=CARD_MARK,
        repo_id=repo_id,
        kind=kind,
        license=license,
        no_twin=_no_twin(folder) if kind == VTLMM else None,
        quantization=quantization_of(config),
        base=config.get("base_model_name_or_path"),
        base_revision=config.get("revision"),
        parts=describe_parts(config, base_models),
        tokens=f" ({config['image_seq_length']} image tokens)" if "image_seq_length" in config else "",
        images=sorted(file.name for file in folder.glob("*.png") if file.name != CURVES_FILE),
        curves=CURVES_FILE if draw_curves(runs, folder / CURVES_FILE) else None,
        runs=[describe_run(run) for run in runs],
        results=[{"title": _title(table), "rows": _rows(table)} for table in tables],
    )
    card.save(path)


def front_matter(form, repo_id, license, base_models, runs, tables) -> ModelCardData:
    """What the Hub reads: see [`ModelCardData`]. Parts of a data set and training data give no result there, only in
    the text."""
    datasets = dict.fromkeys(run["settings"].get("dataset_name") for run in runs)
    whole = [table for table in tables if _of_data_set(table)]
    return ModelCardData(
        license=license,
        library_name="peft" if form == ADAPTER else "transformers",
        pipeline_tag=TASK,
        tags=["vt-lmm", "conversational", "visual-tokens", *(["trl"] if runs else [])],
        base_model=base_models or None,
        # a twin has the very weights: the Hub has no word for that
        base_model_relation=RELATIONS.get(form) if base_models else None,
        datasets=[name for name in datasets if is_hub_id(name)] or None,
        model_name=repo_id.split("/")[-1],
        eval_results=[result for table in whole for result in _eval_results(table)] or None,
    )


def find_base_models(kind: str, config: dict, runs: list[dict]) -> list[str]:
    """Hub ids that the folder names: of an adapter its base, else the start of the training or both parts. A quantized
    model is made of the whole one, whose id is nowhere in it."""
    if kind == ADAPTER:
        names = [config.get("base_model_name_or_path")]
    elif quantization_of(config):
        names = []
    else:
        names = [config.get(part, {}).get("_name_or_path") for part in ("text_config", "vision_config")]
        names += [run["settings"].get("model") for run in runs[:1]]
    return list(dict.fromkeys(name for name in names if is_hub_id(name)))


def quantization_of(config: dict) -> str | None:
    """`"nf4"` or `"int8"` of a quantized model."""
    values = config.get("quantization_config")
    return None if not values else values["bnb_4bit_quant_type"] if values.get("load_in_4bit") else "int8"


def _no_twin(folder: Path) -> str | None:
    """Why there is no native twin of the VT-LMM in `folder`."""
    config = VTLMMConfig.from_pretrained(folder)
    return obstacle(config, embeddings_name(model_without_weights(config)))


def license_text() -> str | None:
    """The text of this package's license, from where it is installed; what a build left in a checkout lacks it."""
    texts = (installed.read_text(f"licenses/{LICENSE_FILE}") for installed in distributions(name="vtlmm"))
    return next(filter(None, texts), None)


def check_files(results: list[str | Path] = (), images: list[str | Path] = ()) -> None:
    """
    Raises:
        `ValueError`: when one of what is to go into a card is none.
    """
    for file in map(Path, results):
        _read_results(file)
    for file in map(Path, images):
        if file.suffix != ".png" or not file.is_file():
            raise ValueError(f"{file} is no PNG: pass one, such as `vtlmm tokens` writes.")


def _add_images(folder: Path, images: list[str | Path]) -> None:
    for file in map(Path, images):
        if file.resolve().parent != folder.resolve():
            shutil.copy(file, folder)


def _write_license(folder: Path, license: str | None) -> None:
    """The text of the license if it is this package's own; another one's is its owner's to add."""
    file, text = folder / LICENSE_FILE, license_text()
    if license == OUR_LICENSE and text and not file.is_file():
        file.write_text(text, encoding="utf-8")
    elif license != OUR_LICENSE and file.is_file() and file.read_text(encoding="utf-8") == text:
        file.unlink()


def describe_parts(config: dict, base_models: list[str]) -> list[tuple[str, str]]:
    """Name and description of each part."""
    parts = [("base models", ", ".join(f"[{name}](https://huggingface.co/{name})" for name in base_models) or "–")]
    for part, name in (("vision_config", "vision tower"), ("text_config", "decoder")):
        if part in config:
            values = config[part]
            size = [f"{values[key]} {word}" for key, word in SIZES.items() if isinstance(values.get(key), int)]
            parts.append((name, ", ".join([values.get("model_type", "–"), *size])))
    if "image_seq_length" in config:
        parts.append(("image tokens per image", str(config["image_seq_length"])))
    if "visual_vocab_size" in config:
        words, pseudo = f"{config['visual_vocab_size']:,}", config.get("use_pseudo_image_features")
        parts.append(("VM head", f"{config['vm_head_type']}, {words} words of a visual token"))
        parts.append(("decoder reads", "pseudo image features" if pseudo else "image features"))
    if quantization_of(config):
        parts.append(("decoder's projections", f"{quantization_of(config)}, the rest bfloat16"))
    for key in ("peft_type", "r", "lora_alpha", "use_dora"):
        if key in config:
            parts.append((f"`{key}`", str(config[key])))
    return parts


def describe_run(run: dict) -> dict:
    """One run of the record for the template."""
    settings, metrics = run["settings"], run.get("metrics", {})
    losses = [f"{key.removeprefix('eval_')} {value:.3g}" for key, value in metrics.items() if key.endswith("_loss")]
    where = f"{run['processes']} × {run['device']}"
    epochs = "–" if run.get("epochs") is None else f"{run['epochs']:.3g}"
    row = [
        run["stage"],
        _named(settings["model_name_or_path"]),
        _named(settings.get("dataset_name")),
        run.get("rows") or "stream",
    ]
    row += [run["steps"], epochs, f"{run['learning_rate']:g}", where, f"{run['seconds'] / 3600:.2g}"]
    versions = [f"{name} {number}" for name, number in run["versions"].items()]
    commit = [f"commit {run['commit']}"] if run.get("commit") else []
    return {
        "stage": run["stage"],
        "row": [*row, ", ".join(losses) or "–"],
        "plan": "\n".join(run["plan"]),
        "settings": [
            (key, _cell(value))
            for key, value in settings.items()
            if key not in NOT_LISTED and not key.endswith("_token")
        ],
        "versions": ", ".join([*versions, *commit]) + ".",
    }


def _named(name) -> str:
    """A Hub id; of a folder or file of the machine only the last part, which is nobody's secret."""
    return "–" if name is None else str(name) if is_hub_id(name) else Path(str(name)).name


def _cell(value) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = _named(text) if Path(text).is_absolute() else text
    return text.replace("|", "\\|").replace("\n", " ")


def _read_runs(folder: Path) -> list[dict]:
    path = folder / RUN_RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


# ---- Results ----


def _read_results(path: Path) -> dict:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        return {**table, "data": table["data"], "all": next(line for line in table["kinds"] if line["kind"] == "all")}
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise ValueError(f"{path} holds no results: pass a results.json of `vtlmm eval`.") from error


def _kept(table: dict) -> dict:
    """What is published, without the paths of this machine that `vtlmm eval` noted."""
    kept = {key: table[key] for key in RESULT_KEYS if key in table} | {"data": _named(table["data"])}
    if not is_hub_id(table["data"]):
        kept.pop("split", None)  # a file is one split, which the loader calls train whatever it holds
    return kept


def _result_name(table: dict) -> str:
    kept = _kept(table)
    parts = [kept["data"], kept.get("split"), table["scorer"], table.get("subset")]
    return re.sub(r"\W+", "_", "_".join(filter(None, parts))) + ".json"


def _add_results(folder: Path, files) -> None:
    tables = {}
    for table in map(_read_results, map(Path, files)):
        name = _result_name(table)
        if name in tables:
            raise ValueError(f"Two of the results would be one file, {name}: publish one of them.")
        tables[name] = table
    for name, table in tables.items():
        file = folder / RESULTS_FOLDER / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(_kept(table), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _title(table: dict) -> str:
    subset = f" SUBSET: {table['subset']}." if table.get("subset") else ""
    split = f", split {table['split']}" if table.get("split") else ""
    return f"**{_named(table['data'])}**{split}, scorer {table['scorer']}.{subset}"


def _rows(table: dict) -> list[list[str]]:
    rows = []
    for line in table["kinds"]:
        row = [line["kind"], str(line["n"])]
        for name, low, high in (("score", "low", "high"), ("blind", "blind_low", "blind_high")):
            known = line.get(name) is not None
            row += [f"{line[name]:.1%}", f"{line[low]:.1%} – {line[high]:.1%}"] if known else ["–", "–"]
        rows.append(row)
    return rows


def _eval_results(table: dict) -> list[EvalResult]:
    """The score over all questions, and its control."""
    name = _named(table["data"])
    where = {"dataset_type": name, "dataset_name": name, "dataset_split": table.get("split")}
    metrics = {"score": table["scorer"], "blind": f"{table['scorer']}, shuffled images"}
    return [
        EvalResult(
            task_type=TASK, **where, metric_type=table["scorer"], metric_name=metric, metric_value=table["all"][key]
        )
        for key, metric in metrics.items()
        if table["all"].get(key) is not None
    ]


def _of_data_set(table: dict) -> bool:
    """Whether a score is one on the data set: of all of a split, and not of what one trains on."""
    split = table.get("split") or ""
    return not table.get("subset") and "[" not in split and split != "train"


def _write_eval_results(folder: Path, tables: list[dict]) -> None:
    """One file for each data set of the Hub: its page can show the results too."""
    entries = {}
    for table in tables:
        if is_hub_id(table["data"]):
            blind = table["all"].get("blind")
            notes = ", ".join(f"{name} {table[name]}" for name in ("split", "scorer") if table.get(name))
            notes += "" if blind is None else f"; shuffled images: {blind:.4f}"
            entry = EvalResultEntry(table["data"], "default", round(table["all"]["score"], 4), notes=notes)
            entries.setdefault(table["data"], []).append(entry)
    for data, of_data in entries.items():
        file = folder / ".eval_results" / (re.sub(r"\W+", "_", data) + ".yaml")
        file.parent.mkdir(exist_ok=True)
        file.write_text(yaml.safe_dump(eval_result_entries_to_yaml(of_data)), encoding="utf-8")
