# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""`vtlmm ablate`: what its intervals are, what it trains once, how it goes on after a kill, and what it refuses."""

import json
import math
import multiprocessing
import random
import shlex
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import WORDS, build_config, build_processor
from PIL import Image as PILImage
from transformers import AutoTokenizer

from modeling_vtlmm import VTLMMForConditionalGeneration
from vtlmm.ablations import run as runner
from vtlmm.ablations.grid import EvaluateConfig, read_grid
from vtlmm.ablations.metrics import answer_all, measure, perplexity, read_held_out
from vtlmm.ablations.paired_tests import compare_arms, format_table, over_images, paired_difference, t_quantile
from vtlmm.cli.main import main
from vtlmm.evaluation.questions import image_loader
from vtlmm.inference.generation import answer, with_shuffled_images
from vtlmm.train.output_folder import RUN_RECORD
from vtlmm.train.stage_runner import build_trainer


GRIDS = Path(__file__).parents[1] / "recipes" / "ablations"


# ---- Statistics ----


@pytest.mark.parametrize(
    ("degrees", "published"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (30, 2.0423)]
)
def test_t_quantiles_are_those_of_the_tables(degrees, published):
    assert t_quantile(0.95, degrees) == pytest.approx(published, abs=5e-5)


def test_paired_interval_by_hand():
    """Differences 1, 2, 3, 4, 5: mean 3, sd √2.5, so half the interval is 2.7764 · √2.5 / √5 = 1.9632."""
    reference = {seed: 10.0 * seed for seed in range(6)}
    arm = {seed: 10.0 * seed + 1 + seed for seed in range(5)} | {7: 0.0}  # 5 and 7 are in one only
    found = paired_difference(reference, arm)
    assert found["n"] == 5 and found["difference"] == pytest.approx(3)
    assert (found["low"], found["high"]) == pytest.approx((3 - 1.9632, 3 + 1.9632), abs=1e-4)
    assert found["reading"] == "higher" and paired_difference(arm, reference)["reading"] == "lower"


def test_what_may_be_said_of_a_difference():
    assert paired_difference({0: 1.0, 1: 1.0, 2: 1.0}, {0: 1.5, 1: 0.4, 2: 1.2})["reading"] == "none shown"
    assert paired_difference({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0})["reading"] == "equal with every seed"
    one = paired_difference({0: 1.0}, {0: 3.0})
    assert one["difference"] == 2 and one["low"] is None and one["reading"] == "one seed: not known"
    assert paired_difference({0: 1.0}, {1: 3.0})["reading"] == "no seed in common"


def test_interval_over_images_draws_images_and_means_over_seeds():
    """Two images; of one every question gains with one of two seeds: the mean is 0 to 0.5, of all 0.25."""
    clusters = ["a"] * 50 + ["b"] * 50
    reference = {seed: [0.0] * 100 for seed in range(2)}
    arm = {0: [1.0] * 50 + [0.0] * 50, 1: [0.0] * 100}
    assert over_images(reference, arm, clusters) == (0.0, 0.5)


def test_a_null_result_reads_as_one():
    rows = [
        {"arm": arm, "seed": seed, "figures": {"accuracy": value}}
        for arm, values in {"off": (0.5, 0.6, 0.7), "on": (0.55, 0.55, 0.71)}.items()
        for seed, value in enumerate(values)
    ]
    lines = compare_arms(rows, ["off", "on"], "off", {}, [])
    off, on = format_table(lines, "off").splitlines()[2:]
    assert off == "| accuracy | off | 3 | 60.0% (10.0%) | reference |  |  |  |"
    # differences 5, −5 and 1 points: mean 1/3, sd 5.033, t 4.3027
    assert on == "| accuracy | on | 3 | 60.3% (9.2%) | +0.3% | -12.2% – +12.8% | – | none shown |"


# ---- A grid of tiny models ----


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A tiny model with weights large enough that answers depend on the image; rows to train and to ask."""
    folder = tmp_path_factory.mktemp("ablate")
    torch.manual_seed(0)
    model = VTLMMForConditionalGeneration(build_config())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(10)
    model.save_pretrained(folder / "start")
    build_processor().save_pretrained(folder / "start")
    rng = random.Random(0)
    rows = []
    for i in range(8):
        PILImage.new("RGB", (28, 28), tuple(rng.randrange(256) for _ in range(3))).save(folder / f"{i}.png")
        texts = {"question": " ".join(rng.choices(WORDS, k=1 + i % 4)), "answer": rng.choice(["red", "blue"])}
        rows += [{"image": f"{i}.png", **texts}, {"image": f"{i}.png", "question": "what is it", "answer": "yes"}]
    (folder / "train.json").write_text(json.dumps(rows))
    (folder / "test.json").write_text(json.dumps(rows[:10]))
    (folder / "texts.txt").write_text("a red boat\n\nwhat is in the image ? a circle\n")
    return folder


def write_grid(work, tmp_path, **changes):
    """Two arms that share stage III, one step a stage."""
    grid = {
        "seeds": [0, 1],
        "reference": "off",
        "base": {
            "model_name_or_path": str(work / "start"),
            "dataset_name": str(work / "train.json"),
            "check_data": False,
            "max_steps": 1,
            "per_device_train_batch_size": 4,
            "learning_rate": 0.05,
            "cache_image_features": True,
            "use_cpu": True,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "stages": {"joint": {"max_steps": 2}},
        },
        "arms": {
            "off": {"visual_head": None, "joint": {"visual_loss_coef": 0}},
            "on": {"visual_head": None, "joint": {}},
        },
        "evaluate": {
            "dataset": str(work / "test.json"),
            "max_new_tokens": 3,
            "kinds": {"color": ["red", "blue"], "other": ["yes"]},
            "figures": ["accuracy", "blind", "pseudo", "visual", "text"],
            "text": str(work / "texts.txt"),
        },
    }
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump({**grid, **changes}, sort_keys=False))
    return path


def rows_of(output) -> list[dict]:
    return [json.loads(line) for line in (output / "grid" / "rows.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(work, tmp_path_factory):
    """A grid that nothing disturbed, and how many stages it trained."""
    folder = tmp_path_factory.mktemp("finished")
    path = write_grid(work, folder)
    assert main(["ablate", str(path), "--output", str(folder / "out")]) == 0
    return path, folder / "out"


def test_a_shared_beginning_is_trained_once(finished):
    path, output = finished
    trained = sorted(mark.parent.name.partition("-")[0] for mark in (output / "stages").glob("*/finished.json"))
    assert trained == ["joint"] * 4 + ["visual_head"] * 2  # for two arms with two seeds
    grid = read_grid(path)
    heads = {(arm, seed): grid.chain(arm, seed)[0]["key"] for arm in ("off", "on") for seed in (0, 1)}
    assert heads["off", 0] == heads["on", 0] != heads["off", 1] == heads["on", 1]
    # and it is the folder that stage IV of both began with
    for row in rows_of(output):
        [head, joint] = json.loads(Path(row["model"], RUN_RECORD).read_text())
        assert (
            joint["settings"]["model_name_or_path"].endswith(heads[row["arm"], row["seed"]])
            and head["stage"] == "visual_head"
        )
        assert joint["settings"]["seed"] == row["seed"] and joint["steps"] == 2 and head["steps"] == 1
        assert joint["settings"].get("visual_loss_coef") == (0 if row["arm"] == "off" else None)


def test_the_results_say_how_they_came_about(finished):
    _, output = finished
    results = json.loads((output / "grid/results.json").read_text())
    table = (output / "grid/results.md").read_text()
    for row in results["rows"]:
        assert row["command"] in table and row["machine"] in table and row["versions"]["torch"] in table
        words = shlex.split(row["command"])
        assert words[words.index("--only") + 1] == row["arm"] and words[words.index("--seed") + 1] == str(row["seed"])
        assert row["num_images"] == 5 and row["num_questions"] == 10 and not row["subset"]
    lines = {(line["figure"], line["arm"]): line for line in results["lines"]}
    on = lines["visual loss of stage IV, KL(p‖q)", "on"]
    by_seed = {
        (row["arm"], row["seed"]): row["figures"]["visual loss of stage IV, KL(p‖q)"] for row in results["rows"]
    }
    differences = [by_seed["on", seed] - by_seed["off", seed] for seed in (0, 1)]
    half = 12.7062 * np.std(differences, ddof=1) / math.sqrt(2)
    assert on["difference"] == pytest.approx(np.mean(differences))
    assert on["high"] - on["difference"] == pytest.approx(half, rel=1e-4)
    assert lines["accuracy: color", "off"]["values"].keys() == {"0", "1"}


def test_a_row_s_own_command_gives_the_row(finished, tmp_path):
    _, output = finished
    row = rows_of(output)[1]
    words = shlex.split(row["command"])
    words[words.index("--output") + 1] = str(tmp_path / "again")
    assert main(words[1:]) == 0
    [again] = rows_of(tmp_path / "again")
    assert again["figures"] == row["figures"] and again["key"] == row["key"]


# ---- Stopped, changed, broken ----


def test_a_killed_grid_goes_on_to_the_same_table(finished, tmp_path, monkeypatch):
    """SIGKILL inside a stage that had begun to write its folder, and as if it had hit the writing of a row."""
    path, whole = finished
    training, started = runner.run_training, []

    def train_and_hang(settings):
        started.append(settings)
        if len(started) == 5:  # seed 0 is finished, and of seed 1 stage III
            folder = Path(settings["output_dir"])
            folder.mkdir()
            (folder / "model.safetensors").write_bytes(b"half")
            (tmp_path / "hangs").touch()
            time.sleep(600)
        return training(settings)

    monkeypatch.setattr(runner, "run_training", train_and_hang)
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
    assert [settings["stage"] for settings in started] == ["joint", "joint"]  # both of seed 1
    assert rows.read_bytes().startswith(done)
    assert [row["figures"] for row in rows_of(tmp_path / "out")] == [row["figures"] for row in rows_of(whole)]


def test_other_settings_are_refused_and_more_seeds_are_not(work, finished, capsys):
    path, output = finished
    before = (output / "grid/rows.jsonl").read_bytes()
    for change in ("learning_rate=0.1", "arms.on.joint.visual_loss_coef=2", "evaluate.max_new_tokens=4"):
        assert main(["ablate", str(path), change, "--output", str(output)]) == 1
        assert "with other settings, data or start: choose another --output" in capsys.readouterr().err
    assert main(["ablate", str(path), "--output", str(output), "--seed", "0", "--seed", "1"]) == 0
    assert capsys.readouterr().out.count("finished before") == 4
    assert (output / "grid/rows.jsonl").read_bytes() == before


def test_answers_longer_than_what_is_generated_are_seen_at_the_start(work, tmp_path, capsys):
    path = write_grid(work, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(work / "start")
    longest = max(len(tokenizer.tokenize(answer)) for answer in ("red", "blue", "yes"))
    change = f"evaluate.max_new_tokens={longest - 1}"
    assert main(["ablate", str(path), change, "--output", str(tmp_path / "out")]) == 1
    assert f"set evaluate.max_new_tokens to {longest + 1}" in capsys.readouterr().err
    assert not (tmp_path / "out/stages").exists()


def test_a_failing_run_is_an_error_and_loses_nothing(work, tmp_path, capsys):
    changes = {"off": {"joint": {"visual_loss_coef": 0}}, "on": {"joint": {"max_length": 5}}}
    path = write_grid(work, tmp_path, arms=changes, seeds=[0])
    assert main(["ablate", str(path), "--output", str(tmp_path / "out")]) == 1
    captured = capsys.readouterr()
    assert "arm on, seed 0" in captured.err and "more than max_length=5" in captured.err
    assert [row["arm"] for row in rows_of(tmp_path / "out")] == ["off"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("reference=nobody", "the reference 'nobody' is no arm; there are off, on"),
        ("arms.on.joint.learnin_rate=1", "there is no setting 'learnin_rate'. Did you mean 'learning_rate'"),
        ("arms.on.joint.visual_student=decoder", "must be 'vm_head' or 'lm_head'"),
        ("evaluate.figurs=[text]", "unexpected keyword argument 'figurs'"),
        ("arms.on.evaluate.max_rows=3", "arm on: an arm's evaluate may set use_pseudo_image_features only"),
        ("evaluate.figures=[beauty]", "there are no figures ['beauty']"),
        ("evaluate.others={emoji: rows.json}", "the figure others and the data `others` need each other"),
        ("evaluate.text=null", "the figure text and the file `text` need each other"),
        ("evaluate.scorer=exakt", "exakt"),
        ("evaluate.text=nowhere.txt", "there is no file nowhere.txt"),
        ("seeds=[]", "a grid needs a seed and an arm at least"),
        ("arms.on=null", "arm on: name its stages"),
        ("evaluate.kinds={color: [red, blue]}", "the answer 'yes' is of no kind"),
    ],
)
def test_mistakes_stop_a_grid_before_it_trains(work, tmp_path, capsys, override, message):
    path = write_grid(work, tmp_path)
    assert main(["ablate", str(path), override, "--output", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out/stages").exists()


def test_a_start_of_its_own_for_each_seed(work, tmp_path):
    path = write_grid(work, tmp_path)
    for seed in (0, 1):
        shutil.copytree(work / "start", tmp_path / f"start_{seed}")
    grid = read_grid(path, [f"model_name_or_path={tmp_path}/start_{{seed}}"])
    assert grid.chain("on", 1)[0]["model_name_or_path"].endswith("start_1")
    assert grid.chain("on", 1)[0]["key"] == read_grid(path).chain("on", 1)[0]["key"]  # the same weights elsewhere
    (tmp_path / "start_1/model.safetensors").write_bytes(b"others")
    again = read_grid(path, [f"model_name_or_path={tmp_path}/start_{{seed}}", "seeds=[0]"])
    assert again.chain("on", 0)[0]["key"] == grid.chain("on", 0)[0]["key"]


# ---- Figures ----


def test_answers_from_cached_features_are_those_from_images(work, tmp_path):
    """Of the blind control too, whose questions have other images."""
    measures = EvaluateConfig(dataset=str(work / "test.json"))
    held_out = read_held_out(measures)
    processor, model = build_processor(), VTLMMForConditionalGeneration.from_pretrained(work / "start")
    features = held_out.vision_features(model, processor, tmp_path, 4)
    load = image_loader(held_out.rows, held_out.places)
    found = {}
    for asked in (held_out.questions, with_shuffled_images(held_out.questions)):
        images = [{**question, "images": [load(key) for key in question["images"]]} for question in asked]
        found[asked is held_out.questions] = answer_all(model, processor, asked, features, 4, 5)
        assert found[asked is held_out.questions] == answer(model, processor, images, 4, 5)
    assert found[True] != found[False] and len(set(found[True])) > 3


def test_visual_losses_are_those_of_the_trainer_s_evaluation(work, tmp_path):
    """Each image once, and whatever is asked about it."""
    rows = json.loads((work / "test.json").read_text())[::2]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    measures = EvaluateConfig(dataset=str(work / "test.json"), figures=["visual"])
    figures, *_ = measure(work / "start", measures, read_held_out(measures), tmp_path / "features")
    for stage, name in (("visual_head", "III, KL(q‖p)"), ("joint", "IV, KL(p‖q)")):
        data = {
            "model_name_or_path": str(work / "start"),
            "dataset_name": str(tmp_path / "rows.json"),
            "image_folder": str(work),
        }
        data |= {
            "eval_dataset": data["dataset_name"],
            "stage": stage,
            "vm_head_init": "keep",
            "output_dir": str(tmp_path),
        }
        found = build_trainer({**data, "use_cpu": True, "report_to": "none", "disable_tqdm": True}).evaluate()
        assert figures[f"visual loss of stage {name}"] == pytest.approx(found["eval_visual_loss"], rel=1e-5)
        assert figures["entropy of visual tokens"] == pytest.approx(found["eval_visual_token_entropy"], rel=1e-5)
        mean = found["eval_mean_visual_token_entropy"]
        assert figures["entropy of their mean"] == pytest.approx(mean, rel=1e-5)


def test_perplexity_is_that_of_the_logits(work):
    texts = ["a red boat", "what is in the image ? a circle", "yes"]
    processor, model = build_processor(), VTLMMForConditionalGeneration.from_pretrained(work / "start")
    loss = number = 0
    for text in texts:
        ids = processor.tokenizer(text, return_tensors="pt")["input_ids"]
        logprobs = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        loss -= logprobs.gather(1, ids[0, 1:, None]).sum().item()
        number += ids.shape[1] - 1
    assert perplexity(model, processor, texts, 2) == pytest.approx(math.exp(loss / number), rel=1e-4)


def test_pseudo_image_features_at_test_and_in_training(work, tmp_path):
    """One arm asks the same weights, another trains with them and remembers it in its configuration."""
    arms = {
        "features": {"joint": None},
        "at test": {"joint": None, "evaluate": {"use_pseudo_image_features": True}},
        "trained": {"joint": {"use_pseudo_image_features": True}},
        "MLP": {"visual_head": {"vm_head_type": "mlp"}},
    }
    figures = {"dataset": str(work / "test.json"), "max_new_tokens": 3, "figures": ["accuracy", "pseudo", "visual"]}
    path = write_grid(work, tmp_path, arms=arms, seeds=[0], reference="features", evaluate=figures)
    assert main(["ablate", str(path), "--output", str(tmp_path / "out")]) == 0
    rows = {row["arm"]: row for row in rows_of(tmp_path / "out")}
    assert rows["features"]["model"] == rows["at test"]["model"] != rows["trained"]["model"]
    loss = {arm: row["figures"]["visual loss of stage IV, KL(p‖q)"] for arm, row in rows.items()}
    assert len(set(loss.values())) == 4
    own, pseudo = "accuracy", "accuracy, pseudo image features"
    assert rows["features"]["figures"][pseudo] == rows["at test"]["figures"][own]
    assert rows["trained"]["figures"][pseudo] == rows["trained"]["figures"][own]
    configs = {arm: json.loads(Path(row["model"], "config.json").read_text()) for arm, row in rows.items()}
    assert configs["trained"]["use_pseudo_image_features"] and not configs["features"]["use_pseudo_image_features"]
    assert configs["MLP"]["vm_head_type"] == "mlp"


# ---- The grids of the repository ----


@pytest.mark.parametrize("base", ["easy_vqa", "vqa_rad"])
@pytest.mark.parametrize("path", sorted(GRIDS.glob("[0-9]*.yaml")), ids=lambda path: path.stem)
def test_grids_of_the_repository_fit(path, base):
    settings = [
        f"base={base}.yaml",
        "model_name_or_path=start",
        "dataset_name=train.parquet",
        "evaluate.dataset=test.parquet",
    ]
    if path.stem.startswith("5"):
        settings.append("evaluate.text=texts.txt")
    if path.stem.startswith("7"):
        settings.append("evaluate.others.emoji=emoji.parquet")
    grid = read_grid(path, settings)
    chains = {arm: grid.chain(arm, 4) for arm in grid.arms}
    assert len(grid.seeds) == 5 and len(chains) >= 3
    stages = {chain[1]["key"] for chain in chains.values()}
    assert len(stages) == 1  # stages I and II are trained once a seed, and so they are over all grids
    assert stages == {read_grid(GRIDS / "3_pseudo.yaml", settings[:4]).chain("image features", 4)[1]["key"]}
