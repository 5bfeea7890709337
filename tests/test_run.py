# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""From a recipe or options to a trained folder, through the command line."""

import json
import os
import re
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from helpers.forked import fork, wait, wait_until
from helpers.tiny_models import build_config, build_processor
from PIL import Image as PILImage
from transformers import AutoProcessor

from modeling_vtlmm import VTLMMForConditionalGeneration
from vtlmm.cli.main import main
from vtlmm.data.rows import ROW_FEATURES
from vtlmm.hub.repository import RUN_RECORD
from vtlmm.train.output_folder import clear_output, lock_output
from vtlmm.train.recipe import parse_settings, read_recipe
from vtlmm.train.run_data import prepare_datasets
from vtlmm.train.run_record import loss_curves
from vtlmm.train.stage_runner import build_trainer, run_training
from vtlmm.train.trainer import VTLMMTrainer


SKIPPED = "1 of 6 rows are left out"


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
        f"model_name_or_path: {tmp_path}/start\ndataset_name: {tmp_path}/rows.json\n"
        f"eval_dataset: {tmp_path}/rows.json\noutput_dir: {tmp_path}/out\nstage: joint\nbad_rows: skip\n"
        "max_steps: 2\nsave_steps: 1\nuse_cpu: true\nreport_to: none\nper_device_train_batch_size: 2\n"
        "logging_steps: 1\ndisable_tqdm: true\n"
    )
    return path


def train(recipe, *options) -> int:
    return main(["train", "--config", str(recipe), *map(str, options)])


@pytest.mark.slow
def test_train_writes_a_model_and_its_record(recipe, tmp_path, capsys):
    with pytest.warns(UserWarning, match=SKIPPED):
        assert train(recipe, "--learning_rate", "1e-2", "--hub_token", "hf_SECRET") == 0
    assert "hf_SECRET" not in (tmp_path / "out" / RUN_RECORD).read_text()  # it is published with the weights
    text = capsys.readouterr().out
    assert "row 5: missing image" in text and "Stage joint: loss = 1 · L_lm + 1 · L_vm" in text
    assert "Stage 1 of 1: joint" in text and f"The model is in {tmp_path}/out" in text and "vtlmm ask" in text
    loaded = VTLMMForConditionalGeneration.from_pretrained(tmp_path / "out")
    start = VTLMMForConditionalGeneration.from_pretrained(tmp_path / "start")
    assert not torch.equal(loaded.lm_head.weight, start.lm_head.weight)
    (record,) = json.loads((tmp_path / "out" / RUN_RECORD).read_text())
    assert record["stage"] == "joint" and record["steps"] == 2 and record["rows"] == 5
    assert record["settings"]["learning_rate"] == 1e-2 and record["metrics"]["eval_visual_loss"] > 0
    assert [step for step, _ in record["curves"]["lm_loss"]] == [1, 2]
    assert record["curves"]["eval_lm_loss"][-1][1] == pytest.approx(record["metrics"]["eval_lm_loss"], rel=1e-4)

    # more steps continue from the last checkpoint, and the next stage appends to the record
    more = ["--learning_rate", "1e-2", "--resume_from_checkpoint", "--max_steps", 3]
    assert train(recipe, *more) == 0
    assert f"Resuming from {tmp_path}/out/checkpoint-2" in capsys.readouterr().out
    (record,) = json.loads((tmp_path / "out" / RUN_RECORD).read_text())
    assert record["steps"] == 3 and record["resumed_from"] == "checkpoint-2"
    following = ["--model_name_or_path", f"{tmp_path}/out", "--output_dir", f"{tmp_path}/next"]
    assert train(recipe, *following, "--stage", "visual_head") == 0
    history = json.loads((tmp_path / "next" / RUN_RECORD).read_text())
    assert [entry["stage"] for entry in history] == ["joint", "visual_head"]


@pytest.mark.slow
def test_train_needs_no_recipe(recipe, tmp_path, capsys):
    options = ["--model_name_or_path", f"{tmp_path}/start", "--dataset_name", f"{tmp_path}/rows.json"]
    options += ["--bad_rows", "skip", "--stage", "projector", "--output_dir", f"{tmp_path}/short"]
    with pytest.warns(UserWarning, match=SKIPPED):
        assert main(["train", *options, "--max_steps", "1", "--use_cpu", "--disable_tqdm"]) == 0
    assert f"--model_name_or_path {tmp_path}/short --stage decoder" in capsys.readouterr().out


def test_long_curves_are_thinned():
    logs = [{"step": step, "lm_loss": 1 / step} for step in range(1, 1002)]
    points = loss_curves(logs)["lm_loss"]
    assert len(points) == 91 and points[-1] == [1001, 0.000999] and points[0] == [11, 0.090909]


# ---- Several stages ----


def with_stages(recipe, stages: str):
    lines = [line for line in recipe.read_text().splitlines() if not line.startswith("stage:")]
    recipe.write_text("\n".join([*lines, "stages:", stages]) + "\n")
    return recipe


@pytest.mark.slow
def test_a_recipe_of_several_stages(recipe, tmp_path, capsys):
    """Each stage starts from the model of the one before; finished stages are skipped."""
    with_stages(recipe, "  visual_head: {learning_rate: 1e-2}\n  joint: {visual_loss_coef: 0.5}")
    options = ["--learning_rate", "1e-4", "--stages.joint.learning_rate", "1e-3"]
    with pytest.warns(UserWarning, match=SKIPPED):
        assert train(recipe, *options) == 0
    history = json.loads((tmp_path / "out/joint" / RUN_RECORD).read_text())
    assert [(run["stage"], run["learning_rate"]) for run in history] == [("visual_head", 1e-2), ("joint", 1e-3)]
    heads = [
        VTLMMForConditionalGeneration.from_pretrained(tmp_path / folder).model.vm_head.weight
        for folder in ("start", "out/visual_head", "out/joint")
    ]
    assert not torch.equal(heads[0], heads[1]) and torch.equal(heads[1], heads[2])
    text = capsys.readouterr().out
    assert text.count("rows        6") == 2  # train and eval, once for both stages
    assert "Stage 1 of 2: visual_head" in text and "Stage 2 of 2: joint" in text
    costs = re.findall(r"^  (visual_head|joint) +(\d+) steps, .* FLOPs, about", text, flags=re.MULTILINE)
    assert [stage for stage, _ in costs] == ["visual_head", "joint"]
    resume = [*options, "--resume_from_checkpoint"]
    assert train(recipe, *resume) == 0
    text = capsys.readouterr().out
    assert text.count("is finished:") == 2 and "Resuming" not in text and "Every stage is finished" in text
    assert train(recipe, *resume, "--stages.joint.learning_rate", "1e-5") == 1
    assert "was finished with other settings (learning_rate: 0.001 → 1e-05)" in capsys.readouterr().err
    assert train(recipe, *resume, "--logging_steps", 7) == 0  # logging does not change the weights
    (tmp_path / "out/visual_head" / RUN_RECORD).unlink()
    assert train(recipe, *resume) == 1
    assert "visual_head is not finished, but a later stage has started" in capsys.readouterr().err
    (tmp_path / "out/joint" / RUN_RECORD).unlink()
    assert (tmp_path / "out/joint/checkpoint-2").is_dir()
    assert train(recipe, *resume) == 1
    assert "visual_head is not finished, but a later stage has started" in capsys.readouterr().err


@pytest.mark.slow
def test_adapters_are_merged_between_stages(recipe, tmp_path, capsys):
    with_stages(recipe, "  visual_head: {learning_rate: 1e-2}\n  joint: {learning_rate: 1e-2}")
    adapter = ["--use_peft", "--lora_r", 2, "--eval_dataset", "null", "--warmup_steps", 0]
    with pytest.warns(UserWarning, match=SKIPPED):
        assert train(recipe, *adapter) == 0
    assert "Merged the adapter of stage visual_head" in capsys.readouterr().out
    merged = VTLMMForConditionalGeneration.from_pretrained(tmp_path / "out/visual_head/merged")
    start = VTLMMForConditionalGeneration.from_pretrained(tmp_path / "start")
    assert not torch.equal(merged.model.vm_head.weight, start.model.vm_head.weight)
    config = json.loads((tmp_path / "out/joint/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == f"{tmp_path}/out/visual_head/merged"
    history = json.loads((tmp_path / "out/joint" / RUN_RECORD).read_text())
    assert [entry["stage"] for entry in history] == ["visual_head", "joint"]
    shutil.rmtree(tmp_path / "out/joint")
    shutil.rmtree(tmp_path / "out/visual_head/merged")  # a stop between the stage and its merge
    assert train(recipe, *adapter, "--resume_from_checkpoint") == 0
    assert (tmp_path / "out/joint/adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("stages", "options", "message"),
    [
        ("  visual_head:\n  joint: {visual_student: decoder}", [], "must be 'vm_head' or 'lm_head'"),
        ("  visual_head: {model_name_or_path: here}\n  joint:", [], "sets stages.visual_head.model_name_or_path"),
        ("  visual_head:\n  joint: {use_peft: true, dtype: bfloat16}", [], "needs mixed precision"),
        ("  visual_head:\n  joint: {packing: true, max_length: null}", [], "`packing` needs `max_length`"),
        ("  visual_head:\n  joint: {router_aux_loss_coef: 0.1}", [], "router_aux_loss_coef"),
        ("  visual_head:\n  joint: {eval_task_data: gone.json}", [], "gone.json does not exist"),
        ("  visual_head:\n  joint: {bad_rows: raise}", [], "row 5: missing image"),
        ("  [visual_head, joint]", [], "`stages` must map each stage"),
        ("  [visual_head, joint]", ["--stages.joint.seed", "1"], "'stages' is ['visual_head', 'joint']"),
        ("  {joint: 5}", [], "`stages` must map each stage"),
        ("  {}", [], "`stages` must map each stage"),
    ],
)
def test_mistakes_in_a_later_stage_stop_the_first(recipe, tmp_path, capsys, stages, options, message):
    assert train(with_stages(recipe, stages), *options) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*/*.safetensors"))


# ---- Refused before anything is loaded or written ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--use_peft", "--dtype", "bfloat16"], "needs mixed precision"),
        (["--dataset_streaming", "--packing"], "needs the lengths"),
        (["--stage", "V"], "Unknown stage 'V'"),
        (["--load_in_4bit"], "Set `use_peft: true`"),
        (["--max_steps", "abc"], "`max_steps` must be a whole number, not 'abc'"),
    ],
)
def test_conflicts_stop_before_the_data_are_read(recipe, capsys, monkeypatch, options, message):
    monkeypatch.setattr("vtlmm.train.run_data.prepare_dataset", lambda *_: pytest.fail("the data were read"))
    assert train(recipe, *options) == 1
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_missing_bitsandbytes_stops_before_the_data(recipe, capsys, monkeypatch):
    monkeypatch.setattr("vtlmm.train.run_data.prepare_dataset", lambda *_: pytest.fail("the data were read"))
    monkeypatch.setattr("vtlmm.hub.quantize.is_bitsandbytes_available", lambda: False)
    assert train(recipe, "--use_peft", "--load_in_4bit") == 1
    assert "bitsandbytes" in capsys.readouterr().err


def test_without_a_stage_the_first_one_is_named(recipe, tmp_path, capsys):
    recipe.write_text(recipe.read_text().replace("stage: joint\n", ""))
    assert train(recipe) == 1
    assert "The projector of" in (error := capsys.readouterr().err) and "begin with `--stage projector`" in error
    (tmp_path / "start" / RUN_RECORD).write_text(json.dumps([{"stage": "projector", "settings": {}}]))
    assert train(recipe) == 1
    assert "continue with `--stage decoder`" in capsys.readouterr().err


def test_starts_without_a_model_are_named(recipe, tmp_path, capsys, monkeypatch):
    def error_of(name) -> str:
        assert train(recipe, "--model_name_or_path", name) == 1
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1
        return error

    lookups: list = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **options: lookups.append(address) or [])
    assert "does not exist" in error_of(tmp_path / "gone")
    assert "does not exist" in error_of("outputs/deep/gone")
    assert lookups == []  # the Hub was not asked
    shutil.copytree(tmp_path / "start", tmp_path / "training/joint")
    assert f"Choose one of its models, e.g. {tmp_path}/training/joint" in error_of(tmp_path / "training")
    (tmp_path / "llava").mkdir()
    (tmp_path / "llava/config.json").write_text('{"model_type": "llava"}')
    assert "is a 'llava' model, not a VT-LMM" in error_of(tmp_path / "llava")
    (tmp_path / "start/vtlmm_run.json").write_text("[3]")
    assert "vtlmm_run.json, entry 0 must hold an object, not a number" in error_of(tmp_path / "start")


@pytest.mark.slow
def test_an_existing_model_is_not_overwritten(recipe, tmp_path, capsys):
    with pytest.warns(UserWarning, match=SKIPPED):
        assert train(recipe) == 0
    before = (tmp_path / "out/model.safetensors").read_bytes()
    assert train(recipe, "--learning_rate", "1e-2") == 1
    assert "already holds a model or checkpoints" in capsys.readouterr().err
    assert (tmp_path / "out/model.safetensors").read_bytes() == before
    assert train(recipe, "--overwrite", "--resume_from_checkpoint") == 1
    assert "exclude each other" in capsys.readouterr().err
    with pytest.warns(UserWarning, match=SKIPPED):
        assert train(recipe, "--learning_rate", "1e-2", "--overwrite", "--max_steps", 1) == 0
    assert (tmp_path / "out/model.safetensors").read_bytes() != before
    assert [path.name for path in tmp_path.glob("out/checkpoint-*")] == ["checkpoint-1"]


@pytest.mark.slow
def test_a_second_process_is_refused(recipe, tmp_path, capsys):
    def hold():
        with lock_output(tmp_path / "out"):
            (tmp_path / "held").touch()
            time.sleep(600)

    process = fork(hold, tmp_path / "log.txt")
    try:
        wait_until((tmp_path / "held").exists, tmp_path / "log.txt")
        assert train(recipe) == 1
        assert f"Another process is writing to {tmp_path}/out (process {process} on" in capsys.readouterr().err
    finally:
        os.kill(process, signal.SIGKILL)
    assert wait(process) == -signal.SIGKILL
    assert not (tmp_path / "out/model.safetensors").exists()


# ---- Runs that stop ----


@pytest.mark.slow
def test_a_stopped_rerun_is_not_finished(recipe, tmp_path, monkeypatch):
    """The record of the earlier run is deleted when training begins."""
    settings = read_recipe(recipe, save_strategy="no")
    with pytest.warns(UserWarning, match="left out"):
        run_training(settings)

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(VTLMMTrainer, "training_step", stop)
    with pytest.warns(UserWarning, match="left out"), pytest.raises(KeyboardInterrupt):
        run_training({**settings, "overwrite": True})
    assert not (tmp_path / "out" / RUN_RECORD).exists()


def test_an_evaluation_failure_loses_no_weights(recipe, tmp_path, monkeypatch):
    def fault(*args, **kwargs):
        raise RuntimeError("evaluation failed")

    monkeypatch.setattr(VTLMMTrainer, "evaluate", fault)
    with pytest.warns(UserWarning, match="left out"), pytest.raises(RuntimeError, match="evaluation failed"):
        run_training(read_recipe(recipe, save_strategy="no"))
    trained = VTLMMForConditionalGeneration.from_pretrained(tmp_path / "out")
    start = VTLMMForConditionalGeneration.from_pretrained(tmp_path / "start")
    assert not torch.equal(trained.lm_head.weight, start.lm_head.weight)


def test_a_date_in_a_recipe_is_recorded(recipe, tmp_path):
    recipe.write_text(recipe.read_text() + "run_name: 2026-03-01\nsave_strategy: no\n")
    with pytest.warns(UserWarning, match="left out"):
        run_training(read_recipe(recipe))
    (record,) = json.loads((tmp_path / "out" / RUN_RECORD).read_text())
    assert record["settings"]["run_name"] == "2026-03-01"


# ---- Data ----


def test_the_data_check_covers_every_stage(recipe, tmp_path, capsys):
    rows = json.loads((tmp_path / "rows.json").read_text())
    (tmp_path / "other.json").write_text(json.dumps(rows[:2]))
    with_stages(recipe, f"  visual_head:\n  joint: {{dataset_name: {tmp_path}/other.json, eval_dataset: null}}")
    assert main(["data", "check", "--config", str(recipe)]) == 1
    text = capsys.readouterr().out
    assert re.findall(r"^rows +(\d+)", text, re.MULTILINE) == ["6", "6", "2"]


def test_a_stream_is_shuffled(recipe):
    """The trainer shuffles the stream once. The shuffle buffer holds files; images are decoded after it."""
    changes = {"dataset_streaming": True, "eval_dataset": None, "shuffle_dataset": True, "seed": 3, "max_steps": 1}
    settings = read_recipe(recipe, **changes)
    run = parse_settings(settings)
    path = Path(run.data.dataset_name)
    row = json.loads(path.read_text())[0]
    path.write_text(json.dumps([{**row, "image": f"{i}.png"} for i in range(9)]))
    for i in range(9):
        PILImage.new("RGB", (28, 28), (i, 0, 0)).save(path.with_name(f"{i}.png"))
    stream, _ = prepare_datasets(run.data, AutoProcessor.from_pretrained(path.with_name("start")), run.args)
    shuffled = stream.decode(False).shuffle(seed=3).cast(ROW_FEATURES)
    datasets = {"read": stream, "once": shuffled, "trainer": build_trainer(settings).train_dataset}
    orders = {name: [row["images"][0].getpixel((0, 0))[0] for row in rows] for name, rows in datasets.items()}
    assert orders["trainer"] == orders["once"] != orders["read"] == list(range(9))


@pytest.mark.slow
def test_packing_with_grouping_by_length(recipe, tmp_path, monkeypatch):
    """Without `output_dir` the model is in TRL's default folder."""
    monkeypatch.chdir(tmp_path)
    recipe.write_text(recipe.read_text().replace(f"output_dir: {tmp_path}/out\n", ""))
    options = ["--packing", "--train_sampling_strategy", "group_by_length", "--max_length", 40, "--max_steps", 1]
    assert train(recipe, *options) == 0
    assert (tmp_path / "trainer_output" / RUN_RECORD).is_file()


@pytest.mark.slow
def test_more_steps_remove_scores_of_the_old_weights(recipe, tmp_path, capsys):
    assert train(recipe) == 0
    for name in ("results/pope.json", ".eval_results/pope.yaml"):
        (tmp_path / "out" / name).parent.mkdir()
        (tmp_path / "out" / name).write_text("{}")
    assert train(recipe, "--resume_from_checkpoint", "true") == 0  # finished: the weights do not change
    assert (tmp_path / "out/results/pope.json").exists()
    assert train(recipe, "--resume_from_checkpoint", "true", "--max_steps", 7) == 0
    assert not list((tmp_path / "out").rglob("pope.*"))


def test_overwrite_removes_scores_of_the_old_weights(tmp_path):
    for name in ("results/pope.json", ".eval_results/pope.yaml", "notes.txt", "results/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    clear_output(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["notes.txt", "notes.txt"]
