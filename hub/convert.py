# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Convert a released VW-LMM or a LLaVA-1.5 to a VT-LMM, bit by bit and without the model in memory."""

import logging
from pathlib import Path
from typing import cast

import torch
from transformers.dynamic_module_utils import custom_object_save

from modeling_vtlmm import VTLMMForConditionalGeneration, VTLMMProcessor

from .chat_templates import load_template
from .checkpoint_files import (
    CHECKPOINT_FILES,
    LM_HEAD,
    SHARD_SIZE,
    StoredTensor,
    Tensors,
    check_tensors,
    embeddings_name,
    list_tensors,
    model_without_weights,
    resize_vocabulary,
    write_tensors,
)
from .paths import check_checkpoint, check_output, clear_output, local_folder
from .source_formats import (
    LLAVA_MODULE_NAMES,
    LLAVA_NAMES,
    Checkpoint,
    is_llava,
    read_config_file,
    read_generation_config,
    read_llava,
    read_original,
)
from .special_tokens import set_generation_config
from .vision_tower import load_vision_tower


logger = logging.getLogger(__name__)

TOWER, VM_HEAD = "model.vision_tower.", "model.vm_head."
VM_HEAD_SOURCES = ("lm_head", "input_embeddings", "random")


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
    Write a complete VT-LMM folder from a released VW-LMM or a LLaVA-1.5.

    A converted VW-LMM gives the same logits, losses and generated tokens. A LLaVA-1.5, in the llava-hf or the original
    format, is a start for stage III. Tensors are copied unchanged, with one shard in memory at a time. The original
    code marks an image with the id −200; here it is the first token after the vocabulary, and like −200 it has no
    embedding and no logit. Details are logged (INFO).

    Args:
        checkpoint (`str` or `Path`): Hub id or folder, with `.safetensors` or `.bin` files.
        output (`str` or `Path`): folder for the VT-LMM.
        vision_tower (`str`, *optional*): Hub id or folder of the CLIP tower, for the original formats; by default
            `mm_vision_tower` of the config, in the checkpoint's folder if it is a path. Its weights are read only if
            the checkpoint contains none; its config and image processor always.
        tokenizer (`str`, *optional*): Hub id or folder, for the original formats; by default the checkpoint's.
        chat_template (`str`, *optional*): `"vicuna_v1"`, `"mistral"` or a `.jinja` file; by default the template
            of the checkpoint's class or processor.
        pad_to_square (`bool`, *optional*, defaults to `False`): for a LLaVA-1.5 in the llava-hf format, whose folders
            crop the center of an image: pad the image instead, as in the training of that model. The original formats
            have this setting in their config.
        vm_head_init (`str`, *optional*, defaults to `"lm_head"`): start of a missing VM head, see
            [`VTLMMForConditionalGeneration.initialize_vm_head`].
        shard_size (`int` or `str`, *optional*, defaults to `"2GB"`): largest size of a file, and so most of the memory
            that the conversion needs.
        overwrite (`bool`, *optional*, defaults to `False`): replace the model that `output` contains.

    Raises:
        `FileNotFoundError`: if an input is a path that does not exist.
        `FileExistsError`: if `output` contains files and `overwrite` is not set.
        `ValueError`: if the checkpoint has another format, or tensors are missing, unexpected or of another shape; all
            are named.
    """
    _check_options(vision_tower, tokenizer, chat_template, vm_head_init)
    output = check_output(output, [checkpoint, vision_tower, tokenizer], overwrite)
    folder = local_folder(checkpoint, patterns=CHECKPOINT_FILES)
    source = read_source(folder, vision_tower, tokenizer, chat_template, pad_to_square)
    model = model_without_weights(source.config)
    tensors = _converted_tensors(folder, source, model, vm_head_init)
    tokens = None if source.processor is None else source.processor.tokenizer
    generation_config = read_generation_config(folder, model.config.text_config)
    set_generation_config(model, tokens, source.vocabulary, generation_config)
    clear_output(output)
    write_tensors(tensors, output, shard_size)
    _save_without_weights(model, source.processor, _dtype(tensors, model), output)
    logger.info("Converted %s: %s parameters, in %s.", checkpoint, f"{model.num_parameters():,}", output)


def _check_options(
    vision_tower: str | None, tokenizer: str | None, chat_template: str | None, vm_head_init: str
) -> None:
    """Check the options of [`convert_checkpoint`] before anything is downloaded."""
    if vm_head_init not in VM_HEAD_SOURCES:
        raise ValueError(f"`vm_head_init` is {vm_head_init!r}; it must be one of {', '.join(VM_HEAD_SOURCES)}.")
    if chat_template is not None:
        load_template(chat_template)
    for name in filter(None, (vision_tower, tokenizer)):
        check_checkpoint(name)


def read_source(
    folder: Path, vision_tower: str | None, tokenizer: str | None, chat_template: str | None, pad_to_square: bool
) -> Checkpoint:
    """
    Read config, vocabulary and processor of the checkpoint in `folder`; see [`convert_checkpoint`].

    Raises:
        `ValueError`: if an option does not apply to the checkpoint's format.
    """
    values = read_config_file(folder)
    if is_llava(values):
        if vision_tower or tokenizer:
            raise ValueError(
                f"{folder} contains its vision tower and tokenizer. Leave out `vision_tower` and `tokenizer`."
            )
        return read_llava(folder, values, chat_template, pad_to_square)
    if pad_to_square:
        raise ValueError(
            f"{folder}/config.json has its own padding setting (`image_aspect_ratio`). Leave out `pad_to_square`."
        )
    return read_original(folder, values, vision_tower, tokenizer, chat_template)


def _converted_tensors(
    folder: Path, source: Checkpoint, model: VTLMMForConditionalGeneration, vm_head_init: str
) -> Tensors:
    """Return the tensors of the converted model: the checkpoint's, and a VM head if it has none."""
    tensors = _source_tensors(folder, source, model)
    if not any(name.startswith(VM_HEAD) for name in tensors):
        tensors[VM_HEAD + "weight"] = _new_vm_head(tensors, model, vm_head_init)
    stored = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, StoredTensor)}
    resize_vocabulary(stored, model, source.num_rows)
    return tensors | stored


def _source_tensors(folder: Path, source: Checkpoint, model: VTLMMForConditionalGeneration) -> Tensors:
    """Return the checkpoint's tensors by our names, with those of a vision tower elsewhere, and check them."""
    names, stored = source.names, list_tensors(folder, source.names)
    if names == LLAVA_NAMES + LLAVA_MODULE_NAMES and any(t.key.startswith("model.") for t in stored.values()):
        names = LLAVA_MODULE_NAMES  # so that an error names missing tensors in the checkpoint's own style
    tensors: Tensors = {**stored}
    if source.tower and not any(name.startswith(TOWER) for name in tensors):
        logger.info("The checkpoint contains no vision tower; it is read from %s.", source.tower)
        dtype, tower = _dtype(tensors, model), load_vision_tower(source.tower)
        tensors |= {TOWER + name: tensor.to(dtype) for name, tensor in tower.state_dict().items()}
    check_tensors(tensors, model, folder, names, may_lack=() if source.has_vm_head else (VM_HEAD,))
    return tensors


def _dtype(tensors: Tensors, model: VTLMMForConditionalGeneration) -> torch.dtype:
    """Return the decoder's dtype. Tensors of other dtypes are copied unchanged."""
    return cast(StoredTensor, tensors[embeddings_name(model)]).meta.dtype


def _new_vm_head(tensors: Tensors, model: VTLMMForConditionalGeneration, source: str) -> StoredTensor | torch.Tensor:
    """Return the weight of [`VTLMMForConditionalGeneration.initialize_vm_head`], without a model in memory."""
    config = model.config
    logger.info("The checkpoint contains no VM head; it is initialized from %s.", source)
    if source == "random":
        weight = torch.empty(cast(torch.Tensor, model.model.vm_head.weight).shape, dtype=_dtype(tensors, model))
        std = getattr(config.text_config, "initializer_range", 0.02)
        return weight.normal_(std=std, generator=torch.Generator().manual_seed(0))
    tied = source == "input_embeddings" or config.tie_word_embeddings
    start = cast(StoredTensor, tensors[embeddings_name(model) if tied else LM_HEAD])
    return start.with_rows(cast(int, config.visual_vocab_size))


def _save_without_weights(
    model: VTLMMForConditionalGeneration, processor: VTLMMProcessor | None, dtype: torch.dtype, output: Path
) -> None:
    """Write all files but the weights. The config comes last, so that an incomplete folder does not load."""
    if processor is not None:
        processor.save_pretrained(output)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(output)
    config = model.config
    config.architectures = [type(model).__name__]
    for part in (config, config.text_config, config.vision_config):
        part.dtype = str(dtype).removeprefix("torch.")
    custom_object_save(model, output, config=config)  # type: ignore[arg-type]  # the annotation is wrong
    config.save_pretrained(output)
