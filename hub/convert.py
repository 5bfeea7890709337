# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""A VT-LMM from a released VW-LMM or from a LLaVA-1.5, without loss and without ever holding the model."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoImageProcessor,
    AutoTokenizer,
    GenerationConfig,
    LlavaConfig,
    LlavaProcessor,
)
from transformers.dynamic_module_utils import custom_object_save

from modeling_vtlmm import VTLMMConfig, VTLMMForConditionalGeneration, VTLMMProcessor

from .assembly import part_config
from .chat_templates import end_of_turn, has_marks, load_template
from .checkpoint_files import (
    CHECKPOINT_FILES,
    LM_HEAD,
    SHARD_SIZE,
    Names,
    StoredTensor,
    check_tensors,
    embeddings_name,
    list_tensors,
    model_without_weights,
    resize_vocabulary,
    write_tensors,
)
from .paths import check_checkpoint, check_output, clear_output, local_folder
from .special_tokens import Vocabulary, add_special_tokens, num_embeddings, pad_left, set_generation_config
from .vision_tower import load_image_processor, load_vision_tower, vision_config_of


logger = logging.getLogger(__name__)

# LLaVA's own code, and that of the VW-LMM release, which stands on it.
ORIGINAL_NAMES: Names = (
    ("model.vision_tower.vision_tower.vision_model.", "model.vision_tower."),
    ("model.mm_projector.0.", "model.multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "model.multi_modal_projector.linear_2."),
    ("vm_head.", "model.vm_head."),
    ("lm_head.", "lm_head."),
    ("model.", "model.language_model."),
)
# transformers' llava: as its folders are, and as its modules have been called since 4.52.
LLAVA_NAMES: Names = (
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
    ("vision_tower.vision_model.", "model.vision_tower."),
    ("vision_tower.", "model.vision_tower."),
)
LLAVA_MODULE_NAMES: Names = (("model.vision_tower.vision_model.", "model.vision_tower."),)
TOWER, VM_HEAD = "model.vision_tower.", "model.vm_head."
VM_HEAD_SOURCES = ("lm_head", "input_embeddings", "random")


@dataclass
class Original:
    """What a class of the original code is here: the decoder's `model_type`, its chat template, and what differs."""

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
# Of a config that names no class.
ORIGINAL_TYPES = {"llava_llama": "LlavaLlamaForCausalLM", "llava_mistral": "LlavaMistralForCausalLM"}
# What the original code can do besides, and we cannot express.
ORIGINAL_SETTINGS = {
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_use_im_start_end": (False,),
    "mm_use_im_patch_token": (False,),
    "mm_patch_merge_type": ("flat",),
    "image_aspect_ratio": ("pad", "square", None),
}


@dataclass
class Checkpoint:
    """
    A checkpoint of another format, in our terms.

    config ([`VTLMMConfig`]), names (of its tensors), has_vm_head (`bool`), vocabulary ([`Vocabulary`]),
    num_rows (`int`): rows of embeddings and `lm_head` that the VT-LMM gets,
    processor ([`VTLMMProcessor`], *optional*), tower (`str`, *optional*): where the vision tower is if not in it.
    """

    config: VTLMMConfig
    names: Names
    has_vm_head: bool
    vocabulary: Vocabulary
    num_rows: int
    processor: VTLMMProcessor | None
    tower: str | None = None


def convert_checkpoint(
    checkpoint: str | Path,
    output: str | Path,
    *,
    vision_tower: str | None = None,
    tokenizer: str | None = None,
    chat_template: str | None = None,
    pad_to_square: bool = False,
    vm_head_init: str = "lm_head",
    shard_size: int | str = SHARD_SIZE,
    overwrite: bool = False,
) -> None:
    r"""
    Write a VT-LMM folder, as a Hub repository has it, from a released VW-LMM (logits, losses and what it generates
    stay the same), or from a LLaVA-1.5 in the llava-hf or in LLaVA's own format: a start for stage III.

    Tensors are copied bit by bit, one shard in memory at a time. The original code marks a image with the id −200;
    here it is a token of its own, the first after the vocabulary, and like −200 it has no embedding and no logit. What
    was done is logged at the level INFO.

    Args:
        checkpoint (`str` or `Path`): Hub id or folder, with `.safetensors` or `.bin` files.
        output (`str` or `Path`): folder for the VT-LMM.
        vision_tower (`str`, *optional*): Hub id or folder of the CLIP tower, for the original formats; by default what
            `mm_vision_tower` names, from the checkpoint's folder if it is a path. Its weights are read only where the
            checkpoint has none, its config and image processor always.
        tokenizer (`str`, *optional*): Hub id or folder, for the original formats; by default the checkpoint's.
        chat_template (`str`, *optional*): `"vicuna_v1"`, `"mistral"` or a `.jinja` file; by default that of the
            checkpoint's class, or of its processor.
        pad_to_square (`bool`, *optional*, defaults to `False`): of a LLaVA-1.5 in the llava-hf format, whose folders
            crop the middle of a image: pad it, as that model was trained. The original formats say it themselves.
        vm_head_init (`str`, *optional*, defaults to `"lm_head"`): where there is no VM head, see
            [`VTLMMForConditionalGeneration.initialize_vm_head`].
        shard_size (`int` or `str`, *optional*, defaults to `"2GB"`): of a file; most of the memory that it takes.
        overwrite (`bool`, *optional*, defaults to `False`): replace the model that `output` contains.

    Raises:
        `FileNotFoundError`: if an input is a path that does not exist.
        `FileExistsError`: if `output` contains files and `overwrite` is not set.
        `ValueError`: for another format, and for tensors that are missing, of no use or of another shape, all named.
    """
    if vm_head_init not in VM_HEAD_SOURCES:
        raise ValueError(f"`vm_head_init` is {vm_head_init!r}; it must be one of {', '.join(VM_HEAD_SOURCES)}.")
    if chat_template is not None:
        load_template(chat_template)  # raises before anything is downloaded
    output = check_output(output, [checkpoint, vision_tower, tokenizer], overwrite)
    for name in filter(None, (vision_tower, tokenizer)):
        check_checkpoint(name)
    folder = local_folder(checkpoint, patterns=CHECKPOINT_FILES)
    values = read_config_file(folder)
    if is_llava(values):
        if vision_tower or tokenizer:
            raise ValueError(f"{folder} has its own vision tower and tokenizer: leave out what was given for them.")
        found = read_llava(folder, values, chat_template, pad_to_square)
    elif pad_to_square:
        raise ValueError(f"{folder}/config.json says itself whether images are padded (`image_aspect_ratio`).")
    else:
        found = read_original(folder, values, vision_tower, tokenizer, chat_template)

    model = model_without_weights(found.config)
    tensors = list_tensors(folder, found.names)
    if found.names == LLAVA_NAMES + LLAVA_MODULE_NAMES and any(t.key.startswith("model.") for t in tensors.values()):
        found.names = LLAVA_MODULE_NAMES  # what is missing is called as the rest is
    if found.tower and not any(name.startswith(TOWER) for name in tensors):
        tensors |= _tower_tensors(found.tower, tensors, model)
    check_tensors(tensors, model, folder, found.names, may_lack=() if found.has_vm_head else (VM_HEAD,))
    if not any(name.startswith(VM_HEAD) for name in tensors):
        tensors[VM_HEAD + "weight"] = _new_vm_head(tensors, model, vm_head_init)
    resize_vocabulary(tensors, model, found.num_rows)

    words = None if found.processor is None else found.processor.tokenizer
    set_generation_config(model, words, found.vocabulary, generation_config_of(folder, model.config.text_config))
    clear_output(output)
    write_tensors(tensors, output, shard_size)
    _save_all_but_tensors(model, found.processor, _dtype(tensors, model), output)
    logger.info("Converted %s: %s parameters, in %s.", checkpoint, f"{model.num_parameters():,}", output)


def read_config_file(folder: Path) -> dict:
    """`config.json` of `folder`; `ValueError` when it has none, or when its weights are quantized."""
    file = folder / "config.json"
    if not file.is_file():
        adapter = (folder / "adapter_config.json").is_file()
        hint = "It is an adapter: merge it into its base model first." if adapter else "Is it a checkpoint?"
        raise ValueError(f"{folder} has no config.json. {hint}")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    if values.get("quantization_config"):
        raise ValueError(f"{file}: the weights are quantized; convert the checkpoint that they were made from.")
    return values


def is_llava(values: dict) -> bool:
    """Whether a config is that of transformers' llava; the VW-LMM release uses the same `model_type`."""
    return values.get("model_type") == "llava" and "text_config" in values


def original_class(values: dict, folder: Path) -> Original:
    """Which class of the original code a config names; raises `ValueError` for what cannot be converted."""
    model_type = values.get("model_type")
    name = (values.get("architectures") or [ORIGINAL_TYPES.get(model_type)])[0]
    if name not in ORIGINALS:
        raise ValueError(
            f"{folder}/config.json: the architecture is {name} (`model_type` {model_type!r}), not a VW-LMM or LLaVA "
            f"that can be converted: {', '.join(ORIGINALS)}, or LlavaForConditionalGeneration with a `text_config`."
        )
    for key, allowed in ORIGINAL_SETTINGS.items():
        if values.get(key, allowed[0]) not in allowed:
            expected = " or ".join(map(repr, allowed))
            raise ValueError(f"{folder}/config.json: `{key}` is {values[key]!r}; only {expected} can be converted.")
    return ORIGINALS[name]


def read_original(
    folder: Path, values: dict, vision_tower: str | None, tokenizer: str | None, chat_template: str | None
) -> Checkpoint:
    """A checkpoint of the VW-LMM release or of LLaVA's own code, whose config.json holds `values`."""
    kind = original_class(values, folder)
    tower = vision_tower or _tower_name(folder, values)
    config = original_config(values, kind, tower)
    words, processor = _load_tokenizer(tokenizer, folder), None
    if words is None:
        vocabulary = Vocabulary(config.visual_vocab_size, config.image_token_id, [config.image_token_id])
    else:
        vocabulary = add_special_tokens(words, config.visual_vocab_size)
        config.image_token_id = vocabulary.image_token_id
        words.chat_template = load_template(chat_template or kind.chat_template)
        processor = VTLMMProcessor(
            load_image_processor(tower, config.vision_config, pad_to_square=values.get("image_aspect_ratio") == "pad"),
            words,
            patch_size=config.vision_config.patch_size,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            num_additional_image_tokens=1,  # CLS
            chat_template=words.chat_template,
        )
    num_rows = num_embeddings(vocabulary, config.text_config.vocab_size)
    return Checkpoint(config, ORIGINAL_NAMES, kind.has_vm_head, vocabulary, num_rows, processor, tower)


def original_config(values: dict, kind: Original, tower: str) -> VTLMMConfig:
    """Our config of the original code's `config.json` and of the tower that it names."""
    text_class = CONFIG_MAPPING[kind.text_type]
    # The rotary base was a key of its own then. `sliding_window` is kept as it is there, null included: the released
    # code read it, and the class has another default than Mistral v0.2.
    known = {*text_class().to_dict(), "rope_theta", "rope_scaling"} - {"model_type", "architectures", "dtype"}
    text_config = text_class(**{key: value for key, value in values.items() if key in known})
    text_config = part_config(text_config, text_config._name_or_path)
    vision_config = part_config(vision_config_of(tower), tower)
    if vision_config.model_type != "clip_vision_model":
        raise ValueError(f"The vision tower {tower} is a {vision_config.model_type}; the original code has CLIP.")
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


def read_llava(folder: Path, values: dict, chat_template: str | None, pad_to_square: bool) -> Checkpoint:
    r"""
    A checkpoint of transformers' llava, whose config.json holds `values`.

    The words of a visual token are those before the image token, since tokens that were added come last. A native twin
    says itself how many there were, and how many rows: see [`vtlmm.hub.export_llava`].
    """
    llava = LlavaConfig.from_pretrained(folder)
    if llava.vision_config.model_type == "pixtral":
        raise ValueError(f"{folder}: Pixtral takes images of any size; VT-LMM has a fixed number of image tokens.")
    num_rows, image_token_id = llava.text_config.vocab_size, llava.image_token_index
    before = {"visual_vocab_size": min(image_token_id, num_rows), "vocab_size": num_rows, **values.get("vtlmm", {})}
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
        visual_vocab_size=before["visual_vocab_size"],
    )
    processor = _llava_processor(folder, config, chat_template, pad_to_square)
    new_ids = {image_token_id, None if processor is None else processor.tokenizer.pad_token_id} - {None}
    new_ids = sorted(i for i in new_ids if i >= config.visual_vocab_size)
    vocabulary = Vocabulary(config.visual_vocab_size, image_token_id, new_ids)
    names = LLAVA_NAMES + LLAVA_MODULE_NAMES
    return Checkpoint(config, names, False, vocabulary, before["vocab_size"], processor)


def _llava_processor(
    folder: Path, config: VTLMMConfig, chat_template: str | None, pad_to_square: bool
) -> VTLMMProcessor | None:
    if pad_to_square and config.vision_config.model_type != "clip_vision_model":
        raise ValueError(f"{folder}: a {config.vision_config.model_type} sees the whole image: no `pad_to_square`.")
    if not (folder / "tokenizer_config.json").is_file():
        logger.info("The checkpoint has no tokenizer, so there is no processor.")
        return None
    theirs = LlavaProcessor.from_pretrained(folder)
    if theirs.image_token_id != config.image_token_id:
        raise ValueError(
            f"{folder}: the image token is {config.image_token_id} in config.json, but the tokenizer has "
            f"{theirs.image_token} as {theirs.image_token_id}."
        )
    template = load_template(chat_template) if chat_template else theirs.chat_template or load_template("vicuna_v1")
    if not has_marks(template) or end_of_turn(template, theirs.tokenizer) is None:
        logger.warning(
            "The chat template does not mark answers with their end-of-turn token: it serves for generation; for "
            "training on answers pass `chat_template`, for a LLaVA-1.5 with Vicuna vicuna_v1."
        )
    image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    if pad_to_square:
        image_processor = load_image_processor(str(folder), config.vision_config)
    elif getattr(image_processor, "do_center_crop", False) and not getattr(image_processor, "do_pad", False):
        logger.warning(
            "Only the middle of a image is seen, as the checkpoint's image processor crops it. LLaVA-1.5 was "
            "trained on images padded to a square: `pad_to_square`."
        )
    strategy = config.vision_feature_select_strategy
    theirs.tokenizer.chat_template = template
    pad_left(theirs.tokenizer)
    return VTLMMProcessor(
        image_processor,
        theirs.tokenizer,
        # older folders do not say it
        patch_size=theirs.patch_size or config.vision_config.patch_size,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=theirs.num_additional_image_tokens or int(strategy == "default"),
        chat_template=template,
        image_token=theirs.image_token,
    )


def generation_config_of(folder: Path, text_config) -> GenerationConfig:
    """That of `folder`, or what its decoder's config says."""
    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder)
    return GenerationConfig.from_model_config(text_config)


def _tower_name(folder: Path, values: dict) -> str:
    name = values.get("mm_vision_tower")
    if name is None:
        raise ValueError(f"{folder}/config.json names no vision tower (`mm_vision_tower`): pass `vision_tower`.")
    return str(folder / name) if (folder / name).is_dir() else name


def _load_tokenizer(name: str | None, folder: Path):
    if name is None and not (folder / "tokenizer_config.json").is_file():
        logger.info("The checkpoint has no tokenizer: pass `tokenizer` for a processor.")
        return None
    return AutoTokenizer.from_pretrained(name or folder)


def _dtype(tensors: dict, model: VTLMMForConditionalGeneration) -> torch.dtype:
    """The decoder's; a checkpoint of several types is kept as it is."""
    return tensors[embeddings_name(model)].meta.dtype


def _tower_tensors(tower: str, tensors: dict, model) -> dict[str, torch.Tensor]:
    logger.info("The checkpoint has no vision tower; it comes from %s.", tower)
    dtype = _dtype(tensors, model)
    return {TOWER + name: tensor.to(dtype) for name, tensor in load_vision_tower(tower).state_dict().items()}


def _new_vm_head(tensors: dict, model, source: str) -> StoredTensor | torch.Tensor:
    """[`VTLMMForConditionalGeneration.initialize_vm_head`], without a model."""
    config = model.config
    logger.info("The checkpoint has no VM head; it starts from %s.", source)
    if source == "random":
        weight = torch.empty(model.model.vm_head.weight.shape, dtype=_dtype(tensors, model))
        std = getattr(config.text_config, "initializer_range", 0.02)
        return weight.normal_(std=std, generator=torch.Generator().manual_seed(0))
    tied = source == "input_embeddings" or config.tie_word_embeddings
    return tensors[embeddings_name(model) if tied else LM_HEAD].with_rows(config.visual_vocab_size)


def _save_all_but_tensors(model, processor: VTLMMProcessor | None, dtype: torch.dtype, output: Path):
    """What `save_pretrained` writes beside the weights; the config last, so that a folder half done does not load."""
    if processor is not None:
        processor.save_pretrained(output)
    model.generation_config.save_pretrained(output)
    config = model.config
    config.architectures = [type(model).__name__]
    for part in (config, config.text_config, config.vision_config):
        part.dtype = str(dtype).removeprefix("torch.")
    custom_object_save(model, output, config=config)
    config.save_pretrained(output)
