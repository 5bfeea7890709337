# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Random changes of rows and images, for tests of everything that reads rows."""

import base64
import copy
import random

import numpy as np
from PIL import Image


MAX_LENGTH = 100  # in tokens, and the number of positions of the decoder
CHAT = [{"role": "user", "content": "<image> what ?"}, {"role": "assistant", "content": "a red square"}]
TURNS = [
    {"from": "human", "value": "<image>\nwhat is it ?"},
    {"from": "gpt", "value": "red"},
    {"from": "human", "value": "and the color ?"},
    {"from": "gpt", "value": "blue"},
]
PARTS = [{"type": "image"}, {"type": "text", "text": "what ?"}]
BASES = [
    {"messages": CHAT, "images": ["good.png"]},
    {"conversations": TURNS, "image": "good.png", "id": 7},
    {"question": "what ?", "answer": "red", "image": "good.png"},
    {"questions": ["what ?", "which ?"], "answers": ["red", "blue"], "images": ["good.png", "photo.jpg"]},
    {"instruction": "say it", "input": "red", "output": "blue"},
    {"query": "<image> what <image> ?", "response": "yes", "images": ["good.png", "photo.jpg"]},
    {"prompt": "what ?", "completion": "red", "image": "photo.jpg"},
    {"prompt": [CHAT[0]], "completion": [CHAT[1]], "images": ["good.png"]},
    {"image": "photo.jpg", "caption": "a red square"},
    {"texts": [{"user": "what ?", "assistant": "red"}], "images": ["good.png"]},
    {"messages": [{"role": "user", "content": PARTS}, CHAT[1]], "image": "good.png", "system": "say yes"},
    {"question": "what ?", "answers": ["red", "red", "blue"], "image": "good.png"},
]
VALUES = [
    None, "", " ", 3, -1.5, float("nan"), True, False, [], {}, [[]], [None], {"a": 1}, ["red", 3], "red", "3", "null",
    "<image>", "<image> <image> what ?", "what <image>", "</s>", "<s> red", "USER : what ? ASSISTANT : red", "<unk>",
    "good.png", "photo.jpg", "\ud800", "\u202ered", "red\x00blue", "é ü 漢", "red " * 60, "{{ 1 }}", "[]", "[1, 2]",
    [{"role": "user", "content": "hi"}], {"bytes": None, "path": "good.png"}, "data:image/png;base64,AAAA",
    {"url": "good.png"}, [{"type": "image"}], [{"type": "text"}], [{"type": "video", "video": "a.mp4"}],
]  # fmt: skip
IMAGES = [
    "good.png", "photo.jpg", "missing.png", "cut.png", "text.png", "flipped.png", "deep.png", "strip.png",
    "palette.png", "cmyk.jpg", "rotated.jpg", "animated.gif", "../good.png", "./sub/../good.png", "/missing/a.png",
    "https://example.com/a.png", "file://good.png", "sub", "", ".", "GOOD.PNG", "data:image/png;base64,####",
    ["good.png", "good.png"], [["good.png"]], ["good.png", None], {"path": "good.png", "bytes": None}, 3, [], [3],
    "good\x00.png", "s3://bucket/a.png",
]  # fmt: skip
COLUMNS = [
    "tools", "system", "history", "images", "image", "photo", "text", "caption", "answer", "answers", "question",
    "messages", "num_context_messages", "id", "label", "choices", "videos", "completion", "input", "context",
]  # fmt: skip


def write_images(folder) -> None:
    """Write images of many kinds, and files that are not images."""
    (folder / "sub").mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    photo = Image.fromarray(pixels)
    photo.save(folder / "good.png")
    photo.save(folder / "photo.jpg")
    content = (folder / "good.png").read_bytes()
    (folder / "cut.png").write_bytes(content[: len(content) // 2])
    (folder / "text.png").write_text("<html>404</html>")
    (folder / "flipped.png").write_bytes(content[:60] + bytes([content[60] ^ 255]) + content[61:])
    Image.fromarray(np.full((8, 8), 30000, dtype=np.uint16)).save(folder / "deep.png")
    Image.new("RGB", (3000, 2), "red").save(folder / "strip.png")
    photo.quantize(8).save(folder / "palette.png", transparency=0)
    photo.convert("CMYK").save(folder / "cmyk.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (32, 16), "blue").save(folder / "rotated.jpg", exif=exif)
    photo.save(folder / "animated.gif", save_all=True, append_images=[Image.new("RGB", (32, 32))])


def paths(value, path=()):
    """Yield the path of every value inside a row."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from paths(item, (*path, key))


def mutate(row, rng):
    """Return a copy of a row with one random change."""
    row = copy.deepcopy(row)
    kind = rng.choice(["value", "value", "image", "image", "column", "remove", "rename", "repeat", "base64"])
    path = rng.choice(list(paths(row)) or [("question",)])
    parent = row
    for key in path[:-1]:
        parent = parent[key]
    if kind == "value":
        parent[path[-1]] = copy.deepcopy(rng.choice(VALUES))
    elif kind == "image":
        row["images" if "images" in row else "image"] = copy.deepcopy(rng.choice(IMAGES))
    elif kind == "base64":
        row.pop("images", None)
        row["image"] = base64.b64encode(rng.randbytes(40)).decode()
    elif kind == "column":
        row[rng.choice(COLUMNS)] = copy.deepcopy(rng.choice(VALUES))
    elif kind == "remove":
        del parent[path[-1]]
    elif kind == "rename":
        name = rng.choice(list(row) or ["a"])
        row[rng.choice(COLUMNS)] = row.pop(name, None)
    elif kind == "repeat" and isinstance(parent, list):
        parent.insert(rng.randrange(len(parent) + 1), copy.deepcopy(parent[path[-1]]))
    return row


def mutated_row(seed):
    rng = random.Random(seed)
    row = rng.choice(BASES)
    for _ in range(rng.choice([1, 1, 2, 3])):
        row = mutate(row, rng)
    return row
