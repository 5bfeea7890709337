# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Describe a decoder in the terms of llama.cpp: metadata and tensors."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .checkpoint_files import LM_HEAD, StoredTensor
from .gguf_file import GGUFTensor, import_gguf
from .gguf_tokenizer import GGUFTokenizer


LANGUAGE_MODEL = "model.language_model."
# `model_type` of decoders to llama.cpp's architecture. SmolLM2 and Vicuna are llama.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2"}
# llama.cpp rotates adjacent channels in `llama`, and channels of two halves in `qwen2`. transformers does the latter.
PERMUTED = "llama"


def reason_without_decoder(text_config: Any) -> str | None:
    """Return why llama.cpp cannot run the decoder of `text_config`, or None if it can."""
    if text_config.model_type not in ARCHITECTURES:
        return (
            f"its decoder is a {text_config.model_type}; supported are {', '.join(ARCHITECTURES)} (Llama, SmolLM2, "
            "Vicuna, Mistral, Qwen2)"
        )
    if text_config.hidden_act != "silu":
        return f"its decoder has the activation {text_config.hidden_act!r}, but llama.cpp computes silu"
    rope_type = rope_parameters(text_config)["rope_type"]
    if rope_type not in ("default", "linear", "llama3"):
        return f"its decoder scales positions with {rope_type!r}; supported are default, linear and llama3"
    return None


def rope_parameters(text_config: Any) -> dict[str, Any]:
    """Return the rotary position embedding's parameters with `rope_type` and `rope_theta`."""
    return {"rope_type": "default", "rope_theta": 10000.0, **(text_config.rope_parameters or {})}


def head_size(text_config: Any) -> int:
    """Return the number of channels of an attention head."""
    return getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads


def context_length(text_config: Any) -> int:
    """Return the longest context in tokens; with a sliding window its size, since llama.cpp attends to all tokens."""
    window = getattr(text_config, "sliding_window", None)
    if not getattr(text_config, "use_sliding_window", True):
        window = None
    return min(text_config.max_position_embeddings, window or text_config.max_position_embeddings)


def add_decoder(writer: Any, text_config: Any, tokenizer: GGUFTokenizer) -> None:
    """Add the decoder's sizes and the tokenizer to the metadata of a GGUF file."""
    rope = rope_parameters(text_config)
    writer.add_block_count(text_config.num_hidden_layers)
    writer.add_context_length(context_length(text_config))
    writer.add_embedding_length(text_config.hidden_size)
    writer.add_feed_forward_length(text_config.intermediate_size)
    writer.add_head_count(text_config.num_attention_heads)
    writer.add_head_count_kv(text_config.num_key_value_heads or text_config.num_attention_heads)
    writer.add_key_length(head_size(text_config))
    writer.add_value_length(head_size(text_config))
    writer.add_rope_dimension_count(head_size(text_config))
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(import_gguf().RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    writer.add_layer_norm_rms_eps(text_config.rms_norm_eps)
    writer.add_vocab_size(text_config.vocab_size)
    tokenizer.add_to(writer)


def decoder_tensors(tensors: Mapping[str, StoredTensor | torch.Tensor], text_config: Any) -> list[GGUFTensor]:
    """
    Return the decoder's tensors under llama.cpp's names.

    Args:
        tensors (`dict`): a VT-LMM's names to tensors.
    """
    gguf = import_gguf()
    architecture = ARCHITECTURES[text_config.model_type]
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, text_config.num_hidden_layers)
    gguf_tensors = []
    for name, tensor in tensors.items():
        if name.startswith(LANGUAGE_MODEL) or name == LM_HEAD:
            theirs = names.get_name(name.replace(LANGUAGE_MODEL, "model."), try_suffixes=(".weight", ".bias"))
            if theirs is None:
                raise ValueError(f"llama.cpp has no place for the tensor {name}.")
            gguf_tensors.append(GGUFTensor(theirs, tensor, _rotation_order(name, architecture, text_config)))
    if rope_parameters(text_config)["rope_type"] == "llama3":
        gguf_tensors.append(GGUFTensor("rope_freqs.weight", llama3_frequency_factors(text_config), keep_float32=True))
    return gguf_tensors


def _rotation_order(name: str, architecture: str, text_config: Any) -> Any:
    """Return the function that reorders the rows of a query or key projection, or None for other tensors."""
    if architecture != PERMUTED:
        return None
    if ".q_proj." in name:
        return lambda values: interleave_halves(values, text_config.num_attention_heads)
    if ".k_proj." in name:
        heads = text_config.num_key_value_heads or text_config.num_attention_heads
        return lambda values: interleave_halves(values, heads)
    return None


def interleave_halves(values: torch.Tensor, num_heads: int) -> torch.Tensor:
    """
    Return a projection `(num_heads · head_dim, …)` whose channels i and i + head_dim / 2 of each head are adjacent.

    transformers rotates these two channels together, llama.cpp's `llama` rotates adjacent channels.
    """
    halves = values.reshape(num_heads, 2, values.shape[0] // num_heads // 2, *values.shape[1:])
    return halves.transpose(1, 2).reshape(values.shape)


def llama3_frequency_factors(text_config: Any) -> torch.Tensor:
    """Return the divisors of the rotary frequencies of Llama 3.1, `(head_dim / 2,)`."""
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](text_config, torch.device("cpu"))
    exponents = torch.arange(0, head_size(text_config), 2, dtype=torch.float32) / head_size(text_config)
    return 1.0 / (rope_parameters(text_config)["rope_theta"] ** exponents) / scaled
