# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The folder and the names of the GGUF export, and the image processors that it refuses."""

import pytest
import torch
from helpers.gguf_models import patch_json, write_gguf_source

from modeling_vtlmm import VTLMMForConditionalGeneration, VTLMMProcessor
from vtlmm.hub import export_source


gguf = pytest.importorskip("gguf")

from vtlmm.hub.export_gguf import export_gguf  # noqa: E402


@pytest.fixture
def source(tmp_path):
    return write_gguf_source(tmp_path / "source", "smollm2", "siglip_vision_model")


@pytest.mark.parametrize(
    ("weight", "theirs"),
    [
        ("model.language_model.layers.0.mlp.up_proj.weight", r"blk\.0\.ffn_up\.weight"),
        ("model.vision_tower.encoder.layers.0.mlp.fc1.weight", r"v\.blk\.0\.ffn_up\.weight"),
    ],
)
def test_values_above_float16_are_named_and_keep_the_earlier_export(source, tmp_path, weight, theirs):
    """The second weight is in the file that is written last, so the decoder is complete when the export fails."""
    output, broken = tmp_path / "gguf", tmp_path / "broken"
    export_gguf(source, output, "f16")
    earlier = {file.name: file.read_bytes() for file in output.iterdir()}
    assert len(earlier) == 3
    model = VTLMMForConditionalGeneration.from_pretrained(source)
    with torch.no_grad():
        model.get_parameter(weight)[0, 0] = 1e5
    model.save_pretrained(broken)
    VTLMMProcessor.from_pretrained(source).save_pretrained(broken)
    for folder, overwrite in ((output, True), (tmp_path / "new", False)):
        with pytest.raises(ValueError, match=f"^{theirs} contains values that F16 cannot represent"):
            export_gguf(broken, folder, "f16", overwrite=overwrite)
    assert {file.name: file.read_bytes() for file in output.iterdir()} == earlier
    assert {file.name for file in tmp_path.iterdir()} == {"source", "broken", "gguf"}
    export_gguf(broken, output, "bf16", overwrite=True)
    assert {file.name for file in output.iterdir()} == {"model-bf16.gguf", "mmproj-bf16.gguf", "Modelfile"}


def test_name_is_that_of_the_repository_or_the_folder(source, tmp_path, monkeypatch):
    """The snapshot of a Hub id is a folder that has the commit as its name."""
    snapshot = tmp_path / "0123abc"
    source.rename(snapshot)
    monkeypatch.setattr(export_source, "local_folder", lambda *args, **options: snapshot)
    for number, (name, expected) in enumerate({"user/tiny-vtlmm": "tiny-vtlmm", snapshot: "0123abc"}.items()):
        files = export_gguf(name, tmp_path / f"gguf{number}")
        for file in (files.model, files.mmproj):
            assert gguf.GGUFReader(file).fields["general.name"].contents() == expected


@pytest.mark.parametrize(
    ("setting", "value", "reason"),
    [
        ("do_normalize", False, "`do_normalize: false`, but llama.cpp always rescales and normalizes"),
        ("do_rescale", False, "`do_rescale: false`, but llama.cpp always rescales and normalizes"),
        ("rescale_factor", 1 / 127.5, "`rescale_factor: 0.00784314`, but llama.cpp always divides pixels by 255"),
    ],
)
def test_other_pixel_values_are_refused(source, tmp_path, setting, value, reason):
    patch_json(source / "processor_config.json", lambda values: values["image_processor"].update({setting: value}))
    with pytest.raises(ValueError, match="cannot be exported to GGUF: its image processor has ") as error:
        export_gguf(source, tmp_path / "gguf")
    assert reason in str(error.value) and not (tmp_path / "gguf").exists()
