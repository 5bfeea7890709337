# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Packing: which rows share a sequence, and that packed and unpacked rows give the same update."""

import pytest
import torch
from datasets import Image
from helpers.tiny_models import build_config, build_processor
from helpers.training import assert_same_update, build_rows, build_trainer, update

from modeling_vtlmm import VTLMMForConditionalGeneration
from vtlmm.data.validation import check_rows
from vtlmm.train.collator import VTLMMCollator
from vtlmm.train.packing import ROW_BY_ROW, pack_dataset, pack_lengths, prepare_packs, with_lengths


FLEX_ATTENTION = pytest.param("flex_attention", marks=pytest.mark.slow)  # it is compiled


def test_packs_hold_every_row_once_and_fit():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 700, (500,), generator=generator).tolist()
    packs = pack_lengths(lengths, 2048)
    assert sorted(row for pack in packs for row in pack) == list(range(500))
    assert all(sum(lengths[row] for row in pack) <= 2048 for pack in packs)
    # at most 2 % more packs than the lower bound
    assert len(packs) <= 1.02 * sum(lengths) / 2048 + 1


def test_rows_go_to_the_pack_with_the_least_room():
    assert pack_lengths([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]
    with pytest.raises(ValueError, match=r"Row 1 has 11 tokens, more than `max_length`"):
        pack_lengths([3, 11], 10)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["eager", "sdpa", FLEX_ATTENTION, ROW_BY_ROW])
@torch.no_grad()
def test_packed_losses_equal_unpacked_losses(build_model, implementation):
    """Three packs of rows with different numbers of images; both losses and both counts."""
    model = build_model()
    processor, rows = build_processor(), build_rows()
    collator = VTLMMCollator(processor)
    lengths = [int(collator([row])["attention_mask"].sum()) for row in rows]
    packs = pack_dataset(rows.add_column("length", lengths), max_length=50)
    assert 1 < len(packs) < 8
    call = {"return_loss_sums": True, "visual_student": "lm_head"}
    alone = model(**collator(list(rows)), **call).loss_sums
    model.model.language_model.set_attn_implementation(implementation)
    packed = model(**collator(list(packs)), **call).loss_sums
    for name in ("lm_loss", "num_lm_targets", "visual_loss", "num_visual_targets"):
        torch.testing.assert_close(packed[name], alone[name], atol=1e-5, rtol=1e-5)


def test_packed_rows_do_not_see_each_other(build_model):
    """The first row of a pack does not change the logits of the next row."""
    model = build_model()
    processor, rows = build_processor(), list(build_rows())
    collator = VTLMMCollator(processor)
    first = collator([{"rows": [rows[0], rows[3]]}])
    second = collator([{"rows": [rows[6], rows[3]]}])
    length = int(collator([rows[3]])["attention_mask"].sum())
    for batch in (first, second):
        batch.pop("labels")
    one, other = (model(**batch, use_cache=False).logits[0, -length:] for batch in (first, second))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_row_by_row_attention_equals_sdpa_without_packing(build_model):
    """Check left padding, no mask, and generation with a cache."""
    model, processor = build_model(), build_processor()
    padded = processor.tokenizer(["hello there what is it", "hello"], padding=True, padding_side="left")
    batch = {name: torch.tensor(values) for name, values in padded.items() if name != "token_type_ids"}
    calls = (
        lambda: model(**batch).logits[batch["attention_mask"].bool()],
        lambda: model(input_ids=batch["input_ids"][:1]).logits,
        lambda: model.generate(**batch, max_new_tokens=5, do_sample=False),
    )
    expected = [call() for call in calls]
    model.model.language_model.set_attn_implementation(ROW_BY_ROW)
    for call, values in zip(calls, expected, strict=True):
        torch.testing.assert_close(call(), values, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_a_packed_step_is_the_padded_step(tmp_path):
    """`packing=True`: one optimizer step over all packs equals the step over all rows."""
    expected = update(build_trainer(tmp_path / "padded", max_length=50))
    packed = build_trainer(tmp_path / "packed", packing=True, max_length=50)
    assert 1 < len(packed.train_dataset) < 8
    assert packed.model.model.language_model.config._attn_implementation == ROW_BY_ROW
    assert_same_update(update(packed), expected)
    logged = next(entry for entry in packed.state.log_history if "lm_loss" in entry)
    assert logged["samples_per_second"] > 0
    assert packed.args.packing  # hidden from TRL only


def test_lengths_need_no_image(monkeypatch):
    """Rows without `num_context_messages` work too."""
    rows, processor = build_rows(), build_processor()
    expected = check_rows(rows, processor).lengths
    monkeypatch.setattr(Image, "decode_example", lambda *_, **__: pytest.fail("decoded"))
    found = with_lengths(rows.remove_columns("num_context_messages"), processor, 50)
    assert found["length"][:] == expected


def test_evaluation_rows_are_grouped_by_length(tmp_path):
    grouped = build_trainer(
        tmp_path, eval_dataset=build_rows(seed=1), train_sampling_strategy="group_by_length", max_length=50
    )
    assert grouped.evaluate()["eval_lm_loss"] > 0
    named = build_trainer(
        tmp_path, eval_dataset={"one": build_rows(seed=1)}, train_sampling_strategy="group_by_length", max_length=50
    )
    assert named.evaluate()["eval_one_lm_loss"] == pytest.approx(grouped.evaluate()["eval_lm_loss"])
    stream = build_rows(seed=1).to_iterable_dataset()
    settings = {"train_sampling_strategy": "group_by_length", "max_length": 50}
    for dataset, metric in ((stream, "eval_lm_loss"), ({"one": stream}, "eval_one_lm_loss")):
        streamed = build_trainer(tmp_path, eval_dataset=dataset, **settings)
        assert streamed.evaluate()[metric] == pytest.approx(grouped.evaluate()["eval_lm_loss"])
    assert grouped.evaluate(stream)["eval_lm_loss"] == pytest.approx(grouped.evaluate()["eval_lm_loss"])


@pytest.mark.parametrize("layers", [["conv", "full_attention"], ["linear_attention", "full_attention"], None])
def test_stateful_decoders_cannot_be_packed(layers, tmp_path, monkeypatch):
    model = VTLMMForConditionalGeneration(build_config())
    if layers is None:
        monkeypatch.setattr(type(model.model.language_model), "_is_stateful", True)
    else:
        model.config.text_config.layer_types = layers
    with pytest.raises(ValueError, match="do not separate"):
        prepare_packs(model, build_trainer(tmp_path).args, build_rows())


@pytest.mark.parametrize("settings", [{"packing": True}, {"train_sampling_strategy": "group_by_length"}])
def test_packing_a_stream_is_rejected(tmp_path, settings):
    with pytest.raises(ValueError, match="streamed dataset does not have"):
        build_trainer(tmp_path, rows=build_rows().to_iterable_dataset(), **settings)
