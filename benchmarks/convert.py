# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Measure time, peak memory and disk space of the conversions llava-hf -> VT-LMM -> llava on random bfloat16 weights.

    python benchmarks/convert.py                  # about 50 MB, a few seconds
    python benchmarks/convert.py --shape 7b       # LLaVA-1.5-7B: three checkpoints of 14 GB

All files are in a temporary folder (set `TMPDIR` to change it) and are deleted at the end. Each step runs in its own
process, whose maximum resident memory is printed. It includes pages of mapped files, which the system can free at any
time. "before" is the memory of Python and its libraries before the conversion. This process imports no large library,
because on Linux the peak of a child process starts at the peak of its parent.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path


SHAPES = {
    "tiny": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8, "num_attention_heads": 4},
    "small": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "num_attention_heads": 8},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}
TOWERS = {
    "tiny": {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4},
    "small": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4},
    "7b": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
}
NUM_ROWS, IMAGE_TOKEN_ID = 32064, 32000  # llava-hf's, padded to a multiple of 64


def make(args, source: Path, output: Path):
    """Write a checkpoint in the format of llava-hf, shard by shard."""
    import torch
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    from vtlmm.hub.checkpoint_files import INDEX_FILE, their_name
    from vtlmm.hub.source_formats import LLAVA_NAMES

    shape = SHAPES[args.shape] | ({"num_hidden_layers": args.layers} if args.layers else {})
    config = LlavaConfig(
        text_config=LlamaConfig(**shape, vocab_size=NUM_ROWS, max_position_embeddings=4096),
        vision_config=CLIPVisionConfig(**TOWERS[args.shape], image_size=336, patch_size=14),
        image_token_index=IMAGE_TOKEN_ID,
        architectures=["LlavaForConditionalGeneration"],
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config).to(torch.bfloat16)
    metas = {their_name(name, LLAVA_NAMES): tensor for name, tensor in model.state_dict().items()}
    split = split_torch_state_dict_into_shards(metas, max_shard_size=args.source_shard_size)
    output.mkdir()
    torch.manual_seed(0)
    for file, names in split.filename_to_tensors.items():
        tensors = {name: torch.empty_like(metas[name], device="cpu").normal_() for name in names}
        save_file(tensors, output / file, metadata={"format": "pt"})
        del tensors
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (output / INDEX_FILE).write_text(json.dumps(index))
    config.save_pretrained(output)


def to_vtlmm(args, source: Path, output: Path):
    from vtlmm.hub.convert import convert_checkpoint

    convert_checkpoint(source, output, shard_size=args.shard_size)


def to_llava(args, source: Path, output: Path):
    from vtlmm.hub.export_llava import export_to_llava

    export_to_llava(source, output, shard_size=args.shard_size)


def compare(args, source: Path, output: Path):
    """Compare all tensors of the exported checkpoint with the original ones."""
    from torch import equal

    from vtlmm.hub.checkpoint_files import list_tensors, map_file

    expected, output_tensors = list_tensors(source), list_tensors(output)
    if expected.keys() != output_tensors.keys():
        raise SystemExit(
            f"Tensors that are in one checkpoint only: {sorted(expected.keys() ^ output_tensors.keys())}."
        )
    for name, tensor in expected.items():
        other = output_tensors[name]
        if not equal(tensor.take_from(map_file(tensor.file)), other.take_from(map_file(other.file))):
            raise SystemExit(f"Tensor {name} has changed.")


STEPS = {
    "make": (make, "source", "source"),
    "to VT-LMM": (to_vtlmm, "source", "vtlmm"),
    "to llava": (to_llava, "vtlmm", "twin"),
    "compare": (compare, "source", "twin"),
}


def peak_bytes() -> int:
    """Return the maximum resident memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run_step(args, folder: Path) -> dict:
    """Run one step in this process. Return its seconds without imports, and the peak memory before and after it."""
    import vtlmm.hub.convert
    import vtlmm.hub.export_llava  # noqa: F401 - not what is measured

    step, source, output = STEPS[args.step]
    before, start = peak_bytes(), time.perf_counter()
    step(args, folder / source, folder / output)
    return {"seconds": time.perf_counter() - start, "before": before, "peak": peak_bytes()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="tiny", choices=SHAPES)
    parser.add_argument("--layers", type=int, help="number of decoder layers (default: as in the shape)")
    parser.add_argument(
        "--shard-size", default="2GB", help="shard size of the output (default: 2GB, as in vtlmm convert)"
    )
    parser.add_argument("--source-shard-size", default="5GB", help="shard size of the input")
    parser.add_argument("--json", help="file for all numbers")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        print("RESULT" + json.dumps(run_step(args, Path(args.folder))))
        return
    results = {"shape": args.shape, "layers": args.layers, "shard_size": args.shard_size}
    print(f"{args.shape}, shards of {args.shard_size}, {platform.machine()}, Python {platform.python_version()}")
    with tempfile.TemporaryDirectory(prefix="vtlmm-convert-") as folder:
        for step, (_, _, output) in STEPS.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--step", step, "--folder", folder]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{step} failed:\n{done.stderr}")
            numbers = json.loads(done.stdout.split("RESULT")[-1])
            numbers["disk"] = sum(file.stat().st_size for file in (Path(folder) / output).iterdir())
            results[step] = numbers
            if step.startswith("to "):
                print(
                    f"{step:10} {numbers['seconds']:7.1f} s   peak {numbers['peak'] / 1e9:6.2f} GB "
                    f"(before: {numbers['before'] / 1e9:.2f})   disk {numbers['disk'] / 1e9:6.2f} GB"
                )
    print("round trip: every tensor equal")
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
