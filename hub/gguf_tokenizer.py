# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Describe a tokenizer in the terms of llama.cpp, which has two algorithms for BPE and a fixed list of word splits."""

import json
import logging
import re
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from .gguf_file import import_gguf


logger = logging.getLogger(__name__)

SPACE = "▁"
# The regular expression of Qwen2's word split. Llama 3 takes up to three digits together.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp's names of word splits, with our description of the same split in a tokenizer.json.
WORD_SPLITS = {
    ("bytes with GPT-2's split",): "gpt-2",
    ("digits", "bytes with GPT-2's split"): "smollm",
    (f"split {SPLIT.replace('DIGITS', '')}", "bytes"): "qwen2",
    (f"split {SPLIT.replace('DIGITS', '{1,3}')}", "bytes"): "llama-bpe",
}
BYTE = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass
class GGUFTokenizer:
    """
    A tokenizer as llama.cpp reads it.

    model (`str`): `"llama"` (merge the adjacent pair with the highest score) or `"gpt2"` (BPE with merges over bytes).
    pre (`str`): llama.cpp's name of the word split.
    tokens, types: text and `gguf.TokenType` of each row of the embeddings.
    scores (`list[float]`) for `"llama"`, merges (`list[str]`) for `"gpt2"`.
    add_bos, add_space_prefix (`bool`): what is added before a text.
    leading_space (`bool`): whether the chat template must write the space that starts a prompt.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    add_bos: bool = False
    add_space_prefix: bool = False
    leading_space: bool = False

    def add_to(self, writer: Any) -> None:
        """Add the tokenizer to the metadata of a GGUF file."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.model == "llama":
            writer.add_token_scores(self.scores)
        else:
            writer.add_token_merges(self.merges)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(False)
        writer.add_add_space_prefix(self.add_space_prefix)


def read_tokenizer(tokenizer: Any, num_rows: int) -> GGUFTokenizer:
    r"""
    Return `tokenizer` in llama.cpp's terms.

    Args:
        tokenizer ([`PreTrainedTokenizerBase`]): a fast tokenizer.
        num_rows (`int`): rows of the embedding matrix. Rows without a token get a name that no text contains; tokens
            without a row, such as the image token, are left out.

    Raises:
        `ValueError`: if llama.cpp cannot tokenize as `tokenizer` does.
    """
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise ValueError(
            "the tokenizer has no tokenizer.json. Load it with transformers' fast class and save it again"
        )
    values = json.loads(tokenizer.backend_tokenizer.to_str())
    model = values["model"]
    if model["type"] != "BPE":
        raise ValueError(f"the tokenizer's model is {model['type']}, but only BPE can be exported")
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ", 1)) for merge in model["merges"]]
    tokens, types = _token_list(values, num_rows)
    result = GGUFTokenizer("gpt2", "", tokens, types, add_bos=_adds_bos(tokenizer))
    if model.get("byte_fallback"):
        _describe_sentencepiece(result, values, merges)
    else:
        _describe_byte_level(result, values, merges)
    return result


def _adds_bos(tokenizer: Any) -> bool:
    """Return whether `tokenizer` puts BOS before each text."""
    ids = tokenizer("a").input_ids
    if tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id:
        raise ValueError("the tokenizer adds EOS after each text, but a prompt must not end with it")
    return tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id


def _token_list(values: dict[str, Any], num_rows: int) -> tuple[list[str], list[int]]:
    """Return the text and the type of each row of the embedding matrix."""
    kinds = import_gguf().TokenType
    tokens, types = [f"[PAD{i}]" for i in range(num_rows)], [int(kinds.UNUSED)] * num_rows
    unknown = values["model"].get("unk_token")
    for token, i in values["model"]["vocab"].items():
        if i < num_rows:
            is_byte = values["model"].get("byte_fallback") and BYTE.fullmatch(token)
            tokens[i], types[i] = token, int(kinds.BYTE if is_byte else kinds.NORMAL)
    for added in values["added_tokens"]:
        if added["id"] < num_rows:
            kind = kinds.CONTROL if added["special"] else kinds.USER_DEFINED
            kind = kinds.UNKNOWN if added["content"] == unknown and values["model"].get("byte_fallback") else kind
            tokens[added["id"]], types[added["id"]] = added["content"], int(kind)
    return tokens, types


# ---- BPE over bytes: GPT-2, SmolLM2, Qwen2, Llama 3 ----


def _describe_byte_level(result: GGUFTokenizer, values: dict[str, Any], merges: list[tuple[str, ...]]) -> None:
    split = tuple(_describe_split(part) for part in _flatten(values["pre_tokenizer"], "pretokenizers"))
    if split not in WORD_SPLITS:
        raise ValueError(
            f"the tokenizer splits words in a way that is not exported: {' + '.join(split) or 'no split'}. Supported: "
            f"the splits of GPT-2, SmolLM2, Qwen2 and Llama 3, and SentencePiece-like BPE with byte fallback"
        )
    result.pre = WORD_SPLITS[split]
    whole_words = bool(values["model"].get("ignore_merges"))
    if whole_words != (result.pre == "llama-bpe"):
        raise ValueError(
            f"the tokenizer has `ignore_merges: {whole_words}`, which llama.cpp does not combine with the word split "
            f"{result.pre}"
        )
    normalizers = [part["type"] for part in _flatten(values["normalizer"], "normalizers")]
    if normalizers:
        logger.warning(
            "llama.cpp does not apply the tokenizer's normalizer (%s). Only texts that it would change are tokenized "
            "in another way.",
            ", ".join(normalizers),
        )
    result.merges = [" ".join(pair) for pair in merges]


def _describe_split(part: dict[str, Any]) -> str:
    """Return a short description of one pre-tokenizer."""
    if part["type"] == "ByteLevel" and not part["add_prefix_space"]:
        return "bytes with GPT-2's split" if part.get("use_regex", True) else "bytes"
    if part["type"] == "Digits" and part["individual_digits"]:
        return "digits"
    if part["type"] == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
        return f"split {part['pattern'].get('Regex')}"
    return json.dumps(part)


def _flatten(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """Return the parts of a normalizer or pre-tokenizer, which may be a sequence."""
    if part is None:
        return []
    return [item for inner in part[key] for item in _flatten(inner, key)] if part["type"] == "Sequence" else [part]


# ---- BPE like SentencePiece's: Llama, Llama 2, Vicuna, Mistral ----


def _describe_sentencepiece(result: GGUFTokenizer, values: dict[str, Any], merges: list[tuple[str, ...]]) -> None:
    missing = [f"<0x{byte:02X}>" for byte in range(256) if f"<0x{byte:02X}>" not in values["model"]["vocab"]]
    if missing:
        raise ValueError(f"the tokenizer has no token for some bytes ({missing[0]}, …), but llama.cpp needs all 256")
    result.model, result.pre = "llama", "default"
    _describe_space_prefix(result, values)
    ranks = _merge_ranks(values, merges)
    # llama.cpp merges the pair with the highest score first, a tokenizer.json the pair with the lowest rank.
    result.scores = [-float(min(ranks[token])) if token in ranks else -float(len(merges)) for token in result.tokens]


def _describe_space_prefix(result: GGUFTokenizer, values: dict[str, Any]) -> None:
    """
    Set how a text starts. With `add_space_prefix`, llama.cpp puts a space at the start and after each special token.

    A tokenizer with `prepend_scheme: first` puts it at the start only, so there the chat template writes it.
    """
    ignored = []
    for part in _flatten(values["normalizer"], "normalizers"):
        if part["type"] == "Prepend" and part["prepend"] == SPACE:
            result.add_space_prefix = True
        elif part["type"] != "Replace" or (part["pattern"], part["content"]) != ({"String": " "}, SPACE):
            ignored.append(part["type"])
    for part in _flatten(values["pre_tokenizer"], "pretokenizers"):
        if part["type"] != "Metaspace" or part["replacement"] != SPACE or part.get("split"):
            raise ValueError(f"the tokenizer splits words in a way that llama.cpp has not: {json.dumps(part)}")
        result.add_space_prefix = part["prepend_scheme"] == "always"
        result.leading_space = part["prepend_scheme"] == "first"
    if ignored:
        logger.warning(
            "llama.cpp does not apply the normalizers %s of the tokenizer. Only texts that they would change, for "
            "example with two spaces in a row, are tokenized in another way.",
            ", ".join(ignored),
        )


def _merge_ranks(values: dict[str, Any], merges: list[tuple[str, ...]]) -> dict[str, list[int]]:
    """
    Return the ranks of the merges that build each token.

    Raises:
        `ValueError`: if scores cannot replace the merges: llama.cpp would merge a pair that is not in the list, or two
            tokens in another order.
    """
    ranks: dict[str, list[int]] = defaultdict(list)
    for rank, pair in enumerate(merges):
        ranks["".join(pair)].append(rank)
    vocabulary, listed = values["model"]["vocab"], set(merges)
    special = {added["content"] for added in values["added_tokens"]}
    for token in vocabulary.keys() - special:
        if BYTE.fullmatch(token):
            continue
        for i in range(1, len(token)):
            pair = token[:i], token[i:]
            if pair not in listed and pair[0] in vocabulary and pair[1] in vocabulary:
                raise ValueError(
                    f"the tokenizer has no merge of {pair[0]!r} and {pair[1]!r}, but llama.cpp would merge them to "
                    f"{token!r}. The merges must be those of a SentencePiece model"
                )
    ordered = sorted(ranks.values())
    if any(max(first) > second[0] for first, second in zip(ordered, ordered[1:], strict=False)):
        raise ValueError("the tokenizer's merges of one token are not next to each other, so they have no scores")
    return ranks
