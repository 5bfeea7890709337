# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The visual targets: values by hand, gradients in the trainer, and checkpoints that do not depend on them."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny_models import build_processor
from helpers.training import assert_same_update, build_rows, build_trainer, update

from modeling_vtlmm import VTLMMForConditionalGeneration
from modeling_vtlmm.fused_losses_vtlmm import next_patch_loss
from vtlmm.train.collator import VTLMMCollator
from vtlmm.train.stages import describe, resolve_stage
from vtlmm.train.visual_targets import basic_loss_sum, feature_loss_sum, set_visual_target


PROJECTOR_TOO = ["multi_modal_projector", "language_model", "lm_head"]
TARGETS = {
    "same_patch": {},
    "other_image": {},
    "feature": {},
    "basic": {"trainable_modules": PROJECTOR_TOO},
}
# Without this weight, the visual loss of the tiny model would hardly change the update.
HEAVY = {"visual_loss_coef": 20.0, "learning_rate": 1.0}


def settings_of(target: str) -> dict:
    return {"visual_target": target, **TARGETS[target], **HEAVY}


# ---- The equations, by hand ----


def test_feature_loss_by_hand():
    """Row 1: (3, 4) and (0, 5) have length 5 and become √2 · (0.6, 0.8) and √2 · (0, 1). Row 2: equal directions.
    Row 3: a difference of 2 in one component, where the loss is linear."""
    hidden = torch.tensor([[3.0, 4.0], [1.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    features = torch.tensor([[0.0, 5.0], [7.0, 7.0], [1.0, -1.0]], dtype=torch.float64)
    expected = (0.5 * 2 * 0.6**2 + 0.5 * 2 * 0.2**2) / 2 + 0.0 + (2 - 0.5) / 2
    assert feature_loss_sum(hidden, features).item() == pytest.approx(expected, abs=1e-5)  # eps is 1e-6
    unrelated = torch.randn(2, 200, 256, generator=torch.Generator().manual_seed(0))
    assert feature_loss_sum(*unrelated).item() / 200 == pytest.approx(0.72, abs=0.01)  # see its docstring


def test_basic_loss_by_hand():
    """Orthogonal features and two words with unit vectors as embeddings."""
    image_features, refined = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    p = 1 / (1 + math.exp(2))  # probability of the first word with the refined features
    q = 1 / (1 + math.exp(-1))
    divergence = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    loss = basic_loss_sum(image_features, refined, torch.eye(2))
    assert loss.item() == pytest.approx(1 + 0.01 * divergence, rel=1e-6)


@pytest.mark.parametrize("detach", [True, False])
def test_basic_gradient_equals_plain_autograd(detach):
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(5, 6, generator=generator, dtype=torch.float64) for _ in range(2)]
    embeddings = torch.randn(9, 6, generator=generator, dtype=torch.float64)

    def plain(v, r, weight):
        teacher, student = (r @ weight.T).softmax(-1), (v @ weight.T).softmax(-1)
        cosine = (v * r).sum(-1) / v.norm(dim=-1) / r.norm(dim=-1)
        return (1 - cosine + 0.01 * (teacher * (teacher / student).log()).sum(-1)).sum()

    found, expected = ([x.clone().requires_grad_() for x in (*values, embeddings)] for _ in range(2))
    basic_loss_sum(*found, detach=detach).backward()
    plain(expected[0], expected[1].detach() if detach else expected[1], expected[2].detach()).backward()
    assert found[2].grad is None
    for one, other in zip(found[: 1 if detach else 2], expected, strict=False):
        torch.testing.assert_close(one.grad, other.grad)
    assert (found[1].grad is None) == detach


def test_no_rows_give_zero_with_a_graph():
    none = torch.zeros(0, 4, requires_grad=True)
    for loss in (feature_loss_sum(none, none.detach()), basic_loss_sum(none, none, torch.eye(4))):
        loss.backward()
        assert loss.item() == 0


# ---- In the trainer ----


def plain_visual_loss(model, batch, target: str) -> torch.Tensor:
    """Compute the mean over all image tokens patch by patch, without the losses of the package."""
    outputs = model(**batch, output_visual_logits=True, output_hidden_states=True)
    size, losses, patch = model.config.visual_vocab_size, [], 0
    features = outputs.image_features.flatten(0, 1)
    embeddings = model.get_input_embeddings().weight[:size].detach()
    for row, column in outputs.image_token_mask.nonzero().tolist():
        assert column > 0 and batch["attention_mask"][row, column - 1]  # every patch has a left neighbor
        last, middle = (states[row, column] for states in (outputs.hidden_states[-1], outputs.hidden_states[1]))
        feature = features[patch]
        if target == "other_image":
            number, place = divmod(patch, outputs.image_features.shape[1])
            other = (number + 1) % outputs.image_features.shape[0] * outputs.image_features.shape[1] + place
            teacher = outputs.visual_logits[other].detach().log_softmax(-1)
            student = (model.lm_head.weight[:size] @ outputs.hidden_states[-1][row, column - 1]).log_softmax(-1)
            losses.append((teacher.exp() * (teacher - student)).sum())
        elif target == "same_patch":
            teacher = outputs.visual_logits[patch].detach().log_softmax(-1)
            student = (model.lm_head.weight[:size] @ last).log_softmax(-1)
            losses.append((teacher.exp() * (teacher - student)).sum())
        elif target == "feature":
            a, b = (x / x.square().mean().sqrt() for x in (last, feature.detach()))
            losses.append(F.smooth_l1_loss(a, b))
        else:
            teacher, student = ((embeddings @ x).log_softmax(-1) for x in (middle.detach(), feature))
            cosine = F.cosine_similarity(feature, middle.detach(), dim=0)
            losses.append(1 - cosine + 0.01 * (teacher.exp() * (teacher - student)).sum())
        patch += 1
    return torch.stack(losses).mean()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the update of one step over all eight rows for each visual target."""
    folder = tmp_path_factory.mktemp("targets")
    return {target: update(build_trainer(folder / target, **settings_of(target))) for target in TARGETS}


@pytest.mark.parametrize("target", TARGETS)
def test_update_equals_plain_autograd(whole, tmp_path, target):
    trainer = build_trainer(tmp_path, **settings_of(target))
    model = trainer.model
    batch = trainer.data_collator(list(trainer.train_dataset))
    labels = batch.pop("labels")
    lm_loss = F.cross_entropy(model(**batch).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    (lm_loss + 20 * plain_visual_loss(model, batch, target)).backward()
    expected = {
        name: torch.zeros_like(parameter) if parameter.grad is None else -parameter.grad
        for name, parameter in model.named_parameters()
    }
    # `feature` uses an eps of 1e-6.
    assert_same_update({name: whole[target][name] for name in expected}, expected, tolerance=1e-5)


# The next image of a batch depends on the batch
@pytest.mark.parametrize("target", [target for target in TARGETS if target != "other_image"])
@pytest.mark.slow
@pytest.mark.parametrize(
    "split",
    [
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
        {"packing": True, "max_length": 50},
        {"gradient_checkpointing": True},
    ],
    ids=["eight micro-batches", "packed", "checkpointed"],
)
def test_step_does_not_depend_on_batching(whole, tmp_path, target, split):
    """The rows have different numbers of images, and some have none."""
    assert_same_update(update(build_trainer(tmp_path, **settings_of(target), **split)), whole[target], tolerance=2e-6)


def test_visual_targets_give_different_updates(whole, tmp_path):
    updates = {**whole, "next_patch": update(build_trainer(tmp_path, **HEAVY))}
    del updates["other_image"]  # the images of the tiny model have similar visual tokens
    flat = [torch.cat([tensor.flatten() for tensor in found.values()]) for found in updates.values()]
    assert all((a - b).norm() > 0.1 * a.norm() for i, a in enumerate(flat) for b in flat[:i])


def test_visual_target_works_under_an_adapter(build_model):
    """PEFT calls the model's forward without its hooks."""
    from peft import LoraConfig, get_peft_model

    batch = VTLMMCollator(build_processor())(list(build_rows()))
    call = {"return_loss_sums": True, "visual_student": "lm_head"}
    model = build_model()
    set_visual_target(model, "feature")
    expected = model(**batch, **call).loss_sums["visual_loss"]
    peft_model = get_peft_model(model, LoraConfig(r=1, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    torch.testing.assert_close(peft_model(**batch, **call).loss_sums["visual_loss"], expected)


def test_saved_model_does_not_depend_on_visual_target(tmp_path):
    """A loaded model uses the paper's loss, as does the same model after a reset."""
    trainer = build_trainer(tmp_path / "target", **settings_of("feature"))
    rows, evaluated = list(build_rows()), trainer.evaluate(build_rows())["eval_visual_loss"]
    trainer.save_model()
    build_trainer(tmp_path / "paper").save_model()
    names, expected = ({path.name for path in (tmp_path / name).iterdir()} for name in ("target", "paper"))
    assert names == expected
    loaded = VTLMMForConditionalGeneration.from_pretrained(tmp_path / "target")
    set_visual_target(trainer.model, "next_patch")
    batch = trainer.data_collator(rows)
    call = {"return_loss_sums": True, "visual_student": "lm_head"}
    own, again = (model(**batch, **call).loss_sums for model in (loaded, trainer.model))
    assert own["visual_loss"] == again["visual_loss"]
    assert (own["visual_loss"] / own["num_visual_targets"]).item() != pytest.approx(evaluated, rel=0.1)


def test_another_image_needs_two_images(tmp_path):
    """The last batch of an epoch may have one image."""
    trainer = build_trainer(tmp_path, **settings_of("other_image"))
    for number in (0, 1):
        rows = [row for row in build_rows() if len(row["images"]) == number][:1]
        inputs = trainer.data_collator(rows)
        loss = trainer.model(**inputs, return_loss_sums=True, visual_student="lm_head").loss_sums["visual_loss"]
        loss.backward()
        assert loss == 0
    with pytest.raises(ValueError, match="Set `per_device_train_batch_size` to 2 or more"):
        build_trainer(tmp_path, **settings_of("other_image"), per_device_train_batch_size=1)


# ---- Settings ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"visual_target": "patch"}, "it must be next_patch, same_patch, other_image, feature, basic"),
        ({"visual_target": "basic"}, "Add multi_modal_projector to `trainable_modules`"),
        ({"visual_target": "feature", "visual_student": "vm_head"}, "does not use the VM head"),
    ],
)
def test_invalid_combinations_are_rejected(changes, message):
    with pytest.raises(ValueError, match=message):
        resolve_stage("joint", **changes)


def test_plan_names_the_visual_target(build_model):
    model = build_model()
    assert "teacher vm_head, at the same patch" in describe(model, resolve_stage("joint", visual_target="same_patch"))
    plan = describe(model, resolve_stage("joint", visual_target="feature"))
    assert "smooth L1" in plan and "changed from the paper's row" in plan


def test_a_function_of_the_user_is_kept(build_model):
    model = build_model()

    def half_loss(*sides, **kwargs):
        return 0.5 * next_patch_loss(*sides, **kwargs)

    model.visual_loss_function = half_loss
    set_visual_target(model, "next_patch")
    assert model.visual_loss_function is half_loss
    with pytest.raises(ValueError, match="is a function of your own"):
        set_visual_target(model, "feature")
