# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""`vtlmm tokens` and `vtlmm analyze` on tiny models: what they read, show and write, and how they are batched."""

import json
import random
from html.parser import HTMLParser

import pytest
import torch
from conftest import WORDS
from PIL import Image, ImageDraw
from test_eval import save_model

from vtlmm.analysis.dataset_analysis import Analysis, Labels, analyze_images
from vtlmm.analysis.failure_modes import evenly, failure_signatures
from vtlmm.analysis.metrics import cosine_scores, word_probabilities
from vtlmm.analysis.patch_features import heads, patches_inside, read_patches
from vtlmm.analysis.visual_tokens import VOICES, patch_tokens
from vtlmm.analysis.vocabulary import content_words
from vtlmm.cli.main import main


NUM_IMAGES = 14


def make_image(seed: int, size: int = 28) -> Image.Image:
    """Four squares of random colors, one a patch."""
    rng, image = random.Random(seed), Image.new("RGB", (size, size))
    draw = ImageDraw.Draw(image)
    for x in (0, size // 2):
        for y in (0, size // 2):
            draw.rectangle((x, y, x + size // 2, y + size // 2), fill=tuple(rng.randrange(256) for _ in range(3)))
    return image


@pytest.fixture
def model(build_model):
    model = build_model()
    model.initialize_vm_head("random")
    with torch.no_grad():
        model.model.vm_head.weight.mul_(10)
    return model


def test_the_last_layer_s_lens_is_the_logits(model, processor):
    """And the decoder's prediction of a patch is that of the position left of it; a batch changes nothing."""
    images = [make_image(i) for i in range(3)]
    patches = read_patches(model, processor, images)
    vm_weight, lm_weight, embeddings = heads(model)
    last = max(patches.layer_states)
    assert sorted(patches.layer_states) == [0, 1, 2]
    for i, image in enumerate(images):
        text = processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it ?"}]}],
            tokenize=False,
        )
        inputs = processor(images=[image], text=text, return_tensors="pt")
        with torch.no_grad():
            outputs = model(**inputs, output_visual_logits=True)
        places = (inputs["input_ids"][0] == model.config.image_token_id).nonzero().squeeze(1)
        logits = outputs.logits[0, :, : len(lm_weight)]
        for states, expected in (
            (patches.layer_states[last][i], logits[places]),
            (patches.left_states[i], logits[places - 1]),
        ):
            torch.testing.assert_close(word_probabilities(states, lm_weight), expected.softmax(-1), atol=1e-5, rtol=0)
        visual = word_probabilities(patches.mixed_features[i], vm_weight)
        torch.testing.assert_close(visual, outputs.visual_logits.softmax(-1), atol=1e-5, rtol=0)
        alone = read_patches(model, processor, [image])
        for layer, states in patches.layer_states.items():
            torch.testing.assert_close(states[i : i + 1], alone.layer_states[layer], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(patches.layer_states[0], model.model.language_model.norm(patches.image_features))


@pytest.mark.parametrize("vm_head_type", ["linear", "attention"])
def test_tokens_are_the_top_words(build_model, processor, vm_head_type):
    model = build_model(vm_head_type=vm_head_type)
    with torch.no_grad():
        if vm_head_type == "attention":
            model.model.vm_head.residual_block.output.weight.normal_()
    image = make_image(0)
    found = patch_tokens(model, processor, [image], 3)[0]
    pixels = processor.image_processor([image], return_tensors="pt")["pixel_values"]
    tokens = model.get_visual_tokens(pixels, top_k=3)
    words = processor.visual_words(tokens.token_ids)[0]
    assert [[word for word, _ in patch] for patch in found["vm_head"]] == words
    values = torch.tensor([[value for _, value in patch] for patch in found["vm_head"]])
    torch.testing.assert_close(values, tokens.probabilities[0], atol=1e-4, rtol=0)
    pseudo = model.model.get_pseudo_image_features(model.get_image_features(pixels).image_features)[0]
    nearest = cosine_scores(pseudo, heads(model)[2]).argmax(-1)
    assert [patch[0][0] for patch in found["pseudo"]] == processor.visual_words(nearest)
    with pytest.raises(ValueError, match="top_k is 99"):
        patch_tokens(model, processor, [image], 99)


def test_words_are_drawn_as_they_are(model, processor, tmp_path, monkeypatch):
    """Two dollars are a word of many vocabularies, and no formula."""
    pytest.importorskip("matplotlib")
    from vtlmm.analysis import plots

    def dollars(model, processor, images):
        words, probabilities = patch_words(model, processor, images)
        return [["$$"] * len(own) for own in words], probabilities

    patch_words = plots.patch_words
    monkeypatch.setattr(plots, "patch_words", dollars)
    plots.save_patch_words(tmp_path / "words.png", model, processor, [make_image(0)], ["a_$5_$10.png $$"])
    assert Image.open(tmp_path / "words.png").size[0] > 100


def analyze(model, processor, images, labels=None, **options):
    keys = [str(i) for i in range(len(images))]
    labels = labels or [Labels([random.Random(i).choice(WORDS[10:])]) for i in range(len(images))]
    labels_by_image = dict(zip(keys, labels, strict=True))
    return analyze_images(model, processor, labels_by_image, lambda key: images[int(key)], **options)


def flatten(value, name: str = "") -> dict:
    if isinstance(value, dict):
        return {k: v for key, part in value.items() for k, v in flatten(part, f"{name}/{key}").items()}
    return {name: value}


def test_streaming_equals_all_at_once(model, processor):
    images = [make_image(i) for i in range(NUM_IMAGES)]
    one, whole = (flatten(analyze(model, processor, images, batch_size=size)) for size in (1, NUM_IMAGES))
    assert one.keys() == whole.keys() and len(one) > 200
    for name, value in whole.items():
        if isinstance(value, float):
            assert one[name] == pytest.approx(value, abs=1e-4, nan_ok=True), name
        else:
            assert one[name] == value, name


def test_identical_images_tell_nothing(model, processor):
    tokens = patch_tokens(model, processor, [make_image(i) for i in range(NUM_IMAGES)], 1)
    varied = max(range(NUM_IMAGES), key=lambda i: len({patch[0][0] for patch in tokens[i]["vm_head"]}))
    results = analyze(model, processor, [make_image(varied)] * NUM_IMAGES)
    found = results["diversity"]["vm_head"]
    assert found["information_image"]["value"] == pytest.approx(0, abs=1e-5)
    assert found["information_patch"]["value"] > 0.1  # its patches differ
    assert any("Collapse of vm_head" in text and "of the image" in text for text in results["warnings"])
    other = analyze(model, processor, [make_image(i) for i in range(NUM_IMAGES)])
    assert other["diversity"]["vm_head"]["information_image"]["low"] > 0.05
    assert not any("vm_head" in text for text in other["warnings"])


def test_a_head_that_says_one_word_is_a_collapse(model, processor):
    """However sharp: low entropy alone would look like success."""
    with torch.no_grad():
        model.model.vm_head.weight.zero_()
    results = analyze(model, processor, [make_image(i) for i in range(NUM_IMAGES)])
    assert sum("Collapse of vm_head" in text for text in results["warnings"]) == 2


def test_diversity_is_that_of_all_tokens(model, processor):
    images = [make_image(i) for i in range(NUM_IMAGES)]
    found = analyze(model, processor, images, batch_size=3)["diversity"]["vm_head"]
    patches = read_patches(model, processor, images)
    p = word_probabilities(patches.mixed_features.flatten(0, 1), heads(model)[0]).double()
    of_patches = torch.special.entr(p).sum(-1)
    mean = torch.special.entr(p.mean(0)).sum()
    of_images = torch.special.entr(p.view(NUM_IMAGES, -1, p.shape[1]).mean(1)).sum(-1)
    assert found["entropy"]["value"] == pytest.approx(of_patches.mean().item(), abs=1e-5)
    assert found["effective_support"]["value"] == pytest.approx(of_patches.exp().mean().item(), rel=1e-5)
    assert found["information_patch"]["value"] == pytest.approx((mean - of_patches.mean()).item(), abs=1e-5)
    assert found["information_image"]["value"] == pytest.approx((mean - of_images.mean()).item(), abs=1e-5)
    assert found["distinct_top_words"]["value"] == len(p.argmax(-1).unique())


def test_labels_that_the_head_says_are_hit(model, processor):
    """Each image's label is the likeliest word of its first patch; other labels, other images' words."""
    images = [make_image(i) for i in range(NUM_IMAGES)]
    words = [found["vm_head"][0][0][0] for found in patch_tokens(model, processor, images, 1)]
    labels = [Labels([word]) for word in words]
    results = analyze(model, processor, images, labels)
    hit = results["lenses"]["vm_head"]["hit@1"]
    assert hit["value"] == 1 and hit["n"] == results["labels"]["labeled"] > 3
    assert hit["lift"]["value"] == pytest.approx(1 - hit["shuffled"]) and hit["lift"]["low"] > 0
    assert hit["lift_over_random_head"]["low"] > 0
    mass = results["lenses"]["vm_head"]["mass"]
    assert mass["value"] > mass["shuffled"] and "mass" not in results["lenses"]["cosine"]


def test_a_random_head_has_rows_of_equal_norm(model, processor):
    analysis = Analysis(model, processor, [Labels(["red"])])
    assert not torch.allclose(analysis.random_weight, analysis.vm_weight, atol=1e-2)
    torch.testing.assert_close(analysis.random_weight.norm(dim=1), analysis.vm_weight.norm(dim=1))


def test_boxes_are_where_the_processor_puts_them(processor):
    """A image of 56 × 28 pixels, of which the processor makes one of 28 × 28."""
    image = Image.new("RGB", (56, 28))
    assert patches_inside(processor, image, [[28, 0, 56, 14]], 4).tolist() == [False, True, False, False]
    assert patches_inside(processor, image, [[0, 0, 28, 14], [0, 14, 56, 28]], 4).tolist() == [True, False, True, True]
    assert patches_inside(processor, image, [[0, 0, 8, 8]], 4).tolist() == [False] * 4
    with pytest.raises(ValueError, match="5 patches are no square grid"):
        patches_inside(processor, image, [], 5)


def test_locality_of_a_word_that_is_said_inside_its_box(model, processor):
    images = [make_image(i) for i in range(6)]
    mixed = read_patches(model, processor, images).mixed_features
    boat = processor.tokenizer.convert_tokens_to_ids("boat")
    labels = []
    for features in mixed:
        best = word_probabilities(features, heads(model)[0])[:, boat].argmax().item()
        x, y = 14 * (best % 2), 14 * (best // 2)
        labels.append(Labels(["boat"], {"boat": [[x, y, x + 14, y + 14]]}))
    assert analyze(model, processor, images, labels)["locality"]["auroc"]["value"] == pytest.approx(1)


def test_signatures(model, processor, monkeypatch):
    asked = [
        {"images": [str(i)], "question": f"is it red {i} ?", "answer": "yes" if i % 4 == 0 else "no"} for i in range(8)
    ]

    def answers(model, processor, questions, *_):
        if model.config.use_pseudo_image_features:
            return ["yes"] * 8  # right twice
        return ["no" if i < 4 else "yes" for i in range(8)] if model is not before[0] else ["no"] * 8

    monkeypatch.setattr("vtlmm.analysis.failure_modes.answer", answers)
    before = (type("Model", (), {"config": type("Config", (), {"use_pseudo_image_features": False})})(), None)
    found = failure_signatures(model, processor, asked, lambda key: None, before)
    assert found["vqa_score"]["value"] == 4 / 8
    assert found["hallucination_rate"]["value"] == 3 / 6 and found["hallucination_rate"]["n"] == 6
    assert found["pseudo_image_feature_gap"]["value"] == 4 / 8 - 2 / 8
    assert found["stage_instability"]["value"] == 3 / 8
    assert failure_signatures(model, processor, asked, lambda key: None)["stage_instability"] is None
    assert not model.config.use_pseudo_image_features
    assert [question["images"] for question in evenly([*asked, {"images": []}], 4)] == [["0"], ["2"], ["4"], ["6"]]


# ---- The commands ----


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("analysis")
    save_model(folder / "model", 0)
    rows = []
    for i in range(NUM_IMAGES):
        make_image(i).save(folder / f"{i}.png")
        row = {"image": f"{i}.png", "question": "is it red", "answer": "no", "what": [{"label": WORDS[9 + i]}]}
        row["what"][0]["bbox"] = [0, 0, 14, 14]
        rows.append(row)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


class Page(HTMLParser):
    """Counts what a page is made of, and checks that every tag that opens is closed."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.patches, self.sources = [], 0, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag not in ("meta", "tr", "td", "th"):
            self.open.append(tag)
        self.patches += "patch" in (attributes.get("class") or "").split()
        self.sources += [value for name, value in attributes.items() if name in ("src", "href")]
        self.sources += [attributes["style"]] if "url(" in (attributes.get("style") or "") else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_tokens_command(work, tmp_path, capsys):
    names = [str(work / "0.png"), str(work / "1.png")]
    assert main(["tokens", str(work / "model"), *names, "--output", str(tmp_path), "--top-k", "4"]) == 0
    tokens = json.loads((tmp_path / "tokens.json").read_text())
    assert [found["image"] for found in tokens["images"]] == names
    for found in tokens["images"]:
        assert all(len(found[voice]) == 4 and len(found[voice][0]) == 4 for voice in VOICES)
        for words, entropy in zip(found["vm_head"], found["entropy"], strict=True):
            values = [value for _, value in words]
            assert values == sorted(values, reverse=True) and entropy >= 0
    text = (tmp_path / "tokens.html").read_text()
    page = Page(text)
    assert not page.open and page.patches == 2 * 2 * 4
    assert len(page.sources) == 2 and all("url(data:image/jpeg;base64," in source for source in page.sources)
    for title, _ in VOICES.values():
        assert text.count(f"<th>{title}".replace("'", "&#x27;")) == 16 or text.count(f"<th>{title}") == 16
    for name in ("0_0.png", "1_1.png"):
        assert Image.open(tmp_path / name).size == (1100, 1140)
    # the images of a data set say the same
    rows = ["--data", str(work / "rows.jsonl"), "--limit", "2", "--batch-size", "1"]
    assert main(["tokens", str(work / "model"), *rows, "--output", str(tmp_path / "rows"), "--top-k", "4"]) == 0
    of_rows = json.loads((tmp_path / "rows" / "tokens.json").read_text())["images"]
    assert [found.pop("image") for found in of_rows] == ["row 0", "row 1"]
    for found, other in zip(of_rows, tokens["images"], strict=True):
        assert found["entropy"] == pytest.approx(other["entropy"], abs=1e-5)
        for voice in VOICES:
            assert [[w for w, _ in words] for words in found[voice]] == [
                [w for w, _ in words] for words in other[voice]
            ]
    assert main(["tokens", str(work / "model")]) == 1 and "or a data set by --data" in capsys.readouterr().err
    (tmp_path / "no.png").write_text("no image")
    assert main(["tokens", str(work / "model"), str(tmp_path / "no.png")]) == 1
    assert "no image that can be read" in capsys.readouterr().err


def test_analyse_command(work, tmp_path, capsys):
    command = ["analyze", str(work / "model"), "--data", str(work / "rows.jsonl"), "--labels", "what"]
    options = ["--questions", "2", "--before", str(work / "model"), "--output", str(tmp_path)]
    assert main([*command, *options, "--limit", str(NUM_IMAGES - 1)]) == 0
    results = json.loads((tmp_path / "analysis.json").read_text())
    assert results["images"] == NUM_IMAGES - 1 and results["subset"] == "the first 13 of 14 rows"
    assert set(results["signatures"]) == {
        "vqa_score",
        "hallucination_rate",
        "pseudo_image_feature_gap",
        "stage_instability",
    }
    assert results["signatures"]["stage_instability"]["value"] == 0  # before is the same model
    named = [word for word in WORDS[9 : 9 + NUM_IMAGES - 1] if content_words([word])]
    assert results["locality"]["auroc"]["n"] == results["labels"]["labeled"] == len(named) > 3
    table = (tmp_path / "analysis.md").read_text()
    found = results["lenses"]["vm_head"]["hit@5"]
    assert f"| vm_head | {found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}] |" in table
    assert "SUBSET: the first 13 of 14 rows" in table and "## Locality" in table and "## Neighborhoods" in table
    capsys.readouterr()
    assert main([*command[:-1], "nothing", "--output", str(tmp_path)]) == 1
    assert "No row has a column 'nothing'" in capsys.readouterr().err
