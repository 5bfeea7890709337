# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Read the formats that can be converted: the VW-LMM release, LLaVA's original code, and transformers' LLaVA."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import (
    CONFIG_MAPPING,
    AutoImageProcessor,
    AutoTokenizer,
    GenerationConfig,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedConfig,
)

from modeling_vtlmm import VTLMMConfig, VTLMMProcessor
from vtlmm.data.json_files import read_json

from .chat_templates import end_of_turn, has_marks, load_template
from .checkpoint_files import Names
from .special_tokens import Vocabulary, add_special_tokens, num_embeddings, pad_left
from .vision_tower import load_image_processor, part_config, vision_config_of


logger = logging.getLogger(__name__)

# LLaVA's original code, and the VW-LMM release, which is based on it.
ORIGINAL_NAMES: Names = (
    ("model.vision_tower.vision_tower.vision_model.", "model.vision_tower."),
    ("model.mm_projector.0.", "model.multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "model.multi_modal_projector.linear_2."),
    ("vm_head.", "model.vm_head."),
    ("lm_head.", "lm_head."),
    ("model.", "model.language_model."),
)
# transformers' LLaVA: the names in its folders, and the names of its modules since 4.52.
LLAVA_NAMES: Names = (
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
    ("vision_tower.vision_model.", "model.vision_tower."),
    ("vision_tower.", "model.vision_tower."),
)
LLAVA_MODULE_NAMES: Names = (("model.vision_tower.vision_model.", "model.vision_tower."),)


@dataclass
class Original:
    """A class of the original code: its decoder's `model_type`, its chat template, and its special features."""

    text_type: str
    chat_template: str
    has_vm_head: bool = True
    use_pseudo_image_features: bool = False


ORIGINALS = {
    "vwLlamaForCausalLM": Original("llama", "vicuna_v1"),
    "vwMistralForCausalLM": Original("mistral", "mistral"),
    "vwPifLlamaForCausalLM": Original("llama", "vicuna_v1", use_pseudo_image_features=True),
    "LlavaLlamaForCausalLM": Original("llama", "vicuna_v1", has_vm_head=False),
    "LlavaMistralForCausalLM": Original("mistral", "mistral", has_vm_head=False),
}
# For a config that names no class.
ORIGINAL_TYPES = {"llava_llama": "LlavaLlamaForCausalLM", "llava_mistral": "LlavaMistralForCausalLM"}
# Settings of the original code, with the values that a VT-LMM supports.
ORIGINAL_SETTINGS: dict[str, tuple[Any, ...]] = {
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_use_im_start_end": (False,),
    "mm_use_im_patch_token": (False,),
    "mm_patch_merge_type": ("flat",),
    "image_aspect_ratio": ("pad", "square", None),
}


@dataclass
class Checkpoint:
    """
    A checkpoint of another format in our terms.

    config ([`VTLMMConfig`]), names (prefixes of its tensors), has_vm_head (`bool`), vocabulary ([`Vocabulary`]),
    num_rows (`int`): rows of the VT-LMM's embeddings and `lm_head`,
    processor ([`VTLMMProcessor`], *optional*), tower (`str`, *optional*): the vision tower, if it is elsewhere.
    """

    config: VTLMMConfig
    names: Names
    has_vm_head: bool
    vocabulary: Vocabulary
    num_rows: int
    processor: VTLMMProcessor | None
    tower: str | None = None


def read_config_file(folder: Path) -> dict[str, Any]:
    """
    Return the content of `config.json` in `folder`.

    Raises:
        `ValueError`: if the file is missing or invalid, or the weights are quantized.
    """
    file = folder / "config.json"
    if not file.is_file():
        adapter = (folder / "adapter_config.json").is_file()
        hint = (
            "It is an adapter; merge it into its base model first." if adapter else "Pass the folder of a checkpoint."
        )
        raise ValueError(f"{folder} contains no config.json. {hint}")
    values = read_json(file)
    if values.get("quantization_config"):
        raise ValueError(f"{file}: the weights are quantized. Use the checkpoint before quantization.")
    return values


def read_generation_config(folder: Path, text_config: PreTrainedConfig) -> GenerationConfig:
    """Return the generation config of `folder`, or the one in its decoder's config."""
    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder)
    return GenerationConfig.from_model_config(text_config)


def is_llava(values: dict[str, Any]) -> bool:
    """Return whether a config is that of transformers' LLaVA. The VW-LMM release uses the same `model_type`."""
    return values.get("model_type") == "llava" and "text_config" in values


# ---- The VW-LMM release and LLaVA's original code ----


def read_original(
    folder: Path, values: dict[str, Any], vision_tower: str | None, tokenizer: str | None, chat_template: str | None
) -> Checkpoint:
    """Read a checkpoint of the VW-LMM release or of LLaVA's original code, whose `config.json` contains `values`."""
    kind = original_class(values, folder)
    tower = vision_tower or _tower_name(folder, values)
    config = original_config(values, kind, tower)
    text_config: Any = config.text_config
    vision_config: Any = config.vision_config
    tokens, processor = _load_tokenizer(tokenizer, folder), None
    num_words = text_config.vocab_size
    if tokens is None:
        vocabulary = Vocabulary(num_words, num_words, [num_words])
    else:
        vocabulary = add_special_tokens(tokens, num_words)
        config.image_token_id = vocabulary.image_token_id
        tokens.chat_template = load_template(chat_template or kind.chat_template)
        processor = VTLMMProcessor(
            load_image_processor(tower, vision_config, pad_to_square=values.get("image_aspect_ratio") == "pad"),
            tokens,
            patch_size=vision_config.patch_size,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            num_additional_image_tokens=1,  # CLS
            chat_template=tokens.chat_template,
        )
    num_rows = num_embeddings(vocabulary, num_words)
    return Checkpoint(config, ORIGINAL_NAMES, kind.has_vm_head, vocabulary, num_rows, processor, tower)


def original_class(values: dict[str, Any], folder: Path) -> Original:
    """
    Return the class of the original code that a config names.

    Raises:
        `ValueError`: if the class or a setting is not supported.
    """
    model_type = str(values.get("model_type"))
    name = (values.get("architectures") or [ORIGINAL_TYPES.get(model_type)])[0]
    if name not in ORIGINALS:
        raise ValueError(
            f"{folder}/config.json: the architecture {name} (`model_type` {model_type!r}) cannot be converted. "
            f"Supported: {', '.join(ORIGINALS)}, and LlavaForConditionalGeneration with a `text_config`."
        )
    for key, allowed in ORIGINAL_SETTINGS.items():
        if values.get(key, allowed[0]) not in allowed:
            expected = " or ".join(map(repr, allowed))
            raise ValueError(f"{folder}/config.json: `{key}` is {values[key]!r}; only {expected} can be converted.")
    return ORIGINALS[name]


def original_config(values: dict[str, Any], kind: Original, tower: str) -> VTLMMConfig:
    """Return our config for the original code's `config.json` and the vision tower that it names."""
    text_class: Any = CONFIG_MAPPING[kind.text_type]
    # `rope_theta` was a separate key then. `sliding_window` is kept even if it is null, because the released code
    # reads it, and the class has another default than Mistral v0.2.
    known = {*text_class().to_dict(), "rope_theta", "rope_scaling"} - {"model_type", "architectures", "dtype"}
    text_config = text_class(**{key: value for key, value in values.items() if key in known})
    text_config = part_config(text_config, text_config._name_or_path)
    vision_config: Any = part_config(vision_config_of(tower), tower)
    if vision_config.model_type != "clip_vision_model":
        raise ValueError(f"The vision tower {tower} is a {vision_config.model_type}; the original code needs CLIP.")
    whole = values.get("mm_vision_select_feature") == "cls_patch"
    num_patches = (vision_config.image_size // vision_config.patch_size) ** 2
    return VTLMMConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_id=text_config.vocab_size,
        image_seq_length=num_patches + whole,
        vision_feature_select_strategy="full" if whole else "default",
        vision_feature_layer=values.get("mm_vision_select_layer", -2),
        use_pseudo_image_features=kind.use_pseudo_image_features,
    )


def _tower_name(folder: Path, values: dict[str, Any]) -> str:
    name = values.get("mm_vision_tower")
    if name is None:
        raise ValueError(f"{folder}/config.json names no vision tower (`mm_vision_tower`). Pass `vision_tower`.")
    return str(folder / name) if (folder / name).is_dir() else name


def _load_tokenizer(name: str | None, folder: Path) -> Any:
    if name is None and not (folder / "tokenizer_config.json").is_file():
        logger.info("No processor is written, since the checkpoint contains no tokenizer. Pass `tokenizer` for one.")
        return None
    return AutoTokenizer.from_pretrained(name or folder)


# ---- transformers' LLaVA ----


def read_llava(folder: Path, values: dict[str, Any], chat_template: str | None, pad_to_square: bool) -> Checkpoint:
    r"""
    Read a checkpoint of transformers' LLaVA, whose `config.json` contains `values`.

    The visual vocabulary is the tokens before the image token, because added tokens come last. The config of a model
    that [`export_to_llava`] wrote contains the original sizes.
    """
    llava: Any = LlavaConfig.from_pretrained(folder)
    if llava.vision_config.model_type == "pixtral":
        raise ValueError(
            f"{folder}: Pixtral takes images of any size, but a VT-LMM has a fixed number of image tokens."
        )
    num_rows, image_token_id = llava.text_config.vocab_size, llava.image_token_index
    sizes = {"visual_vocab_size": min(image_token_id, num_rows), "vocab_size": num_rows, **values.get("vtlmm", {})}
    num_words = sizes["visual_vocab_size"]
    config = VTLMMConfig(
        vision_config=part_config(llava.vision_config, llava.vision_config._name_or_path),
        text_config=part_config(llava.text_config, llava.text_config._name_or_path),
        image_token_id=image_token_id,
        image_seq_length=llava.image_seq_length,
        projector_hidden_act=llava.projector_hidden_act,
        multimodal_projector_bias=llava.multimodal_projector_bias,
        vision_feature_select_strategy=llava.vision_feature_select_strategy,
        vision_feature_layer=llava.vision_feature_layer,
        tie_word_embeddings=llava.tie_word_embeddings,
        visual_vocab_size=num_words,
    )
    processor = _llava_processor(folder, config, chat_template, pad_to_square)
    added = {image_token_id, None if processor is None else processor.tokenizer.pad_token_id}
    new_ids = sorted(i for i in added if i is not None and i >= num_words)
    vocabulary = Vocabulary(num_words, image_token_id, new_ids)
    return Checkpoint(config, LLAVA_NAMES + LLAVA_MODULE_NAMES, False, vocabulary, sizes["vocab_size"], processor)


def _llava_processor(
    folder: Path, config: VTLMMConfig, chat_template: str | None, pad_to_square: bool
) -> VTLMMProcessor | None:
    vision_config: Any = config.vision_config
    if pad_to_square and vision_config.model_type != "clip_vision_model":
        raise ValueError(
            f"{folder}: `pad_to_square` is for CLIP towers. A {vision_config.model_type} sees the whole image without "
            "it."
        )
    if not (folder / "tokenizer_config.json").is_file():
        logger.info("No processor is written, since the checkpoint contains no tokenizer.")
        return None
    source: Any = LlavaProcessor.from_pretrained(folder)
    if source.image_token_id != config.image_token_id:
        raise ValueError(
            f"{folder}: the image token is {config.image_token_id} in config.json, but the tokenizer has "
            f"{source.image_token} as {source.image_token_id}."
        )
    template = load_template(chat_template) if chat_template else source.chat_template or load_template("vicuna_v1")
    if not has_marks(template) or end_of_turn(template, source.tokenizer) is None:
        logger.warning(
            "The chat template does not mark answers with their end-of-turn token. It can be used for generation. For "
            "training pass `chat_template`; a LLaVA-1.5 with Vicuna needs vicuna_v1."
        )
    image_processor: Any = AutoImageProcessor.from_pretrained(folder, backend="pil")
    if pad_to_square:
        image_processor = load_image_processor(str(folder), vision_config)
    elif getattr(image_processor, "do_center_crop", False) and not getattr(image_processor, "do_pad", False):
        logger.warning(
            "The checkpoint's image processor crops the center of each image. LLaVA-1.5 was trained on images padded "
            "to a square; set `pad_to_square` (`--pad-to-square`) for them."
        )
    strategy = config.vision_feature_select_strategy
    source.tokenizer.chat_template = template
    pad_left(source.tokenizer)
    return VTLMMProcessor(
        image_processor,
        source.tokenizer,
        patch_size=source.patch_size or vision_config.patch_size,  # missing in older folders
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=source.num_additional_image_tokens or int(strategy == "default"),
        chat_template=template,
        image_token=source.image_token,
    )
