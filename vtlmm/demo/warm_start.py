# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Train a small vision tower and a small decoder from random weights. A real run downloads both.

The tower learns to name the color, the shape and the position of each patch. The decoder learns from text alone: in
place of the image, each patch is the mean of the word embeddings of its color, shape and position, which is the form
of a pseudo image feature. A caption or questions and answers follow. So the decoder has read about images before it
sees one, as a language model has, and it predicts words at the patches from the start.
"""

import math
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import nn
from tqdm.auto import trange
from transformers import (
    CLIPImageProcessorPil,
    ConvNextConfig,
    ConvNextModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from .shapes import (
    BLANK,
    CAPTION_QUESTION,
    COLORS,
    GRID_SIZE,
    IMAGE_SIZE,
    KINDS,
    NUMBERS,
    PATCH_QUESTION,
    POSITIONS,
    SHAPES,
    Scene,
    caption,
    describe_patches,
    draw,
    make_scenes,
    patch_caption,
    questions,
    words,
)


NUM_PATCHES = (2 * GRID_SIZE) ** 2
TOWER_STEPS, LOOKUP_STEPS, QUESTION_STEPS = 250, 250, 650
PATCH_WEIGHT = 0.4  # weight of the next patch in the decoder's loss; an answer has weight 1
NUM_LOOKUPS, NUM_TURNS = 30, 8  # turns per row of the decoder's text
# Counting and comparing colors are the hardest kinds, so the text asks them most often
LOOKUP_WEIGHTS = (3, 2, 5)  # count, comparison, property
QUESTION_WEIGHTS = (1, 1, 3, 1, 1, 2)  # in the order of `KINDS`

Turns = list[tuple[str, str]]  # pairs of question and answer


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per word or punctuation mark."""
    tokens = ["<pad>", "<s>", "</s>", "<unk>", "Q", "A", ":", *words()]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\w-]+|[^\w\s]"), behavior="removed", invert=True)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(Regex(r"^(?=\w)"), " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def build_image_processor() -> CLIPImageProcessorPil:
    """Return an image processor for the images of [`~shapes.draw`]."""
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return CLIPImageProcessorPil(
        size=side, do_center_crop=False, crop_size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )


def _rate(step: int, steps: int) -> float:
    """Return the factor of the learning rate: a warm-up, then a cosine schedule down to 5 %."""
    return min(1.0, (step + 1) / 20) * (0.525 + 0.475 * math.cos(math.pi * step / steps))


def train_tower(seed: int, steps: int = TOWER_STEPS, batch_size: int = 32) -> ConvNextModel:
    """Return a small ConvNeXt whose 4 × 4 output positions encode the color, the shape and the position of a patch."""
    scenes = make_scenes(random.Random(seed), held_out=False)
    processor = build_image_processor()
    tower = ConvNextModel(
        ConvNextConfig(
            image_size=IMAGE_SIZE, patch_size=4, num_stages=3, hidden_sizes=[24, 48, 64], depths=[1, 1, 1],
            layer_scale_init_value=1.0, initializer_range=0.05,
        )
    )  # fmt: skip
    kinds = ([*COLORS, BLANK], [*SHAPES, BLANK], POSITIONS)
    heads = nn.ModuleList(nn.Linear(64, len(kind)) for kind in kinds)
    optimizer = torch.optim.AdamW([*tower.parameters(), *heads.parameters()], lr=4e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    for _ in trange(steps, desc="vision tower", leave=False, disable=None):
        batch = [next(scenes) for _ in range(batch_size)]
        pixels = processor([draw(scene) for scene in batch], return_tensors="pt")["pixel_values"]
        features = tower(pixels).last_hidden_state.flatten(2).transpose(1, 2)
        words = [describe_patches(scene) for scene in batch]
        loss = torch.zeros(())
        for i, (head, kind) in enumerate(zip(heads, kinds, strict=True)):
            target = torch.tensor([[kind.index(patch[i]) for patch in patches] for patches in words])
            loss = loss + F.cross_entropy(head(features).flatten(0, 1), target.flatten())
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return tower.eval()


class DescribedImages:
    """
    Batches of text about images whose patches are described in words: `<s> Q :`, the patches, then turns.

    Each turn attends to the patches and to itself. The turns are lookups such as `circle color red` at first, later
    questions as in the demo. Lookups are short, and a row contains thirty of them, so the decoder learns early that
    the answer is in the patches.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int):
        self.tokenizer = tokenizer
        self.ids = tokenizer.get_vocab()
        self.rng = random.Random(seed)
        self.scenes = make_scenes(self.rng, held_out=False)
        self.prefix = 3

    def lookups(self, scene: Scene) -> Turns:
        """Return short turns about a scene: a count, a comparison or a property."""
        counts = Counter(item.color for item in scene.items)
        turns = []
        for _ in range(NUM_LOOKUPS):
            kind = self.rng.choices(("count", "comparison", "property"), LOOKUP_WEIGHTS)[0]
            item = self.rng.choice(scene.items)
            if kind == "count":
                number = self.rng.choice(sorted({0, *counts.values()}))
                color = self.rng.choice([color for color in COLORS if counts[color] == number])
                turns.append((f"many {color}", NUMBERS[number]))
            elif kind == "comparison":
                same = self.rng.random() < 0.5
                color = item.color if same else self.rng.choice([color for color in COLORS if color != item.color])
                turns.append((f"{item.shape} {color}?", "yes" if same else "no"))
            else:
                facts = {"color": item.color, "shape": item.shape, "where": POSITIONS[item.cell]}
                known = self.rng.choice(("shape", "where"))  # two shapes can have the same color
                wanted = self.rng.choice([name for name in facts if name != known])
                turns.append((f"{facts[known]} {wanted}", facts[wanted]))
        return turns

    def questions(self, scene: Scene) -> Turns:
        """Return turns as in a chat of the demo. The first turn follows the image, later ones begin with `Q:`."""
        turns = [(PATCH_QUESTION, patch_caption(scene))] if self.rng.random() < 0.5 else []
        turns += [(CAPTION_QUESTION, caption(scene, self.rng))] if self.rng.random() < 0.25 else []
        while len(turns) < NUM_TURNS:
            kinds = [self.rng.choices(KINDS, QUESTION_WEIGHTS)[0] for _ in range(2)]
            asked = [question for kind in kinds for question in questions(scene, self.rng, (kind,))]
            turns += [(q.question, q.answer) for q in asked if (q.question, q.answer) not in turns]
        turns = self.rng.sample(turns[:NUM_TURNS], NUM_TURNS)
        return [
            (("Q:" if i else "") + question + " A:", answer + "</s>") for i, (question, answer) in enumerate(turns)
        ]

    def row(self, turns: Turns) -> tuple[list[int], list[int], list[int], list[bool]]:
        """Return token ids, the turn of each token (0 for the image), position ids, and which tokens are answers."""

        def encode(text: str) -> list[int]:
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]

        start = self.prefix + NUM_PATCHES
        ids = [*encode("<s>Q:"), *[0] * NUM_PATCHES]
        turn, position, is_answer = [0] * start, list(range(start)), [False] * start
        for number, (question, answer) in enumerate(turns, 1):
            asked, answered = encode(question), encode(answer)
            ids += asked + answered
            turn += [number] * (len(asked) + len(answered))
            position += range(start, start + len(asked) + len(answered))
            is_answer += [False] * len(asked) + [True] * len(answered)
        return ids, turn, position, is_answer

    def batch(self, batch_size: int, turns: Callable[[Scene], Turns]) -> dict[str, torch.Tensor]:
        """Return a padded batch of rows about new scenes. `turns` is [`lookups`] or [`questions`]."""
        scenes = [next(self.scenes) for _ in range(batch_size)]
        rows = [self.row(turns(scene)) for scene in scenes]
        length = max(len(ids) for ids, *_ in rows)
        columns = [
            torch.tensor([list(row[i]) + [fill] * (length - len(row[i])) for row in rows])
            for i, fill in enumerate((0, -1, 0, False))
        ]
        names = ("input_ids", "turn", "position_ids", "is_answer")
        words = [[[self.ids[word] for word in patch] for patch in describe_patches(scene)] for scene in scenes]
        return {**dict(zip(names, columns, strict=True)), "patch_words": torch.tensor(words)}


def decoder_loss(decoder: LlamaForCausalLM, batch: dict[str, torch.Tensor], prefix: int) -> torch.Tensor:
    """
    Return the weighted cross-entropy of answers, questions and the next patch.

    A turn does not attend to other turns, so the decoder has to read the patches, which it learns faster this way.

    Args:
        decoder ([`LlamaForCausalLM`])
        batch (`dict[str, torch.Tensor]`): From [`DescribedImages.batch`].
        prefix (`int`): Number of tokens before the patches.
    """
    input_ids, turn = batch["input_ids"], batch["turn"]
    patches = slice(prefix, prefix + NUM_PATCHES)
    embeddings = decoder.get_input_embeddings()
    embeds = embeddings(input_ids)
    embeds[:, patches] = embeddings(batch["patch_words"]).mean(2)
    length = input_ids.shape[1]
    visible = (turn[:, :, None] == turn[:, None, :]) | (turn[:, None, :] == 0)
    visible = visible & torch.ones(length, length, dtype=torch.bool).tril()
    logits = decoder(
        inputs_embeds=embeds, attention_mask=visible[:, None], position_ids=batch["position_ids"], use_cache=False
    ).logits
    # the target at the position before a patch is its color or its shape, at random; its position is known anyway
    chosen = torch.randint(2, batch["patch_words"].shape[:2] + (1,))
    targets = input_ids.clone()
    targets[:, patches] = batch["patch_words"].gather(2, chosen)[..., 0]
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten(), reduction="none")
    weights = torch.where(batch["is_answer"], 1.0, 0.1) * (turn >= 0)
    weights[:, patches] = PATCH_WEIGHT
    weights = weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


def train_decoder(tokenizer, seed: int, batch_size: int = 8) -> LlamaForCausalLM:
    """Return a small Llama that answers questions about images whose patches are described in words."""
    decoder = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=96, intermediate_size=192, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512, initializer_range=0.1,
            rope_parameters={"rope_type": "default", "rope_theta": 100.0},
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    texts = DescribedImages(tokenizer, seed)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=3e-3, betas=(0.9, 0.99), weight_decay=0.0)
    steps = LOOKUP_STEPS + QUESTION_STEPS
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    for step in trange(steps, desc="decoder", leave=False, disable=None):
        turns = texts.lookups if step < LOOKUP_STEPS else texts.questions
        loss = decoder_loss(decoder, texts.batch(batch_size, turns), texts.prefix)
        loss.backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    # The projector is initialized with this. Its output then has about the norm of the patches in the decoder's text.
    # A larger norm would hide the context from which the decoder predicts the next patch.
    decoder.config.initializer_range = 0.02
    return decoder.eval()


def save_warm_start(output: Path, seed: int) -> None:
    """Write the folders `vision_tower` and `language_model`, in the layout of a download from the Hub."""
    torch.manual_seed(seed)
    started = time.time()
    tokenizer = build_tokenizer()
    train_tower(seed).save_pretrained(output / "vision_tower")
    build_image_processor().save_pretrained(output / "vision_tower")
    train_decoder(tokenizer, seed).save_pretrained(output / "language_model")
    tokenizer.save_pretrained(output / "language_model")
    print(f"Vision tower and decoder: trained from random weights in {time.time() - started:.0f} s")
