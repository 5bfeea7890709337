# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""`vtlmm ask` and `vtlmm chat` on a tiny model, how every command loads one, and what a page shows."""

import html
import io
import json
import os
import shutil

import pytest
import torch
from conftest import build_config, build_processor
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage
from PIL import ImageOps
from safetensors.torch import load_file, save_file
from test_analysis import make_image
from training_setup import write_start
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, CompileConfig, GenerationConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from modeling_vtlmm import VTLMMForConditionalGeneration
from vtlmm.analysis.app import IMAGE_FEATURES, PSEUDO_IMAGE_FEATURES, answers_so_far, build_page, words_frame
from vtlmm.analysis.visual_tokens import format_patch_words
from vtlmm.cli.load import load
from vtlmm.cli.main import main
from vtlmm.hub.export_llava import export_to_llava
from vtlmm.inference.generation import VisionFeatures, answer_batch, conversation, generate, stream_answer
from vtlmm.inference.loading import load_model
from vtlmm.inference.prompt_encoding import encode_prompt
from vtlmm.inference.resumable import weights_digest
from vtlmm.train.merge import merge_adapter
from vtlmm.train.stage_runner import run_training


QUESTION = "what is in the image ?"
COLORS = ("red", "green", "blue", "white", "black")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A tiny model whose layers bitsandbytes takes, that never ends an answer early, and images."""
    folder = tmp_path_factory.mktemp("use")
    config = build_config()
    config.text_config.update({"hidden_size": 64, "intermediate_size": 64, "head_dim": 16})
    torch.manual_seed(0)
    model = VTLMMForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(10)
        model.initialize_vm_head("random")
        model.model.vm_head.weight.mul_(3)
        # one part of the features is common to all patches and would choose the word of each
        common = model.get_image_features(torch.randn(8, 3, 28, 28)).image_features.flatten(0, 1).mean(0)
        common /= common.norm()
        model.model.vm_head.weight.sub_((model.model.vm_head.weight @ common)[:, None] * common)
    model.generation_config = GenerationConfig(bos_token_id=1, pad_token_id=3)
    model.generation_config.suppress_tokens = [0, 1, 2, 3, config.image_token_id, *range(45, 64)]
    model.save_pretrained(folder / "model")
    build_processor().save_pretrained(folder / "model")
    for color in COLORS:
        PILImage.new("RGB", (28, 28), color).save(folder / f"{color}.png")
    make_image(3).save(folder / "squares.png")
    (folder / "broken.png").write_bytes((folder / "red.png").read_bytes()[:40])
    return folder


def loaded(work, **options):
    return load(str(work / "model"), **options)


@pytest.fixture(scope="module")
def model_and_processor(work):
    return loaded(work)


def expected_answer(model, processor, question: str, *colors: str, length: int = 6, folder=None) -> str:
    images = [PILImage.open(folder / f"{color}.png").convert("RGB") for color in colors]
    [text] = answer_batch(model, processor, [{"images": images, "question": question}], length)
    return text


# ---- One question ----


def test_one_answer_is_all_that_stdout_gets(work, model_and_processor, capfd):
    command = ["ask", str(work / "model"), str(work / "red.png"), QUESTION, "--max-new-tokens", "6"]
    assert main(command) == 0
    answer = expected_answer(*model_and_processor, QUESTION, "red", folder=work)
    assert capfd.readouterr().out == f"{answer}\n" and len(answer.split()) == 6
    assert main([*command, "--use-pseudo-image-features"]) == 0
    assert capfd.readouterr().out not in ("", f"{answer}\n")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["broken.png", QUESTION], "broken.png: the file is not an image"),
        (["model", QUESTION], "model is a folder, not an image file"),
        (["nowhere.png", QUESTION], "nowhere.png: the image file does not exist"),
        (["red.png"], "The question is missing"),
        (["what " * 60], "Repo id must use"),  # longer than the name of a file may be
        ([], "The question is missing"),
        (["red.png", QUESTION, "--dataset", "rows.json"], "the questions come from its rows"),
        (["--dataset", "rows.json"], "--dataset needs --output"),
        (["red.png", QUESTION, "--output", "a.jsonl"], "--output has no effect without --dataset"),
    ],
)
def test_what_cannot_be_asked_is_said_before_a_model_is_loaded(work, capfd, asked, said):
    paths = [str(work / text) if os.path.exists(work / text) or text == "nowhere.png" else text for text in asked]
    assert main(["ask", "no model", *paths]) == 1
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and said in printed.err


# ---- A file of questions ----


def write_rows(work, path) -> list[dict]:
    rows = [
        {"id": 7 * i, "image": f"{color}.png", "question": "what " * (i % 3 + 1)} for i, color in enumerate(COLORS)
    ]
    rows.append({"question": "hello", "images": []})
    rows.append({"question": "yes or no ?", "images": ["red.png", "blue.png"]})
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    else:
        table = [{"question": row["question"], "image": str(work / row["image"])} for row in rows if "image" in row]
        features = Features({"question": Value("string"), "image": Image()})
        Dataset.from_list(table).cast(features).to_parquet(path)  # with the images in it
        rows = rows[: len(table)]
    return rows


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
def test_a_file_of_questions(work, model_and_processor, tmp_path, kind):
    data, output = tmp_path / f"rows.{kind}", tmp_path / "out" / "answers.jsonl"
    rows = write_rows(work, data)
    command = [
        "ask",
        str(work / "model"),
        "--dataset",
        str(data),
        "--image-folder",
        str(work),
        "--output",
        str(output),
    ]
    command += ["--max-new-tokens", "6", "--batch-size", "2"]
    assert main(command) == 0
    records = sorted(map(json.loads, output.read_text().splitlines()), key=lambda record: record["index"])
    for row, record in zip(rows, records, strict=True):
        images = row["images"] if "images" in row else [row["image"]]
        colors = [name.removesuffix(".png") for name in images]
        answer = expected_answer(*model_and_processor, row["question"], *colors, folder=work)
        assert record["answer"] == answer and record["question"] == row["question"] and "truth" not in record
        assert record.get("id") == (None if kind == "parquet" else row.get("id"))
    assert len({record["answer"] for record in records}) > 3

    # stopped in the middle of a line, after one batch
    whole = output.read_bytes()
    lines = whole.splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:3]) + lines[3][:10])
    assert main(command) == 0 and output.read_bytes() == whole
    # answers of two models or of two files are never mixed
    assert main([*command, "--use-pseudo-image-features"]) == 1 and main([*command[:-3], "5"]) == 1
    # nor those about other images of the same names
    other = tmp_path / "other"
    other.mkdir()
    for color in COLORS:
        ImageOps.invert(PILImage.open(work / f"{color}.png").convert("RGB")).save(other / f"{color}.png")
    write_rows(other, data)
    assert main([str(other) if option == str(work) else option for option in command]) == 1
    assert output.read_bytes() == whole


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[{"image": "red.png"}]', "row 0 has columns ['image'], which match no supported format"),
        ('[{"question": "what", "image": "nowhere.png"}]', "nowhere.png does not exist"),
        ('{"question": "what"}', "must hold a list of rows"),
        ("[]", "has no rows"),
        ('{"question": "what"}\n\n{"question"', "rows.jsonl, line 3 is not JSON"),
    ],
)
def test_rows_that_cannot_be_asked_are_named(work, tmp_path, capfd, text, said):
    data = tmp_path / ("rows.jsonl" if "rows.jsonl" in said else "rows.json")
    data.write_text(text)
    assert main(["ask", "no model", "--dataset", str(data), "--output", str(tmp_path / "a.jsonl")]) == 1
    assert said in capfd.readouterr().err and not (tmp_path / "a.jsonl").exists()


# ---- Chat ----


def turns(*texts: str, images=()) -> list[dict]:
    """Question, answer, question, …; the images stand in the first."""
    messages = conversation({"images": list(images), "question": texts[0]})
    for i, text in enumerate(texts[1:]):
        part = {"type": "text", "text": text}
        messages.append({"role": ("assistant", "user")[i % 2], "content": [part]})
    return messages


def test_pieces_are_the_answer(work, model_and_processor):
    model, processor = model_and_processor
    red = PILImage.open(work / "red.png").convert("RGB")
    pieces = list(stream_answer(model, processor, turns(QUESTION, images=[red]), 6))
    assert len([piece for piece in pieces if piece]) > 2
    assert "".join(pieces).strip() == expected_answer(model, processor, QUESTION, "red", folder=work)
    stream = stream_answer(model, processor, turns(QUESTION, images=[red]), 100_000)
    next(stream)
    stream.close()  # would take minutes if the generation went on
    with pytest.raises(ValueError, match="max_new_tokens"):
        list(stream_answer(model, processor, turns(QUESTION), 0))


def test_chat(work, model_and_processor, monkeypatch, capsys):
    """Two turns about a image, one more image, what cannot be done, and a new conversation."""
    model, processor = model_and_processor
    red, squares = (PILImage.open(work / f"{name}.png").convert("RGB") for name in ("red", "squares"))
    lines = [
        QUESTION,
        "is it red ?",
        f"/image {work}/broken.png",
        "/jump",
        f"/image {work}/squares.png",
        "is it blue ?",
    ]
    lines += ["/words", "/reset", "/words", "hello", "/quit", "never read"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    monkeypatch.setenv("COLUMNS", "80")
    command = ["chat", str(work / "model"), "--image", str(work / "red.png"), "--max-new-tokens", "6"]
    assert main(command) == 0

    def answered(messages):
        return "".join(stream_answer(model, processor, messages, 6)).strip()

    first = turns(QUESTION, images=[red])
    one = answered(first)
    second = [*first, *turns("", one, "is it red ?")[1:]]
    two = answered(second)
    third = [*second, *turns("", two)[1:], *turns("is it blue ?", images=[squares])]
    words = format_patch_words(model, processor, squares, 80).split()
    found = [line.removeprefix("> ") for line in capsys.readouterr().out.splitlines()[1:]]
    assert found[:2] == [one, two] and len({one, two}) == 2
    assert "broken.png: the file is not an image" in found[2] and found[3].startswith("Unknown command /jump")
    assert found[4].removeprefix("> ") == answered(third)
    assert " ".join(found[5:7]).split() == words and len(set(words)) > 1
    assert "Add an image first" in found[7] and found[8:] == [answered(turns("hello")), ""]


# ---- How a model is loaded ----


@pytest.mark.parametrize(("option", "kind"), [("load_in_4bit", "Linear4bit"), ("load_in_8bit", "Linear8bitLt")])
def test_quantized(work, model_and_processor, option, kind):
    model, processor = loaded(work, **{option: True})
    quantized = {name for name, module in model.named_modules() if type(module).__name__ == kind}
    assert len(quantized) == 14 and all(name.startswith("model.language_model.layers.") for name in quantized)
    inputs = processor(PILImage.new("RGB", (28, 28), "red"), "USER : <image> what ASSISTANT :", return_tensors="pt")
    with torch.no_grad():
        found, expected = (m(**inputs).logits.float() for m in (model, model_and_processor[0]))
    similarity = torch.cosine_similarity(found, expected, dim=-1).mean()
    assert 0.9 < similarity < 0.99999
    [answer] = answer_batch(model, processor, [{"images": [], "question": QUESTION}], 3)
    assert len(answer.split()) == 3


@torch.no_grad()
def test_a_model_that_memory_does_not_hold(work, model_and_processor, tmp_path):
    """With `device_map="auto"` and little memory the rest is read from the disk when it is its turn."""
    whole, processor = model_and_processor
    model = VTLMMForConditionalGeneration.from_pretrained(
        work / "model", device_map="auto", max_memory={"cpu": "150KB"}, offload_folder=tmp_path
    )
    assert {"cpu", "disk"} <= set(model.hf_device_map.values())
    assert any(".layers." in name for name in model.hf_device_map)
    assert weights_digest(model) == weights_digest(whole)  # by which `eval` and `ask --data` know a model
    inputs = processor(PILImage.new("RGB", (28, 28), "red"), "USER : <image> what ASSISTANT :", return_tensors="pt")
    torch.testing.assert_close(model(**inputs).logits, whole(**inputs).logits)
    settings = {"max_new_tokens": 4}
    assert torch.equal(model.generate(**inputs, **settings), whole.generate(**inputs, **settings))


def test_the_device_map_is_the_user_s(work):
    model, _ = loaded(work, device_map="cpu", dtype="bfloat16", use_pseudo_image_features=True)
    assert model.dtype == torch.bfloat16 and model.device.type == "cpu" and model.config.use_pseudo_image_features


def test_compiled_generation_with_a_static_cache(model_and_processor, monkeypatch):
    """The library compiles on a GPU by itself; here it is told to."""
    model, processor = model_and_processor
    graphs = []

    def count_graphs(graph, inputs):
        graphs.append(graph)
        return graph

    compilation = CompileConfig(fullgraph=True, backend=count_graphs, mode=None)
    compilation._compile_all_devices = True
    inputs = processor(PILImage.new("RGB", (28, 28), "red"), "USER : <image> what ASSISTANT :", return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=8)
    found = model.generate(**inputs, max_new_tokens=8, cache_implementation="static", compile_config=compilation)
    assert torch.equal(found, expected) and len(set(found[0, -8:].tolist())) > 2
    assert 1 <= len(graphs) <= 2  # not one a step


def test_an_engine_s_attention_is_the_attention_of_every_layer(work, model_and_processor):
    """What `_supports_attention_backend` promises, of tower and decoder."""
    whole, processor = model_and_processor
    called = []

    def attention(module, *args, **kwargs):
        called.append(module)
        return sdpa_attention_forward(module, *args, **kwargs)

    AttentionInterface.register("engine", attention)
    AttentionMaskInterface.register("engine", sdpa_mask)
    model, _ = loaded(work)
    model.set_attn_implementation("engine")
    inputs = processor(PILImage.new("RGB", (28, 28), "red"), "USER : <image> what ASSISTANT :", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, whole(**inputs).logits)
    # the tower's last layer is above the one whose states are used
    assert len(called) == len(set(called)) == 2 + 2 and model._supports_attention_backend


def test_a_twin_answers_the_same_and_says_what_it_lacks(work, model_and_processor, tmp_path, capfd, monkeypatch):
    export_to_llava(work / "model", tmp_path / "twin")
    asked = [str(work / "red.png"), QUESTION, "--max-new-tokens", "6"]
    assert main(["ask", str(tmp_path / "twin"), *asked]) == 0
    assert capfd.readouterr().out == expected_answer(*model_and_processor, QUESTION, "red", folder=work) + "\n"
    assert main(["ask", str(tmp_path / "twin"), *asked, "--use-pseudo-image-features"]) == 1
    assert "llava model without a VM head" in capfd.readouterr().err
    monkeypatch.setattr("sys.stdin", io.StringIO("/words\n"))
    assert main(["chat", str(tmp_path / "twin"), "--image", str(work / "red.png")]) == 0
    assert "This model is a llava without a VM head" in capfd.readouterr().out
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"image": str(work / "red.png"), "question": QUESTION, "answer": "red"}]))
    for command in (["tokens", str(tmp_path / "twin"), str(work / "red.png")], ["analyze", str(tmp_path / "twin")]):
        command += ["--dataset", str(rows)] if command[0] == "analyze" else []
        assert main(command) == 1 and "llava model without a VM head" in capfd.readouterr().err

    weights = load_file(tmp_path / "twin" / "model.safetensors")
    del weights["multi_modal_projector.linear_1.bias"]
    save_file(weights, tmp_path / "twin" / "model.safetensors", {"format": "pt"})
    assert main(["ask", str(tmp_path / "twin"), *asked]) == 1  # it would answer with random numbers there
    assert "1 missing tensors" in (said := capfd.readouterr().err) and "multi_modal_projector.linear_1.bias" in said


# ---- The page ----


def test_what_the_page_shows(work):
    model, processor = loaded(work)
    red = PILImage.open(work / "red.png")
    frames = {kind: words_frame(model, processor, red, kind) for kind in (IMAGE_FEATURES, PSEUDO_IMAGE_FEATURES)}
    assert frames[IMAGE_FEATURES] != frames[PSEUDO_IMAGE_FEATURES]
    page = html.unescape(frames[IMAGE_FEATURES])
    assert page.count('class="patch') == 8 and "http" not in page.replace("image/svg", "")
    assert words_frame(model, processor, None, IMAGE_FEATURES) == ""
    answers = {}
    for kind in frames:
        grown = list(answers_so_far(model, processor, red, kind, [], QUESTION, 6))
        assert [turn[-1][1] for turn in grown] == sorted((turn[-1][1] for turn in grown), key=len)
        answers[kind] = grown[-1]
    assert answers[IMAGE_FEATURES] == [(QUESTION, expected_answer(*loaded(work), QUESTION, "red", folder=work))]
    assert answers[PSEUDO_IMAGE_FEATURES] != answers[IMAGE_FEATURES]
    *_, second = answers_so_far(model, processor, red, IMAGE_FEATURES, answers[IMAGE_FEATURES], "is it red ?", 6)
    messages = turns(QUESTION, second[0][1], "is it red ?", images=[red.convert("RGB")])
    assert second[0] == answers[IMAGE_FEATURES][0]
    assert second[1] == ("is it red ?", "".join(stream_answer(model, processor, messages, 6)).strip())


def test_the_page_is_built(model_and_processor):
    pytest.importorskip("gradio", reason="the extra `app` is not installed")
    page = build_page(*model_and_processor, "model")
    settings = page.get_config_file()
    assert settings["analytics_enabled"] is False
    assert len([event for event in settings["dependencies"] if event["targets"][0][1] == "change"]) == 2


# ---- Python API ----


def test_generate_takes_paths_and_lists(work, model_and_processor):
    model, processor = model_and_processor
    [one] = generate(model, processor, QUESTION, str(work / "red.png"), max_new_tokens=6)
    assert one == expected_answer(model, processor, QUESTION, "red", folder=work)
    red, blue = str(work / "red.png"), PILImage.open(work / "blue.png")
    questions = [QUESTION, "hello", "yes or no ?", "what " * 5]
    images = [red, None, [red, blue], blue]
    together = generate(model, processor, questions, images, max_new_tokens=6, batch_size=3)
    pairs = zip(questions, images, strict=True)
    assert together == [generate(model, processor, q, i, max_new_tokens=6)[0] for q, i in pairs]
    assert len(set(together)) == 4
    with pytest.raises(ValueError, match="one entry for each of the 2 questions"):
        generate(model, processor, ["what", "is"], [red])
    with pytest.raises(ValueError, match="more image parts than images"):
        generate(model, processor, [{"role": "user", "content": [{"type": "image"}]}])


def test_tower_runs_once_per_image(work, model_and_processor, monkeypatch):
    model, processor = model_and_processor
    encoded, forward = [], model.model.vision_tower.forward
    monkeypatch.setattr(
        model.model.vision_tower, "forward", lambda pixels, **kw: encoded.append(len(pixels)) or forward(pixels, **kw)
    )
    questions = ["what " * (i % 3 + 1) for i in range(12)]
    images = [str(work / f"{COLORS[i % 4]}.png") for i in range(12)]
    features = VisionFeatures()
    answers = generate(model, processor, questions, images, max_new_tokens=4, batch_size=5, vision_features=features)
    assert sum(encoded) == 4 == len(features)
    assert generate(model, processor, questions, images, max_new_tokens=4, vision_features=features) == answers
    assert sum(encoded) == 4
    small = VisionFeatures(max_images=2)
    assert generate(model, processor, questions, images, max_new_tokens=4, vision_features=small) == answers
    assert len(small) == 2


@pytest.mark.parametrize("token", ["<image>", "</s>", "<s>"])
def test_control_tokens_in_a_question_are_text(model_and_processor, token):
    model, processor = model_and_processor
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"what is {token} ?"}]}]
    ids = encode_prompt(processor, messages)
    assert ids.count(processor.image_token_id) == 1 and ids.count(2) == 0 and ids.count(1) == 1
    plain = encode_prompt(processor, [{"role": "user", "content": [{"type": "text", "text": "what is ?"}]}])
    assert len(ids) > len(plain)
    [answer] = generate(model, processor, f"what is {token} ?", PILImage.new("RGB", (28, 28)), max_new_tokens=3)
    assert len(answer.split()) == 3


def test_prompt_is_encoded_as_by_the_processor(model_and_processor):
    _, processor = model_and_processor
    image = PILImage.new("RGB", (28, 28))
    content = [{"type": "text", "text": "a"}, {"type": "image", "image": image}, {"type": "text", "text": "what ?"}]
    messages = [{"role": "user", "content": content}]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    expected = processor.apply_chat_template(messages, **options)
    image_id = processor.image_token_id
    ids = [i for token in encode_prompt(processor, messages) for i in [token] * (4 if token == image_id else 1)]
    assert [ids] == expected["input_ids"] and ids.count(image_id) == 4


def test_adapter_folder_is_loaded_with_its_base(tmp_path):
    run_training(
        write_start(tmp_path) | {"use_peft": True, "lora_r": 4, "stage": "visual_head", "vm_head_type": "mlp"}
    )
    merged = merge_adapter(tmp_path / "out")
    model, processor = load_model(tmp_path / "out", dtype="float32")
    inputs = processor(PILImage.new("RGB", (28, 28), "red"), "USER : <image> what ASSISTANT :", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, merged(**inputs).logits, rtol=1e-4, atol=1e-4)
    assert model.config.vm_head_type == "mlp"
    quantized, _ = load_model(tmp_path / "out", load_in_4bit=True)
    assert len(generate(quantized, processor, "what is it", max_new_tokens=2)) == 1
    shutil.move(tmp_path / "start", tmp_path / "moved")
    with pytest.raises(ValueError, match="is an adapter, and its base model .* was not found"):
        load_model(tmp_path / "out")


def test_missing_folder_is_not_looked_up_on_the_hub(work, tmp_path, monkeypatch):
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *args, **kwargs: pytest.fail("looked up"))
    monkeypatch.chdir(work.parent)
    for name in (str(tmp_path / "nowhere"), "./nowhere", "a/b/c", f"{work.name}/nowhere"):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            load_model(name)
    with pytest.raises(ValueError, match=f"has no config.json .*Did you mean {work / 'model'}"):
        load_model(work)
    with pytest.raises(ValueError, match="is a file"):
        load_model(work / "red.png")
