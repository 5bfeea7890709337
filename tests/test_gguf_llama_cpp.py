# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Exported GGUF files in llama.cpp itself (the package xllamacpp): `make gguf` runs these tests."""

import copy
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.gguf_models import DECODERS, TEXTS, build_vision, patch_json, write_gguf_source
from PIL import Image, ImageDraw
from transformers import SiglipVisionModel

from modeling_vtlmm import VTLMMForConditionalGeneration, VTLMMProcessor


pytest.importorskip("gguf")
pytest.importorskip("xllamacpp", reason="xllamacpp (llama.cpp) is not installed; `make gguf` installs it")

from vtlmm.hub.compose import compose_model  # noqa: E402
from vtlmm.hub.export_gguf import export_gguf  # noqa: E402


pytestmark = pytest.mark.slow

NUM_TOKENS = 24
GREEDY = {"temperature": 0, "n_predict": NUM_TOKENS, "return_tokens": True, "samplers": ["temperature"]}
QUESTION = "What is in the image?"


def draw_image(path: Path, size: tuple[int, int], seed: int) -> Path:
    """Draw four ellipses in random colors."""
    random = np.random.default_rng(seed)
    image = Image.new("RGB", size, tuple(map(int, random.integers(0, 256, 3))))
    for _ in range(4):
        x, y = (int(random.integers(0, side - 8)) for side in size)
        corners = [x, y, x + int(random.integers(6, size[0])), y + int(random.integers(6, size[1]))]
        ImageDraw.Draw(image).ellipse(corners, fill=tuple(map(int, random.integers(0, 256, 3))))
    image.save(path)
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list[Path]:
    """Two images in the size of the tower, a larger one, a wide one, and the wide one in the size of the tower."""
    folder = tmp_path_factory.mktemp("images")
    sizes = {"first": (56, 56), "second": (56, 56), "large": (224, 224), "wide": (120, 80)}
    files = [draw_image(folder / f"{name}.png", size, seed) for seed, (name, size) in enumerate(sizes.items())]
    stretched = folder / "stretched.png"
    Image.open(files[-1]).resize((56, 56), Image.Resampling.BICUBIC).save(stretched)
    return [*files, stretched]


def user(text: str, num_images: int) -> dict:
    return {"role": "user", "content": [*[{"type": "image"}] * num_images, {"type": "text", "text": text}]}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


@dataclass
class Conversation:
    """A conversation with images: messages (`list[dict]`) and images (`list[Path]`)."""

    messages: list
    images: list


def conversations(images: list[Path]) -> dict[str, Conversation]:
    return {
        "text only": Conversation([user("Tell me a story.", 0)], []),
        "one image": Conversation([user(QUESTION, 1)], images[:1]),
        "another image": Conversation([user(QUESTION, 1)], images[1:2]),
        "two images": Conversation([user("Compare the images.", 2)], images[:2]),
        "three turns": Conversation(
            [
                user(QUESTION, 1),
                assistant("A boat."),
                user("\tWhat color?", 0),
                assistant("Red."),
                user("And this?", 1),
            ],
            images[:2],
        ),
    }


class LlamaCpp:
    """The replies of llama.cpp and of transformers for an exported model."""

    def __init__(self, source: Path, output: Path, file_type: str, images: list[Path], start: str = ""):
        self.processor = VTLMMProcessor.from_pretrained(source)
        self.model = VTLMMForConditionalGeneration.from_pretrained(source, dtype=torch.float32).eval()
        self.files = export_gguf(source, output, file_type)
        self.conversations = conversations(images)
        self.images = images
        prompts = {name: start + self.prompt(conversation) for name, conversation in self.conversations.items()}
        texts = [text if text.startswith(" ") else start + text for text in TEXTS]
        requests = {("tokens", i): {"path": "/tokenize", "body": tokenize(text)} for i, text in enumerate(texts)}
        for name, conversation in self.conversations.items():
            files = [str(file) for file in conversation.images]
            messages = copy.deepcopy(conversation.messages)
            requests["prompt", name] = {"path": "/apply-template", "body": {"messages": messages}, "images": files}
            requests["answer", name] = completion(prompts[name], files)
            body = {"messages": copy.deepcopy(messages), "temperature": 0, "max_tokens": NUM_TOKENS}
            requests["chat", name] = {"path": "/v1/chat/completions", "body": body, "images": files}
        for file in images:
            requests["resized", file.stem] = completion(prompts["one image"], [str(file)])
        self.replies = dict(zip(requests, self.ask(output, list(requests.values())), strict=True))

    def ask(self, folder: Path, requests: list[dict]) -> list[dict]:
        """Send requests to llama.cpp in a new process."""
        (folder / "requests.json").write_text(json.dumps(requests))
        script = Path(__file__).parent / "helpers" / "llama_cpp_server.py"
        paths = [script, self.files.model, self.files.mmproj, folder / "requests.json", folder / "replies.json"]
        done = subprocess.run([sys.executable, *map(str, paths)], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads((folder / "replies.json").read_text())

    def prompt(self, conversation: Conversation) -> str:
        return self.processor.apply_chat_template(conversation.messages, add_generation_prompt=True, tokenize=False)

    @torch.no_grad()
    def logits(self, prompt: str, files: list, tokens: list[int]) -> torch.Tensor:
        """Return transformers' logits (len(tokens) + 1, vocab_size) for the prompt and an answer."""
        images = [Image.open(file).convert("RGB") for file in files] or None
        inputs = self.processor(images=images, text=prompt, return_tensors="pt")
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([tokens], dtype=torch.long)], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        return self.model(**inputs).logits[0, -len(tokens) - 1 :]

    def regrets(self, group: str = "answer") -> dict[str, float]:
        """
        Return how far the tokens of llama.cpp's answers are below the best ones.

        Returns:
            `dict`: name to the largest difference between the highest logit of transformers and the logit of
                llama.cpp's token. It is 0 if each token is the greedy one.
        """
        found = {}
        for (kind, name), reply in self.replies.items():
            if kind == group:
                assert "error" not in reply, reply
                conversation = self.conversations.get(name, self.conversations["one image"])
                files = conversation.images if kind == "answer" else [f for f in self.images if f.stem == name]
                tokens = reply["tokens"]
                assert len(tokens) > 2
                logits = self.logits(self.prompt(conversation), files, tokens[:-1])
                chosen = logits[torch.arange(len(tokens)), torch.tensor(tokens)]
                found[name] = float((logits.max(-1).values - chosen).max())
        return found


def tokenize(text: str) -> dict:
    return {"content": text, "add_special": True, "parse_special": True}


def completion(prompt: str, files: list[str]) -> dict:
    return {"path": "/completion", "body": {**GREEDY, "prompt": prompt}, "images": files}


@pytest.fixture(scope="module")
def exported(tmp_path_factory, images):
    """Function that exports a model of `write_gguf_source` and asks llama.cpp, once per arguments."""
    made = {}

    def export(kind: str, file_type: str = "f32", tower: str = "siglip_vision_model", **values) -> LlamaCpp:
        key = f"{kind} {file_type} {tower} {values}"
        if key not in made:
            folder = tmp_path_factory.mktemp("model")
            source = write_gguf_source(folder / "source", kind, tower, **values)
            # llama.cpp has no setting for a space at the start only: the chat template writes it
            made[key] = LlamaCpp(source, folder / "gguf", file_type, images, " " if kind == "vicuna" else "")
        return made[key]

    return export


@pytest.mark.parametrize("kind", DECODERS)
def test_greedy_answers_equal_those_of_transformers(exported, kind):
    """
    Text only, one image, two images, and several turns.

    The weights are random, so two tokens can be almost equally likely. The logits have a standard deviation of 1 to 3.
    """
    found = exported(kind).regrets()
    assert max(found.values()) < 0.01, found
    assert sum(value == 0 for value in found.values()) >= 3, found
    answers = {name: exported(kind).replies["answer", name]["tokens"] for name in ("one image", "another image")}
    assert answers["one image"] != answers["another image"]


@pytest.mark.parametrize("kind", ["llama", "vicuna", "smollm2", "qwen2"])
def test_greedy_answers_are_equal_in_float16(exported, kind):
    found = exported(kind, "f16").regrets()
    assert max(found.values()) < 0.02, found
    assert sum(value == 0 for value in found.values()) >= 3, found


VISION = {
    "last layer": {"vision_feature_layer": -1},
    "two layers": {"vision_feature_layer": [-3, -1]},
    "no bias": {"multimodal_projector_bias": False},
}


@pytest.mark.parametrize("values", VISION.values(), ids=VISION)
def test_other_layers_and_a_projector_without_bias(exported, values):
    found = exported("llama", **values).regrets()
    assert max(found.values()) < 0.01, found


@pytest.mark.parametrize(("file_type", "limit"), [("bf16", 0.1), ("q8_0", 0.5)])
def test_answers_of_smaller_types_are_near(exported, file_type, limit):
    assert max(exported("llama", file_type).regrets().values()) < limit


def test_llama_cpp_pads_images_that_the_processor_stretches(exported):
    """Square images of any size give the answers of transformers, and a wide image after a resize by the client."""
    found = exported("llama").regrets("resized")
    assert max(found[name] for name in ("first", "second", "large", "stretched")) < 0.02, found
    assert found["wide"] > 0.1  # if this fails, llama.cpp has learned to stretch: remove STRETCH_WARNING


def test_answers_about_images_differ_with_a_clip_tower(exported):
    """llama.cpp puts CLS behind the patches. If this fails, it was corrected: remove CLIP_WARNING."""
    found = exported("llama", tower="clip_vision_model").regrets()
    assert found.pop("text only") == 0 and min(found.values()) > 0.1, found


@pytest.mark.parametrize("file_type", ["f32", "f16"])
def test_a_trained_decoder_gives_the_same_answers(shared, tmp_path, images, file_type):
    """TinyStories with a Llama tokenizer. Its own tokenizer strips white space, which llama.cpp does not."""
    decoder = tmp_path / "decoder"
    shutil.copytree(shared / "weights" / "stories260k", decoder, copy_function=shutil.copyfile)
    decoder.chmod(0o755)

    def keep_white_space(values: dict) -> None:
        values["normalizer"]["normalizers"] = values["normalizer"]["normalizers"][2:]

    patch_json(decoder / "tokenizer.json", keep_white_space)
    vision_config, image_processor = build_vision("siglip_vision_model")
    torch.manual_seed(0)
    SiglipVisionModel(vision_config).save_pretrained(tmp_path / "tower")
    image_processor.save_pretrained(tmp_path / "tower")
    compose_model(str(tmp_path / "tower"), str(decoder), tmp_path / "source")
    found = LlamaCpp(tmp_path / "source", tmp_path / "gguf", file_type, images).regrets()
    assert found == dict.fromkeys(found, 0.0) and len(found) == 5


@pytest.mark.parametrize("kind", DECODERS)
def test_texts_are_tokenized_as_transformers_does(exported, kind):
    llama_cpp = exported(kind)
    tokenizer = llama_cpp.processor.tokenizer
    wrong = {}
    for i, text in enumerate(TEXTS):
        expected = tokenizer(text).input_ids
        found = llama_cpp.replies["tokens", i]["tokens"]
        if found != expected:
            wrong[text] = tokenizer.convert_ids_to_tokens(expected), tokenizer.convert_ids_to_tokens(found)
    assert wrong == {}


@pytest.mark.parametrize("kind", DECODERS)
def test_chat_requests_give_the_prompt_and_answer_of_transformers(exported, kind):
    """The server renders the exported template, and its chat answers are those to transformers' prompt."""
    llama_cpp = exported(kind)
    bos = llama_cpp.processor.tokenizer.bos_token or ""
    for name, conversation in llama_cpp.conversations.items():
        assert "error" not in llama_cpp.replies["prompt", name], llama_cpp.replies["prompt", name]
        prompt, expected = llama_cpp.replies["prompt", name]["prompt"], llama_cpp.prompt(conversation)
        assert prompt == " " + expected if kind == "vicuna" else prompt in (expected, expected.removeprefix(bos))
        chat = llama_cpp.replies["chat", name]["choices"][0]["message"]["content"]
        answer = llama_cpp.replies["answer", name]["content"]
        assert chat.strip().rstrip("\ufffd") == answer.strip().rstrip(
            "\ufffd"
        )  # without the bytes of an incomplete character
