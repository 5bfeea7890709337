# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The demo's images and questions: the answers are correct, and only the image gives them away. Its warm start."""

import random
import re
from collections import Counter, defaultdict
from itertools import islice
from pathlib import Path

import pytest
import torch

from vtlmm.demo import warm_start
from vtlmm.demo.run import as_dataset, quiet_libraries, run_demo
from vtlmm.demo.shapes import (
    BLANK,
    COLORS,
    GRID_SIZE,
    IMAGE_SIZE,
    KINDS,
    NUMBERS,
    POSITIONS,
    SHAPES,
    caption,
    caption_rows,
    describe_patches,
    draw,
    make_scenes,
    patch_caption,
    question_rows,
    questions,
    words,
)
from vtlmm.hub.compose import compose_model


# Accuracy of a guess without the image, for uniform answers, and a margin for the sampling error
CHANCE = {"color": 1 / 6, "shape": 1 / 5, "count": 1 / 3, "position": 1 / 4, "relation": 1 / 4, "yes_no": 1 / 2}
MARGIN = 0.05
SIDES = {(-1, 0): "left", (1, 0): "right", (0, -1): "above", (0, 1): "below"}  # (x, y)


def scenes(num: int, seed: int, held_out: bool = False) -> list:
    return list(islice(make_scenes(random.Random(seed), held_out), num))


def asked(num: int, seed: int, held_out: bool = False) -> list:
    rng = random.Random(seed)
    return [(scene, question) for scene in scenes(num, seed, held_out) for question in questions(scene, rng)]


def grid(scene) -> dict[tuple[int, int], tuple[str, str]]:
    """Return (x, y) of each cell to its (color, shape), so that `solve` does not use the scene's own code."""
    return {(item.cell % GRID_SIZE, item.cell // GRID_SIZE): (item.color, item.shape) for item in scene.items}


def find_cell(cells: dict, word: str) -> tuple[int, int]:
    """Return the only cell that `word` (a color, a shape or a position) can refer to."""
    if word in POSITIONS:
        vertical, horizontal = word.split("-")
        return ("left", "right").index(horizontal), ("top", "bottom").index(vertical)
    [cell] = [cell for cell, pair in cells.items() if word in pair]
    return cell


def solve(scene, question: str) -> str:
    cells = grid(scene)
    if found := re.fullmatch(r"what (color|shape) is (?:at )?(?:the )?([\w-]+)\?", question):
        return cells[find_cell(cells, found[2])][found[1] == "shape"]
    if question == "how many shapes are there?":
        return NUMBERS[len(cells)]
    if found := re.fullmatch(r"how many (\w+) shapes are there\?", question):
        return NUMBERS[sum(color == found[1] for color, _ in cells.values())]
    if found := re.fullmatch(r"where is the (\w+)\?", question):
        x, y = find_cell(cells, found[1])
        return f"{('top', 'bottom')[y]}-{('left', 'right')[x]}"
    if found := re.fullmatch(r"on which side of the (\w+) is the (\w+)\?", question):
        (x, y), (other_x, other_y) = find_cell(cells, found[1]), find_cell(cells, found[2])
        return SIDES[other_x - x, other_y - y]
    if found := re.fullmatch(r"is there a (\w+)\?", question):
        return "yes" if any(shape == found[1] for _, shape in cells.values()) else "no"
    if found := re.fullmatch(r"is the (\w+) (\w+)\?", question):
        return "yes" if cells[find_cell(cells, found[1])][0] == found[2] else "no"
    raise ValueError(question)


def test_answers_are_correct_and_cover_all_kinds():
    pairs = asked(1500, seed=0)
    for scene, question in pairs:
        assert solve(scene, question.question) == question.answer, (scene.key, question)
    assert set(Counter(question.kind for _, question in pairs)) == set(KINDS)


def test_every_scene_allows_a_color_count():
    rng = random.Random(0)
    answers = Counter()
    for scene in scenes(500, seed=10):
        [question] = questions(scene, rng, ("color_count",))
        assert solve(scene, question.question) == question.answer
        answers[question.answer] += 1
    assert set(answers) == {"zero", "one", "two"}


@pytest.mark.slow
def test_guess_without_image_is_near_chance():
    counts = defaultdict(Counter)
    for _, question in asked(6000, seed=1):
        counts[question.question][question.answer] += 1
    right = defaultdict(list)
    for _, question in asked(3000, seed=2, held_out=True):
        guess = max(counts[question.question].items(), key=lambda item: item[1], default=(None, 0))[0]
        right[question.kind].append(guess == question.answer)
    for kind, values in right.items():
        assert sum(values) / len(values) < CHANCE[kind] + MARGIN, kind


def test_yes_and_no_are_balanced():
    answers = defaultdict(Counter)
    for _, question in asked(6000, seed=3):
        if question.kind == "yes_no":
            answers[question.question.split()[1]][question.answer] += 1
    assert set(answers) == {"there", "the"}
    for counted in answers.values():
        assert abs(counted["yes"] / sum(counted.values()) - 0.5) < 0.04


def test_splits_share_no_scene():
    train = {scene.key for seed in range(4) for scene in scenes(1000, seed)}
    held_out = {scene.key for seed in range(4) for scene in scenes(250, seed, held_out=True)}
    assert len(held_out) > 500
    assert not train & held_out


def test_same_seed_gives_same_rows():
    for make in (caption_rows, question_rows):
        first, again, other = make(20, 5), make(20, 5), make(20, 6)
        assert [row["messages"] for row in first] == [row["messages"] for row in again]
        assert [row["images"][0].tobytes() for row in first] == [row["images"][0].tobytes() for row in again]
        assert [row["messages"] for row in first] != [row["messages"] for row in other]
        assert first[0]["images"][0].tobytes() != other[0]["images"][0].tobytes()


def test_rows_have_one_image_part_and_alternate():
    rows = caption_rows(20, 0) + question_rows(20, 0) + question_rows(20, 0, held_out=True, one_each=True)
    for row in rows:
        parts = [part["type"] for message in row["messages"] for part in message["content"]]
        assert parts.count("image") == len(row["images"]) == 1
        assert row["messages"][0]["content"][0]["type"] == "image"
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert row["images"][0].size == (IMAGE_SIZE, IMAGE_SIZE)
    assert all(len(row["messages"]) == 2 and row["kind"] in KINDS for row in rows[40:])


def test_conversations_repeat_hard_kinds_without_duplicates():
    num_counts, rows = 0, question_rows(300, 0)
    for row in rows:
        texts = [message["content"][-1]["text"] for message in row["messages"][::2]]
        assert len(set(texts)) == len(texts)
        num_counts += sum(text.startswith("how many") for text in texts)
    single = question_rows(300, 0, one_each=True)
    assert num_counts > 2.5 * sum(row["kind"] == "count" for row in single)


def test_vocabulary_covers_every_text():
    known = set(words())
    assert known >= {*COLORS, *SHAPES, *POSITIONS, BLANK}
    for row in caption_rows(300, 9) + question_rows(300, 9) + question_rows(300, 9, held_out=True):
        for message in row["messages"]:
            text = message["content"][-1]["text"]
            assert set(re.findall(r"[\w-]+|[^\w\s]", text)) <= known, text


def test_pixels_have_the_named_colors():
    for scene in scenes(200, 4):
        image, cells = draw(scene), grid(scene)
        side = IMAGE_SIZE // GRID_SIZE
        for x in range(GRID_SIZE):
            for y in range(GRID_SIZE):
                tile = image.crop((x * side, y * side, (x + 1) * side, (y + 1) * side))
                # a shape may reach a row or two into the next cell
                shown = [c for n, c in tile.getcolors() if n > 60 and c != (scene.background,) * 3]
                if (x, y) not in cells:
                    assert not shown
                    continue
                [pixel] = shown
                nearest = min(
                    COLORS, key=lambda name: sum((a - b) ** 2 for a, b in zip(COLORS[name], pixel, strict=True))
                )
                assert nearest == cells[x, y][0]


def test_caption_names_every_shape_once():
    for scene in scenes(100, 7):
        named = re.findall(r"at the ([\w-]+) a (\w+) (\w+)", caption(scene, random.Random(0)))
        cells = grid(scene)
        assert sorted(named) == sorted((POSITIONS[y * GRID_SIZE + x], *pair) for (x, y), pair in cells.items())


def test_patch_caption_names_every_patch_in_order():
    for scene in scenes(200, seed=8):
        words = iter(patch_caption(scene).split())
        for color, shape, _ in describe_patches(scene):
            assert next(words) == color and (color == BLANK or next(words) == shape)
        assert next(words, None) is None


@pytest.mark.parametrize("held_out", [False, True])
def test_patch_descriptions_match_their_cell(held_out):
    for scene in scenes(50, 8, held_out):
        patches, cells, side = describe_patches(scene), grid(scene), 2 * GRID_SIZE
        assert len(patches) == side**2
        for i, patch in enumerate(patches):
            x, y = i % side // 2, i // side // 2
            assert patch == (*cells.get((x, y), (BLANK, BLANK)), POSITIONS[y * GRID_SIZE + x])


def test_new_projector_has_the_norm_of_patch_words(tmp_path, monkeypatch):
    monkeypatch.setattr(warm_start, "LOOKUP_STEPS", 1)
    monkeypatch.setattr(warm_start, "QUESTION_STEPS", 1)
    tower, tokenizer = warm_start.train_tower(0, steps=1), warm_start.build_tokenizer()
    for folder, part in (
        ("tower", tower),
        ("tower", warm_start.build_image_processor()),
        ("decoder", warm_start.train_decoder(tokenizer, seed=0)),
        ("decoder", tokenizer),
    ):
        part.save_pretrained(tmp_path / folder)
    template = str(Path(warm_start.__file__).parent / "chat_template.jinja")
    model, _ = compose_model(
        str(tmp_path / "tower"), str(tmp_path / "decoder"), tmp_path / "model", chat_template=template
    )
    vision_features = 5 * torch.randn(8, 16, 64)  # the scale of the trained tower
    projected = model.model.multi_modal_projector(vision_features).norm(dim=-1).mean()
    word_ids = torch.tensor([tokenizer.convert_tokens_to_ids(["red", "circle", "top-left"])])
    patch = model.get_input_embeddings()(word_ids).mean(1).norm()
    assert 0.3 < projected / patch < 3


def test_the_demo_hides_progress_bars_of_libraries(capfd):
    rows = caption_rows(4, seed=0)
    with quiet_libraries():
        as_dataset(rows)
    assert capfd.readouterr().err == ""
    as_dataset(rows)
    assert "Casting the dataset" in capfd.readouterr().err  # shown again after the demo


def test_an_existing_output_is_refused_before_the_training(tmp_path):
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(FileExistsError, match="is not empty. Choose another folder, or delete it"):
        run_demo(tmp_path)
