# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The trainer: exact normalization, trainable modules of each stage, resuming, logging."""

import dataclasses
import time

import pytest
import torch
from accelerate import Accelerator
from helpers.forked import train_until_kill
from helpers.tiny_models import build_processor
from helpers.training import assert_same_update, build_rows, build_trainer, update, weights
from safetensors.torch import load_file

from modeling_vtlmm.losses_vtlmm import predicted_positions
from vtlmm.train.collator import VTLMMCollator
from vtlmm.train.config import VTLMMTrainingConfig
from vtlmm.train.stages import MODULES, STAGES, describe, module_of, resolve_stage
from vtlmm.train.trainer import VTLMMTrainer


@pytest.fixture(scope="module")
def whole_batch(tmp_path_factory):
    return update(build_trainer(tmp_path_factory.mktemp("whole")))


def test_the_update_is_the_gradient_of_the_papers_loss(whole_batch, tmp_path):
    """Compare with one step of plain autograd on the mean losses over the eight rows."""
    trainer = build_trainer(tmp_path)
    model = trainer.model
    batch = trainer.data_collator(list(trainer.train_dataset))
    labels = batch.pop("labels")
    outputs = model(**batch, output_visual_logits=True)
    lm_loss = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    predicted = predicted_positions(outputs.image_token_mask, batch["attention_mask"])
    size = model.config.visual_vocab_size
    student = outputs.logits[:, :-1][predicted[:, 1:]][:, :size].log_softmax(-1)
    teacher = outputs.visual_logits.detach().log_softmax(-1)[predicted[outputs.image_token_mask]]
    visual_loss = (teacher.exp() * (teacher - student)).sum(-1).mean()
    (lm_loss + visual_loss).backward()
    expected = {
        name: torch.zeros_like(parameter) if parameter.grad is None else -10.0 * parameter.grad
        for name, parameter in model.named_parameters()
    }
    assert_same_update({name: whole_batch[name] for name in expected}, expected)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_accumulation_equals_the_whole_batch(whole_batch, tmp_path, batch_size):
    """Rows have different numbers of images; some micro-batches of one row have no image."""
    accumulated = build_trainer(
        tmp_path, per_device_train_batch_size=batch_size, gradient_accumulation_steps=8 // batch_size
    )
    accumulated.model_accepts_loss_kwargs = False  # Trainer derives it from the signature of forward
    assert_same_update(update(accumulated), whole_batch)


# Counts of other normalizations `[num_lm_targets, num_visual_targets]`
WRONG_COUNTS = {
    "mean of each micro-batch, added up": lambda own, whole, num_steps: own,
    "mean of the micro-batches' means": lambda own, whole, num_steps: own * num_steps,
    "visual loss over the text targets": lambda own, whole, num_steps: whole[[0, 0]],
}


@pytest.mark.slow
@pytest.mark.parametrize("wrong", WRONG_COUNTS)
def test_other_normalizations_would_be_wrong(tmp_path, wrong):
    """Each common way to normalize gives another update, so the test above can fail."""
    rows = build_rows(
        (1, 0, 0, 1, 0, 0, 0, 1)
    )  # with similar numbers of image and text tokens, two of the counts would be similar
    settings = {
        "visual_loss_coef": 20.0,
        "learning_rate": 1.0,
    }  # makes the visual loss of this tiny model large enough
    expected = update(build_trainer(tmp_path, rows, **settings))
    settings |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    assert_same_update(update(build_trainer(tmp_path, rows, **settings)), expected)
    trainer = build_trainer(tmp_path, rows, **settings)
    compute_loss = trainer.compute_loss

    def wrongly_divided(model, inputs, return_outputs=False, num_items_in_batch=None):
        counts = WRONG_COUNTS[wrong](trainer._count_targets(inputs), num_items_in_batch, 4)
        return compute_loss(model, inputs, num_items_in_batch=counts)

    trainer.compute_loss = wrongly_divided
    with pytest.raises(AssertionError):
        assert_same_update(update(trainer), expected, tolerance=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        *({"stage": stage} for stage in STAGES),
        {"stage": "joint", "trainable_modules": ["language_model", "lm_head", "multi_modal_projector"]},
        {"stage": "decoder", "trainable_modules": [*MODULES], "visual_loss_coef": 0.5, "detach_visual_teacher": False},
        {"stage": "joint", "visual_loss_coef": 0},
    ],
    ids=lambda settings: "-".join(map(str, settings.values()))[:60],
)
def test_a_stage_changes_exactly_its_modules(tmp_path, settings):
    """The last layer of the tower is not used, so it gets no gradient."""
    trainer = build_trainer(tmp_path, **settings)
    trains = trainer.stage.trains
    found = update(trainer)
    unused = ("vision_tower.encoder.layers.2.", "vision_tower.post_layernorm.", "embed_tokens")
    for name, difference in found.items():
        if module_of(name) in trains and not any(part in name for part in unused):
            # a key bias adds the same number to all scores of a row, so its gradient is a rounding error
            assert difference.abs().max() > 0 or name.endswith("k_proj.bias"), name
        elif module_of(name) not in trains:
            assert difference.abs().max() == 0, name


def test_throughput_excludes_evaluation(tmp_path):
    rows = build_rows()
    settings = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    trainer = build_trainer(tmp_path, rows, eval_dataset=rows, **settings)
    trainer.task_scores = lambda model: time.sleep(2) or {}
    trainer.train()
    speeds = [entry["samples_per_second"] for entry in trainer.state.log_history if "samples_per_second" in entry]
    assert len(speeds) == 2 and speeds[1] > len(rows) / 2


def test_an_epoch_that_ends_with_an_evaluation_is_logged(tmp_path):
    rows = build_rows()
    settings = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "logging_strategy": "epoch"}
    trainer = build_trainer(tmp_path, rows, eval_dataset=rows, learning_rate=0.0, **settings)
    trainer.train()
    evaluated = next(entry for entry in trainer.state.log_history if "eval_lm_loss" in entry)
    logged = [entry["lm_loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx([evaluated["eval_lm_loss"]] * 2, rel=1e-5)


def test_a_mixture_of_experts_needs_router_aux_loss_coef_0(tmp_path):
    trainer = build_trainer(tmp_path)
    config = trainer.model.config.text_config
    config.router_aux_loss_coef, config.output_router_logits = 0.01, False
    arguments = {"model": trainer.model, "train_dataset": build_rows(), "processing_class": build_processor()}
    with pytest.raises(ValueError, match="Set `router_aux_loss_coef: 0`"):
        VTLMMTrainer(args=trainer.args, **arguments)
    VTLMMTrainer(args=dataclasses.replace(trainer.args, router_aux_loss_coef=0.0), **arguments)
    assert config.router_aux_loss_coef == 0.0 and not config.output_router_logits


def test_the_baseline_does_not_use_the_vm_head(tmp_path):
    """With visual_loss_coef = 0, the VM head does not change the update."""
    one = build_trainer(tmp_path, visual_loss_coef=0)
    other = build_trainer(tmp_path, visual_loss_coef=0)
    torch.nn.init.normal_(other.model.model.vm_head.weight)
    first, second = update(one), update(other)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_logged_values_are_exact_means(tmp_path):
    """Two optimizer steps of unequal micro-batches are logged as one evaluation of all rows."""
    rows = build_rows()
    trainer = build_trainer(
        tmp_path,
        rows,
        learning_rate=0.0,
        max_steps=2,
        logging_steps=2,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
    )
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "lm_loss" in entry)
    trainer.args.per_device_eval_batch_size = 3
    evaluated = trainer.evaluate(rows)
    names = (
        "lm_loss",
        "visual_loss",
        "visual_token_entropy",
        "mean_visual_token_entropy",
        "blank_top_words",
        "head_agreement",
    )
    for name in names:
        assert logged[name] == pytest.approx(evaluated[f"eval_{name}"], rel=1e-5), name
    assert evaluated["eval_loss"] == pytest.approx(evaluated["eval_lm_loss"] + evaluated["eval_visual_loss"])
    assert logged["samples_per_second"] > 0 and logged["image_tokens_per_second"] > 0
    batch = trainer.data_collator(list(rows))
    sums = trainer.model(**batch, return_loss_sums=True, visual_student="lm_head").loss_sums
    outputs = trainer.model(**batch, output_visual_logits=True)
    assert evaluated["eval_lm_loss"] == pytest.approx(outputs.loss.item(), rel=1e-5)
    assert evaluated["eval_visual_loss"] == pytest.approx(
        (sums["visual_loss"] / sums["num_visual_targets"]).item(), rel=1e-5
    )
    probs = outputs.visual_logits.softmax(-1)
    assert evaluated["eval_visual_token_entropy"] == pytest.approx(
        torch.special.entr(probs).sum(-1).mean().item(), rel=1e-4
    )
    assert evaluated["eval_mean_visual_token_entropy"] == pytest.approx(
        torch.special.entr(probs.mean(0)).sum().item(), rel=1e-4
    )


RESUMED = {"max_steps": 8, "save_strategy": "steps", "save_steps": 3, "optim": "adamw_torch", "learning_rate": 1e-2}
RESUMED |= {"per_device_train_batch_size": 2, "lr_scheduler_type": "cosine", "train_sampling_strategy": "random"}


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights(tmp_path):
    """SIGKILL stops stage IV two steps after a checkpoint."""
    whole = build_trainer(tmp_path / "whole", **RESUMED)
    whole.train()
    assert "| max_steps | 8 |" in (tmp_path / "whole" / "README.md").read_text()  # one card, at the end
    assert train_until_kill(lambda: build_trainer(tmp_path / "killed", **RESUMED), 5, tmp_path / "log.txt") == -9
    assert [path.name for path in (tmp_path / "killed").glob("checkpoint-*")] == ["checkpoint-3"]
    resumed = build_trainer(tmp_path / "killed", **RESUMED)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 8
    for (name, a), b in zip(weights(whole.model).items(), weights(resumed.model).values(), strict=True):
        assert torch.equal(a, b), name


def test_a_checkpoint_of_another_model_is_rejected(tmp_path):
    trainer = build_trainer(tmp_path, **RESUMED | {"max_steps": 3})
    trainer.train()
    path = tmp_path / "checkpoint-3" / "model.safetensors"
    from safetensors.torch import save_file

    tensors = load_file(path)
    del tensors["model.multi_modal_projector.linear_1.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing \['model.multi_modal_projector.linear_1.weight'\]"):
        build_trainer(tmp_path, **RESUMED)._load_from_checkpoint(str(path.parent))
    tensors = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    tensors["model.multi_modal_projector.linear_1.weight"] = trainer.model.model.multi_modal_projector.linear_1.weight
    save_file({**tensors, "model.another": torch.zeros(1)}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"unexpected \['model.another'\]"):
        build_trainer(tmp_path, **RESUMED)._load_from_checkpoint(str(path.parent))


def test_the_saved_folder_is_a_complete_model(tmp_path):
    from modeling_vtlmm import VTLMMForConditionalGeneration, VTLMMProcessor

    trainer = build_trainer(tmp_path)
    trainer.train()
    trainer.save_model()
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "model.safetensors", "modeling_vtlmm.py", "processing_vtlmm.py"} <= names
    assert {"processor_config.json", "tokenizer.json", "chat_template.jinja"} <= names
    loaded = VTLMMForConditionalGeneration.from_pretrained(tmp_path)
    assert all(
        torch.equal(a, b) for a, b in zip(weights(trainer.model).values(), weights(loaded).values(), strict=True)
    )
    assert VTLMMProcessor.from_pretrained(tmp_path).num_image_tokens(28, 28) == 4


def test_the_projector_can_have_its_own_learning_rate(tmp_path):
    slow = update(build_trainer(tmp_path, stage="decoder", projector_learning_rate=1.0))
    same = update(build_trainer(tmp_path, stage="decoder"))
    for name in same:
        factor = 0.1 if "multi_modal_projector" in name else 1.0
        torch.testing.assert_close(slow[name], factor * same[name], atol=1e-4, rtol=1e-3)


# ---- Settings ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stage": "IV"}, "Unknown stage 'IV'. Use projector, decoder, visual_head, joint"),
        ({"stage": "joint", "trainable_modules": ["adapter"]}, "Unknown modules in `trainable_modules`: adapter"),
        ({"stage": "joint", "trainable_modules": []}, "at least one module"),
        ({"stage": "projector", "lm_loss_coef": 0}, "are both 0, so there is no loss"),
        ({"stage": "joint", "visual_loss_coef": -1}, "must not be negative"),
        ({"stage": "joint", "visual_student": "decoder"}, "must be 'vm_head' or 'lm_head'"),
        ({"stage": "joint", "visual_student": "vm_head"}, "trains the VM head, but it is frozen"),
        ({"stage": "joint", "label_smoothing_factor": 0.1}, "`label_smoothing_factor=0.1` is not supported"),
        ({"stage": "joint", "loss_type": "dft"}, "`loss_type='dft'` is not supported"),
        ({"stage": "joint", "vm_head_init": "zeros"}, "`vm_head_init` is 'zeros'"),
    ],
)
def test_contradicting_settings_are_rejected(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        VTLMMTrainingConfig(output_dir=str(tmp_path), use_cpu=True, **settings)


def test_a_stream_is_not_evaluated_on_several_processes(tmp_path, monkeypatch):
    """A stream has no length, so the rows that accelerate repeats in the last batch are unknown."""
    monkeypatch.setattr(Accelerator, "num_processes", property(lambda self: 2))
    with pytest.raises(ValueError, match="Load `eval_dataset` as a whole"):
        build_trainer(tmp_path, eval_dataset=build_rows().to_iterable_dataset())


def test_candidates_need_an_evaluation_image(tmp_path):
    settings = {"stage": "visual_head", "vm_head_candidates": [{"learning_rate": 1e-2}, {"learning_rate": 1e-3}]}
    with pytest.raises(ValueError, match="no image"):
        build_trainer(tmp_path, eval_dataset=build_rows((0, 0)), **settings)


def test_stage_defaults(tmp_path):
    config = VTLMMTrainingConfig(output_dir=str(tmp_path), use_cpu=True, stage="visual_head")
    assert (config.learning_rate, config.vm_head_init, config.bf16) == (1e-3, "lm_head", False)
    # a fraction of the steps, not 0.03 steps or 30 steps
    assert [config.get_warmup_steps(steps) for steps in (1000, 2000)] == [30, 60]
    early = resolve_stage("projector", visual_loss_coef=1.0)
    assert early.visual_student == "lm_head" and early.trains == ("multi_modal_projector",)


def test_the_plan_lists_trainable_parameters(build_model):
    from vtlmm.train.stages import set_trainable

    model = build_model()
    stage = resolve_stage("joint", visual_loss_coef=0.5)
    set_trainable(model, stage)
    text = describe(model, stage)
    assert "1 · L_lm + 0.5 · L_vm [KL(p ‖ q), teacher vm_head]" in text and "changed from the paper's row" in text
    head = model.lm_head.weight.numel()
    assert f"{head:,} parameters" in text
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    decoder = sum(p.numel() for p in model.model.language_model.parameters())
    assert learning == decoder + head


def test_tied_embeddings_are_trained_together(build_model):
    from vtlmm.train.stages import set_trainable

    model = build_model("qwen2")
    set_trainable(model, resolve_stage("joint", trainable_modules=["lm_head"]))
    assert model.get_input_embeddings().weight.requires_grad
    set_trainable(model, STAGES["visual_head"])
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["model.vm_head.weight"]


def test_losses_use_the_trainable_copy_of_a_head(build_model):
    """`head.weight` of PEFT's wrapper is the trainable copy; the original gets no gradient."""
    from peft import LoraConfig, get_peft_model

    model = build_model().train()
    config = LoraConfig(r=1, target_modules="dummy-target-modules", modules_to_save=["lm_head", "vm_head"])
    peft_model = get_peft_model(model, config)
    for wrapper in (model.lm_head, model.model.vm_head):
        torch.nn.init.normal_(wrapper.modules_to_save["default"].weight)
    batch = VTLMMCollator(build_processor())(list(build_rows()))
    student = {"visual_student": "vm_head", "detach_visual_teacher": False}
    sums = peft_model(**batch, return_loss_sums=True, **student).loss_sums
    (sums["lm_loss"] + sums["visual_loss"]).backward()
    logits = peft_model(**{**batch, "labels": None}).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(sums["lm_loss"], expected)
    for wrapper in (model.lm_head, model.model.vm_head):
        assert wrapper.modules_to_save["default"].weight.grad.abs().max() > 0
        assert wrapper.original_module.weight.grad is None


def test_a_model_given_by_name_is_trained_in_float32(build_model, tmp_path):
    """A bfloat16 checkpoint is loaded in float32. A model without a folder needs `processing_class`."""
    from vtlmm.train.trainer import VTLMMTrainer

    build_model().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    build_processor().save_pretrained(tmp_path / "model")
    args = VTLMMTrainingConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    trainer = VTLMMTrainer(model=str(tmp_path / "model"), args=args, train_dataset=build_rows())
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    with pytest.raises(ValueError, match="Pass the model's processor"):
        VTLMMTrainer(model=build_model(), args=args, train_dataset=build_rows())
