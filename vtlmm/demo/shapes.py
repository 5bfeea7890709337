# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Draw images of colored shapes and write captions and questions about them: the demo's dataset.

A scene is a 2 × 2 grid of cells, and 2 to 4 cells contain a shape. The same seed gives the same rows. A checksum of
the shapes and their cells decides whether a scene is held out, so no arrangement is in both splits for any seed.

The questions are balanced: a guess from the question alone is correct only by chance. Colors, shapes and cells are
uniform, the sizes of color groups make counts uniform, and yes or no is drawn before the question.
"""

import random
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, permutations

from PIL import Image, ImageDraw


COLORS = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (40, 84, 214),
    "yellow": (240, 205, 40),
    "purple": (145, 60, 180),
    "black": (30, 30, 30),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross")
# In raster order, as the patches of an image
POSITIONS = ("top-left", "top-right", "bottom-left", "bottom-right")
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "above": (-1, 0), "below": (1, 0)}  # (row, column)
NUMBERS = ("zero", "one", "two", "three", "four")
KINDS = ("color", "shape", "count", "position", "relation", "yes_no")
EXTRA_KINDS = ("color_count", "color_count", "yes_no")  # a conversation asks the two hardest kinds more often
BLANK = "empty"

GRID_SIZE = 2
CELL_SIZE = 32  # pixels
IMAGE_SIZE = GRID_SIZE * CELL_SIZE  # pixels
# Numbers of shapes with the same color. Their sums 2, 3 and 4 are equally frequent, so the total count is uniform.
COLOR_GROUPS = ((1, 1), (1, 1), (1, 1, 1), (2, 1), (2, 1, 1), (2, 2))


@dataclass(frozen=True)
class Item:
    """One shape with its cell (0 to 3, in raster order), its shift in the cell and its radius, in pixels."""

    color: str
    shape: str
    cell: int
    shift: tuple[int, int] = (0, 0)
    radius: int = 12
    fill: tuple[int, int, int] = (0, 0, 0)

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """Items in the order of their cells, all of different shapes, on a plain light background."""

    items: tuple[Item, ...]
    background: int = 235

    @property
    def key(self) -> str:
        """Return a text of the shapes and their cells. Images with the same key have the same answers."""
        return ";".join(f"{item.cell} {item.name}" for item in self.items)

    @property
    def is_held_out(self) -> bool:
        """Return whether the scene is for evaluation: one in eight. `hash` would differ between processes."""
        return zlib.crc32(self.key.encode()) % 8 == 0


@dataclass(frozen=True)
class Question:
    kind: str
    question: str
    answer: str


def make_scene(rng: random.Random) -> Scene:
    sizes = rng.choice(COLOR_GROUPS)
    colors = rng.sample(list(COLORS), len(sizes))
    colors = [color for color, size in zip(colors, sizes, strict=True) for _ in range(size)]
    shapes = rng.sample(SHAPES, len(colors))
    cells = rng.sample(range(GRID_SIZE**2), len(colors))
    items = []
    for color, shape, cell in zip(colors, shapes, cells, strict=True):
        red, green, blue = (min(255, max(0, value + rng.randint(-20, 20))) for value in COLORS[color])
        shift = (rng.randint(-3, 3), rng.randint(-3, 3))
        items.append(Item(color, shape, cell, shift, rng.randint(9, 13), (red, green, blue)))
    return Scene(tuple(sorted(items, key=lambda item: item.cell)), rng.randint(220, 250))


def draw(scene: Scene) -> Image.Image:
    """Return an RGB image of `IMAGE_SIZE` × `IMAGE_SIZE` pixels. The same scene always gives the same pixels."""
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), (scene.background,) * 3)
    canvas = ImageDraw.Draw(image)
    for item in scene.items:
        row, column = divmod(item.cell, GRID_SIZE)
        x = column * CELL_SIZE + CELL_SIZE // 2 + item.shift[0]
        y = row * CELL_SIZE + CELL_SIZE // 2 + item.shift[1]
        _draw_shape(canvas, item.shape, x, y, item.radius, item.fill)
    return image


def _draw_shape(canvas: ImageDraw.ImageDraw, shape: str, x: int, y: int, r: int, fill: tuple[int, int, int]) -> None:
    if shape == "circle":
        canvas.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif shape == "square":
        canvas.rectangle((x - r + 1, y - r + 1, x + r - 1, y + r - 1), fill=fill)
    elif shape == "triangle":
        canvas.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], fill=fill)
    elif shape == "diamond":
        canvas.polygon([(x, y - r), (x + r, y), (x, y + r), (x - r, y)], fill=fill)
    else:
        arm = r // 3
        canvas.rectangle((x - r, y - arm, x + r, y + arm), fill=fill)
        canvas.rectangle((x - arm, y - r, x + arm, y + r), fill=fill)


def caption(scene: Scene, rng: random.Random) -> str:
    """
    Return a caption that names every shape and its position, in random order.

    The position comes first, so the words after it have one correct answer, from which the projector learns.
    """
    items = rng.sample(scene.items, len(scene.items))
    return ", ".join(f"at the {POSITIONS[item.cell]} a {item.name}" for item in items)


def questions(scene: Scene, rng: random.Random, kinds: tuple[str, ...] = KINDS) -> list[Question]:
    """
    Return one question of each of `kinds` that the scene allows, in their order.

    A kind is omitted if the scene has nothing to ask about. It is never omitted because of its answer, which would
    make one answer more frequent than another.
    """
    asked = []
    for kind in kinds:
        pair = QUESTION_MAKERS[kind](scene, rng)
        if pair is not None:
            asked.append(Question(kind, *pair))
    return asked


def _ask_color(scene: Scene, rng: random.Random) -> tuple[str, str]:
    item = rng.choice(scene.items)
    place = rng.choice((f"is the {item.shape}", f"is at the {POSITIONS[item.cell]}"))
    return f"what color {place}?", item.color


def _ask_shape(scene: Scene, rng: random.Random) -> tuple[str, str]:
    counts = Counter(item.color for item in scene.items)
    single = [item for item in scene.items if counts[item.color] == 1]
    if single and rng.random() < 0.5:
        item = rng.choice(single)
        return f"what shape is {item.color}?", item.shape
    item = rng.choice(scene.items)
    return f"what shape is at the {POSITIONS[item.cell]}?", item.shape


def _ask_count(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    if rng.random() < 0.25:
        return "how many shapes are there?", NUMBERS[len(scene.items)]
    counts = Counter(item.color for item in scene.items)
    # The answer is drawn first, from scenes that allow each answer. Otherwise zero or one would be the best guess.
    if set(counts.values()) != {1, 2}:
        return None
    return _ask_color_count(scene, rng)


def _ask_color_count(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """Return a question that every scene allows. Its answers are not uniform, so it is for training only."""
    counts = Counter(item.color for item in scene.items)
    number = rng.choice(sorted({0, *counts.values()}))
    color = rng.choice([color for color in COLORS if counts[color] == number])
    return f"how many {color} shapes are there?", NUMBERS[number]


def _ask_position(scene: Scene, rng: random.Random) -> tuple[str, str]:
    item = rng.choice(scene.items)
    return f"where is the {item.shape}?", POSITIONS[item.cell]


def _ask_relation(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    """Return a question about two neighboring shapes, or None if no two shapes lie in the drawn direction."""
    direction = rng.choice(list(DIRECTIONS))
    row_step, column_step = DIRECTIONS[direction]
    pairs = []
    for item, other in permutations(scene.items, 2):
        row, column = divmod(item.cell, GRID_SIZE)
        if divmod(other.cell, GRID_SIZE) == (row + row_step, column + column_step):
            pairs.append((item, other))
    if not pairs:
        return None
    item, other = rng.choice(pairs)
    return f"on which side of the {item.shape} is the {other.shape}?", direction


def _ask_yes_no(scene: Scene, rng: random.Random) -> tuple[str, str]:
    answer = rng.choice(("yes", "no"))
    shown = [item.shape for item in scene.items]
    if rng.random() < 0.5:
        shapes = shown if answer == "yes" else [shape for shape in SHAPES if shape not in shown]
        return f"is there a {rng.choice(shapes)}?", answer
    item = rng.choice(scene.items)
    colors = [item.color] if answer == "yes" else [color for color in COLORS if color != item.color]
    return f"is the {item.shape} {rng.choice(colors)}?", answer


QUESTION_MAKERS = {
    "color": _ask_color,
    "shape": _ask_shape,
    "count": _ask_count,
    "color_count": _ask_color_count,
    "position": _ask_position,
    "relation": _ask_relation,
    "yes_no": _ask_yes_no,
}


def make_scenes(rng: random.Random, held_out: bool) -> Iterator[Scene]:
    while True:
        scene = make_scene(rng)
        if scene.is_held_out == held_out:
            yield scene


def describe_patches(scene: Scene) -> list[tuple[str, str, str]]:
    """Return (color, shape, position) of each of the 4 × 4 patches; color and shape are "empty" in an empty cell."""
    contents = {item.cell: (item.color, item.shape) for item in scene.items}
    cells = [(row // 2) * GRID_SIZE + column // 2 for row in range(2 * GRID_SIZE) for column in range(2 * GRID_SIZE)]
    return [(*contents.get(cell, (BLANK, BLANK)), POSITIONS[cell]) for cell in cells]


def patch_caption(scene: Scene) -> str:
    """
    Return the contents of every patch in raster order.

    Only a projector that maps each patch to the decoder's words for it can answer this; captions need less.
    """
    return " ".join(color if color == BLANK else f"{color} {shape}" for color, shape, _ in describe_patches(scene))


def _conversation(turns: list[tuple[str, str]]) -> list[dict]:
    messages: list[dict] = []
    for i, (question, answer) in enumerate(turns):
        content: list[dict] = [{"type": "text", "text": question}]
        image: list[dict] = [{"type": "image", "text": None}] if i == 0 else []
        messages.append({"role": "user", "content": image + content})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


def _row(scene: Scene, turns: list[tuple[str, str]], kind: str) -> dict:
    return {"messages": _conversation(turns), "images": [draw(scene)], "num_context_messages": 0, "kind": kind}


CAPTION_QUESTION, PATCH_QUESTION = "describe the image", "name the patches"


def caption_rows(num: int, seed: int) -> list[dict]:
    """Return rows of `num` training images with a caption. Two of three captions name every patch."""
    rng = random.Random(seed)
    rows = []
    for scene in islice(make_scenes(rng, held_out=False), num):
        dense = rng.random() < 2 / 3
        turn = (PATCH_QUESTION, patch_caption(scene)) if dense else (CAPTION_QUESTION, caption(scene, rng))
        rows.append(_row(scene, [turn], "caption"))
    return rows


def question_rows(num: int, seed: int, held_out: bool = False, one_each: bool = False) -> list[dict]:
    """
    Return rows of questions about `num` images, in random order.

    Args:
        num (`int`): Number of images.
        seed (`int`): Seed of scenes and questions.
        held_out (`bool`, *optional*, defaults to `False`): Use held-out scenes.
        one_each (`bool`, *optional*, defaults to `False`): One question per row instead of a conversation per image.
    """
    rng = random.Random(seed)
    rows = []
    for scene in islice(make_scenes(rng, held_out), num):
        if one_each:
            rows += [_row(scene, [(q.question, q.answer)], q.kind) for q in shuffled(questions(scene, rng), rng)]
        else:
            asked = questions(scene, rng) + questions(scene, rng, EXTRA_KINDS)
            turns = dict.fromkeys((q.question, q.answer) for q in asked)  # without duplicates
            rows.append(_row(scene, shuffled(turns, rng), "all"))
    return rows


def shuffled(items: Iterable, rng: random.Random) -> list:
    """Return the items in random order."""
    items = list(items)
    return rng.sample(items, len(items))


def words() -> list[str]:
    """Return all words and punctuation marks of captions, questions and answers, in a fixed order."""
    rng = random.Random(0)
    texts = {CAPTION_QUESTION, PATCH_QUESTION, BLANK}
    for scene in islice(make_scenes(rng, held_out=False), 500):
        texts.add(caption(scene, rng))
        texts.update(text for q in questions(scene, rng) for text in (q.question, q.answer))
    return sorted({word for text in texts for word in re.findall(r"[\w-]+|[^\w\s]", text)})
