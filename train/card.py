# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The short card of what a trainer saves or pushes itself; `vtlmm push` writes a longer one in its place."""

from importlib.metadata import version
from pathlib import Path

from huggingface_hub import ModelCardData
from peft import PeftModel

from .stages import describe


# The line by which `vtlmm push` knows that nobody wrote a card. UNFILLED is in those that PEFT writes.
CARD_MARK = "<!-- Written by vtlmm, anew at every push. Take this line out to keep your own changes. -->"
UNFILLED = "[More Information Needed]"
SETTINGS = ("learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "max_grad_norm")
SETTINGS += ("num_train_epochs", "max_steps", "max_length", "bf16", "seed")


def write_card(
    trainer, folder: Path, name: str, dataset_name: str | None = None, tags=None, license: str | None = None
) -> None:
    """Write README.md into `folder`, unless somebody's own is there: what the run has done so far."""
    file = folder / "README.md"
    if file.is_file():
        before = file.read_text(encoding="utf-8")
        if CARD_MARK not in before and UNFILLED not in before:
            return
    folder.mkdir(parents=True, exist_ok=True)
    adapter = isinstance(trainer.model, PeftModel)
    base = trainer.model.active_peft_config.base_model_name_or_path if adapter else trainer.model.name_or_path
    known = bool(base) and base.count("/") == 1 and not Path(base).exists()  # the Hub refuses a path
    data = ModelCardData(
        license=license,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="image-text-to-text",
        tags=["vt-lmm", "conversational", "trl", *([tags] if isinstance(tags, str) else tags or [])],
        base_model=base if known else None,
        base_model_relation=("adapter" if adapter else "finetune") if known else None,
        datasets=[dataset_name] if dataset_name else None,
    )
    text = _TEXT.format(
        data=data.to_yaml(),
        mark=CARD_MARK,
        name=name,
        paper=trainer._paper["id"],
        steps=trainer.state.global_step,
        plan=describe(trainer.model, trainer.stage),
        losses=_losses(trainer.state.log_history),
        settings="\n".join(f"| `{key}` | {value} |" for key, value in _settings(trainer).items()),
        versions=", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "peft", "vtlmm")),
        citation=trainer._paper["citation"],
    )
    file.write_text(text, encoding="utf-8")


def _settings(trainer) -> dict:
    args = trainer.args
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    values = {name: getattr(args, name) for name in SETTINGS}
    return {"rows a step": rows, **{name: getattr(value, "value", value) for name, value in values.items()}}


def _losses(log_history: list[dict]) -> str:
    """What was logged last of each loss, in nats."""
    last = {}
    for entry in log_history:
        last |= {name: value for name, value in entry.items() if name.endswith(("lm_loss", "visual_loss"))}
    return ", ".join(f"{name} {value:.3g}" for name, value in last.items()) or "none logged"


_TEXT = """---
{data}
---

{mark}

# {name}

A VT-LMM ([arXiv {paper}](https://arxiv.org/abs/{paper})) after {steps} optimizer steps of one stage. Losses (nats):
{losses}.

```
{plan}
```

It loads with `trust_remote_code=True`, which runs code files of a repository with your rights: read them, and name the
commit that you have read as `revision`.

| setting | |
|---|---|
{settings}

{versions}.

```bibtex
{citation}
```
"""
