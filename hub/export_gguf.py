# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Export a VT-LMM to GGUF for llama.cpp and Ollama: the decoder, and the vision tower with the projector."""

import logging
from pathlib import Path
from typing import Any, NamedTuple

from modeling_vtlmm import VTLMMProcessor
from vtlmm.data.output_files import write_text

from .chat_templates import end_of_turn
from .export_source import ExportSource, open_vtlmm
from .gguf_decoder import ARCHITECTURES, add_decoder, decoder_tensors, reason_without_decoder
from .gguf_file import FILE_TYPES, import_gguf, write_gguf
from .gguf_template import llama_cpp_template, ollama_modelfile
from .gguf_tokenizer import GGUFTokenizer, read_tokenizer
from .gguf_vision import CLIP, add_vision, reason_without_vision, vision_tensors
from .paths import check_output, draft_output
from .source_formats import read_generation_config


logger = logging.getLogger(__name__)

MODELFILE = "Modelfile"
CLIP_WARNING = (
    "llama.cpp computes other image features than this model, because it puts the CLS position of a CLIP tower behind "
    "the patches (llama.cpp issue 25814). Answers without images are equal. With images, greedy answers differed "
    "after 0 to 7 tokens in our tests. See docs/export.md."
)
STRETCH_WARNING = (
    "llama.cpp pads an image to a square, but this model's image processor does not. Answers about images that are "
    "not square differ. Resize images to %d × %d pixels before you send them to llama.cpp."
)


class GGUFFiles(NamedTuple):
    """The return value of [`export_gguf`]: the decoder, the vision tower with the projector, Ollama's Modelfile."""

    model: Path
    mmproj: Path
    modelfile: Path


def export_gguf(
    model_path: str | Path, output_dir: str | Path, file_type: str = "f16", *, overwrite: bool = False
) -> GGUFFiles:
    r"""
    Write a VT-LMM as `model-TYPE.gguf`, `mmproj-TYPE.gguf` and an Ollama `Modelfile`.

    The VM head is used in training only, so GGUF files do not contain it. Tensors are written one after the other.
    After an error, `output_dir` is unchanged.

    Args:
        model_path (`str` or `Path`): folder or Hub id of a VT-LMM.
        output_dir (`str` or `Path`): folder for the files.
        file_type (`str`, *optional*, defaults to `"f16"`): type of the matrices: `"f32"`, `"f16"`, `"bf16"` or
            `"q8_0"`.
        overwrite (`bool`, *optional*, defaults to `False`): replace the model that `output_dir` contains.

    Returns:
        [`GGUFFiles`]

    Raises:
        `FileExistsError`: if `output_dir` contains files and `overwrite` is not set.
        `ValueError`: if llama.cpp cannot run the model, with the reason; if the model is an adapter or is quantized;
            if the package `gguf` is not installed.
    """
    if file_type not in FILE_TYPES:
        raise ValueError(f"`file_type` is {file_type!r}; it must be one of {', '.join(FILE_TYPES)}.")
    import_gguf()
    output = check_output(output_dir, [model_path], overwrite)
    source = open_vtlmm(model_path)
    if not (source.folder / "processor_config.json").is_file():
        raise ValueError(
            f"{source.folder} contains no processor, but GGUF files contain the tokenizer. Save one there."
        )
    processor: Any = VTLMMProcessor.from_pretrained(source.folder)
    tokenizer = _check_parts(source, processor)
    tensors = source.list_tensors()
    decoder, vision = decoder_tensors(tensors, source.config.text_config), vision_tensors(tensors, source.config)
    stops = _stop_tokens(source, processor)

    def add_model(writer: Any) -> None:
        _add_general(writer, "model", model_path)
        add_decoder(writer, source.config.text_config, tokenizer)
        _add_special_tokens(writer, processor.tokenizer, stops)
        if (template := processor.chat_template) is not None:
            writer.add_chat_template(llama_cpp_template(template, processor.image_token, tokenizer.leading_space))

    def add_mmproj(writer: Any) -> None:
        _add_general(writer, "mmproj", model_path)
        add_vision(writer, source.config, processor.image_processor)

    files = GGUFFiles(output / f"model-{file_type}.gguf", output / f"mmproj-{file_type}.gguf", output / MODELFILE)
    architecture = ARCHITECTURES[source.config.text_config.model_type]
    stop_texts = [str(processor.tokenizer.convert_ids_to_tokens(stop)) for stop in stops]
    modelfile = ollama_modelfile(files.model.name, files.mmproj.name, processor, tokenizer, stop_texts)
    with draft_output(output) as draft:
        write_gguf(draft / files.model.name, architecture, file_type, add_model, decoder)
        write_gguf(draft / files.mmproj.name, "clip", file_type, add_mmproj, vision)
        write_text(draft / MODELFILE, modelfile)
    logger.info("Exported %s to %s.", model_path, output)
    return files


def reason_without_gguf(config: Any, image_processor: Any) -> str | None:
    """Return why llama.cpp cannot run the model of `config`, or None if it can. The tokenizer is not checked."""
    if config.use_pseudo_image_features:
        return (
            "its decoder reads pseudo image features (`use_pseudo_image_features`), which need the VM head, and "
            "llama.cpp has no VM head"
        )
    return reason_without_vision(config, image_processor) or reason_without_decoder(config.text_config)


def _check_parts(source: ExportSource, processor: Any) -> GGUFTokenizer:
    """Check that llama.cpp has all parts of the model, and return the tokenizer."""
    reason = reason_without_gguf(source.config, processor.image_processor)
    if reason is None:
        try:
            tokenizer = read_tokenizer(processor.tokenizer, source.config.text_config.vocab_size)
        except ValueError as error:
            reason = str(error)
    if reason is not None:
        raise ValueError(f"{source.folder} cannot be exported to GGUF: {reason}.")
    side = source.config.vision_config.image_size
    if source.config.vision_config.model_type == CLIP:
        logger.warning(CLIP_WARNING)
    if not getattr(processor.image_processor, "do_pad", False):
        logger.warning(STRETCH_WARNING, side, side)
    if tokenizer.leading_space:
        logger.warning(
            "llama.cpp cannot add a space at the start of a prompt only. The exported chat template writes it. "
            "Without the chat template, start prompts with a space."
        )
    return tokenizer


def _add_general(writer: Any, kind: str, model_path: str | Path) -> None:
    """Add the kind, and the name of the folder or repository: a snapshot's folder has the name of a commit."""
    writer.add_type(kind)
    writer.add_name(Path(model_path).resolve().name)


def _stop_tokens(source: ExportSource, processor: Any) -> list[int]:
    """Return the ids of the tokens that end an answer, the end of a turn first."""
    eos = read_generation_config(source.folder, source.config.text_config).eos_token_id
    template = processor.chat_template
    end = end_of_turn(template, processor.tokenizer) if template else None
    token_ids = [processor.tokenizer.convert_tokens_to_ids(end)] if end else []
    token_ids += [*(eos if isinstance(eos, list) else [eos]), processor.tokenizer.eos_token_id]
    return [token for token in dict.fromkeys(token_ids) if token is not None]


def _add_special_tokens(writer: Any, tokenizer: Any, stops: list[int]) -> None:
    """Add BOS, padding and up to three tokens that end an answer, which is what the format has names for."""
    for add, token in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if token is not None:
            add(token)
    for add, token in zip(
        (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id), stops, strict=False
    ):
        add(token)
    if len(stops) > 3:
        texts = ", ".join(str(tokenizer.convert_ids_to_tokens(stop)) for stop in stops[3:])
        logger.warning("GGUF has names for three tokens that end an answer. llama.cpp does not stop at %s.", texts)
