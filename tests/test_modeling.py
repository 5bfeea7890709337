# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The model: towers, decoders, images per row, padding, losses, pseudo image features, errors."""

import copy

import pytest
import torch
from helpers.tiny_models import TEXT_CONFIGS, VISION_CONFIGS, build_config, random_rows
from transformers import AutoModel

from modeling_vtlmm import VTLMMForConditionalGeneration
from modeling_vtlmm.losses_vtlmm import visual_loss_sum


@pytest.mark.parametrize("text", TEXT_CONFIGS)
def test_batched_rows_equal_single_rows(build_model, text):
    """The rows have different numbers of images, some have none, and the padding is on the right or the left."""
    model = build_model(text)
    counts = [1, 0, 3, 2]
    input_ids, attention_mask, pixel_values = random_rows(model, counts)
    batched = model(input_ids, pixel_values, attention_mask).logits
    flipped = [ids[mask.bool()] for ids, mask in zip(input_ids, attention_mask, strict=True)]
    left_ids = torch.stack(
        [torch.nn.functional.pad(row, (input_ids.shape[1] - len(row), 0), value=3) for row in flipped]
    )
    left_mask = attention_mask.flip(1)
    left_positions = (left_mask.cumsum(1) - 1).clamp(min=0)
    left = model(left_ids, pixel_values, left_mask, left_positions).logits
    for i, images in enumerate(pixel_values.split(counts)):
        ids = flipped[i][None]
        alone = model(ids, images if len(images) else None).logits[0]
        torch.testing.assert_close(batched[i, : ids.shape[1]], alone, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(left[i, -ids.shape[1] :], alone, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("vision", VISION_CONFIGS)
def test_image_features_equal_the_full_tower(build_model, vision):
    """The full tower gives the selected layer without CLS and register positions, and maps in raster order."""
    model = build_model(vision=vision)
    config, tower = model.config, AutoModel.from_config(model.config.vision_config).eval()
    tower.load_state_dict(model.model.vision_tower.state_dict())
    side = config.vision_config.image_size
    pixel_values = torch.randn(2, 3, side, side)
    outputs = tower(pixel_values, output_hidden_states=True)
    if outputs.last_hidden_state.ndim == 4:
        maps = outputs.last_hidden_state
        features = torch.stack([maps[:, :, y, x] for y in range(maps.shape[2]) for x in range(maps.shape[3])], 1)
    else:
        dropped = {"siglip_vision_model": 0, "dinov2_with_registers": 3}.get(vision, 1)
        features = outputs.hidden_states[-2][:, dropped:]
    expected = model.model.multi_modal_projector(features)
    found = model.get_image_features(pixel_values)
    torch.testing.assert_close(found.image_features, expected)
    assert [tuple(image.shape) for image in found.pooler_output] == [(4, 32)] * 2


def test_unused_layers_of_the_tower_are_not_computed(build_model):
    model = build_model()
    layers = model.model.vision_tower.encoder.layers
    calls = []
    for i, layer in enumerate(layers):
        layer.mlp.register_forward_hook(lambda *_, i=i: calls.append(i))
    model.get_image_features(torch.randn(1, 3, 28, 28))
    assert calls == [0, 1]


def test_several_vision_layers_are_concatenated(build_model):
    model = build_model(vision_feature_layer=[-3, -1])
    assert model.model.multi_modal_projector.linear_1.in_features == 32
    pixel_values = torch.randn(1, 3, 28, 28)
    layers = model.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states
    vision_features = model.get_image_features(pixel_values).vision_features
    assert torch.equal(vision_features, torch.cat([layers[1], layers[3]], dim=-1)[:, 1:])
    assert model.get_image_features(pixel_values, output_hidden_states=True).hidden_states[2] is not None


def test_config_can_change_before_the_model_is_built():
    config = build_config()
    config.vision_feature_layer = [-3, -1]
    model = VTLMMForConditionalGeneration(config)
    assert model.model.multi_modal_projector.linear_1.in_features == 32
    assert model.get_image_features(torch.randn(1, 3, 28, 28)).image_features.shape == (1, 4, 32)


def test_loss_is_the_mean_over_supervised_text(build_model):
    model = build_model()
    input_ids, attention_mask, pixel_values = random_rows(model, [1, 2])
    labels = torch.where((input_ids < model.config.image_token_id) & attention_mask.bool(), input_ids, -100)
    outputs = model(input_ids, pixel_values, attention_mask, labels=labels)
    logprobs = outputs.logits.log_softmax(-1)
    chosen = [
        -logprobs[b, s - 1, labels[b, s]] for b in range(2) for s in range(1, labels.shape[1]) if labels[b, s] >= 0
    ]
    torch.testing.assert_close(outputs.loss, torch.stack(chosen).mean())
    sums = model(input_ids, pixel_values, attention_mask, labels=labels, return_loss_sums=True).loss_sums
    assert sums["num_lm_targets"] == len(chosen)
    torch.testing.assert_close(sums["lm_loss"], torch.stack(chosen).sum())


@pytest.mark.parametrize("student", ["vm_head", "lm_head"])
@pytest.mark.parametrize("vm_head_type", ["linear", "mlp", "attention"])
def test_visual_loss_is_the_kl_with_the_left_neighbor(build_model, student, vm_head_type):
    """Compute the KL patch by patch from the public outputs, and check which parameters get gradients."""
    model = build_model(vm_head_type=vm_head_type)
    input_ids, attention_mask, pixel_values = random_rows(model, [2, 0, 1])
    input_ids[2, :4], input_ids[2, 4:7] = model.config.image_token_id, torch.tensor([5, 6, 7])  # image first
    outputs = model(input_ids, pixel_values, attention_mask, output_visual_logits=True)
    p = outputs.visual_logits.log_softmax(-1)
    q = outputs.logits[..., : model.config.visual_vocab_size].log_softmax(-1)
    total, count, patch = 0.0, 0, 0
    for b in range(3):
        for s in range(input_ids.shape[1]):
            if input_ids[b, s] == model.config.image_token_id:
                if s > 0:
                    teacher, learner = (q[b, s - 1], p[patch]) if student == "vm_head" else (p[patch], q[b, s - 1])
                    total += (teacher.exp() * (teacher - learner)).sum()
                    count += 1
                patch += 1
    sums = model(input_ids, pixel_values, attention_mask, return_loss_sums=True, visual_student=student).loss_sums
    assert sums["num_visual_targets"] == count == 11
    torch.testing.assert_close(sums["visual_loss"], total)
    sums["visual_loss"].backward()
    taught = {"vm_head": model.model.vm_head.weight, "lm_head": model.lm_head.weight}
    assert taught.pop(student).grad.abs().max() > 0
    assert next(iter(taught.values())).grad is None
    decoder = model.model.language_model.layers[0].self_attn.q_proj.weight.grad
    assert (decoder is None) == (student == "vm_head")


@pytest.mark.parametrize("vm_head_type", ["linear", "mlp", "attention"])
def test_text_only_batch_has_zero_loss_and_all_gradients(build_model, vm_head_type):
    model = build_model(vm_head_type=vm_head_type).train()
    input_ids, attention_mask, _ = random_rows(model, [0, 0])
    sums = model(
        input_ids,
        None,
        attention_mask,
        labels=input_ids,
        return_loss_sums=True,
        visual_student="vm_head",
        detach_visual_teacher=False,
    ).loss_sums
    assert sums["visual_loss"] == 0 and sums["num_visual_targets"] == 0
    (sums["visual_loss"] + sums["lm_loss"]).backward()
    for name, parameter in model.named_parameters():
        if "vision_tower" in name:
            continue
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert model.model.vm_head.weight.grad.abs().max() == 0
    model.zero_grad()
    model(input_ids, None, attention_mask, labels=input_ids, return_loss_sums=True).loss_sums["lm_loss"].backward()
    projector = model.model.multi_modal_projector.linear_1.weight  # the only trainable module of stage I
    assert projector.grad is not None and not projector.grad.any()


@pytest.mark.parametrize("student", ["lm_head", None])  # stages I and II have no visual loss
def test_text_only_batch_runs_the_tower_in_evaluation(build_model, student):
    """With a sharded tower, another process may have an image and waits for this process."""
    model = build_model()
    calls = []
    model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    input_ids, attention_mask, _ = random_rows(model, [0, 0])
    options = {"labels": input_ids, "return_loss_sums": True, "visual_student": student}
    with torch.no_grad():
        sums = model(input_ids, None, attention_mask, **options).loss_sums
        logits = model(input_ids, None, attention_mask).logits
    assert len(calls) == 1, "the tower runs for the sums, not for the logits"
    assert student is None or sums["visual_loss"] == sums["num_visual_targets"] == 0
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten(), reduction="sum"
    )
    torch.testing.assert_close(sums["lm_loss"], expected)


def test_vm_head_initialization(build_model):
    model = build_model()
    rows_ = model.config.visual_vocab_size
    for source, weight in (
        ("lm_head", model.lm_head.weight),
        ("input_embeddings", model.get_input_embeddings().weight),
    ):
        model.initialize_vm_head(source)
        assert torch.equal(model.model.vm_head.weight, weight[:rows_])
    model.initialize_vm_head("random")
    assert 0.015 < model.model.vm_head.weight.std() < 0.025
    with pytest.raises(ValueError, match="source is 'zeros'"):
        model.initialize_vm_head("zeros")


@pytest.mark.parametrize("vm_head_type", ["mlp", "attention"])
def test_new_residual_block_is_the_identity(vm_head_type):
    torch.manual_seed(0)
    model = VTLMMForConditionalGeneration(build_config(vm_head_type=vm_head_type)).eval()
    features = torch.randn(2, 4, 32)
    residual_block = model.model.vm_head.residual_block
    assert torch.equal(residual_block(features), features)
    torch.nn.init.normal_(residual_block.output.weight)
    other = features.clone()
    other[0, 3] = torch.randn(32)  # random, because the layer norm removes a constant
    changed = (residual_block(other) - residual_block(features)).abs().amax(-1) > 1e-6
    assert changed[0].tolist() == ([True] * 4 if vm_head_type == "attention" else [False, False, False, True])
    assert not changed[1].any()


def test_pseudo_image_features_replace_the_input(build_model):
    model = build_model(use_pseudo_image_features=True)
    input_ids, attention_mask, pixel_values = random_rows(model, [1, 2])
    features = model.get_image_features(pixel_values)
    probs = model.model.vm_head(features.image_features).softmax(-1)
    pseudo = probs @ model.get_input_embeddings().weight[: model.config.visual_vocab_size]
    torch.testing.assert_close(torch.stack(features.pooler_output), pseudo)
    embeds = model.get_input_embeddings()(input_ids)
    embeds[input_ids == model.config.image_token_id] = pseudo.flatten(0, 1)
    expected = model.model.language_model(inputs_embeds=embeds, attention_mask=attention_mask).last_hidden_state
    found = model(input_ids, pixel_values, attention_mask)
    torch.testing.assert_close(found.logits, model.lm_head(expected))
    generated = model.generate(
        input_ids=input_ids[1:], pixel_values=pixel_values[1:], max_new_tokens=3, do_sample=False
    )
    assert generated[0, -3] == found.logits[1, -1].argmax()


def test_visual_tokens_are_the_top_words(build_model):
    model = build_model()
    pixel_values = torch.randn(2, 3, 28, 28)
    probs = model.model.vm_head(model.get_image_features(pixel_values).image_features).softmax(-1)
    tokens = model.get_visual_tokens(pixel_values, top_k=3)
    order = probs.argsort(-1, descending=True)[..., :3]
    assert torch.equal(tokens.token_ids, order)
    torch.testing.assert_close(tokens.probabilities, probs.gather(-1, order))


def test_gradient_checkpointing_changes_no_gradient(build_model):
    plain = build_model().train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    input_ids, attention_mask, pixel_values = random_rows(plain, [1, 2])
    for model in (plain, checkpointed):
        sums = model(
            input_ids, pixel_values, attention_mask, labels=input_ids, return_loss_sums=True, visual_student="lm_head"
        ).loss_sums
        (sums["lm_loss"] + sums["visual_loss"]).backward()
    for (name, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        if a.grad is not None or b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_frozen_tower_stays_in_evaluation_mode(build_model):
    model = build_model(vision="mobilenet_v2")
    assert model.train().model.vision_tower.training
    model.model.vision_tower.requires_grad_(False)
    assert not model.train().model.vision_tower.training and model.model.language_model.training


def test_invalid_arguments_raise_clear_errors(build_model):
    model = build_model()
    input_ids, attention_mask, pixel_values = random_rows(model, [1, 2])
    with pytest.raises(ValueError, match="tokens: 12, features: 8"):
        model(input_ids, pixel_values[:2], attention_mask)
    with pytest.raises(ValueError, match="tokens: 0, features: 12"):
        model(torch.full_like(input_ids, 5), pixel_values, attention_mask)
    with pytest.raises(ValueError, match="exactly one of"):
        model(pixel_values=pixel_values)
    with pytest.raises(ValueError, match="must be 'vm_head' or 'lm_head'"):
        model(input_ids, pixel_values, return_loss_sums=True, visual_student="projector")
    with pytest.raises(ValueError, match="`visual_vocab_size` is 65, which exceeds"):
        build_config(visual_vocab_size=65)
    with pytest.raises(ValueError, match="must be one of linear, mlp2x_gelu"):
        build_config(projector_type="mlp3x")
    with pytest.raises(ValueError, match="last feature map"):
        build_config(vision="convnext", vision_feature_layer=-2)


def test_checkpoint_with_missing_tensor_is_rejected(build_model, tmp_path):
    model = build_model()
    state = model.state_dict()
    del state["model.vm_head.weight"]
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"1 tensors of .* are missing in .*model\.vm_head\.weight"):
        VTLMMForConditionalGeneration.from_pretrained(tmp_path)
    # transformers' own tools read the loading info, or load without a checkpoint.
    _, info = VTLMMForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {"model.vm_head.weight"}
    VTLMMForConditionalGeneration.from_pretrained(None, config=build_config(), state_dict={})


def test_save_and_load_round_trip(build_model, tmp_path):
    for text in ("llama", "qwen2"):
        model = build_model(text, vm_head_type="attention")
        model.save_pretrained(tmp_path / text)
        loaded = VTLMMForConditionalGeneration.from_pretrained(tmp_path / text)
        for (name, a), b in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
            assert torch.equal(a, b), name
        ignored = {"dtype", "_name_or_path", "text_config", "vision_config"}
        a, b = loaded.config.to_dict(), model.config.to_dict()
        assert {k: v for k, v in a.items() if k not in ignored} == {k: v for k, v in b.items() if k not in ignored}


def test_resized_vocabulary_keeps_the_visual_tokens(build_model):
    model = build_model(visual_vocab_size=50)
    input_ids, attention_mask, pixel_values = random_rows(model, [1, 1])
    call = {"return_loss_sums": True, "visual_student": "lm_head"}
    before = model(input_ids, pixel_values, attention_mask, **call).loss_sums["visual_loss"]
    model.resize_token_embeddings(80, mean_resizing=False)
    assert model.config.text_config.vocab_size == 80 and model.lm_head.weight.shape[0] == 80
    torch.testing.assert_close(model(input_ids, pixel_values, attention_mask, **call).loss_sums["visual_loss"], before)


def test_smaller_vocabulary_truncates_the_vm_head(build_model, tmp_path):
    model = build_model(use_pseudo_image_features=True)
    input_ids, attention_mask, pixel_values = random_rows(model, [1, 1])
    input_ids[input_ids != model.config.image_token_id] = 5
    head = model.model.vm_head.weight[:40]
    model.resize_token_embeddings(40)
    assert torch.equal(model.model.vm_head.weight, head) and model.config.visual_vocab_size == 40
    outputs = model(input_ids, pixel_values, attention_mask, output_visual_logits=True)
    assert outputs.logits.shape[-1] == outputs.visual_logits.shape[-1] == 40
    model.save_pretrained(tmp_path)
    loaded = VTLMMForConditionalGeneration.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(input_ids, pixel_values, attention_mask).logits, outputs.logits)


def test_outputs_are_floating_point_by_default(build_model):
    """Tools subtract outputs to compare them. A tuple has the same values in the same order."""
    model = build_model()
    input_ids, attention_mask, pixel_values = random_rows(model, [1, 2])
    outputs = model(input_ids, pixel_values, attention_mask)
    assert outputs.image_token_mask is None
    assert [tuple(x.shape) for x in outputs.to_tuple() if isinstance(x, torch.Tensor)] == [(2, 15, 64)]
    assert outputs.image_outputs.image_features.shape == (3, 4, 32)
    assert all(x.is_floating_point() for x in outputs.image_outputs.values() if isinstance(x, torch.Tensor))
    for a, b in zip(
        outputs.to_tuple(), model(input_ids, pixel_values, attention_mask, return_dict=False), strict=True
    ):
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(a, b)
    asked = model(input_ids, pixel_values, attention_mask, output_visual_logits=True)
    assert torch.equal(asked.image_token_mask, input_ids == model.config.image_token_id)


def test_image_tokens_in_labels_are_not_targets(build_model):
    """The image token is outside the vocabulary here, so it has no logit."""
    model = build_model(image_token_id=64)
    input_ids, attention_mask, pixel_values = random_rows(model, [1, 2])
    masked = input_ids.masked_fill(input_ids == 64, -100)
    for options in ({}, {"return_loss_sums": True}):
        found = model(input_ids, pixel_values, attention_mask, labels=input_ids, **options)
        expected = model(input_ids, pixel_values, attention_mask, labels=masked, **options)
        torch.testing.assert_close(found.loss, expected.loss)
        torch.testing.assert_close(found.loss_sums, expected.loss_sums)


@pytest.mark.parametrize("invalid_id", [65, -1])
def test_invalid_labels_are_rejected(build_model, invalid_id):
    model = build_model(image_token_id=64)
    input_ids, attention_mask, pixel_values = random_rows(model, [1, 2])
    labels = input_ids.clone()
    labels[1, 2] = invalid_id
    for options in ({}, {"return_loss_sums": True}):
        with pytest.raises(ValueError, match=rf"the id {invalid_id}, which is outside the vocabulary.*64 tokens"):
            model(input_ids, pixel_values, attention_mask, labels=labels, **options)


def test_visual_loss_function_can_be_replaced(build_model):
    """The function gets both sides with the student first, and the arguments of other visual losses."""
    model = build_model()
    input_ids, attention_mask, pixel_values = random_rows(model, [1, 2])
    options = {"return_loss_sums": True, "visual_student": "lm_head", "detach_visual_teacher": False}
    default = model(input_ids, pixel_values, attention_mask, **options).loss_sums["visual_loss"]
    calls = []

    def half_loss(*sides, **kwargs):
        calls.append((sides, kwargs))
        return 0.5 * visual_loss_sum(*sides)

    model.visual_loss_function = half_loss
    found = model(input_ids, pixel_values, attention_mask, **options).loss_sums["visual_loss"]
    torch.testing.assert_close(found, 0.5 * default)
    ((student, student_weight, teacher, teacher_weight), kwargs) = calls[0]
    assert torch.equal(student_weight, model.lm_head.weight[: model.config.visual_vocab_size])
    assert torch.equal(teacher_weight, model.model.vm_head.weight)
    positions = kwargs["positions"]
    assert torch.equal(student, kwargs["outputs"].last_hidden_state[:, :-1][positions[:, 1:]])
    assert torch.equal(teacher, kwargs["outputs"].image_features.flatten(0, 1))
    assert kwargs["model"] is model and kwargs["visual_student"] == "lm_head" and not kwargs["detach_teacher"]


def test_tensor_parallel_plan_names_the_head_and_the_decoder(build_model):
    plan = build_model("qwen2").tp_plan
    assert plan["lm_head"] == "colwise_gather_output"
    assert plan["model.language_model.layers.*.mlp.down_proj"] == "rowwise"
