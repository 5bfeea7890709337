# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Load a saved folder in a process that cannot import this package, so that all code comes from the folder."""

import json

import pytest
import torch
from helpers.processes import LOAD, in_clean_process
from PIL import Image

from modeling_vtlmm.configuration_vtlmm import AUTO_MAP


@pytest.fixture(scope="module")
def folder(tmp_path_factory, processor):
    from helpers.tiny_models import build_config

    from modeling_vtlmm import VTLMMForConditionalGeneration

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("hub")
    model = VTLMMForConditionalGeneration(build_config(vm_head_type="attention"))
    model.generation_config.update(eos_token_id=None, pad_token_id=3)
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


@pytest.mark.slow
def test_auto_classes_and_pipeline_load_the_folder_and_a_copy(folder, processor, tmp_path):
    from modeling_vtlmm import VTLMMForConditionalGeneration

    first, second = tmp_path / "first", tmp_path / "second"
    cache = tmp_path / "cache"
    cache.mkdir()
    found = in_clean_process(LOAD, folder, first, cache=cache)
    generated = [found.pop(name) for name in list(found) if name.startswith("AutoModel")]
    assert len(generated) == 4 and all(ids == generated[0] for ids in generated)
    assert found["config"] == "VTLMMConfig" and found["pipeline"].strip() == found["decoded"].strip()

    model = VTLMMForConditionalGeneration.from_pretrained(folder)
    image = Image.new("RGB", (40, 30), (200, 30, 30))
    content = [{"type": "image", "image": image}, {"type": "text", "text": "what is it"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    torch.testing.assert_close(model(**inputs).logits[0, -1], torch.tensor(found["logits"]), atol=1e-5, rtol=1e-5)

    # A folder saved from remote code is complete, and loads like the original.
    assert json.loads((first / "config.json").read_text())["auto_map"] == AUTO_MAP
    names = {file.name for file in folder.glob("*.py")}
    assert names == {file.name for file in first.glob("*.py")} and len(names) >= 6
    assert in_clean_process(LOAD, first, second, cache=cache)["logits"] == found["logits"]


def test_auto_map_names_existing_files_and_classes(folder):
    """All files and classes of the map exist in the folder, and no file imports the package by its absolute name."""
    for target in AUTO_MAP.values():
        file, name = target.split(".")
        assert f"class {name}(" in (folder / f"{file}.py").read_text()
    processor_map = json.loads((folder / "processor_config.json").read_text())["auto_map"]
    assert processor_map["AutoProcessor"] == AUTO_MAP["AutoProcessor"]
    for file in folder.glob("*.py"):
        assert "from modeling_vtlmm" not in file.read_text() and "import modeling_vtlmm" not in file.read_text()
