# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The native twin of a VT-LMM: the same model as transformers' own `LlavaForConditionalGeneration`.

The VM head only makes training targets, so without it a VT-LMM answers as it did: the logits of all words and the
generated ids are equal. A twin needs no remote code, and engines that know llava serve it.
"""

import copy
import logging
from pathlib import Path

from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from modeling_vtlmm import VTLMMConfig, VTLMMProcessor

from .checkpoint_files import (
    CHECKPOINT_FILES,
    SHARD_SIZE,
    check_tensors,
    embeddings_name,
    list_tensors,
    model_without_weights,
    resize_vocabulary,
    their_name,
    write_tensors,
)
from .convert import LLAVA_NAMES, VM_HEAD, generation_config_of, read_config_file
from .paths import check_output, clear_output, local_folder


logger = logging.getLogger(__name__)

# Their folders have another level in the tower than transformers' modules have today.
NESTED_TOWERS = ("clip_vision_model", "siglip_vision_model")


def export_to_llava(
    checkpoint: str | Path, output: str | Path, *, shard_size: int | str = SHARD_SIZE, overwrite: bool = False
) -> None:
    r"""
    Write the native twin of a VT-LMM: a llava folder with processor, chat template and generation config.

    Stock llava looks up an embedding for the image token before the image features take its place. Where the VT-LMM
    has no row for it the twin gets one, in `lm_head` too: the mean of the others, whose logit never is the largest,
    and never generated. How many rows and words there were stands in its config under `vtlmm`, for the way back.

    Args:
        checkpoint (`str` or `Path`): Hub id or folder of a VT-LMM.
        output (`str` or `Path`): folder for the twin.
        shard_size (`int` or `str`, *optional*, defaults to `"2GB"`): of a file; most of the memory that it takes.
        overwrite (`bool`, *optional*, defaults to `False`): replace the model that `output` contains.

    Raises:
        `ValueError`: for a model that stock llava cannot express, with the reason; and for tensors that are missing,
        of no use or of another shape, all named.
    """
    output = check_output(output, [checkpoint], overwrite)
    folder = local_folder(checkpoint, patterns=CHECKPOINT_FILES)
    model_type = read_config_file(folder).get("model_type")
    if model_type != VTLMMConfig.model_type:
        raise ValueError(f"{folder}/config.json: `model_type` is {model_type!r}; a twin is made of a VT-LMM only.")
    config = VTLMMConfig.from_pretrained(folder)
    model = model_without_weights(config)
    reason = obstacle(config, embeddings_name(model))
    if reason is not None:
        raise ValueError(f"{folder} has no native twin: {reason}.")

    tensors = list_tensors(folder)
    check_tensors(tensors, model, folder)
    before = {"visual_vocab_size": config.visual_vocab_size, "vocab_size": config.text_config.vocab_size}
    resize_vocabulary(tensors, model, max(config.image_token_id + 1, config.text_config.vocab_size))
    nested = config.vision_config.model_type in NESTED_TOWERS
    names = [pair for pair in LLAVA_NAMES if nested or "vision_model" not in pair[0]]
    tensors = {their_name(name, names): t for name, t in tensors.items() if not name.startswith(VM_HEAD)}
    clear_output(output)
    write_tensors(tensors, output, shard_size)

    if (folder / "processor_config.json").is_file():
        _save_processor(VTLMMProcessor.from_pretrained(folder), output)
    else:
        logger.info("The VT-LMM has no processor, and so the twin has none.")
    generation_config = generation_config_of(folder, config.text_config)
    suppressed = {*(generation_config.suppress_tokens or ()), config.image_token_id}
    generation_config.suppress_tokens = sorted(suppressed)
    generation_config.save_pretrained(output)
    llava_config(config, before).save_pretrained(output)
    logger.info("The native twin of %s is in %s.", checkpoint, output)


def obstacle(config: VTLMMConfig, embeddings: str) -> str | None:
    """Why stock llava cannot be the model of `config`, whose embedding matrix has the name `embeddings`."""
    tower = config.vision_config
    hidden_size = getattr(tower, "hidden_size", None)
    if config.use_pseudo_image_features:
        return (
            "its decoder reads pseudo image features (`use_pseudo_image_features`), which are made with the VM head, "
            "and stock llava has no VM head"
        )
    if config.projector_type != "mlp2x_gelu":
        return f"its projector is {config.projector_type!r}, and that of stock llava has two layers (mlp2x_gelu)"
    if not hasattr(tower, "num_attention_heads") or not isinstance(hidden_size, int):
        return f"its vision tower is a {tower.model_type}, and stock llava needs the hidden states of a ViT"
    if getattr(tower, "num_register_tokens", 0) and config.vision_feature_select_strategy == "default":
        return f"its vision tower, a {tower.model_type}, has register tokens, which stock llava would take for patches"
    if config.vision_feature_size != hidden_size * len(config.vision_feature_layers):
        return (
            f"its image features have {config.vision_feature_size} channels (`vision_hidden_size`), and stock llava "
            f"takes {hidden_size} of every layer"
        )
    tied = LlavaForConditionalGeneration._tied_weights_keys["lm_head.weight"]
    if config.tie_word_embeddings and embeddings != tied:
        return f"its `lm_head` is tied to {embeddings}, and stock llava ties it to {tied}"
    return None


def llava_config(config: VTLMMConfig, before: dict) -> LlavaConfig:
    """The twin's config; `before` are the sizes of the VT-LMM's vocabularies."""
    return LlavaConfig(
        vision_config=copy.deepcopy(config.vision_config),
        text_config=copy.deepcopy(config.text_config),
        image_token_index=config.image_token_id,
        image_seq_length=config.image_seq_length,
        projector_hidden_act=config.projector_hidden_act,
        multimodal_projector_bias=config.multimodal_projector_bias,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        vision_feature_layer=config.vision_feature_layer,
        tie_word_embeddings=config.tie_word_embeddings,
        architectures=["LlavaForConditionalGeneration"],
        dtype=config.dtype,
        vtlmm=before,
    )


def _save_processor(processor: VTLMMProcessor, output: Path):
    """As transformers has it; the image processor also in the file of its own that other engines read."""
    # The parts of a processor with code of its own say so too, and a twin has no such code.
    vars(processor.image_processor).pop("auto_map", None)
    processor.tokenizer.init_kwargs.pop("auto_map", None)
    theirs = LlavaProcessor(
        processor.image_processor,
        processor.tokenizer,
        patch_size=processor.patch_size,
        vision_feature_select_strategy=processor.vision_feature_select_strategy,
        chat_template=processor.chat_template,
        image_token=processor.image_token,
        num_additional_image_tokens=processor.num_additional_image_tokens,
    )
    theirs.save_pretrained(output)
    processor.image_processor.save_pretrained(output)
