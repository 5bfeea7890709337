# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""`vtlmm ablate`: shared stages, resuming after a kill, invalid grids, and the metrics."""

import json
import math
import multiprocessing
import shlex
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.ablation import ALL_BUT_OOD, rows_of, work, write_grid  # noqa: F401 - `work` is a fixture
from helpers.tiny_models import build_processor

from modeling_vtlmm import VTLMMForConditionalGeneration
from vtlmm.ablations import run as runner
from vtlmm.ablations.grid import EvaluateConfig, read_grid
from vtlmm.ablations.metrics import Evaluator, measure, perplexity, read_held_out_data
from vtlmm.cli.main import main
from vtlmm.evaluation.questions import image_loader
from vtlmm.evaluation.shuffled_images import with_shuffled_images
from vtlmm.hub.repository import RUN_RECORD
from vtlmm.inference.generation import generate
from vtlmm.train.stage_runner import build_trainer


GRIDS = Path(__file__).parents[1] / "recipes" / "ablations"


# ---- A grid of tiny models ----


@pytest.fixture(scope="module")
def finished(work, tmp_path_factory):
    """The path and the output folder of a grid that ran without an interruption."""
    folder = tmp_path_factory.mktemp("finished")
    path = write_grid(work, folder)
    assert main(["ablate", str(path), "--output", str(folder / "out")]) == 0
    return path, folder / "out"


@pytest.mark.slow
def test_shared_stages_are_trained_once(finished):
    path, output = finished
    trained = sorted(mark.parent.name.partition("-")[0] for mark in (output / "stages").glob("*/finished.json"))
    assert trained == ["joint"] * 4 + ["visual_head"] * 2  # for two arms with two seeds
    grid = read_grid(path)
    heads = {(arm, seed): grid.chain(arm, seed)[0]["key"] for arm in ("off", "on") for seed in (0, 1)}
    assert heads["off", 0] == heads["on", 0] != heads["off", 1] == heads["on", 1]
    # stage IV of both arms started from this folder
    for row in rows_of(output):
        [head, joint] = json.loads(Path(row["model"], RUN_RECORD).read_text())
        assert (
            joint["settings"]["model_name_or_path"].endswith(heads[row["arm"], row["seed"]])
            and head["stage"] == "visual_head"
        )
        assert joint["settings"]["seed"] == row["seed"] and joint["steps"] == 2 and head["steps"] == 1
        assert joint["settings"].get("visual_loss_coef") == (0 if row["arm"] == "off" else None)


@pytest.mark.slow
def test_results_have_machine_versions_and_commands(finished):
    _, output = finished
    results = json.loads((output / "grid/results.json").read_text())
    table = (output / "grid/results.md").read_text()
    for row in results["rows"]:
        assert row["command"] in table and row["machine"] in table and row["versions"]["torch"] in table
        words = shlex.split(row["command"])
        assert words[words.index("--only") + 1] == row["arm"] and words[words.index("--seed") + 1] == str(row["seed"])
        assert row["num_images"] == 5 and row["num_questions"] == 10 and not row["subset"]
    comparisons = {(c["metric"], c["arm"]): c for c in results["comparisons"]}
    difference = comparisons["visual loss of stage IV, KL(p‖q)", "on"]["difference"]
    by_seed = {
        (row["arm"], row["seed"]): row["metrics"]["visual loss of stage IV, KL(p‖q)"] for row in results["rows"]
    }
    differences = [by_seed["on", seed] - by_seed["off", seed] for seed in (0, 1)]
    half = 12.7062 * np.std(differences, ddof=1) / math.sqrt(2)
    assert difference["value"] == pytest.approx(np.mean(differences))
    assert difference["high"] - difference["value"] == pytest.approx(half, rel=1e-4)
    assert comparisons["accuracy: color", "off"]["values"].keys() == {"0", "1"}


@pytest.mark.slow
def test_command_of_a_row_reproduces_the_row(finished, tmp_path):
    _, output = finished
    row = rows_of(output)[1]
    words = shlex.split(row["command"])
    words[words.index("--output") + 1] = str(tmp_path / "again")
    assert main(words[1:]) == 0
    [again] = rows_of(tmp_path / "again")
    assert again["metrics"] == row["metrics"] and again["key"] == row["key"]


# ---- Interrupted, changed and invalid grids ----


@pytest.mark.slow
def test_killed_grid_resumes_with_the_same_results(finished, tmp_path, monkeypatch):
    """The process is killed while a stage writes its folder. The last line of the rows is truncated as well."""
    path, whole = finished
    training, started = runner.run_training, []

    def train_until_the_kill(settings):
        started.append(settings)
        if len(started) == 5:  # seed 0 and stage III of seed 1 are finished
            folder = Path(settings["output_dir"])
            folder.mkdir()
            (folder / "model.safetensors").write_bytes(b"half")
            (tmp_path / "hangs").touch()
            time.sleep(600)
        return training(settings)

    monkeypatch.setattr(runner, "run_training", train_until_the_kill)
    command = ["ablate", str(path), "--output", str(tmp_path / "out")]
    process = multiprocessing.get_context("fork").Process(target=main, args=(command,))
    process.start()
    deadline, rows = time.monotonic() + 200, tmp_path / "out/grid/rows.jsonl"
    while not (tmp_path / "hangs").exists():
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    done = rows.read_bytes()
    assert done.count(b"\n") == 2
    rows.write_bytes(done + b'{"arm": "on", "se')
    monkeypatch.setattr(runner, "run_training", lambda settings: started.append(settings) or training(settings))
    assert main(command) == 0
    assert [settings["stage"] for settings in started] == ["joint", "joint"]  # both arms of seed 1
    assert rows.read_bytes().startswith(done)
    assert [row["metrics"] for row in rows_of(tmp_path / "out")] == [row["metrics"] for row in rows_of(whole)]


@pytest.mark.slow
def test_output_with_other_settings_is_rejected(work, finished, capsys):
    path, output = finished
    before = (output / "grid/rows.jsonl").read_bytes()
    for change in ("learning_rate=0.1", "arms.on.joint.visual_loss_coef=2", "evaluate.max_new_tokens=4"):
        assert main(["ablate", str(path), change, "--output", str(output)]) == 1
        assert "with other settings, data or another start model. Choose another --output" in capsys.readouterr().err
    assert main(["ablate", str(path), "--output", str(output), "--seed", "0", "--seed", "1"]) == 0
    assert capsys.readouterr().out.count("already finished") == 4
    assert (output / "grid/rows.jsonl").read_bytes() == before


def test_too_long_answers_are_rejected_before_training(work, tmp_path, capsys):
    rows = json.loads((work / "test.json").read_text())
    rows = [{**row, "answer": "a red boat", "image": str(work / row["image"])} for row in rows]
    (tmp_path / "long.json").write_text(json.dumps(rows))
    path = write_grid(work, tmp_path)
    changes = [f"evaluate.dataset={tmp_path / 'long.json'}", "evaluate.max_new_tokens=2", "evaluate.kinds={}"]
    assert main(["ablate", str(path), *changes, "--output", str(tmp_path / "out")]) == 1
    assert "Set evaluate.max_new_tokens=4" in capsys.readouterr().err
    assert not (tmp_path / "out/stages").exists()


@pytest.mark.slow
def test_failed_run_keeps_the_finished_rows(work, tmp_path, capsys):
    changes = {"off": {"joint": {"visual_loss_coef": 0}}, "on": {"joint": {"max_length": 5}}}
    path = write_grid(work, tmp_path, arms=changes, seeds=[0])
    assert main(["ablate", str(path), "--output", str(tmp_path / "out")]) == 1
    captured = capsys.readouterr()
    assert "arm on, seed 0" in captured.err and "more than max_length=5" in captured.err
    assert [row["arm"] for row in rows_of(tmp_path / "out")] == ["off"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("reference=missing", "the reference 'missing' is not an arm. Use one of off, on"),
        ("arms.on.joint.learnin_rate=1", "unknown setting 'learnin_rate'. Did you mean 'learning_rate'"),
        ("arms.on.joint.visual_student=decoder", "must be 'vm_head' or 'lm_head'"),
        ("arms.on.visual_head.use_peft=true", "`use_peft` is supported in the last stage of an arm only"),
        ("evaluate.metrcs=[ood]", "unknown setting 'metrcs'. Did you mean 'metrics'?"),
        ("evaluate.max_rows=many", "`max_rows` must be a whole number or null, not 'many'"),
        ("arms.on.evaluate.max_rows=3", "arm on: `evaluate` of an arm may set use_pseudo_image_features only"),
        ("evaluate.metrics=[beauty]", "`metrics` has unknown names ['beauty']"),
        ("evaluate.ood_datasets={emoji: rows.json}", "metric ood and the setting `ood_datasets` need each other"),
        ("evaluate.text_file=null", "metric text_perplexity and the setting `text_file` need each other"),
        ("evaluate.scorer=exakt", "exakt"),
        ("evaluate.text_file=missing.txt", "the file missing.txt does not exist"),
        ("seeds=[]", "a grid needs at least one seed and one arm"),
        ("seeds=[first]", "`seeds[0]` must be a whole number, not 'first'"),
        ("arms.on=null", "arm on: name its stages"),
        ("evaluate.kinds={color: [red, blue]}", "no kind lists the answer 'yes'"),
    ],
)
def test_invalid_grid_is_rejected_before_training(work, tmp_path, capsys, override, message):
    path = write_grid(work, tmp_path)
    assert main(["ablate", str(path), override, "--output", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out/stages").exists()


def test_each_seed_can_have_a_start_model(work, tmp_path):
    path = write_grid(work, tmp_path)
    for seed in (0, 1):
        shutil.copytree(work / "start", tmp_path / f"start_{seed}")
    grid = read_grid(path, [f"model_name_or_path={tmp_path}/start_{{seed}}"])
    assert grid.chain("on", 1)[0]["model_name_or_path"].endswith("start_1")
    assert grid.chain("on", 1)[0]["key"] == read_grid(path).chain("on", 1)[0]["key"]  # a copy of the same weights
    (tmp_path / "start_1/model.safetensors").write_bytes(b"other weights")
    again = read_grid(path, [f"model_name_or_path={tmp_path}/start_{{seed}}", "seeds=[0]"])
    assert again.chain("on", 0)[0]["key"] == grid.chain("on", 0)[0]["key"]


# ---- Metrics ----


@pytest.mark.parametrize("shuffle", [False, True])
def test_cached_features_give_the_answers_of_images(work, tmp_path, shuffle):
    config = EvaluateConfig(dataset=str(work / "test.json"), batch_size=4, max_new_tokens=5)
    processor, model = build_processor(), VTLMMForConditionalGeneration.from_pretrained(work / "start")
    held_out = read_held_out_data(config, processor).held_out
    evaluator = Evaluator(model, processor, config, tmp_path)
    questions = with_shuffled_images(held_out.questions) if shuffle else held_out.questions
    answers = [answer.text for answer in evaluator.answer(questions, evaluator.vision_features(held_out))]
    load_image = image_loader(held_out.rows, held_out.image_positions)
    images = [[load_image(key) for key in question["images"]] for question in questions]
    texts = [question["question"] for question in questions]
    assert answers == generate(model, processor, texts, images, max_new_tokens=5, batch_size=4)
    assert len(set(answers)) > 3


def test_invalid_held_out_rows_are_rejected_before_training(work, tmp_path, capsys):
    (tmp_path / "test.json").write_text(json.dumps([{"image": "missing.png", "question": "what", "answer": "yes"}]))
    path = write_grid(work, tmp_path)
    change = f"evaluate.dataset={tmp_path / 'test.json'}"
    assert main(["ablate", str(path), change, "--output", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "evaluate.dataset has invalid rows" in error and "missing.png" in error
    assert not (tmp_path / "out").exists()


def test_visual_losses_equal_the_evaluation_in_training(work, tmp_path):
    """Each image counts once, for any questions about it."""
    rows = json.loads((work / "test.json").read_text())[::2]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    config = EvaluateConfig(dataset=str(work / "test.json"), metrics=["visual_tokens"])
    data = read_held_out_data(config, build_processor())
    metrics = measure(work / "start", config, data, tmp_path / "features").metrics
    for stage, name in (("visual_head", "III, KL(q‖p)"), ("joint", "IV, KL(p‖q)")):
        settings = {
            "model_name_or_path": str(work / "start"),
            "dataset_name": str(tmp_path / "rows.json"),
            "image_folder": str(work),
        }
        settings |= {
            "eval_dataset": settings["dataset_name"],
            "stage": stage,
            "vm_head_init": "keep",
            "output_dir": str(tmp_path),
        }
        expected = build_trainer({**settings, "use_cpu": True, "report_to": "none", "disable_tqdm": True}).evaluate()
        assert metrics[f"visual loss of stage {name}"] == pytest.approx(expected["eval_visual_loss"], rel=1e-5)
        assert metrics["entropy of visual tokens"] == pytest.approx(expected["eval_visual_token_entropy"], rel=1e-5)
        mean = expected["eval_mean_visual_token_entropy"]
        assert metrics["entropy of the mean visual token"] == pytest.approx(mean, rel=1e-5)


def test_perplexity_by_hand(work):
    texts = ["a red boat", "what is in the image ? a circle", "yes"]
    processor, model = build_processor(), VTLMMForConditionalGeneration.from_pretrained(work / "start")
    loss = number = 0
    for text in texts:
        ids = processor.tokenizer(text, return_tensors="pt")["input_ids"]
        logprobs = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        loss -= logprobs.gather(1, ids[0, 1:, None]).sum().item()
        number += ids.shape[1] - 1
    assert perplexity(model, processor, texts, 2) == pytest.approx(math.exp(loss / number), rel=1e-4)


@pytest.mark.slow
def test_pseudo_image_features_in_test_and_training(work, tmp_path):
    """One arm uses them in the evaluation only. Another arm trains with them and saves that in its config."""
    arms = {
        "features": {"joint": None},
        "at test": {"joint": None, "evaluate": {"use_pseudo_image_features": True}},
        "trained": {"joint": {"use_pseudo_image_features": True}},
        "MLP": {"visual_head": {"vm_head_type": "mlp"}},
    }
    metrics = ["accuracy", "accuracy_pseudo_image_features", "visual_tokens"]
    evaluate = {"dataset": str(work / "test.json"), "max_new_tokens": 3, "metrics": metrics}
    path = write_grid(work, tmp_path, arms=arms, seeds=[0], reference="features", evaluate=evaluate)
    assert main(["ablate", str(path), "--output", str(tmp_path / "out")]) == 0
    rows = {row["arm"]: row for row in rows_of(tmp_path / "out")}
    assert rows["features"]["model"] == rows["at test"]["model"] != rows["trained"]["model"]
    loss = {arm: row["metrics"]["visual loss of stage IV, KL(p‖q)"] for arm, row in rows.items()}
    assert len(set(loss.values())) == 4
    pseudo = "accuracy, pseudo image features"
    assert rows["features"]["metrics"][pseudo] == rows["at test"]["metrics"]["accuracy"]
    assert rows["trained"]["metrics"][pseudo] == rows["trained"]["metrics"]["accuracy"]
    configs = {arm: json.loads(Path(row["model"], "config.json").read_text()) for arm, row in rows.items()}
    assert configs["trained"]["use_pseudo_image_features"] and not configs["features"]["use_pseudo_image_features"]
    assert configs["MLP"]["vm_head_type"] == "mlp"


# ---- The grids of the repository ----


@pytest.mark.parametrize("base", ["easy_vqa", "vqa_rad"])
@pytest.mark.parametrize("path", sorted(GRIDS.glob("[1-8]_*.yaml")), ids=lambda path: path.stem)
def test_grids_of_the_repository_are_valid(path, base, tmp_path):
    settings = [
        f"base={base}.yaml",
        "model_name_or_path=start",
        "dataset_name=train.parquet",
        "evaluate.dataset=test.parquet",
    ]
    if path.stem.startswith("5"):
        (tmp_path / "texts.txt").write_text("a text")
        settings.append(f"evaluate.text_file={tmp_path / 'texts.txt'}")
    if path.stem.startswith("7"):
        settings.append("evaluate.ood_datasets.emoji=emoji.parquet")
    grid = read_grid(path, settings)
    chains = {arm: grid.chain(arm, 4) for arm in grid.arms}
    assert len(grid.seeds) == 5 and len(chains) >= 3
    stages = {chain[1]["key"] for chain in chains.values()}
    assert len(stages) == 1  # all arms of all grids share stages I and II
    assert stages == {read_grid(GRIDS / "3_pseudo.yaml", settings[:4]).chain("image features", 4)[1]["key"]}


@pytest.mark.slow
def test_long_captions_are_measured(work, tmp_path):
    """Caption matching generates nothing, so an answer may be longer than `max_new_tokens`."""
    rows = json.loads((work / "train.json").read_text())[::2]
    captions = [{**row, "answer": f"{row['answer']} boat on a square"} for row in rows]
    (tmp_path / "captions.json").write_text(
        json.dumps([{**row, "image": str(work / row["image"])} for row in captions])
    )
    evaluate = {"dataset": str(tmp_path / "captions.json"), "max_new_tokens": 2}
    evaluate["metrics"] = ["caption_matching", "hard_caption_matching"]
    path = write_grid(work, tmp_path, seeds=[0], evaluate=evaluate)
    assert main(["ablate", str(path), "--only", "off", "--output", str(tmp_path / "out")]) == 0
    [row] = rows_of(tmp_path / "out")
    assert 0 <= row["metrics"]["caption matching"] <= 1 and 0 <= row["metrics"]["hard caption matching"] <= 1
    assert row["num_questions"] == 8


def test_the_grid_of_real_photos_is_valid(tmp_path):
    (tmp_path / "texts.txt").write_text("the sky is blue\n")
    grid = read_grid(GRIDS / "9_real_photos.yaml", [f"evaluate.text_file={tmp_path / 'texts.txt'}"])
    chains = {arm: grid.chain(arm, 4) for arm in grid.arms}
    own_stage_2 = chains.pop("weight 0.1 in stages II and IV")
    assert len(grid.seeds) == 5 and len({chain[0]["key"] for chain in chains.values()}) == 1  # one stage II
    steps = {run["max_steps"] for chain in (*chains.values(), own_stage_2) for run in chain}
    assert steps == {20} and {chain[-1]["stage"] for chain in chains.values()} == {"joint"}
