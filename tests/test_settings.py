# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Settings of a run: from the command line and YAML, their types, and combinations that conflict."""

import pytest

from vtlmm.train.recipe import (
    CONFIGS,
    check_settings,
    parse_arguments,
    parse_settings,
    read_recipe,
    settings_table,
)
from vtlmm.train.setting_checks import validate
from vtlmm.train.stage_settings import split_stages


BASE = {"model_name_or_path": "start", "dataset_name": "x.json", "output_dir": "out", "use_cpu": True}


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model_name_or_path: here\nlearning_rate: 2e-5\nstage: joint\n")
    return str(path)


def test_options_replace_settings_of_the_recipe(recipe):
    argv = ["--config", recipe, "--stage", "decoder", "--visual_loss_coef=0.5", "--bf16", "--save-strategy", "no"]
    settings = parse_arguments([*argv, "--trainable_modules", "lm_head", "vm_head"])
    assert settings == {
        "model_name_or_path": "here",
        "learning_rate": 2e-5,  # YAML reads it as a text
        "stage": "decoder",
        "visual_loss_coef": 0.5,
        "bf16": True,
        "save_strategy": "no",  # YAML reads it as false
        "trainable_modules": ["lm_head", "vm_head"],
    }
    assert parse_arguments(["--trainable_modules", "[lm_head]"]) == {"trainable_modules": ["lm_head"]}
    assert parse_arguments(["--weight_decay", "-1"]) == {"weight_decay": -1.0}


def test_an_option_changes_one_stage(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("stages:\n  visual_head:\n  joint: {max_steps: 3}\n")
    settings = parse_arguments(["--config", str(path), "--stages.joint.learning_rate", "1e-4"])
    assert settings == {"stages": {"visual_head": {}, "joint": {"max_steps": 3, "learning_rate": 1e-4}}}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--learnin_rate", "1"], "unknown setting 'learnin_rate'. Did you mean 'learning_rate'"),
        (["--lr", "1"], "Did you mean 'learning_rate'"),
        (["--model", "x"], "Did you mean 'model_name_or_path'"),
        (["--stages.joint.batch_size", "1"], "Did you mean 'per_device_train_batch_size'"),
        (["learning_rate=1"], "Write `--learning_rate 1`"),
        (["--stage", "joint", "learning_rate=1"], "Write `--learning_rate 1`"),
        (["joint"], "Options begin with `--`"),
        (["--max_steps", "abc"], "`max_steps` must be a whole number, not 'abc'"),
        (["--learning_rate", "{a: 1}"], "`learning_rate` must be a number or null, not {'a': 1}"),
        (["--packing", "None"], "`packing` must be true or false, not null"),
        (["--packing", "2"], "`packing` must be true or false, not 2"),
        (["--optim", "adamm"], "`optim` must be one of adamw_torch"),
        (["--stage"], "`stage` must be a text, not True"),
        (["--config"], "`--config` takes one recipe"),
        (["--stage.a", "1", "--stage", "2", "--stage.b", "1"], "so it has no settings below it"),
    ],
)
def test_bad_arguments_are_named(argv, message):
    with pytest.raises(ValueError) as error:
        parse_arguments(argv)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_missing_or_broken_recipe_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.yaml does not exist"):
        read_recipe(tmp_path / "gone.yaml")
    for text, message in {"a: [": "is not a YAML file", "- a": "must hold `setting: value` lines"}.items():
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_recipe(tmp_path / "bad.yaml")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("max_length", "None", None),
        ("max_rows", "null", None),
        ("max_steps", "1e3", 1000),
        ("max_steps", 500.0, 500),
        ("lora_r", "8", 8),
        ("learning_rate", "2e-5", 2e-5),
        ("learning_rate", 1, 1.0),
        ("packing", "true", True),
        ("packing", "off", False),
        ("cache_image_features", "true", True),
        ("cache_image_features", False, None),
        ("resume_from_checkpoint", "false", None),
        ("resume_from_checkpoint", "outputs/run/checkpoint-2", "outputs/run/checkpoint-2"),
        ("run_name", 2026, "2026"),
        ("eval_strategy", False, "no"),
        ("trainable_modules", "lm_head", ["lm_head"]),
        ("cache_image_features", True, True),
        ("resume_from_checkpoint", True, True),
        ("lr_scheduler_kwargs", {"min_lr": "1e-6", "name": "x"}, {"min_lr": 1e-6, "name": "x"}),
        ("report_to", "none", "none"),
    ],
)
def test_values_get_their_declared_type(name, value, expected):
    result = check_settings({name: value}, "here")[name]
    assert result == expected and type(result) is type(expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("packing", "None"),
        ("seed", None),
        ("seed", "None"),
        ("dataset_streaming", None),
        ("push_to_hub", "None"),
        ("max_steps", 1.5),
        ("max_steps", True),
        ("learning_rate", True),
        ("learning_rate", float("nan")),
        ("stage", ["joint"]),
        ("output_dir", {"a": 1}),
        ("lora_r", "eight"),
        ("lr_scheduler_kwargs", [1]),
    ],
)
def test_values_of_another_type_are_refused(name, value):
    with pytest.raises(ValueError, match=f"here: `{name}` must be"):
        check_settings({name: value}, "here")


def test_parsed_settings_have_their_types():
    run = parse_settings({**BASE, "max_steps": "1e3", "bf16": "None", "lora_r": "8", "lr_scheduler_kwargs": {"a": 1}})
    assert (run.args.max_steps, run.adapter.lora_r, run.args.lr_scheduler_kwargs) == (1000, 8, {"a": 1})
    assert run.args.bf16 is False


def test_the_table_lists_every_setting():
    table = {setting.name: setting for setting in settings_table()}
    assert table["learning_rate"].group == "training" and table["visual_loss_coef"].group == "stage"
    assert table["model_name_or_path"].default == "required" and table["lora_r"].default == "128"
    assert table["packing"].type == "bool" and table["max_rows"].type == "int or null"
    assert len(table) > 150 and all(setting.help for setting in table.values() if setting.group != "training")
    assert len(CONFIGS) == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_peft": True, "dtype": "bfloat16"}, "needs mixed precision"),
        ({"use_peft": True, "vm_head_type": "mlp"}, "`vm_head_type` makes a new VM head"),
        ({"use_peft": True, "vm_head_init": "random"}, "`vm_head_init` makes a new VM head"),
        ({"load_in_8bit": True}, "cannot be trained in full"),
        ({"base_id": "a/b"}, "`base_id` is recorded in an adapter"),
        ({"dtype": "float16"}, "loses small updates"),
        ({"dataset_streaming": True, "packing": True}, "`packing` needs the lengths"),
        ({"dataset_streaming": True, "train_sampling_strategy": "group_by_length"}, "`group_by_length` needs the"),
        ({"dataset_streaming": True, "cache_image_features": "x"}, "needs all images before training"),
        ({"dataset_streaming": True}, "Set `max_steps`"),
        ({"eval_strategy": "steps", "eval_steps": 1}, "`eval_strategy: steps` needs evaluation data"),
        ({"eval_on_start": True}, "`eval_on_start` needs evaluation data"),
        ({"eval_task_data": "x"}, "`eval_task_data` needs evaluation data"),
        ({"eval_caption_data": "x"}, "`eval_caption_data` needs evaluation data"),
        ({"stage": "visual_head", "vm_head_candidates": [{}, {}]}, "`vm_head_candidates` needs evaluation data"),
    ],
)
def test_settings_that_conflict_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        validate(parse_settings({**BASE, **changes}))


@pytest.mark.parametrize("name", ["model_name_or_path", "dataset_name", "eval_dataset", "image_folder"])
def test_an_output_that_is_an_input_is_refused(tmp_path, name):
    (tmp_path / "folder").mkdir()
    run = parse_settings({**BASE, "output_dir": str(tmp_path / "folder/../folder"), name: str(tmp_path / "folder")})
    with pytest.raises(ValueError, match=f"is or contains the input `{name}`"):
        validate(run)


@pytest.mark.parametrize("name", ["model_name_or_path", "dataset_name", "eval_dataset", "eval_caption_data"])
@pytest.mark.parametrize("place", ["checkpoint-2", "merged", "merged/rows.json", "results/rows.json", "vocab.json"])
def test_an_input_that_the_run_replaces_is_refused(tmp_path, name, place):
    path = tmp_path / place
    path.parent.mkdir(exist_ok=True)
    path.write_text("[]") if path.suffix else path.mkdir()
    run = parse_settings({**BASE, "eval_dataset": "eval.json", "output_dir": str(tmp_path), name: str(path)})
    with pytest.raises(ValueError, match=f"is or contains the input `{name}` .*, which the run would replace"):
        validate(run)


def test_a_file_that_the_run_keeps_may_be_an_input(tmp_path):
    (tmp_path / "rows.json").write_text("[]")
    validate(parse_settings({**BASE, "output_dir": str(tmp_path), "dataset_name": str(tmp_path / "rows.json")}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("per_device_train_batch_size", 0),
        ("per_device_eval_batch_size", -1),
        ("gradient_accumulation_steps", 0),
        ("max_length", 0),
        ("max_length", -5),
        ("dataloader_num_workers", -1),
        ("seed", -1),
        ("learning_rate", -1e-3),
        ("projector_learning_rate", -1.0),
        ("num_train_epochs", -1),
        ("weight_decay", -0.1),
        ("max_grad_norm", -1.0),
        ("lora_r", 0),
        ("lora_alpha", -1),
        ("lora_dropout", 1.0),
        ("eval_task_images", 0),
    ],
)
def test_numbers_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=f"`{name}` is {value}"):
        parse_settings({**BASE, name: value})


def test_stages_follow_each_other_through_folders():
    shared = {"model_name_or_path": "a", "model_revision": "v1", "output_dir": "out"}
    runs = split_stages({**shared, "stages": {"visual_head": {"use_peft": True}, "joint": {}}})
    assert [run["model_name_or_path"] for run in runs] == ["a", "out/visual_head/merged"]
    assert [run.get("model_revision") for run in runs] == ["v1", None]
    assert [run["output_dir"] for run in runs] == ["out/visual_head", "out/joint"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_name_or_path": "a", "stages": {"joint": {}}}, "needs `output_dir`"),
        ({**BASE, "vm_head_type": "mlp", "stages": {"joint": {}}}, "stages.visual_head.vm_head_type"),
        ({**BASE, "vm_head_init": "random", "stages": {"joint": {}}}, "stages.visual_head.vm_head_init"),
        ({**BASE, "stage": "joint", "stages": {"joint": {}}}, "sets stage itself"),
        ({**BASE, "stages": {"joint": {"output_dir": "x"}}}, "sets stages.joint.output_dir itself"),
    ],
)
def test_settings_that_conflict_with_stages(settings, message):
    with pytest.raises(ValueError, match=message):
        split_stages(settings)
