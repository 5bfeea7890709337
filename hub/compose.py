# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""An untrained VT-LMM from any vision tower and any decoder."""

import logging
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_vtlmm import VTLMMConfig, VTLMMForConditionalGeneration, VTLMMProcessor

from .assembly import assemble, part_config, quiet_loading, require_native, save
from .chat_templates import TEMPLATE_NAMES, add_images_and_marks, load_template
from .paths import check_checkpoint, check_output, clear_output
from .special_tokens import add_special_tokens, fit_embeddings, set_generation_config
from .vision_tower import load_image_processor, load_vision_tower, probe_tower


logger = logging.getLogger(__name__)

UNTRAINED = ("model.multi_modal_projector.", "model.vm_head.")

# A decoder that does one of these between its last hidden state and its logits is more than a linear head.
LOGIT_CHANGES = ("logit_scale", "logits_scaling", "final_logit_softcapping", "lm_head_multiplier")


class ComposedModel(NamedTuple):
    """The return value of [`compose_model`]."""

    model: VTLMMForConditionalGeneration
    processor: VTLMMProcessor


def compose_model(
    vision: str,
    text: str,
    output: str | Path | None = None,
    *,
    projector_type: str = "mlp2x_gelu",
    vm_head_type: str = "linear",
    vm_head_init: str = "lm_head",
    vision_feature_layer: int | list[int] | None = None,
    chat_template: str | None = None,
    dtype: str | torch.dtype | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
    overwrite: bool = False,
) -> ComposedModel:
    r"""
    Put a vision tower and a decoder together, with a new projector and VM head. What was done is logged (INFO).

    Args:
        vision (`str`): Hub id or folder of the tower, with its image processor: a ViT (CLIP, SigLIP, DINOv2, …) or a
            convolutional network. Of a two-tower model the vision part is taken.
        text (`str`): Hub id or folder of a causal decoder with its tokenizer.
        output (`str` or `Path`, *optional*): folder to save everything in, as a Hub repository has it.
        projector_type, vm_head_type (`str`, *optional*): see [`VTLMMConfig`].
        vm_head_init (`str`, *optional*): see [`VTLMMForConditionalGeneration.initialize_vm_head`].
        vision_feature_layer (`int` or `list[int]`, *optional*): by default -2, and -1 of a convolutional tower.
        chat_template (`str`, *optional*): `"vicuna_v1"`, `"mistral"` or a `.jinja` file, which is used as it is. By
            default the decoder's own with images and marked answers, or `"vicuna_v1"` when it has none.
        dtype (`str` or `torch.dtype`, *optional*): of the whole model; by default the decoder's.
        seed (`int`, *optional*, defaults to 0): for what is initialized.
        trust_remote_code (`bool`, *optional*, defaults to `False`): for a tokenizer or image processor with code of
            its own. Models with code of their own are refused.
        overwrite (`bool`, *optional*, defaults to `False`): replace the model that `output` contains.

    Returns:
        [`ComposedModel`]

    Raises:
        `ValueError`: for a tower or a decoder that does not fit, saying why.
    """
    if chat_template is not None:
        load_template(chat_template)  # raises before the parts are loaded
    if output is not None:
        output = check_output(output, [vision, text], overwrite)
    vision, text = check_checkpoint(vision), check_checkpoint(text)
    tower = load_vision_tower(vision, trust_remote_code)
    image_processor = load_image_processor(vision, tower.config, trust_remote_code=trust_remote_code)
    geometry = probe_tower(tower, image_processor, vision_feature_layer)
    decoder = load_decoder(text, dtype, trust_remote_code)
    tokenizer = AutoTokenizer.from_pretrained(text, trust_remote_code=trust_remote_code)
    vocabulary = add_special_tokens(tokenizer, decoder.get_input_embeddings().weight.shape[0])
    tokenizer.chat_template, template_origin = choose_template(chat_template, tokenizer)
    config = VTLMMConfig(
        vision_config=part_config(tower.config, vision),
        text_config=part_config(decoder.config, text),
        image_token_id=vocabulary.image_token_id,
        visual_vocab_size=vocabulary.num_words,
        projector_type=projector_type,
        vm_head_type=vm_head_type,
        **geometry.config_values(),
    )
    model = _assemble(config, tower, decoder, vm_head_init, seed)
    fit_embeddings(model, vocabulary)
    set_generation_config(model, tokenizer, vocabulary, decoder.generation_config)
    chat_template = tokenizer.chat_template
    processor = VTLMMProcessor(image_processor, tokenizer, chat_template=chat_template, **geometry.processor_values())
    _log_summary(model, template_origin)
    if output is not None:
        clear_output(output)
        save(model, processor, output)
    return ComposedModel(model, processor)


def load_decoder(name: str, dtype: str | torch.dtype | None, trust_remote_code: bool = False):
    r"""
    The causal language model of checkpoint `name`.

    Raises:
        `ValueError`: when its logits are not `lm_head` × the last hidden state, its head has another width than its
        embeddings, tensors are missing, or its code is not transformers' own.
    """
    with quiet_loading():
        decoder, info = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype or "auto", trust_remote_code=trust_remote_code, output_loading_info=True
        )
    require_native(decoder, name)
    if info["missing_keys"]:
        raise ValueError(f"The decoder {name} lacks tensors: {', '.join(sorted(info['missing_keys']))}.")
    reason = _unusual_head(decoder)
    if reason is not None:
        raise ValueError(f"The decoder {name} cannot be used: {reason}. VT-LMM needs logits = lm_head × hidden state.")
    return decoder.eval()


@torch.no_grad()
def _unusual_head(decoder) -> str | None:
    """What stands between `decoder`'s last hidden state and its logits besides a matrix; None when nothing does."""
    head, hidden_size = decoder.get_output_embeddings(), decoder.config.hidden_size
    if head is None or decoder.base_model is decoder:
        return "it has no language modeling head beside its base model"
    if getattr(head, "bias", None) is not None:
        return "its language modeling head has a bias"
    if head.weight.shape != decoder.get_input_embeddings().weight.shape or head.weight.shape[1] != hidden_size:
        return "its embeddings and its head differ in shape, or from its hidden size"
    for name in LOGIT_CHANGES:
        if getattr(decoder.config, name, None) not in (None, 0, 1):
            return f"its config changes the logits (`{name}` is {getattr(decoder.config, name)})"
    input_ids, embeddings = torch.arange(3)[None], decoder.get_input_embeddings()
    if not torch.equal(embeddings(input_ids), embeddings.weight[input_ids]):
        return "it scales its embeddings, and pseudo image features are mixed of the matrix as it stands"
    logits = decoder(input_ids).logits
    if not torch.allclose(logits, head(decoder.base_model(input_ids).last_hidden_state), rtol=1e-2, atol=1e-2):
        return "its logits are not its head × its last hidden state"
    return None


def choose_template(chat_template: str | None, tokenizer) -> tuple[str, str]:
    """The chat template, and in words where it comes from; see [`compose_model`]."""
    if chat_template is not None:
        origin = f"{chat_template}, of the VW-LMM release" if chat_template in TEMPLATE_NAMES else chat_template
        return load_template(chat_template), origin
    if tokenizer.chat_template is not None:
        return add_images_and_marks(tokenizer.get_chat_template(), tokenizer), "the decoder's own, with images"
    return load_template("vicuna_v1"), "vicuna_v1, of the VW-LMM release, since the decoder has none"


def _assemble(config, tower, decoder, vm_head_init: str, seed: int) -> VTLMMForConditionalGeneration:
    tensors = {f"model.vision_tower.{name}": tensor for name, tensor in tower.state_dict().items()}
    tensors |= {f"model.language_model.{name}": tensor for name, tensor in decoder.base_model.state_dict().items()}
    if not config.tie_word_embeddings:
        tensors["lm_head.weight"] = decoder.get_output_embeddings().weight
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = assemble(config, tensors, decoder.dtype, untrained=UNTRAINED)
        model.initialize_vm_head(vm_head_init)
    return model


def _log_summary(model, template_origin: str):
    config = model.config
    parts = {
        "vision tower": model.model.vision_tower,
        "projector": model.model.multi_modal_projector,
        "VM head": model.model.vm_head,
        "decoder": model.model.language_model,
    }
    for name, part in parts.items():
        logger.info("Parameters of the %s: %s.", name, f"{sum(p.numel() for p in part.parameters()):,}")
    logger.info(
        "Image tokens per image: %d, of %d channels from layer %s (%s).",
        config.image_seq_length,
        config.vision_hidden_size,
        config.vision_feature_layer,
        "without CLS and registers" if config.vision_feature_select_strategy == "default" else "every position",
    )
    logger.info("Words of a visual token: %d. Image token: %d.", config.visual_vocab_size, config.image_token_id)
    logger.info("Chat template: %s.", template_origin)
