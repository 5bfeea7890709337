# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Export a VT-LMM as transformers' own `LlavaForConditionalGeneration`, for engines that run no remote code.

The VM head is used in training only, so the exported model gives the same logits and generates the same tokens.
"""

import copy
import logging
from pathlib import Path
from typing import Any, cast

from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from modeling_vtlmm import VTLMMProcessor

from .checkpoint_files import SHARD_SIZE, embeddings_name, resize_vocabulary, their_name, write_tensors
from .convert import VM_HEAD
from .export_source import open_vtlmm
from .paths import check_output, clear_output
from .source_formats import LLAVA_NAMES, read_generation_config


logger = logging.getLogger(__name__)

# In LLaVA folders with these towers, the tower's tensors have one more level in their names than the modules.
NESTED_TOWERS = ("clip_vision_model", "siglip_vision_model")


def export_to_llava(
    checkpoint: str | Path, output: str | Path, *, shard_size: int | str = SHARD_SIZE, overwrite: bool = False
) -> None:
    r"""
    Write a VT-LMM as a LLaVA folder with processor, chat template and generation config.

    LLaVA looks up an embedding for the image token before image features replace it. If the VT-LMM has no row for this
    token, the exported model gets one, in `lm_head` too: the mean of the other rows. Its logit is never the largest,
    and the token is suppressed in generation. The original sizes are stored in the config under `vtlmm`, so that
    [`convert_checkpoint`] can restore them.

    Args:
        checkpoint (`str` or `Path`): folder or Hub id of a VT-LMM.
        output (`str` or `Path`): folder for the exported model.
        shard_size (`int` or `str`, *optional*, defaults to `"2GB"`): largest size of a file, and so most of the memory
            that the export needs.
        overwrite (`bool`, *optional*, defaults to `False`): replace the model that `output` contains.

    Raises:
        `FileExistsError`: if `output` contains files and `overwrite` is not set.
        `ValueError`: if LLaVA cannot represent the model, with the reason, or tensors are missing, unexpected or of
            another shape; all are named.
    """
    output = check_output(output, [checkpoint], overwrite)
    source = open_vtlmm(checkpoint)
    folder, config, model = source.folder, source.config, source.model
    reason = reason_without_export(config, embeddings_name(model))
    if reason is not None:
        raise ValueError(f"{folder} cannot be exported to LLaVA: {reason}.")

    tensors = source.list_tensors()
    sizes = {"visual_vocab_size": config.visual_vocab_size, "vocab_size": config.text_config.vocab_size}
    resize_vocabulary(tensors, model, max(config.image_token_id + 1, config.text_config.vocab_size))
    nested = config.vision_config.model_type in NESTED_TOWERS
    names = tuple(pair for pair in LLAVA_NAMES if nested or "vision_model" not in pair[0])
    llava_tensors = {their_name(name, names): t for name, t in tensors.items() if not name.startswith(VM_HEAD)}
    clear_output(output)
    write_tensors(llava_tensors, output, shard_size)

    if (folder / "processor_config.json").is_file():
        _save_processor(VTLMMProcessor.from_pretrained(folder), output)
    else:
        logger.info("No processor was exported, since %s contains none.", folder)
    generation_config = read_generation_config(folder, config.text_config)
    suppressed = {*(generation_config.suppress_tokens or ()), config.image_token_id}
    generation_config.suppress_tokens = sorted(suppressed)
    generation_config.save_pretrained(output)
    llava_config(config, sizes).save_pretrained(output)
    logger.info("Exported %s to %s.", checkpoint, output)


def reason_without_export(config: Any, embeddings: str) -> str | None:
    """
    Return why LLaVA cannot represent the model of `config`, or None if it can.

    Args:
        config ([`VTLMMConfig`])
        embeddings (`str`): name of the model's embedding matrix.
    """
    tower = config.vision_config
    hidden_size = getattr(tower, "hidden_size", None)
    if config.use_pseudo_image_features:
        return (
            "its decoder reads pseudo image features (`use_pseudo_image_features`), which need the VM head, and LLaVA "
            "has no VM head"
        )
    if config.projector_type != "mlp2x_gelu":
        return f"its projector is {config.projector_type!r}, but LLaVA's has two layers (mlp2x_gelu)"
    if not hasattr(tower, "num_attention_heads") or not isinstance(hidden_size, int):
        return f"its vision tower is a {tower.model_type}, but LLaVA needs the hidden states of a ViT"
    if getattr(tower, "num_register_tokens", 0) and config.vision_feature_select_strategy == "default":
        return f"its vision tower, a {tower.model_type}, has register tokens, which LLaVA would use as patches"
    if config.vision_feature_size != hidden_size * len(config.vision_feature_layers):
        return (
            f"its image features have {config.vision_feature_size} channels (`vision_hidden_size`), but LLaVA takes "
            f"{hidden_size} of each layer"
        )
    tied = cast(dict[str, str], LlavaForConditionalGeneration._tied_weights_keys)["lm_head.weight"]
    if config.tie_word_embeddings and embeddings != tied:
        return f"its `lm_head` is tied to {embeddings}, but LLaVA ties it to {tied}"
    return None


def llava_config(config: Any, sizes: dict[str, int]) -> LlavaConfig:
    """Return the LLaVA config of a VT-LMM; `sizes` are its vocabulary sizes, for the conversion back."""
    return LlavaConfig(  # type: ignore[call-arg]
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
        vtlmm=sizes,
    )


def _save_processor(processor: VTLMMProcessor, output: Path) -> None:
    """Save the processor as LLaVA's, and the image processor also in the file that other engines read."""
    # The parts of a processor with remote code name that code too, and the export contains none.
    vars(processor.image_processor).pop("auto_map", None)
    processor.tokenizer.init_kwargs.pop("auto_map", None)
    llava_processor = LlavaProcessor(
        processor.image_processor,
        processor.tokenizer,
        patch_size=processor.patch_size,
        vision_feature_select_strategy=processor.vision_feature_select_strategy,
        chat_template=processor.chat_template,
        image_token=processor.image_token,
        num_additional_image_tokens=processor.num_additional_image_tokens,
    )
    llava_processor.save_pretrained(output)
    processor.image_processor.save_pretrained(output)
