# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The words of the patches: which words are shown, the files of `vtlmm tokens`, and plots."""

import json
import math
from html.parser import HTMLParser

import pytest
import torch
from helpers.analysis import make_image, model, work  # noqa: F401 - fixtures
from PIL import Image
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from vtlmm.analysis.metrics import cosine_scores
from vtlmm.analysis.patch_features import heads, shown_image
from vtlmm.analysis.visual_token_page import (
    CELL,
    CHARACTER_WIDTH,
    LARGEST_FONT,
    SMALLEST_FONT,
    color_of,
    fit_word,
    visual_token_page,
)
from vtlmm.analysis.visual_tokens import (
    SOURCES,
    ImageTokens,
    format_patch_words,
    patch_labels,
    read_visual_tokens,
    top_words,
)
from vtlmm.analysis.vocabulary import shown_words
from vtlmm.cli.main import main


PIECES = ["<pad>", "<0xE5>", "▁dog", "ing", "▁", "▁.", "▁the", "▁Dog", "<|end|>", "s"]


def build_piece_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with SentencePiece-like tokens, a byte, white space and control tokens."""
    vocabulary = {token: i for i, token in enumerate(PIECES)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary)), pad_token="<pad>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    tokenizer.decode = lambda ids: PIECES[ids[0]].replace("▁", " ")
    return tokenizer


# ---- Which words are shown ----


def test_sub_words_are_marked_and_control_tokens_hidden():
    words = shown_words(build_piece_tokenizer(), len(PIECES))
    assert [PIECES[i] for i in words.is_shown.nonzero().flatten()] == ["▁dog", "ing", "▁.", "▁the", "▁Dog", "s"]
    assert [words.texts[i] for i in (2, 3, 5, 9)] == ["dog", "-ing", ".", "-s"]
    assert [PIECES[i] for i, whole in enumerate(words.is_whole) if whole] == ["▁dog", "▁the", "▁Dog"]


def test_vocabulary_of_words_has_no_sub_words(processor):
    words = shown_words(processor.tokenizer, len(processor.tokenizer))
    assert not any(text.startswith("-") and len(text) > 1 for text in words.texts)
    hidden = [i for i, shown in enumerate(words.is_shown.tolist()) if not shown]
    assert set(processor.tokenizer.all_special_ids) <= set(hidden)


def test_labels_prefer_whole_words():
    words = shown_words(build_piece_tokenizer(), len(PIECES))
    control = torch.tensor([0.6, 0.1, 0.05, 0.2, 0, 0, 0, 0.05, 0, 0])
    pieces = torch.tensor([0, 0, 0, 0.7, 0, 0.3, 0, 0, 0, 0])
    assert top_words(control[None], words, 2) == [[("-ing", 0.2), ("dog", 0.05)]]
    assert patch_labels(control[None], words) == [("dog", 0.05)]
    [(word, probability)] = patch_labels(pieces[None], words)
    assert (word, probability) == ("dog", 0) or probability == 0  # a whole word, however unlikely


@pytest.mark.parametrize("vm_head_type", ["linear", "attention"])
def test_words_are_those_of_the_model(build_model, processor, vm_head_type):
    model = build_model(vm_head_type=vm_head_type)  # noqa: F811
    with torch.no_grad():
        if vm_head_type == "attention":
            model.model.vm_head.residual_block.output.weight.normal_()
    image = make_image(0)
    [tokens] = read_visual_tokens(model, processor, [image], 3)
    pixels = processor.image_processor([image], return_tensors="pt")["pixel_values"]
    every = model.get_visual_tokens(pixels, top_k=model.config.visual_vocab_size)
    shown = shown_words(processor.tokenizer, model.config.visual_vocab_size)
    for patch in range(4):
        expected = [
            (shown.texts[i], probability)
            for i, probability in zip(
                every.token_ids[0, patch].tolist(), every.probabilities[0, patch].tolist(), strict=True
            )
            if shown.is_shown[i]
        ][:3]
        assert [word for word, _ in tokens.vm_head[patch]] == [word for word, _ in expected]
        assert [p for _, p in tokens.vm_head[patch]] == pytest.approx([p for _, p in expected], abs=1e-4)
    pseudo = model.model.get_pseudo_image_features(model.get_image_features(pixels).image_features)[0]
    scores = cosine_scores(pseudo, heads(model)[2]).masked_fill(~shown.is_shown, -math.inf)
    assert [patch[0][0] for patch in tokens.pseudo] == [shown.texts[i] for i in scores.argmax(-1)]
    with pytest.raises(ValueError, match="`top_k` is 99"):
        read_visual_tokens(model, processor, [image], 99)


def test_untrained_head_is_reported(model, processor):  # noqa: F811
    [tokens] = read_visual_tokens(model, processor, [make_image(0)])
    assert not tokens.is_near_uniform
    with torch.no_grad():
        model.model.vm_head.weight.mul_(1e-4)
    [uniform] = read_visual_tokens(model, processor, [make_image(0)])
    assert uniform.is_near_uniform and uniform.mean_entropy == pytest.approx(uniform.max_entropy, abs=1e-3)
    page = visual_token_page(["a"], [shown_image(processor, make_image(0))], [uniform])
    assert "This VM head is untrained" in page
    assert "untrained" not in visual_token_page(["a"], [shown_image(processor, make_image(0))], [tokens])


def test_patch_words_as_text_follow_the_grid(model, processor):  # noqa: F811
    [tokens] = read_visual_tokens(model, processor, [make_image(0)], 1)
    text = format_patch_words(model, processor, make_image(0), width=200)
    assert [line.split() for line in text.splitlines()] == [
        [word for word, _ in tokens.labels[:2]],
        [word for word, _ in tokens.labels[2:]],
    ]
    narrow = format_patch_words(model, processor, make_image(0), width=8)
    assert max(map(len, narrow.splitlines())) <= 8


# ---- Files and plots ----


class Page(HTMLParser):
    """Counts the patches and resources of a page, and checks that every opened tag is closed."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.words, self.details, self.sources, self.is_json = [], 0, [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag not in ("meta", "input"):
            self.open.append(tag)
        self.words += tag == "text"
        self.is_json = attributes.get("type") == "application/json"
        self.sources += [value for name, value in attributes.items() if name in ("src", "href")]

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_data(self, data):
        if self.is_json and self.open[-1] == "script":
            self.details.append(json.loads(data))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_tokens_command_writes_page_json_and_plots(work, tmp_path):  # noqa: F811
    pytest.importorskip("matplotlib")
    names = [str(work / "0.png"), str(work / "1.png")]
    assert main(["tokens", str(work / "model"), *names, "--output", str(tmp_path), "--top-k", "4"]) == 0
    content = json.loads((tmp_path / "tokens.json").read_text())
    assert [image["image"] for image in content["images"]] == names
    for image in content["images"]:
        assert all(len(image[source]) == 4 and len(image[source][0]) == 4 for source in SOURCES)
        for words, entropy in zip(image["vm_head"], image["entropy"], strict=True):
            values = [value for _, value in words]
            assert values == sorted(values, reverse=True) and entropy >= 0
    text = (tmp_path / "tokens.html").read_text()
    page = Page(text)
    assert not page.open and page.words == 2 * 4
    assert len(page.sources) == 2 and all(source.startswith("data:image/jpeg;base64,") for source in page.sources)
    for details, image in zip(page.details, content["images"], strict=True):
        assert [patch["entropy"] for patch in details] == image["entropy"]
        assert [patch["words"] for patch in details] == [
            [image[source][i] for source in SOURCES] for i in range(len(details))
        ]
    for name in ("0_0.png", "1_1.png"):
        assert min(Image.open(tmp_path / name).size) > 1000


def test_tokens_of_rows_equal_those_of_files(work, tmp_path):  # noqa: F811
    pytest.importorskip("matplotlib")
    names = [str(work / "0.png"), str(work / "1.png")]
    assert main(["tokens", str(work / "model"), *names, "--output", str(tmp_path / "files")]) == 0
    rows = ["--dataset", str(work / "rows.jsonl"), "--limit", "2"]
    assert main(["tokens", str(work / "model"), *rows, "--output", str(tmp_path / "rows")]) == 0
    of_files, of_rows = (
        json.loads((tmp_path / name / "tokens.json").read_text())["images"] for name in ("files", "rows")
    )
    assert [image.pop("image") for image in of_rows] == ["row 0", "row 1"]
    for image, other in zip(of_rows, of_files, strict=True):
        assert other.pop("image") in names and image == other


def test_tokens_command_rejects_bad_input(work, tmp_path, capsys):  # noqa: F811
    pytest.importorskip("matplotlib")
    assert main(["tokens", str(work / "model")]) == 1
    assert "Specify either images or a dataset" in capsys.readouterr().err
    (tmp_path / "no.png").write_text("text")
    assert main(["tokens", str(work / "model"), str(tmp_path / "no.png")]) == 1
    assert "no.png" in capsys.readouterr().err
    (tmp_path / "tokens.json").write_text("{}")
    image = str(work / "0.png")
    assert main(["tokens", str(work / "model"), image, "--output", str(tmp_path)]) == 1
    assert "Choose another output folder, or set `overwrite=True`" in capsys.readouterr().err


def test_words_are_drawn_as_plain_text(model, processor, tmp_path):  # noqa: F811
    """Two dollar signs are a word of many vocabularies, and not a formula."""
    pytest.importorskip("matplotlib")
    from vtlmm.analysis import plots

    [tokens] = read_visual_tokens(model, processor, [make_image(0)])
    dollars = ImageTokens(**{**vars(tokens), "labels": [("$$", 0.3)] * 4, "summary": [("$$", 0.3)]})
    plots.save_patch_words(
        tmp_path / "words.png", processor, [make_image(0)], [dollars], ["a_$5_$10.png $$"], "$$", [[True, False] * 2]
    )
    plots.save_visual_token_plot(tmp_path / "one.png", shown_image(processor, make_image(0)), dollars, "$$ $")
    assert all(Image.open(tmp_path / name).size[0] > 100 for name in ("words.png", "one.png"))


@pytest.mark.parametrize("word", ["cat", "-building", "W" * 40, "一二三四五六七八九十一二三四五六"])
def test_words_fit_into_their_patch(word):
    text, size = fit_word(word)
    wide = sum(1.2 if character.isupper() else 1.6 if character > "\u2e80" else 1 for character in text)
    assert SMALLEST_FONT <= size <= LARGEST_FONT and wide * size * CHARACTER_WIDTH <= CELL
    assert text == word or (text.endswith("…") and word.startswith(text[:-1]) and len(text) > 4)


def test_words_of_a_page_are_escaped(model, processor):  # noqa: F811
    [tokens] = read_visual_tokens(model, processor, [make_image(0)])
    attack = [("</script><b>", 0.3)]
    changed = ImageTokens(**{**vars(tokens), "labels": attack * 4, "summary": attack, "vm_head": [attack] * 4})
    page = visual_token_page(["<i>"], [shown_image(processor, make_image(0))], [changed])
    assert "</script><b>" not in page and "<i></h2>" not in page and "&lt;i&gt;</h2>" in page


def test_colors_of_the_page_are_those_of_viridis():
    matplotlib = pytest.importorskip("matplotlib")
    for share in (0.0, 0.2, 0.5, 0.9, 1.0):
        expected = [255 * value for value in matplotlib.colormaps["viridis"](share)[:3]]
        found = [int(value) for value in color_of(share).removeprefix("rgb(").removesuffix(")").split(",")]
        assert found == pytest.approx(expected, abs=10)
