# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""lm-eval and lmms-eval: the same prompts and answers as `vtlmm eval`, and an exit code that says when one failed.

The harnesses are no dependency: what needs them is skipped without them (`make harness` has them)."""

import importlib
import json
import sys
import types
from dataclasses import dataclass
from importlib.metadata import entry_points

import pytest
import torch
import yaml
from datasets import Dataset, Image, load_dataset
from helpers.evaluation import save_model
from helpers.tiny_models import WORDS, build_processor
from jinja2 import Template
from PIL import Image as PILImage
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from modeling_vtlmm import VTLMMForConditionalGeneration
from vtlmm.cli.main import main
from vtlmm.data.questions import split_questions
from vtlmm.data.rows import load_rows
from vtlmm.demo.run import HELD_OUT_FILE, save_questions
from vtlmm.demo.shapes import question_rows
from vtlmm.evaluation import harness
from vtlmm.evaluation.questions import read_questions
from vtlmm.evaluation.scorers import exact_match
from vtlmm.inference.generation import answer, conversation


pytestmark = pytest.mark.slow


LOCAL_TASKS = ("demo_shapes", "easy_vqa", "vqa_rad")
HARNESSES = ("lm-eval", "lmms-eval")


def needs(name: str):
    """Skips a test without the package of a harness."""
    return pytest.importorskip(harness.PACKAGES[name], reason=f"{name} is not installed: pip install 'vtlmm[harness]'")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A tiny model, and images with two questions each, one of them in gray."""
    folder = tmp_path_factory.mktemp("harness")
    save_model(folder / "model", 0)
    rows = []
    for i in range(5):
        path = folder / f"{i}.png"
        PILImage.new("RGB", (28, 28), (50 * i, 200 - 40 * i, 90)).convert("L" if i == 4 else "RGB").save(path)
        asked = [" ".join(WORDS[i + j : i + 2 * j + 2]) for j in (1, 3)]
        rows.append({"image": str(path), "questions": asked, "answers": [WORDS[4 + i], "No"]})
    Dataset.from_list(rows).cast_column("image", Image()).to_parquet(folder / "rows.parquet")
    return folder


# ---- Without the harnesses ----


def read_task(name: str, task: str) -> dict:
    """A local task as both harnesses read it: `include`, then `!function` by import."""

    def function(loader, node):
        module, _, attribute = loader.construct_scalar(node).rpartition(".")
        return getattr(importlib.import_module(module), attribute)

    loader = type("Loader", (yaml.SafeLoader,), {})
    loader.add_constructor("!function", function)
    path = harness.TASKS / harness.PACKAGES[name] / f"{task}.yaml"
    own = yaml.load(path.read_text(), loader)
    return {**yaml.load((path.parent / own.pop("include")).read_text(), loader), **own}


@pytest.mark.parametrize("task", LOCAL_TASKS)
def test_both_harnesses_have_the_same_tasks(task):
    first, second = (read_task(name, task) for name in HARNESSES)
    for key in (
        "task",
        "dataset_path",
        "dataset_kwargs",
        "test_split",
        "process_docs",
        "doc_to_target",
        "metric_list",
    ):
        assert first[key] == second[key]
    assert first["process_results"] is second["process_results"] is harness.score
    assert first["generation_kwargs"] == {"until": [], "max_gen_toks": 128}
    assert second["generation_kwargs"] == {"until": [], "max_new_tokens": 128}
    (path,) = first["dataset_kwargs"]["data_files"].values()
    assert first["task"] == task and not path.startswith("/")


def test_the_local_tasks_ask_what_vtlmm_eval_asks(work):
    """The same questions, truths, images and prompts, to the character."""
    processor = build_processor()
    rows = load_rows(str(work / "rows.parquet"))
    expected, _ = read_questions(rows)
    source = load_dataset("parquet", data_files=str(work / "rows.parquet"), split="train")
    for name in HARNESSES:
        task = read_task(name, "easy_vqa")
        docs = task["process_docs"](source)
        assert len(docs) == len(expected) == 10
        for doc, question in zip(docs, expected, strict=True):
            assert doc[task["doc_to_target"]] == question["answer"]
            (image,) = harness.images(doc)
            assert image.mode == "RGB"
            if name == "lm-eval":  # which splits the text at its marks
                text = Template(task["doc_to_text"]).render(**doc)
                before, after = text.split("<image>")
                assert before == ""
                content = [{"type": "image"}, {"type": "text", "text": after}]
            else:
                content = [{"type": "image", "image": image}, {"type": "text", "text": doc[task["doc_to_text"]]}]
            found = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            assert found == processor.apply_chat_template(conversation(question), add_generation_prompt=True)


def test_the_demo_writes_its_held_out_questions(tmp_path):
    """In a form that `vtlmm eval --data` and the harnesses both read."""
    rows = question_rows(3, 2, held_out=True, one_each=True)
    asked = [{**question, "kind": rows[question["row"]]["kind"]} for question in split_questions(rows)]
    save_questions(tmp_path / HELD_OUT_FILE, asked)
    assert read_task("lm-eval", "demo_shapes")["dataset_kwargs"]["data_files"]["test"].endswith(
        f"/demo/{HELD_OUT_FILE}"
    )
    docs = harness.one_question_each(load_dataset("parquet", data_files=str(tmp_path / HELD_OUT_FILE), split="train"))
    rows = load_rows(tmp_path / HELD_OUT_FILE, keep_columns=["kind"])
    found, image_positions = read_questions(rows, kind="kind")
    assert len(image_positions) == 3 and len(docs) == len(found) == len(asked) > 9
    for doc, own, expected in zip(docs, found, asked, strict=True):
        assert (doc["question"], doc["answer"]) == (own["question"], own["answer"])
        assert all(own[key] == expected[key] for key in ("question", "answer", "kind"))
        assert doc["images"][0].tobytes() == expected["images"][0].tobytes()


def test_local_scores_are_those_of_the_scorer():
    for text, truth in (("No", "no "), ("no.", "no"), ("red", "blue")):
        assert harness.score({"answer": truth}, [text]) == {"exact": exact_match(text, truth)}


@pytest.fixture
def manifest(monkeypatch):
    """What the entry point gives, with stand-ins where lmms-eval is not installed."""
    if importlib.util.find_spec("lmms_eval") is None:

        @dataclass
        class ModelManifest:
            model_id: str
            chat_class_path: str | None = None

        for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.models"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        for name, content in (
            ("api.model", {"lmms": type("lmms", (), {})}),
            ("models.registry_v2", {"ModelManifest": ModelManifest}),
        ):
            module = types.ModuleType(f"lmms_eval.{name}")
            vars(module).update(content)
            monkeypatch.setitem(sys.modules, module.__name__, module)
        module = "vtlmm.evaluation.lmms_eval_model"  # monkeypatch forgets it again
        monkeypatch.setitem(sys.modules, module, None)
        del sys.modules[module]
    (found,) = entry_points(group="lmms_eval.models", name="vtlmm")
    return found.load()()


def test_the_model_for_lmms_eval_answers_as_ours(work, manifest):
    """In the order of the requests, whatever the batches; a stop cuts; what it cannot do is refused."""
    assert manifest.model_id == "vtlmm"
    module, _, name = manifest.chat_class_path.rpartition(".")
    lm = getattr(importlib.import_module(module), name)(str(work / "model"), batch_size=3)
    source = load_dataset("parquet", data_files=str(work / "rows.parquet"), split="train")
    docs = harness.one_question_each(source)
    lm.task_dict = {"a": {"test": docs}, "b": {"test": docs}}

    def messages(doc):
        parts = [{"type": "image", "url": image} for image in doc["images"]]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": doc["question"]}]}]

    def requests(**settings):
        return [
            types.SimpleNamespace(args=("x" * i, messages, {"max_new_tokens": 4, **settings}, i, "ab"[i % 2], "test"))
            for i in range(len(docs))
        ]

    model = VTLMMForConditionalGeneration.from_pretrained(work / "model")
    questions = [{"images": harness.images(doc), "question": doc["question"]} for doc in docs]
    expected = answer(model, build_processor(), questions, max_new_tokens=4)
    assert lm.generate_until(requests()) == expected and len(set(expected)) > 5
    assert lm.generate_until(requests(until=[" "])) == [text.split(" ")[0] for text in expected]
    with pytest.raises(ValueError, match="Task a samples or searches"):
        lm.generate_until(requests(temperature=0.7))


def test_a_harness_that_fails_is_seen(work, tmp_path, monkeypatch, capsys):
    """Not installed, no results, an error of its own: lmms-eval's command would end with 0."""
    command = ["eval", str(work / "model"), "--tasks", "easy_vqa", "--output", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "lmms_eval", None)
        assert main(command) == 1
        assert "lmms-eval does not load" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "lmms_eval", types.ModuleType("lmms_eval"))
    for results in (None, {}, {"results": {}}):
        monkeypatch.setattr(harness, "_run_lmms_eval", lambda *args, results=results: (results, ""))
        assert main(command) == 1
        assert "returned no results for easy_vqa" in capsys.readouterr().err and not (tmp_path / "out").exists()

    def fail(*args):
        raise RuntimeError("of the harness")

    monkeypatch.setattr(harness, "_run_lmms_eval", fail)
    with pytest.raises(RuntimeError, match="of the harness"):
        main(command)


def test_local_tasks_on_other_data(work, tmp_path):
    data = str(work / "rows.parquet")
    for name in HARNESSES:
        folder = harness.task_on_data(name, ["easy_vqa"], data, tmp_path / name)
        task = yaml.safe_load((folder / "easy_vqa.yaml").read_text())
        assert task["task"] == "easy_vqa" and task["dataset_kwargs"] == {"data_files": {"test": data}}
        assert task["include"] == str(harness.TASKS / harness.PACKAGES[name] / "easy_vqa.yaml")
    with pytest.raises(ValueError, match="one local task"):
        harness.task_on_data("lm-eval", ["mmlu"], data, tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere.parquet"):
        harness.task_on_data("lm-eval", ["easy_vqa"], "nowhere.parquet", tmp_path)


# ---- With them ----


def read_answers(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", HARNESSES)
def test_answers_are_those_of_vtlmm_eval(work, tmp_path, name):
    needs(name)
    data = ["eval", str(work / "model"), "--dataset", str(work / "rows.parquet")]
    assert main([*data, "--output", str(tmp_path / "ours")]) == 0
    options = ["--tasks", "easy_vqa", "--harness", name, "--batch-size", "3", "--output", str(tmp_path / name)]
    assert main([*data, *options]) == 0
    ours = {record["index"]: record for record in read_answers(tmp_path / "ours" / "answers.jsonl")}
    found = read_answers(tmp_path / name / "easy_vqa.jsonl")
    assert len(found) == len(ours) == 10 and len({record["answer"] for record in ours.values()}) > 5
    for record in found:
        own = ours[record["index"]]
        assert (record["answers"], record["truth"]) == ([own["answer"]], own["truth"])
        assert record["exact"] == exact_match(own["answer"], own["truth"])


@pytest.mark.parametrize("name", HARNESSES)
def test_a_checkpoint_that_lacks_a_tensor_is_refused(work, tmp_path, name, capsys):
    needs(name)
    save_model(tmp_path / "model", 0)
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    del tensors[next(key for key in tensors if "q_proj" in key and "language_model" in key)]
    save_file(tensors, path, metadata={"format": "pt"})
    options = ["--dataset", str(work / "rows.parquet"), "--harness", name, "--output", str(tmp_path / "out")]
    assert main(["eval", str(tmp_path / "model"), "--tasks", "easy_vqa", *options]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "missing" in error and "q_proj.weight" in error
    assert main(["eval", str(work / "model"), "--tasks", "no_such_task", "--harness", name]) == 1
    assert "does not have the task no_such_task" in capsys.readouterr().err


def test_texts_have_the_log_likelihoods_of_the_decoder_alone(work, tmp_path):
    needs("lm-eval")
    pairs = [(" ".join(WORDS[i : i + 3]), " " + " ".join(WORDS[2 * i : 2 * i + 1 + i % 3])) for i in range(9)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"context": a, "goes_on": b}) + "\n" for a, b in pairs))
    task = {"task": "texts", "dataset_path": "json", "test_split": "test", "output_type": "loglikelihood"}
    task |= {"doc_to_text": "{{context}}", "doc_to_target": "{{goes_on}}", "metric_list": [{"metric": "acc"}]}
    task["dataset_kwargs"] = {"data_files": {"test": str(tmp_path / "texts.jsonl")}}
    (tmp_path / "texts.yaml").write_text(yaml.safe_dump(task))
    options = ["--tasks", "texts", "--harness", "lm-eval", "--include-path", str(tmp_path), "--batch-size", "4"]
    assert main(["eval", str(work / "model"), *options, "--output", str(tmp_path / "out")]) == 0

    model = VTLMMForConditionalGeneration.from_pretrained(work / "model")
    decoder = AutoModelForCausalLM.from_config(model.config.text_config).eval()
    own = {key.replace("model.language_model.", "model."): value for key, value in model.state_dict().items()}
    decoder.load_state_dict({key: own[key] for key in decoder.state_dict()})
    decoder.save_pretrained(tmp_path / "decoder")
    decoder = AutoModelForCausalLM.from_pretrained(tmp_path / "decoder")
    tokenizer = build_processor().tokenizer
    for (context, goes_on), record in zip(pairs, read_answers(tmp_path / "out" / "texts.jsonl"), strict=True):
        ids = torch.tensor([tokenizer(context + goes_on)["input_ids"]])
        start = len(tokenizer(context)["input_ids"])
        with torch.no_grad():
            log_probabilities = decoder(ids).logits.log_softmax(-1)[0, start - 1 : -1]
        expected = log_probabilities.gather(1, ids[0, start:, None]).sum().item()
        assert record["answers"][0][0] == pytest.approx(expected, abs=1e-4) and expected < -0.1
