# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""What a real run downloads: a vision tower that sees and a decoder that reads. Here both start from random.

The tower learns to name the color, the shape and the place of each patch. The decoder learns from text alone: where
the image will stand, each patch is *told* in words (the mean of the embeddings of its color, shape and place, the
very form of a pseudo image feature), then come a caption or questions and answers. So it has read of images before
it sees one, as a language model has; and what it predicts at a patch is a word from the start.
"""

import math
import random
import time
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
TOWER_STEPS, LOOKUP_STEPS, QUESTION_STEPS = 250, 250, 600
PATCH_WEIGHT = 0.4  # in the decoder's loss, where an answer has 1
LOOKUPS, TURNS = 30, 8  # in a row of the decoder's text, about one image


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; marks are words. Decoding puts spaces back, but none before a mark."""
    vocabulary = ["<pad>", "<s>", "</s>", "<unk>", "Q", "A", ":", *words()]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(vocabulary))}
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
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return CLIPImageProcessorPil(
        size=side, do_center_crop=False, crop_size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )


def _rate(step: int, steps: int) -> float:
    """Warm-up, then a cosine down to a twentieth."""
    return min(1.0, (step + 1) / 20) * (0.525 + 0.475 * math.cos(math.pi * step / steps))


def train_tower(seed: int, steps: int = TOWER_STEPS, batch_size: int = 32) -> ConvNextModel:
    """A small ConvNeXt whose last map of 4 x 4 positions knows the color, the shape and the place there."""
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
    progress = trange(steps, desc="vision tower")
    for _ in progress:
        batch = [next(scenes) for _ in range(batch_size)]
        pixels = processor([draw(scene) for scene in batch], return_tensors="pt")["pixel_values"]
        features = tower(pixels).last_hidden_state.flatten(2).transpose(1, 2)
        told = [describe_patches(scene) for scene in batch]
        loss = 0.0
        for i, (head, kind) in enumerate(zip(heads, kinds, strict=True)):
            target = torch.tensor([[kind.index(patch[i]) for patch in patches] for patches in told])
            loss = loss + F.cross_entropy(head(features).flatten(0, 1), target.flatten())
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    return tower.eval()


class DescribedImages:
    """Batches of text: `<s> Q :`, the patches told in words, then turns; each turn sees the patches and itself.

    The turns are questions as they will be asked, or before that look-ups, `circle color red`: as short as can be, so
    that many fit into a row, and the decoder soon finds out that the patches are where to look.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int):
        self.tokenizer = tokenizer
        self.ids = tokenizer.get_vocab()
        self.rng = random.Random(seed)
        self.scenes = make_scenes(self.rng, held_out=False)
        self.prefix = 3

    def lookups(self, scene: Scene) -> list[tuple[str, str]]:
        turns = []
        for _ in range(LOOKUPS):
            item = self.rng.choice(scene.items)
            facts = {"color": item.color, "shape": item.shape, "where": POSITIONS[item.cell]}
            known = self.rng.choice(("shape", "where"))  # two shapes may have one color
            wanted = self.rng.choice([name for name in facts if name != known])
            turns.append((f"{facts[known]} {wanted}", facts[wanted]))
        return turns

    def questions(self, scene: Scene) -> list[tuple[str, str]]:
        turns = [(PATCH_QUESTION, patch_caption(scene))] if self.rng.random() < 0.5 else []
        turns += [(CAPTION_QUESTION, caption(scene, self.rng))] if self.rng.random() < 0.25 else []
        self.rng.shuffle(turns)
        while len(turns) < TURNS:
            asked = questions(scene, self.rng)
            self.rng.shuffle(asked)
            turns += [(q.question, q.answer) for q in asked if (q.question, q.answer) not in turns]
        # the first turn of a chat continues after the image, a later one says Q again
        return [
            (("Q:" if i else "") + question + " A:", answer + "</s>")
            for i, (question, answer) in enumerate(turns[:TURNS])
        ]

    def row(self, turns: list[tuple[str, str]]) -> tuple[list[int], list[int], list[int], list[bool]]:
        """Ids, turn of each token (0 for the image), position, and whether the token belongs to an answer."""
        encode = lambda text: self.tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
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

    def batch(self, batch_size: int, turns) -> dict[str, torch.Tensor]:
        """`turns` is one of the two methods above."""
        scenes = [next(self.scenes) for _ in range(batch_size)]
        rows = [self.row(turns(scene)) for scene in scenes]
        length = max(len(ids) for ids, *_ in rows)
        columns = [
            torch.tensor([list(row[i]) + [fill] * (length - len(row[i])) for row in rows])
            for i, fill in enumerate((0, -1, 0, False))
        ]
        names = ("input_ids", "turn", "position_ids", "is_answer")
        told = [[[self.ids[word] for word in patch] for patch in describe_patches(scene)] for scene in scenes]
        return {**dict(zip(names, columns, strict=True)), "told": torch.tensor(told)}


def decoder_loss(decoder: LlamaForCausalLM, batch: dict[str, torch.Tensor], prefix: int) -> torch.Tensor:
    """Cross-entropy of answers and, with less weight, of questions and of a word of the next patch. A turn that cannot
    see the other turns has to look at the patches, which is learnt faster."""
    input_ids, turn = batch["input_ids"], batch["turn"]
    patches = slice(prefix, prefix + NUM_PATCHES)
    embeddings = decoder.get_input_embeddings()
    embeds = embeddings(input_ids)
    embeds[:, patches] = embeddings(batch["told"]).mean(2)
    length = input_ids.shape[1]
    visible = (turn[:, :, None] == turn[:, None, :]) | (turn[:, None, :] == 0)
    visible = visible & torch.ones(length, length, dtype=torch.bool).tril()
    logits = decoder(
        inputs_embeds=embeds, attention_mask=visible[:, None], position_ids=batch["position_ids"], use_cache=False
    ).logits
    # a patch's color or its shape, at random, is the target at the position before it; its place would be no news
    chosen = torch.randint(2, batch["told"].shape[:2] + (1,))
    targets = input_ids.clone()
    targets[:, patches] = batch["told"].gather(2, chosen)[..., 0]
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten(), reduction="none")
    weights = torch.where(batch["is_answer"], 1.0, 0.1) * (turn >= 0)
    weights[:, patches] = PATCH_WEIGHT
    weights = weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


def train_decoder(tokenizer, seed: int, batch_size: int = 8) -> LlamaForCausalLM:
    """A small Llama that answers questions about images it is told in words."""
    decoder = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=96, intermediate_size=192, num_hidden_layers=3,
            num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=512, initializer_range=0.1,
            rope_parameters={"rope_type": "default", "rope_theta": 100.0},
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    texts = DescribedImages(tokenizer, seed)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=3e-3, betas=(0.9, 0.99), weight_decay=0.0)
    steps = LOOKUP_STEPS + QUESTION_STEPS
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    progress = trange(steps, desc="decoder")
    for step in progress:
        turns = texts.lookups if step < LOOKUP_STEPS else texts.questions
        loss = decoder_loss(decoder, texts.batch(batch_size, turns), texts.prefix)
        loss.backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    return decoder.eval()


def save_warm_start(output: Path, seed: int) -> None:
    """Writes the folders `vision_tower` and `language_model`, as a download from the Hub would be."""
    torch.manual_seed(seed)
    started = time.time()
    tokenizer = build_tokenizer()
    train_tower(seed).save_pretrained(output / "vision_tower")
    build_image_processor().save_pretrained(output / "vision_tower")
    train_decoder(tokenizer, seed).save_pretrained(output / "language_model")
    tokenizer.save_pretrained(output / "language_model")
    print(f"warm start: {time.time() - started:.0f} s")
