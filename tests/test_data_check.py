# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The data check reports every kind of invalid row, how to fix it, and the token counts of the collator."""

import json
import os
import signal
from types import SimpleNamespace

import datasets
import numpy as np
import PIL.Image
import pytest
from helpers.tiny_models import build_config, build_processor
from PIL import ImageFile
from transformers import CLIPImageProcessorPil

from vtlmm.cli.main import main
from vtlmm.data.data_report import FIXES
from vtlmm.data.row_checker import RowChecker, image_problems
from vtlmm.data.rows import load_rows
from vtlmm.data.validation import check_rows, checked_stream
from vtlmm.train.collator import VTLMMCollator


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def chat(*values, image="good.jpg", roles=("human", "gpt")):
    turns = [{"from": roles[i % len(roles)], "value": value} for i, value in enumerate(values)]
    return {"conversations": turns, **({} if image is None else {"image": image})}


TURNS = [{"role": "user", "content": "what ?"}, {"role": "assistant", "content": "yes"}]
GOOD = chat("<image>\nwhat is in the image ?", "a red square")
# Row: kinds of problems, and a text that the report must contain
BROKEN = [
    (GOOD, {}),
    (chat("<image> what ?", "yes", image="gone.jpg"), {"missing image": "gone.jpg"}),
    (chat("<image> what ?", "yes", image="cut.jpg"), {"broken image": "truncated"}),
    (chat("<image> what ?", "yes", image="text.jpg"), {"broken image": "not an image"}),
    (chat("<image> what ?", "yes", image="../outside.jpg"), {"image path": "outside.jpg"}),
    (chat("<image> what ?", "yes", image="deep.png"), {}),
    (chat("<image> what ?", "yes", image="."), {"missing image": "data/."}),
    (chat("<image> what ?", "yes", roles=("gpt", "human")), {"roles": "assistant, user"}),
    (chat("<image> what ?", "yes", "who ?"), {"roles": "user, assistant, user"}),
    (chat("<image> what ?", "yes", roles=("human", "tool")), {"roles": "user, tool"}),
    (chat("<image><image> what ?", "yes"), {"image count": "2 marks, 1 images"}),
    (chat("<image> what ?", "yes", image=["good.jpg", "good.jpg"]), {"image count": "1 marks, 2 images"}),
    (chat("<image> what ?", "yes", image=None), {"image count": "1 marks, 0 images"}),
    (chat(), {"no messages": "empty"}),
    (chat("<image> what ?", " \n"), {"empty answer": "message 1"}),
    (chat("<image>", "yes", "", "no"), {"empty question": "message 2"}),
    (chat("<image> what ?", "yes " * 60), {"too long": "4 of them image tokens; max_length is 60"}),
    (chat("what ?", "see <image> here"), {"image in answer": "message 1"}),
    (chat("<image> what ?", 3), {"text": "the text of message 1 is not a string"}),
    (chat("<image> what ?", "yes </s> USER : no"), {"control token": "'</s>'"}),
    ({"prompt": "what ?", "completion": ""}, {"empty answer": "message 1"}),
    (chat("<image>\nwhat ?", "yes", image="gone too.jpg") | {"id": "x"}, {"missing image": "gone too.jpg"}),
    (
        {"messages": [{"role": "user", "content": [{"type": "video"}]}, {"role": "assistant", "content": "yes"}]},
        {"text": "neither text nor image", "empty question": "message 0"},
    ),
    (chat("what ?", "yes", image=None), {}),
    (chat("photos/a.JPG", "yes", image=None), {"image path as text": "photos/a.JPG"}),
]


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(folder / "good.jpg")
    PIL.Image.fromarray(pixels).save(tmp_path / "outside.jpg")
    content = (folder / "good.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(content[: len(content) // 2])
    (folder / "text.jpg").write_text("<html>404</html>")
    PIL.Image.fromarray(np.full((8, 8), 30000, dtype=np.uint16)).save(folder / "deep.png")
    write(folder, [row for row, _ in BROKEN])
    return folder


def write(folder, rows):
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    return str(folder / "rows.json")


def load(folder, **options):
    return load_rows(str(folder / "rows.json"), **options)


@pytest.fixture
def report(folder, processor):
    return check_rows(load(folder), processor, max_length=60)


@pytest.mark.parametrize("index", range(len(BROKEN)))
def test_each_kind_is_named(report, index):
    problems = [problem for problem in report.problems if problem.row == index]
    expected = BROKEN[index][1]
    assert {problem.kind for problem in problems} == set(expected)
    for problem in problems:
        assert f"row {index}: {problem.kind}" in str(problem)
        assert problem.fix == FIXES[problem.kind]
        assert expected[problem.kind] in str(problem)
    assert (index in report.good_rows) == (not expected)


def test_all_kinds_are_tested():
    found = {kind for _, problems in BROKEN for kind in problems}
    # these two need another chat template or context messages, below
    assert found == set(FIXES) - {"chat template", "nothing supervised"}


def test_one_error_lists_rows_and_fixes(report):
    with pytest.raises(ValueError) as error:
        report.raise_for_problems(limit=3)
    text = str(error.value)
    assert "row 1: missing image" in text and "gone.jpg" in text and text.count("missing image: restore") == 1
    assert all(problem.fix in text for problem in report.problems)
    assert "bad_rows: skip" in text


def test_good_rows_can_be_trained_on(folder, report, processor):
    rows = load(folder).select(report.good_rows)
    batch = VTLMMCollator(processor, max_length=60)(list(rows))
    lengths = [report.lengths[i] for i in report.good_rows]
    assert batch["attention_mask"].sum(1).tolist() == lengths
    with pytest.raises(ValueError):
        report.raise_for_problems()


def test_counts_are_the_collators(folder, processor):
    write(folder, [chat("<image> what ?", "yes " * n, "and <image> ?", "no", image=["good.jpg"] * 2) for n in (1, 9)])
    rows = load(folder)
    report = check_rows(rows, processor)
    batch = VTLMMCollator(processor)(list(rows))
    assert report.lengths == batch["attention_mask"].sum(1).tolist()
    assert report.num_supervised_tokens == (batch["labels"] != -100).sum()
    assert (report.num_rows, report.num_images, report.num_text_only_rows) == (2, 4, 0)
    assert report.length_percentiles() == dict(
        zip(("50%", "90%", "99%", "max"), [report.lengths[0]] + [report.lengths[1]] * 3, strict=True)
    )
    report.raise_for_problems()
    longest = max(report.lengths)
    assert not check_rows(rows, processor, max_length=longest).problems
    assert [problem.row for problem in check_rows(rows, processor, max_length=longest - 1).problems] == [1]


def test_report_shows_a_row_and_its_supervised_part(folder, processor):
    write(folder, [chat("<image> what ?", "</s>"), chat("<image> what ?", "yes", "who ?", "no one")])
    text = check_rows(load(folder), processor, max_length=99).format()
    assert "<s> USER : <image> what ? ASSISTANT :⟦yes </s>⟧USER : <unk> ? ASSISTANT :⟦no one </s>⟧" in text
    assert "rows        2, 0 of them without an image" in text and "max_length 99" in text
    assert "problems    1 in 1 of 2 rows" in text and "row 0: control token" in text


def test_context_and_templates(folder, processor):
    write(folder, [{"prompt": TURNS, "completion": []}, {"prompt": "what ?", "completion": "yes"}])
    [problem] = check_rows(load(folder), processor).problems
    assert (problem.row, problem.kind) == (0, "nothing supervised")
    own = build_processor()
    own.chat_template = "{{ raise_exception('no') if messages | length == 2 }}" + own.chat_template
    assert {problem.kind for problem in check_rows(load(folder), own).problems} == {"chat template"}
    own.chat_template = "{{ messages }}"
    with pytest.raises(ValueError, match="does not mark the answers"):
        check_rows(load(folder), own)
    own.chat_template = processor.chat_template
    own.image_processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, do_center_crop=False)
    with pytest.raises(ValueError, match="different sizes"):
        check_rows(load(folder), own)


def test_several_processes(folder, processor, report):
    again = check_rows(load(folder), processor, max_length=60, num_proc=2)
    assert again == report


def test_a_killed_process_ends_the_check(folder, processor, monkeypatch):
    monkeypatch.setattr(RowChecker, "check_table", lambda self, table: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(ChildProcessError, match="A process that checks rows was killed"):
        check_rows(load(folder), processor, max_length=60, num_proc=2)


def test_more_processes_than_rows(folder, processor, monkeypatch):
    """Every process takes part in the collective operation that gathers the results."""
    write(folder, [GOOD] * 3)
    found = []

    def gather(tables):
        found.append(sum(map(len, tables)))
        return tables

    for rank in range(5):
        state = SimpleNamespace(num_processes=5, process_index=rank)
        monkeypatch.setattr("accelerate.PartialState", lambda state=state: state)
        monkeypatch.setattr("accelerate.utils.gather_object", gather)
        if rank < 3:
            assert check_rows(load(folder), processor).num_rows == 1
        else:  # the others' rows are not gathered here
            with pytest.raises(ValueError, match="There are no rows"):
                check_rows(load(folder), processor)
    assert found == [1, 1, 1, 0, 0]


def test_a_changed_image_is_checked_again(folder, processor):
    write(folder, [GOOD])
    assert not check_rows(load(folder), processor).problems
    (folder / "good.jpg").unlink()
    assert [problem.kind for problem in check_rows(load(folder), processor).problems] == ["missing image"]


def test_truncated_images_if_pillow_fills_them(folder, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    [problem] = image_problems({"path": str(folder / "cut.jpg"), "bytes": None})
    assert problem[0] == "broken image"
    assert ImageFile.LOAD_TRUNCATED_IMAGES


def test_no_rows(folder, processor):
    write(folder, [GOOD])
    with pytest.raises(ValueError, match="There are no rows"):
        check_rows(load(folder).select([]), processor)
    with pytest.raises(ValueError, match="The list of rows is empty"):
        load_rows([])
    with pytest.raises(ValueError, match="`max_rows` is 0"):
        load(folder, max_rows=0)


@pytest.mark.filterwarnings("ignore:Skipped an invalid row")
def test_stream(folder, processor, report):
    stream = load(folder, streaming=True)
    assert check_rows(stream, processor, max_length=60) == report
    with pytest.warns(UserWarning, match="Skipped an invalid row.*row 1: missing image.*gone.jpg.*restore the file"):
        rows = list(checked_stream(stream, processor, max_length=60, bad_rows="skip"))
    assert len(rows) == len(report.good_rows)
    assert rows[0]["images"][0].size == (64, 64)
    with pytest.raises(ValueError, match="row 1: missing image"):
        list(checked_stream(stream, processor, max_length=60))
    both = datasets.concatenate_datasets([stream, stream])
    with pytest.raises(ValueError, match="row 1: missing image.*each worker counts"):
        list(checked_stream(both, processor, max_length=60))


@pytest.mark.filterwarnings("ignore:Skipped an invalid row")
def test_stream_of_a_table(folder, processor):
    """The images of a stream are decoded after it was mapped and checked."""
    content = (folder / "good.jpg").read_bytes()
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    cuts = (content[:400], content[:-400], content)
    rows = [{"image": {"bytes": cut, "path": None}, "caption": "boat"} for cut in cuts]
    path = str(folder / "rows.parquet")
    datasets.Dataset.from_list(rows, features=features).to_parquet(path)
    stream = load_rows(path, streaming=True)
    with pytest.warns(UserWarning, match="row 0: broken image"):
        [row] = checked_stream(stream, processor, bad_rows="skip")
    assert row["images"][0].size == (64, 64)
    VTLMMCollator(processor)([row])


def test_command(folder, tmp_path, capsys):
    model = tmp_path / "model"
    build_processor().save_pretrained(model)
    build_config().save_pretrained(model)

    def run(*arguments):
        code = main(["data", "check", *map(str, arguments)])
        return code, "".join(capsys.readouterr())

    code, text = run("--dataset", folder / "rows.json", "--model", model, "--max-length", 60)
    assert code == 1 and "row 1: missing image" in text and "max_length 60" in text
    write(folder, [GOOD])
    recipe = tmp_path / "recipe.yaml"
    settings = {"dataset_name": str(folder / "rows.json"), "dataset_test_split": "train"}
    settings |= {"model_name_or_path": str(model), "output_dir": "x"}
    recipe.write_text(json.dumps(settings))
    code, text = run("--config", recipe)
    assert code == 0 and text.startswith("train\n") and "\neval\n" in text and "max_length 2,048" in text
    code, text = run("--config", recipe, "--max-length", 3)
    assert code == 1 and "too long" in text
    code, text = run("--dataset", folder / "rows.json")
    assert code == 1 and "The model is missing" in text


def test_shared_rows(shared, processor):
    folder = shared / "data/llava_pretrain_2k"
    report = check_rows(load_rows(folder / "chat.json", image_folder=folder / "images", max_rows=50), processor)
    assert not report.problems and report.num_images == 50
    report = check_rows(load_rows(str(shared / "data/easy_vqa/test.parquet"), max_rows=50), processor)
    assert not report.problems and report.num_images == 50
