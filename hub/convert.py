# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""A VT-LMM from a checkpoint of the VW-LMM release (pengts/VW-LMM), without loss."""

import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoTokenizer, GenerationConfig

from modeling_vtlmm import VTLMMConfig, VTLMMForConditionalGeneration, VTLMMProcessor

from .assembly import assemble, part_config, save
from .chat_templates import load_template
from .vision_tower import load_image_processor, load_vision_tower, vision_config_of
from .vocabulary import Vocabulary, add_special_tokens, fit_embeddings, set_generation_config


logger = logging.getLogger(__name__)


@dataclass
class Released:
    """What a released class is here: the decoder's `model_type`, its chat template, and what the decoder gets."""

    text_type: str
    chat_template: str
    use_pseudo_image_features: bool = False


RELEASED = {
    "vwLlamaForCausalLM": Released("llama", "vicuna_v1"),
    "vwMistralForCausalLM": Released("mistral", "mistral"),
    "vwPifLlamaForCausalLM": Released("llama", "vicuna_v1", use_pseudo_image_features=True),
}

# Beginnings of tensor names: the release's and ours. The first that fits counts, in either direction.
NAMES = (
    ("model.vision_tower.vision_tower.vision_model.", "model.vision_tower."),
    ("model.mm_projector.0.", "model.multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "model.multi_modal_projector.linear_2."),
    ("vm_head.", "model.vm_head."),
    ("lm_head.", "lm_head."),
    ("model.", "model.language_model."),
)
TOWER = "model.vision_tower."
# Older libraries saved these; they follow from the config.
DERIVED = re.compile(r"\.(rotary_emb\.inv_freq|position_ids)$")


def convert(
    checkpoint: str | Path,
    output: str | Path | None = None,
    *,
    vision_tower: str | None = None,
    tokenizer: str | None = None,
    dtype: str | torch.dtype | None = None,
) -> tuple[VTLMMForConditionalGeneration, VTLMMProcessor | None]:
    r"""
    Read a released VW-LMM: logits, losses and what it generates stay the same, tensor by tensor.

    The release marks a picture with the id −200; here it is a token of its own, the first after the released
    vocabulary, and like −200 it has no embedding and no logit. What was done is logged at the level INFO.

    Args:
        checkpoint (`str` or `Path`): Hub id or folder, with `.safetensors` or `.bin` files.
        output (`str` or `Path`, *optional*): folder to save everything in, as a Hub repository has it.
        vision_tower (`str`, *optional*): Hub id or folder of the CLIP tower; by default what the checkpoint's
            `mm_vision_tower` names, from the checkpoint's folder if it is a path. Its weights are read only where the
            checkpoint has none, its config and image processor always.
        tokenizer (`str`, *optional*): Hub id or folder; by default the checkpoint's.
        dtype (`str` or `torch.dtype`, *optional*): by default that of the checkpoint's tensors.

    Returns:
        `tuple`: the model, and its processor or `None` when there is no tokenizer.

    Raises:
        `ValueError`: for another format, and for tensors that are missing, of no use or of another shape, all named.
    """
    folder = _local(checkpoint)
    released = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = released_kind(released, folder)
    tower_name = vision_tower or _tower_name(folder, released)
    config = read_config(released, kind, tower_name)

    model = _load_model(folder, config, tower_name, dtype)
    words = _load_tokenizer(tokenizer, folder)
    if words is None:
        vocabulary = Vocabulary(config.visual_vocab_size, config.image_token_id, [config.image_token_id])
    else:
        vocabulary = add_special_tokens(words, config.visual_vocab_size)
        model.config.image_token_id = vocabulary.image_token_id
        words.chat_template = load_template(kind.chat_template)
    fit_embeddings(model, vocabulary)
    set_generation_config(model, words, vocabulary, GenerationConfig.from_model_config(config.text_config))
    processor = None if words is None else _processor(words, tower_name, config, released)
    logger.info("Converted %s: %s parameters.", checkpoint, f"{model.num_parameters():,}")
    if output is not None:
        save(model, processor, output)
    return model, processor


def released_kind(released: dict, folder: Path) -> Released:
    """Which released class `config.json` (as `released`) names; raises `ValueError` for what cannot be converted."""
    name = (released.get("architectures") or [None])[0]
    if name not in RELEASED:
        raise ValueError(f"{folder}/config.json: the architecture is {name}, not one of {', '.join(RELEASED)}.")
    expected = {"mm_projector_type": "mlp2x_gelu", "mm_use_im_start_end": False, "mm_use_im_patch_token": False}
    for key, value in expected.items():
        if released.get(key, value) != value:
            raise ValueError(f"{folder}/config.json: `{key}` is {released[key]!r}; only {value!r} can be converted.")
    return RELEASED[name]


def read_config(released: dict, kind: Released, tower_name: str) -> VTLMMConfig:
    """Our config of the release's `config.json` and of the tower that it names."""
    text_class = CONFIG_MAPPING[kind.text_type]
    # The rotary base was a key of its own then. `sliding_window` is kept as it is there, null included: the released
    # code read it, and the class has another default than Mistral v0.2.
    known = {*text_class().to_dict(), "rope_theta", "rope_scaling"} - {"model_type", "architectures", "dtype"}
    text_config = text_class(**{key: value for key, value in released.items() if key in known})
    vision_config = part_config(vision_config_of(tower_name), tower_name)
    whole = released.get("mm_vision_select_feature") == "cls_patch"
    num_patches = (vision_config.image_size // vision_config.patch_size) ** 2
    return VTLMMConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_id=text_config.vocab_size,
        image_seq_length=num_patches + whole,
        vision_feature_select_strategy="full" if whole else "default",
        vision_feature_layer=released.get("mm_vision_select_layer", -2),
        use_pseudo_image_features=kind.use_pseudo_image_features,
    )


def _load_model(folder: Path, config: VTLMMConfig, tower_name: str, dtype) -> VTLMMForConditionalGeneration:
    tensors = {our_name(name): tensor for name, tensor in read_tensors(folder).items() if not DERIVED.search(name)}
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or next(iter(tensors.values())).dtype
    if not any(name.startswith(TOWER) for name in tensors):
        logger.info("The checkpoint has no vision tower; it comes from %s.", tower_name)
        tensors |= {TOWER + name: tensor for name, tensor in load_vision_tower(tower_name).state_dict().items()}
    return assemble(config, tensors, dtype, released_name=released_name)


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """
    All tensors of `folder`, from `.safetensors` files or else from `.bin` files, by the names in them.

    Raises:
        `ValueError`: when there is no such file, or an index names one that is not there.
    """
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index, single = folder / f"{stem}.{suffix}.index.json", folder / f"{stem}.{suffix}"
        if index.is_file():
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = [folder / name for name in sorted(set(weight_map.values()))]
        else:
            files = [single] if single.is_file() else []
        absent = [file.name for file in files if not file.is_file()]
        if absent:
            raise ValueError(f"{index} names files that are not there: {', '.join(absent)}.")
        if files:
            # A .bin file is a pickle, which could run any code.
            read = load_file if suffix == "safetensors" else _load_pickle
            return {name: tensor for file in files for name, tensor in read(file).items()}
    raise ValueError(f"No weights in {folder}: neither model.safetensors nor pytorch_model.bin, nor an index of them.")


def our_name(name: str) -> str:
    """The model's name of a tensor of the release; an unknown name is kept."""
    return next((ours + name.removeprefix(theirs) for theirs, ours in NAMES if name.startswith(theirs)), name)


def released_name(name: str) -> str:
    """The inverse of [`our_name`]."""
    return next((theirs + name.removeprefix(ours) for theirs, ours in NAMES if name.startswith(ours)), name)


def _load_pickle(file: Path) -> dict[str, torch.Tensor]:
    return torch.load(file, map_location="cpu", weights_only=True)


def _local(checkpoint: str | Path) -> Path:
    if Path(checkpoint).is_dir():
        return Path(checkpoint)
    return Path(snapshot_download(str(checkpoint), allow_patterns=["*.json", "*.safetensors", "*.bin", "*.model"]))


def _tower_name(folder: Path, released: dict) -> str:
    name = released.get("mm_vision_tower")
    if name is None:
        raise ValueError(f"{folder}/config.json names no vision tower (`mm_vision_tower`): pass `vision_tower`.")
    return str(folder / name) if (folder / name).is_dir() else name


def _load_tokenizer(name: str | None, folder: Path):
    if name is None and not (folder / "tokenizer_config.json").is_file():
        logger.info("The checkpoint has no tokenizer: pass `tokenizer` for a processor.")
        return None
    return AutoTokenizer.from_pretrained(name or folder)


def _processor(tokenizer, tower_name: str, config: VTLMMConfig, released: dict) -> VTLMMProcessor:
    pad = released.get("image_aspect_ratio") == "pad"
    return VTLMMProcessor(
        load_image_processor(tower_name, config.vision_config, pad_to_square=pad),
        tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,  # CLS
        chat_template=tokenizer.chat_template,
    )
