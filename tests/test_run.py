# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""From a recipe to a trained folder, through the command line."""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import build_config, build_processor
from PIL import Image as PILImage
from transformers import AutoProcessor

from modeling_vtlmm import VTLMMForConditionalGeneration
from vtlmm.cli.main import main
from vtlmm.train.recipe import parse_settings, read_settings, split_stages
from vtlmm.train.stage_runner import RUN_RECORD, loss_curves, prepare_datasets, run_training
from vtlmm.train.trainer import VTLMMTrainer


def test_settings(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: here\nlearning_rate: 2e-5\nstage: joint\n")
    settings = read_settings(recipe, ["stage=decoder", "trainable_modules=[lm_head, vm_head]", "visual_loss_coef=0.5"])
    assert settings["learning_rate"] == 2e-5  # YAML reads it as text
    assert read_settings(recipe, ["save_strategy=no"])["save_strategy"] == "no"  # YAML reads it as false
    assert settings["stage"] == "decoder" and settings["trainable_modules"] == ["lm_head", "vm_head"]
    with pytest.raises(ValueError, match=r"no setting 'learnin_rate'. Did you mean 'learning_rate'"):
        read_settings(recipe, ["learnin_rate=1"])
    with pytest.raises(ValueError, match="not of the form key=value"):
        read_settings(recipe, ["stage"])


@pytest.fixture
def recipe(tmp_path):
    """A tiny model, six rows (one broken), and a recipe for stage IV."""
    torch.manual_seed(0)
    VTLMMForConditionalGeneration(build_config()).save_pretrained(tmp_path / "start")
    build_processor().save_pretrained(tmp_path / "start")
    PILImage.new("RGB", (28, 28), (200, 30, 30)).save(tmp_path / "red.png")
    talk = [{"from": "human", "value": "<image>\nwhat is it"}, {"from": "gpt", "value": "red boat"}]
    rows = [{"image": "red.png", "conversations": talk}] * 5 + [{"image": "gone.png", "conversations": talk}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {tmp_path}/start\ndataset: {tmp_path}/rows.json\neval_dataset: {tmp_path}/rows.json\n"
        f"output_dir: {tmp_path}/out\nstage: joint\nbad_rows: skip\nmax_steps: 2\nsave_steps: 1\nuse_cpu: true\n"
        "report_to: none\nper_device_train_batch_size: 2\nlogging_steps: 1\ndisable_tqdm: true\n"
    )
    return path


def test_train_writes_a_model_and_what_it_did(recipe, tmp_path, capsys):
    with pytest.warns(UserWarning, match="1 of 6 rows are left out"):
        assert main(["train", "--config", str(recipe), "learning_rate=1e-2", "hub_token=hf_SECRET"]) == 0
    assert "hf_SECRET" not in (tmp_path / "out" / RUN_RECORD).read_text()  # it is published with the weights
    text = capsys.readouterr().out
    assert "row 5: missing image" in text and "Stage joint: loss = 1 · L_lm + 1 · L_vm" in text
    loaded = VTLMMForConditionalGeneration.from_pretrained(tmp_path / "out")
    start = VTLMMForConditionalGeneration.from_pretrained(tmp_path / "start")
    assert not torch.equal(loaded.lm_head.weight, start.lm_head.weight)
    (record,) = json.loads((tmp_path / "out" / RUN_RECORD).read_text())
    assert record["stage"] == "joint" and record["steps"] == 2 and record["rows"] == 5
    assert record["settings"]["learning_rate"] == 1e-2 and record["metrics"]["eval_visual_loss"] > 0
    assert [step for step, _ in record["curves"]["lm_loss"]] == [1, 2]
    assert record["curves"]["eval_lm_loss"][-1][1] == pytest.approx(record["metrics"]["eval_lm_loss"], rel=1e-4)

    # the same command goes on from the last checkpoint, and the next stage appends to the record
    assert main(["train", "--config", str(recipe), "resume_from_checkpoint=true", "max_steps=3"]) == 0
    assert "Resuming from" in capsys.readouterr().out
    following = [f"model={tmp_path}/out", f"output_dir={tmp_path}/next", "stage=visual_head"]
    assert main(["train", "--config", str(recipe), *following]) == 0
    history = json.loads((tmp_path / "next" / RUN_RECORD).read_text())
    assert [entry["stage"] for entry in history] == ["joint", "visual_head"]


def test_long_curves_are_thinned():
    logs = [{"step": step, "lm_loss": 1 / step} for step in range(1, 1002)]
    points = loss_curves(logs)["lm_loss"]
    assert len(points) == 91 and points[-1] == [1001, 0.000999] and points[0] == [11, 0.090909]


def with_stages(recipe, stages: str):
    lines = [line for line in recipe.read_text().splitlines() if not line.startswith("stage:")]
    recipe.write_text("\n".join([*lines, "stages:", stages]) + "\n")
    return recipe


def test_a_recipe_of_several_stages(recipe, tmp_path, capsys):
    """Each begins with what the one before it saved; a second start passes over what is finished."""
    with_stages(recipe, "  visual_head: {learning_rate: 1e-2}\n  joint: {visual_loss_coef: 0.5}")
    command = ["train", "--config", str(recipe), "learning_rate=1e-4", "stages.joint.learning_rate=1e-3"]
    with pytest.warns(UserWarning, match="1 of 6 rows are left out"):
        assert main(command) == 0
    history = json.loads((tmp_path / "out/joint" / RUN_RECORD).read_text())
    assert [(run["stage"], run["learning_rate"]) for run in history] == [("visual_head", 1e-2), ("joint", 1e-3)]
    heads = [
        VTLMMForConditionalGeneration.from_pretrained(tmp_path / folder).model.vm_head.weight
        for folder in ("start", "out/visual_head", "out/joint")
    ]
    assert not torch.equal(heads[0], heads[1]) and torch.equal(heads[1], heads[2])
    assert capsys.readouterr().out.count("rows        6") == 2  # train and eval, once for both stages
    assert main([*command, "resume_from_checkpoint=true"]) == 0
    text = capsys.readouterr().out
    assert text.count("is finished") == 2 and "Resuming" not in text
    assert main([*command, "stages.joint.learning_rate=1e-5", "resume_from_checkpoint=true"]) == 1
    assert "was finished with other settings (learning_rate)" in capsys.readouterr().err
    (tmp_path / "out/visual_head" / RUN_RECORD).unlink()
    assert main([*command, "resume_from_checkpoint=true"]) == 1
    assert "visual_head is not finished, but a later stage was begun" in capsys.readouterr().err
    (tmp_path / "out/joint" / RUN_RECORD).unlink()
    assert (tmp_path / "out/joint/checkpoint-2").is_dir()
    assert main([*command, "resume_from_checkpoint=true"]) == 1
    assert "visual_head is not finished, but a later stage was begun" in capsys.readouterr().err


def test_a_rerun_that_was_stopped_is_not_finished(recipe, tmp_path, monkeypatch):
    """The record of the run before it goes when training begins."""
    settings = read_settings(recipe, ["save_strategy=no"])
    with pytest.warns(UserWarning, match="left out"):
        run_training(settings)

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(VTLMMTrainer, "training_step", stop)
    with pytest.warns(UserWarning, match="left out"), pytest.raises(KeyboardInterrupt):
        run_training(settings)
    assert not (tmp_path / "out" / RUN_RECORD).exists()


def test_a_fault_in_the_last_evaluation_loses_no_weights(recipe, tmp_path, monkeypatch):
    def fault(*args, **kwargs):
        raise RuntimeError("evaluation failed")

    monkeypatch.setattr(VTLMMTrainer, "evaluate", fault)
    with pytest.warns(UserWarning, match="left out"), pytest.raises(RuntimeError, match="evaluation failed"):
        run_training(read_settings(recipe, ["save_strategy=no", "run_name=2026-03-01"]))
    trained = VTLMMForConditionalGeneration.from_pretrained(tmp_path / "out")
    start = VTLMMForConditionalGeneration.from_pretrained(tmp_path / "start")
    assert not torch.equal(trained.lm_head.weight, start.lm_head.weight)


def test_a_date_in_a_recipe_is_written_down(recipe, tmp_path):
    with pytest.warns(UserWarning, match="left out"):
        run_training(read_settings(recipe, ["save_strategy=no", "run_name=2026-03-01"]))
    (record,) = json.loads((tmp_path / "out" / RUN_RECORD).read_text())
    assert record["settings"]["run_name"] == "2026-03-01"


@pytest.mark.parametrize(
    ("stages", "override", "message"),
    [
        ("  visual_head:\n  joint: {visual_student: decoder}", [], "must be 'vm_head' or 'lm_head'"),
        ("  visual_head: {adapter: lora}\n  joint: {adapter: lora}", [], "Stage visual_head would leave an adapter"),
        ("  visual_head: {model: here}\n  joint:", [], "stages.visual_head.model follows from their order"),
        ("  visual_head:\n  joint:", ["stage=joint"], "stage follows from their order"),
        ("  visual_head:\n  joint: {adapter: lora, dtype: bfloat16}", [], "only mixed precision multiplies the two"),
        ("  visual_head:\n  joint: {adapter: lora, vm_head_type: mlp}", [], "`vm_head_type` makes a new VM head"),
        ("  visual_head:\n  joint: {streaming: true, packing: true}", [], "lengths, which packing goes by"),
        ("  visual_head:\n  joint: {streaming: true, cache_image_features: x}", [], "does not know its images"),
        ("  visual_head:\n  joint: {adapter: lora, vm_head_init: random}", [], "`vm_head_init` makes a new VM head"),
        ("  visual_head:\n  joint: {packing: true, max_length: null}", [], "Packing needs `max_length`"),
        ("  visual_head:\n  joint: {router_aux_loss_coef: 0.1}", [], "can be 0 only"),
        (
            "  visual_head:\n  joint: {eval_dataset: null, eval_strategy: steps}",
            [],
            "`eval_strategy: steps` needs an eval",
        ),
        (
            "  visual_head: {eval_dataset: null, vm_head_candidates: [{}, {}]}\n  joint:",
            [],
            "`vm_head_candidates` needs an",
        ),
        (
            "  visual_head:\n  joint: {eval_dataset: null, eval_task_data: x}",
            [],
            "`eval_task_data` needs an evaluation",
        ),
        ("  visual_head:\n  joint:", ["vm_head_type=mlp"], "belongs below the stage"),
        ("  visual_head:\n  joint:", ["vm_head_init=random"], "belongs below the stage"),
        ("  visual_head:\n  joint: {eval_task_data: gone.json}", [], "gone.json: there is no such file"),
        ("  visual_head:\n  joint: {eval_dataset: gone.json}", [], "gone.json: there is no such file"),
        ("  visual_head:\n  joint: {bad_rows: raise}", [], "row 5: missing image"),
        ("  [visual_head, joint]", [], "`stages` must name its stages"),
        ("  [visual_head, joint]", ["stages.joint.seed=1"], "'stages' holds ['visual_head', 'joint']"),
        ("  {joint: 5}", [], "`stages` must name its stages"),
    ],
)
def test_a_later_stage_s_mistakes_stop_the_first(recipe, tmp_path, capsys, stages, override, message):
    assert main(["train", "--config", str(with_stages(recipe, stages)), *override]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [(["adapter=lora", "dtype=bfloat16"], "only mixed precision"), (["streaming=true", "packing=true"], "lengths")],
)
def test_settings_that_do_not_fit_stop_before_the_data_are_read(recipe, capsys, monkeypatch, settings, message):
    monkeypatch.setattr("vtlmm.train.stage_runner.prepare_datasets", lambda *_: pytest.fail("the data were read"))
    assert main(["train", "--config", str(recipe), *settings]) == 1 and message in capsys.readouterr().err


def test_quantization_without_bitsandbytes_stops_before_the_data_are_read(recipe, capsys, monkeypatch):
    monkeypatch.setattr("vtlmm.train.stage_runner.prepare_datasets", lambda *_: pytest.fail("the data were read"))
    monkeypatch.setattr("vtlmm.hub.quantize.is_bitsandbytes_available", lambda: False)
    assert main(["train", "--config", str(recipe), "adapter=lora", "quantization=nf4"]) == 1
    assert "nf4 needs bitsandbytes: pip install 'vtlmm[qlora]'" in capsys.readouterr().err


def test_a_recipe_of_stages_needs_its_folders():
    with pytest.raises(ValueError, match="needs `output_dir`"):
        split_stages({"model": "here", "stages": {"joint": {}}})


def test_the_check_looks_at_the_data_of_every_stage(recipe, tmp_path, capsys):
    rows = json.loads((tmp_path / "rows.json").read_text())
    (tmp_path / "other.json").write_text(json.dumps(rows[:2]))
    with_stages(recipe, f"  visual_head:\n  joint: {{dataset: {tmp_path}/other.json, eval_dataset: null}}")
    assert main(["data", "check", "--config", str(recipe)]) == 1
    text = capsys.readouterr().out
    assert re.findall(r"^rows +(\d+)", text, re.MULTILINE) == ["6", "6", "2"]


def test_a_stream_is_shuffled(recipe):
    """In a buffer of files: images are decoded behind it."""
    orders = {}
    for shuffle in (False, True):
        changes = ["streaming=true", "bad_rows=skip", "eval_dataset=null", f"shuffle_dataset={shuffle}", "seed=3"]
        _, data, _, args = parse_settings(read_settings(recipe, changes))
        path = Path(data.dataset)
        rows = json.loads(path.read_text())
        path.write_text(json.dumps([{**row, "image": f"{i}.png"} for i, row in enumerate(rows[:5])]))
        for i in range(5):
            PILImage.new("RGB", (28, 28), (i, 0, 0)).save(path.with_name(f"{i}.png"))
        stream, _ = prepare_datasets(data, AutoProcessor.from_pretrained(path.with_name("start")), args)
        orders[shuffle] = [row["images"][0].getpixel((0, 0))[0] for row in stream]
    assert orders[False] == [0, 1, 2, 3, 4] and orders[True] != orders[False] == sorted(orders[True])


def test_packs_of_a_recipe_that_groups_by_length(recipe, tmp_path, monkeypatch):
    """And without an `output_dir`, which TRL chooses then."""
    monkeypatch.chdir(tmp_path)
    recipe.write_text(recipe.read_text().replace(f"output_dir: {tmp_path}/out\n", ""))
    settings = ["packing=true", "train_sampling_strategy=group_by_length", "max_length=40", "max_steps=1"]
    assert main(["train", "--config", str(recipe), *settings]) == 0
    assert (tmp_path / "trainer_output" / RUN_RECORD).is_file()


def test_bad_recipes_stop_before_anything_is_loaded(recipe, capsys):
    assert main(["train", "--config", str(recipe), "stage=V"]) == 1
    assert "Unknown stage 'V'" in capsys.readouterr().err
    assert main(["train", "--config", str(recipe), "bad_rows=raise"]) == 1
    assert "row 5: missing image" in capsys.readouterr().err
    assert main(["train", "--config", str(recipe), "quantization=nf4"]) == 1
    assert "set `adapter`" in capsys.readouterr().err
