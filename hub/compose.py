# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Compose an untrained VT-LMM from any vision tower and any decoder."""

import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from modeling_vtlmm import VTLMMConfig, VTLMMForConditionalGeneration, VTLMMPreTrainedModel, VTLMMProcessor
from vtlmm.data.setting_values import require_integers

from .chat_templates import (
    TEMPLATE_NAMES,
    add_images_and_marks,
    default_system_prompt,
    drop_default_system_prompt,
    load_template,
)
from .gguf_file import import_gguf
from .paths import check_checkpoint, check_output, clear_output, split_gguf_file
from .repository_checks import require_json
from .special_tokens import Vocabulary, add_special_tokens, fit_embeddings, set_generation_config
from .vision_tower import (
    TowerGeometry,
    load_image_processor,
    load_vision_tower,
    part_config,
    probe_tower,
    quiet_loading,
    require_native,
)


logger = logging.getLogger(__name__)

# The modules that are initialized; a composed model has no tensors for them.
UNTRAINED = ("model.multi_modal_projector.", "model.vm_head.")

# Config keys of decoders that change the logits after the linear head.
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
    drop_system_prompt: bool = False,
    dtype: str | torch.dtype | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
    overwrite: bool = False,
) -> ComposedModel:
    r"""
    Combine a vision tower and a decoder with a new projector and VM head. Details are logged (INFO).

    Args:
        vision (`str`): Hub id or folder of the tower with its image processor: a ViT (CLIP, SigLIP, DINOv2, …) or a
            convolutional network. Of a two-tower model the vision part is used.
        text (`str`): Hub id or folder of a causal decoder with its tokenizer, or a GGUF file of a decoder:
            `folder/model.gguf` or `user/name/model.gguf`. Quantized weights become floating-point numbers again.
        output (`str` or `Path`, *optional*): folder to save everything in, as in a Hub repository.
        projector_type, vm_head_type (`str`, *optional*): see [`VTLMMConfig`].
        vm_head_init (`str`, *optional*): see [`VTLMMForConditionalGeneration.initialize_vm_head`].
        vision_feature_layer (`int` or `list[int]`, *optional*): by default -2, and -1 for a convolutional tower.
        chat_template (`str`, *optional*): `"vicuna_v1"`, `"mistral"` or a `.jinja` file, which is used unchanged. By
            default the decoder's template with images and generation marks, or `"vicuna_v1"` if it has none.
        drop_system_prompt (`bool`, *optional*, defaults to `False`): leave out the system prompt that the decoder's
            template adds to conversations without one. It takes tokens in every row.
        dtype (`str` or `torch.dtype`, *optional*): dtype of the whole model; by default the decoder's.
        seed (`int`, *optional*, defaults to 0): seed of the new modules.
        trust_remote_code (`bool`, *optional*, defaults to `False`): for a tokenizer or image processor with its own
            code. Models with their own code are rejected.
        overwrite (`bool`, *optional*, defaults to `False`): replace the model that `output` contains.

    Returns:
        [`ComposedModel`]

    Raises:
        `FileNotFoundError`: if a part is a path that does not exist.
        `FileExistsError`: if `output` contains files and `overwrite` is not set.
        `ValueError`: if the tower or the decoder cannot be used, with the reason.
    """
    require_integers(0, seed=seed)
    if chat_template is not None:
        load_template(chat_template)  # check it before the parts are loaded
    if output is not None:
        output = check_output(output, [vision, split_gguf_file(text)[0]], overwrite)
    parts = _load_parts(vision, text, vision_feature_layer, dtype, trust_remote_code)
    tokenizer = parts.tokenizer
    tokenizer.chat_template, template_origin = choose_template(chat_template, tokenizer, drop_system_prompt)
    composed = _assemble_parts(parts, projector_type, vm_head_type, vm_head_init, seed)
    _log_summary(composed.model, template_origin)
    if output is not None:
        _save(composed, output)
    return composed


class _Parts(NamedTuple):
    """The parts of a model: the tower with its configuration and image sizes, and the decoder with its tokenizer."""

    tower: PreTrainedModel
    vision_config: PreTrainedConfig
    image_processor: Any
    geometry: TowerGeometry
    decoder: Any
    text_config: PreTrainedConfig
    tokenizer: Any
    vocabulary: Vocabulary


def _load_parts(
    vision: str,
    text: str,
    vision_feature_layer: int | list[int] | None,
    dtype: str | torch.dtype | None,
    trust_remote_code: bool,
) -> _Parts:
    """Load and check the parts, and add the special tokens to the tokenizer."""
    text, gguf_file = split_gguf_file(text)
    vision, text = check_checkpoint(vision), check_checkpoint(text)
    require_json(vision)
    require_json(text)
    tower = load_vision_tower(vision, trust_remote_code)
    image_processor = load_image_processor(vision, tower.config, trust_remote_code=trust_remote_code)
    geometry = probe_tower(tower, image_processor, vision_feature_layer)
    decoder = load_decoder(text, dtype, trust_remote_code, gguf_file)
    options = {} if gguf_file is None else {"gguf_file": gguf_file}
    tokenizer: Any = AutoTokenizer.from_pretrained(text, trust_remote_code=trust_remote_code, **options)
    vocabulary = add_special_tokens(tokenizer, decoder.get_input_embeddings().weight.shape[0])
    configs = part_config(tower.config, vision), part_config(decoder.config, text)
    return _Parts(tower, configs[0], image_processor, geometry, decoder, configs[1], tokenizer, vocabulary)


def load_decoder(
    name: str, dtype: str | torch.dtype | None, trust_remote_code: bool = False, gguf_file: str | None = None
) -> Any:
    r"""
    Load the causal language model of checkpoint `name`, or of its file `gguf_file`.

    Raises:
        `ValueError`: if tensors are missing, transformers does not implement the model, or its logits are not
            `lm_head` × the last hidden state.
    """
    options: dict[str, Any] = {"dtype": dtype or "auto", "trust_remote_code": trust_remote_code}
    if gguf_file is not None:
        import_gguf()
        options |= {"gguf_file": gguf_file, "dtype": dtype or torch.float32}
    with quiet_loading():
        loaded: Any = AutoModelForCausalLM.from_pretrained(name, **options, output_loading_info=True)
    decoder, info = loaded
    if gguf_file is not None:
        # transformers marks the model as quantized, but its weights are floating-point numbers now.
        decoder.hf_quantizer, decoder.is_quantized = None, False
        del decoder.config.quantization_config
    require_native(decoder, name)
    if info["missing_keys"]:
        raise ValueError(f"Tensors of the decoder {name} are missing: {', '.join(sorted(info['missing_keys']))}.")
    reason = _reason_unsupported(decoder)
    if reason is not None:
        raise ValueError(
            f"The decoder {name} is not supported: {reason}. VT-LMM needs logits = lm_head × the last hidden state."
        )
    return decoder.eval()


@torch.no_grad()
def _reason_unsupported(decoder: Any) -> str | None:
    """Return why the logits of `decoder` are not a linear map of its last hidden state, or None if they are."""
    head, hidden_size = decoder.get_output_embeddings(), decoder.config.hidden_size
    if head is None or decoder.base_model is decoder:
        return "it has no language modeling head separate from its base model"
    if getattr(head, "bias", None) is not None:
        return "its language modeling head has a bias"
    if head.weight.shape != decoder.get_input_embeddings().weight.shape or head.weight.shape[1] != hidden_size:
        return "its embeddings and its head differ in shape, or their width is not its hidden size"
    for name in LOGIT_CHANGES:
        if getattr(decoder.config, name, None) not in (None, 0, 1):
            return f"its config changes the logits (`{name}` is {getattr(decoder.config, name)})"
    input_ids, embeddings = torch.arange(3)[None], decoder.get_input_embeddings()
    if not torch.equal(embeddings(input_ids), embeddings.weight[input_ids]):
        return "it scales its embeddings, and pseudo image features are computed from the unscaled matrix"
    logits = decoder(input_ids).logits
    if not torch.allclose(logits, head(decoder.base_model(input_ids).last_hidden_state), rtol=1e-2, atol=1e-2):
        return "its logits are not its head × its last hidden state"
    return None


def choose_template(chat_template: str | None, tokenizer: Any, drop_system_prompt: bool) -> tuple[str, str]:
    """
    Return the chat template and a description of its origin; see [`compose_model`].

    Raises:
        `ValueError`: if the default system prompt should be dropped from a given template, or cannot be found.
    """
    if chat_template is not None:
        if drop_system_prompt:
            raise ValueError("`drop_system_prompt` needs the decoder's chat template. Leave out `chat_template`.")
        origin = f"{chat_template}, from the VW-LMM release" if chat_template in TEMPLATE_NAMES else chat_template
        return load_template(chat_template), origin
    if tokenizer.chat_template is None:
        return load_template("vicuna_v1"), "vicuna_v1, from the VW-LMM release, since the decoder has none"
    template = tokenizer.get_chat_template()
    prompt = default_system_prompt(template, tokenizer)
    if drop_system_prompt and prompt:
        return drop_default_system_prompt(template, tokenizer), "the decoder's, with images, without system prompt"
    if prompt:
        num_tokens = len(tokenizer(prompt, add_special_tokens=False).input_ids)
        logger.info(
            "The chat template adds a system prompt of %d tokens to each conversation without one: %r. To leave it "
            "out, set `drop_system_prompt` (`--drop-system-prompt`).",
            num_tokens,
            prompt,
        )
    return add_images_and_marks(template, tokenizer), "the decoder's, with images"


def _assemble_parts(
    parts: _Parts, projector_type: str, vm_head_type: str, vm_head_init: str, seed: int
) -> ComposedModel:
    """Return the model of the parts with a new projector and VM head, and its processor."""
    tokenizer, vocabulary, decoder = parts.tokenizer, parts.vocabulary, parts.decoder
    config = VTLMMConfig(
        vision_config=parts.vision_config,
        text_config=parts.text_config,
        image_token_id=vocabulary.image_token_id,
        visual_vocab_size=vocabulary.num_words,
        projector_type=projector_type,
        vm_head_type=vm_head_type,
        **parts.geometry.config_values(),
    )
    tensors = {f"model.vision_tower.{name}": tensor for name, tensor in parts.tower.state_dict().items()}
    tensors |= {f"model.language_model.{name}": tensor for name, tensor in decoder.base_model.state_dict().items()}
    if not config.tie_word_embeddings:
        tensors["lm_head.weight"] = decoder.get_output_embeddings().weight
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = assemble_model(config, tensors, decoder.dtype, untrained=UNTRAINED)
        model.initialize_vm_head(vm_head_init)
    fit_embeddings(model, vocabulary)
    set_generation_config(model, tokenizer, vocabulary, decoder.generation_config)
    sizes = parts.geometry.processor_values()
    processor = VTLMMProcessor(parts.image_processor, tokenizer, chat_template=tokenizer.chat_template, **sizes)
    return ComposedModel(model, processor)


def _save(composed: ComposedModel, output: Path) -> None:
    clear_output(output)
    composed.model.save_pretrained(output)
    composed.processor.save_pretrained(output)
    logger.info("Saved to %s.", output)


def assemble_model(
    config: VTLMMConfig, state_dict: dict[str, torch.Tensor], dtype: torch.dtype, untrained: tuple[str, ...] = ()
) -> VTLMMForConditionalGeneration:
    r"""
    Return a model with `config` and the tensors of `state_dict`.

    Args:
        state_dict (`dict`): names in the model to tensors.
        untrained (`tuple[str, ...]`): prefixes of names that may be missing; these tensors are initialized.

    Raises:
        `ValueError`: if tensors are missing, unexpected or of another shape; all are named.
    """
    with quiet_loading():
        # Our own `from_pretrained` rejects missing tensors, and here those of the new modules are missing.
        loaded: Any = super(VTLMMPreTrainedModel, VTLMMForConditionalGeneration).from_pretrained(
            None,
            config=config,
            state_dict=state_dict,
            dtype=dtype,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    model, info = loaded
    model._weight_conversions = None  # save the names of a model that was not loaded, as other commands expect
    wrong_shape = {key for key, *_ in info["mismatched_keys"]}
    problems = {
        "missing": {key for key in info["missing_keys"] if not key.startswith(untrained)} - wrong_shape,
        "unexpected": set(info["unexpected_keys"]),
        "of a shape that differs from the config": wrong_shape,
    }
    if any(problems.values()):
        raise ValueError(
            "The tensors do not fit the model: "
            + "; ".join(f"{what}: {', '.join(sorted(keys))}" for what, keys in problems.items() if keys)
            + "."
        )
    model.config._name_or_path = ""  # transformers sets "None"
    return model.eval()


def _log_summary(model: VTLMMForConditionalGeneration, template_origin: str) -> None:
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
        "Image tokens per image: %d, with %d channels from layer %s (%s).",
        config.image_seq_length,
        config.vision_hidden_size,
        config.vision_feature_layer,
        "without CLS and registers" if config.vision_feature_select_strategy == "default" else "all positions",
    )
    logger.info("Visual vocabulary: %d tokens. Image token id: %d.", config.visual_vocab_size, config.image_token_id)
    logger.info("Chat template: %s.", template_origin)
