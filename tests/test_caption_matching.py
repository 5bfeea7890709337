# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Caption matching, against the model's own loss row by row."""

import io

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from PIL import Image

from vtlmm.analysis.caption_matching import measure_caption_matching
from vtlmm.analysis.captions import captioned_images
from vtlmm.data.rows import ROW_FEATURES
from vtlmm.train.collator import VTLMMCollator


CAPTIONS = ("a red square", "a blue circle and a red square", "what is it", "a blue circle")


def caption_rows(captions=CAPTIONS) -> Dataset:
    """Return rows with an image of one color each. The captions have different lengths."""
    rows = []
    for number, caption in enumerate(captions):
        question = [{"type": "image", "text": None}, {"type": "text", "text": "what is it ?"}]
        answer = [{"type": "text", "text": caption}]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append({"messages": messages, "images": [image_bytes(number)], "num_context_messages": 0})
    return Dataset.from_list(rows, features=ROW_FEATURES)


def image_bytes(number: int) -> dict:
    file = io.BytesIO()
    Image.new("RGB", (28, 28), (60 * number, 200 - 50 * number, 30)).save(file, "PNG")
    return {"path": f"{number}.png", "bytes": file.getvalue()}


def model_loss(model, processor, rows, row: int, image: int) -> float:
    """Return the model's loss of the caption of a row with the image of another row, in nats per token."""
    batch = VTLMMCollator(processor)([{**rows[row], "images": rows[image]["images"]}])
    sums = model(**batch, return_loss_sums=True).loss_sums
    return (sums["lm_loss"] / sums["num_lm_targets"]).item()


@pytest.mark.parametrize("hard", [False, True])
def test_losses_are_those_of_the_model(build_model, processor, hard):
    model, rows = build_model(), caption_rows()
    # With equal numbers of shared words, the next row comes first
    others = [1, 3, 3, 1] if hard else [1, 2, 3, 0]
    losses = [
        [model_loss(model, processor, rows, row, image) for image in (row, other)] for row, other in enumerate(others)
    ]
    own, shuffled = torch.tensor(losses).T
    result = measure_caption_matching(model, processor, rows, hard=hard, batch_size=3)
    assert result.loss.value == pytest.approx(own.mean().item(), rel=1e-5)
    assert result.loss_shuffled.value == pytest.approx(shuffled.mean().item(), rel=1e-5)
    assert result.scores == (own < shuffled).float().tolist()
    assert result.accuracy.value == pytest.approx((own < shuffled).float().mean().item())


def test_several_other_images_are_averaged(build_model, processor):
    rows, model = caption_rows(), build_model()
    losses = torch.tensor([[model_loss(model, processor, rows, row, image) for image in range(4)] for row in range(4)])
    result = measure_caption_matching(model, processor, rows, num_others=3)
    own, total = losses.diagonal(), losses.sum(1)
    assert result.loss_shuffled.value == pytest.approx(((total - own) / 3).mean().item(), rel=1e-5)
    assert result.scores == pytest.approx(((own[:, None] < losses).sum(1) / 3).tolist())


def test_a_model_that_ignores_the_image_is_at_chance(build_model, processor):
    model = build_model()
    for parameter in model.model.multi_modal_projector.parameters():
        torch.nn.init.zeros_(parameter)
    result = measure_caption_matching(model, processor, caption_rows())
    assert result.accuracy.value == 0.5 and result.loss_lift.value == 0


def test_unusable_rows_are_rejected(build_model, processor):
    rows = caption_rows()
    with pytest.raises(ValueError, match="`num_others` is 4; with 4 rows it must be 1 to 3"):
        measure_caption_matching(build_model(), processor, rows, num_others=4)
    two = rows.map(lambda row: {"images": row["images"] * 2})
    with pytest.raises(ValueError, match="Row 0 has 2 images"):
        measure_caption_matching(build_model(), processor, two)
    repeated = concatenate_datasets([rows, rows])
    with pytest.raises(ValueError, match="Rows 0 and 4 have the same image"):
        measure_caption_matching(build_model(), processor, repeated)


def test_rows_about_one_image_are_merged():
    rows = concatenate_datasets([caption_rows(), caption_rows(CAPTIONS[::-1])])
    images = captioned_images(rows)
    assert [(image.row, image.captions) for image in images] == [
        (row, [CAPTIONS[row], CAPTIONS[3 - row]]) for row in (0, 1, 2, 3)
    ]
    assert images[0].words == {"red", "square", "blue", "circle"}
