# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Pushes and downloads with the loopback Hub, in a process of its own, because the client reads HF_ENDPOINT at import.

Prints the outcomes as JSON for tests/test_push.py.
"""

import contextlib
import gc
import io
import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path

from .loopback_hub import TOKEN, USER, LoopbackHub, Repository


HUB = LoopbackHub().__enter__()
WORK = Path(sys.argv[1])
os.environ.update(HF_ENDPOINT=HUB.endpoint, HF_TOKEN=TOKEN, HF_HOME=str(WORK / "home"), HF_HUB_OFFLINE="0")
os.environ.update(HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_DISABLE_PROGRESS_BARS="1")

import torch  # noqa: E402
from huggingface_hub.utils import close_session  # noqa: E402
from peft import PeftModel  # noqa: E402
from safetensors.torch import load  # noqa: E402
from transformers import modeling_utils  # noqa: E402

from modeling_vtlmm import VTLMMForConditionalGeneration, VTLMMProcessor  # noqa: E402
from vtlmm.cli.main import main  # noqa: E402
from vtlmm.hub import verify  # noqa: E402
from vtlmm.hub.isolated_load import probe  # noqa: E402
from vtlmm.hub.push import push_model  # noqa: E402
from vtlmm.train.stage_runner import build_trainer, run_training  # noqa: E402

from .gguf_models import write_gguf_source  # noqa: E402
from .tiny_models import build_config, build_processor  # noqa: E402
from .training import write_start  # noqa: E402


FACTS, SHARD_SIZES = {}, []
WHOLE = f"{USER}/whole"


def split_noting_size(*arguments, max_shard_size, **options):
    SHARD_SIZES.append(max_shard_size)
    return split(*arguments, max_shard_size=max_shard_size, **options)


split, modeling_utils.split_torch_state_dict_into_shards = (
    modeling_utils.split_torch_state_dict_into_shards,
    split_noting_size,
)


def run(action) -> dict:
    """Run a function that returns an exit code; return code, output, error and the commits of each repository."""
    before = {name: len(repository.commits) for name, repository in HUB.repositories.items()}
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            code = action()
        except (ValueError, OSError) as problem:
            code = 1
            print(problem, file=sys.stderr)
    commits = {name: len(r.commits) - before.get(name, 1) for name, r in HUB.repositories.items()}
    return {"code": code, "out": out.getvalue(), "error": error.getvalue(), "commits": commits}


def vtlmm(*command) -> dict:
    """Run one command."""
    return run(lambda: main([str(part) for part in command]))


def push(folder, repo_id: str, **options) -> dict:
    """Run [`push_model`] and print its result."""

    def action() -> int:
        result = push_model(folder, repo_id, **options)
        print(result.format())
        return 1 if result.report.problems else 0

    return run(action)


def files(name: str, revision: str = "main") -> dict[str, bytes]:
    repository = HUB.repositories[f"{USER}/{name}"]
    return repository.commits[repository.at(revision)]


@contextlib.contextmanager
def without_loading():
    """Skip the process that loads the model, for a folder that was loaded before."""
    load, verify.load_in_new_process = verify.load_in_new_process, lambda *arguments: []
    yield
    verify.load_in_new_process = load


def write_model(folder: Path, seed: int = 0, **options) -> Path:
    torch.manual_seed(seed)
    VTLMMForConditionalGeneration(build_config()).save_pretrained(folder, **options)
    build_processor().save_pretrained(folder)
    return folder


def folder_state(folder: Path) -> dict[str, float]:
    return {str(file): file.stat().st_mtime for file in folder.rglob("*") if file.is_file()}


def push_a_model(folder: Path) -> None:
    """A push without a license, a dry run, a push that fails in a shard, a push, and the same push again."""
    (folder / ".env").write_text("HF_TOKEN=hf_private")
    (folder / "wandb").mkdir()
    (folder / "wandb/run.json").write_text("{}")
    (folder / "notes.txt").write_text("private")
    (folder / "extra.txt").write_text("public")
    FACTS["incomplete"] = push(folder, WHOLE)
    before = folder_state(folder)
    FACTS["invalid id"] = push(folder, "somebody", license="apache-2.0")
    FACTS["dry run"] = push(folder, WHOLE, license="apache-2.0", dry_run=True)
    FACTS["unchanged by dry run"] = folder_state(folder) == before
    FACTS["requests of both"] = [request for request in HUB.requests if not request.startswith("GET /api/whoami")]
    HUB.refuse = r"PUT /large"
    FACTS["first push fails"] = push(folder, WHOLE, license="apache-2.0", private=True)
    HUB.refuse = None
    options = {"license": "apache-2.0", "private": True, "include": ["extra.*"]}
    FACTS["push"] = push(folder, WHOLE, **options)
    FACTS["files"] = sorted(files("whole"))
    FACTS["private"] = HUB.repositories[WHOLE].private
    FACTS["second push"] = push(folder, WHOLE, include=["extra.*"])
    link = folder / "tokenizer.model"
    link.symlink_to(folder / ".env")
    FACTS["link"] = push(folder, WHOLE)
    link.unlink()


def push_the_parts(folder: Path) -> None:
    """`push_to_hub` of model and processor, to an existing and to a new repository."""
    card, commits = files("whole")["README.md"].decode(), len(HUB.repositories[WHOLE].commits)
    model, processor = VTLMMForConditionalGeneration.from_pretrained(folder), VTLMMProcessor.from_pretrained(folder)
    model.push_to_hub(WHOLE)
    processor.push_to_hub(WHOLE)
    FACTS["own pushes"] = {"commits": len(HUB.repositories[WHOLE].commits) - commits}
    FACTS["cards"] = [card, files("whole")["README.md"].decode()]
    model.push_to_hub(f"{USER}/parts")
    processor.push_to_hub(f"{USER}/parts")
    FACTS["files of parts"] = sorted(files("parts"))
    FACTS["shard sizes"] = list(SHARD_SIZES)
    FACTS["push over parts"] = push(folder, f"{USER}/parts", license="mit")
    FACTS["card of parts"] = files("parts")["README.md"].decode()


def push_another_model(other: Path) -> None:
    """A model in one file: a push that fails at the commit, then a push to a branch with a tag."""
    before = dict(files("whole"))
    HUB.refuse = r"POST .*/commit/"
    FACTS["failed push"] = push(other, WHOLE, license="mit")
    HUB.refuse = None
    FACTS["unchanged after it"] = files("whole") == before
    FACTS["branch"] = push(other, WHOLE, license="mit", revision="dev", tag="v1")
    FACTS["main unchanged"] = files("whole") == before
    FACTS["files of branch"] = sorted(files("whole", "dev"))
    FACTS["tag is the branch"] = files("whole", "v1") == files("whole", "dev")


def push_from_trainers(settings: dict) -> None:
    """`push_to_hub` of a trainer, and of a recipe with an adapter, which is then merged."""
    settings = {**settings, "max_steps": 1, "warmup_steps": 0, "learning_rate": 1e-2}
    trained = {"output_dir": str(WORK / "trained"), "hub_model_id": f"{USER}/trained"}
    trainer = build_trainer({**settings, **trained})
    trainer.train()
    trainer.push_to_hub(license="mit", dataset_name="somebody/images")
    FACTS["files of trained"] = sorted(files("trained"))
    FACTS["card of trained"] = files("trained")["README.md"].decode()
    FACTS["trained"] = vtlmm("verify", f"{USER}/trained", "--trust-remote-code")

    adapter = WORK / "adapter"
    options = {
        "use_peft": True,
        "lora_r": 2,
        "stage": "decoder",
        "base_id": f"{USER}/base",
        "output_dir": str(adapter),
    }
    trainer = run_training({**settings, **options, "push_to_hub": True, "hub_model_id": f"{USER}/adapter"})
    FACTS["files of adapter"] = sorted(files("adapter"))
    base = VTLMMForConditionalGeneration.from_pretrained(settings["model_name_or_path"])
    loaded = PeftModel.from_pretrained(base, f"{USER}/adapter")
    answers = [probe(model, build_processor())["logits"] for model in (loaded, trainer.model)]
    FACTS["logits of adapter"] = answers
    FACTS["adapter"] = push(adapter, f"{USER}/adapter", form="adapter", license="mit")
    FACTS["card of adapter"] = files("adapter")["README.md"].decode()
    config = adapter / "adapter_config.json"
    values = {**json.loads(config.read_text()), "base_model_name_or_path": settings["model_name_or_path"]}
    config.write_text(json.dumps(values))
    FACTS["adapter of local"] = push(adapter, f"{USER}/other", license="mit")
    FACTS["merge"] = vtlmm("merge", adapter, "--base", settings["model_name_or_path"], "--output", WORK / "merged")


def push_with_all_strategies(settings: dict) -> None:
    """Each `hub_strategy` of a trainer, with a token in its settings and private files in its folder."""
    for strategy in ("end", "every_save", "checkpoint", "all_checkpoints"):
        output = WORK / f"strategy_{strategy}"
        output.mkdir()
        (output / ".env").write_text("HF_TOKEN=hf_private")
        options = {"max_steps": 2, "save_steps": 1, "save_strategy": "steps", "warmup_steps": 0, "learning_rate": 1e-2}
        options |= {"output_dir": str(output), "hub_model_id": f"{USER}/{strategy}", "hub_strategy": strategy}
        options |= {"push_to_hub": True, "hub_token": TOKEN, "hub_always_push": True}
        trainer = build_trainer({**settings, **options})
        trainer.train()
        trainer._finish_current_push()
        if strategy == "end":
            trainer.push_to_hub()
        published = files(strategy)
        FACTS[f"files of {strategy}"] = sorted(published)
        FACTS[f"secrets of {strategy}"] = [name for name, data in published.items() if TOKEN.encode() in data]
        FACTS[f"verify {strategy}"] = vtlmm("verify", f"{USER}/{strategy}")


def push_llava(merged: Path) -> None:
    """The LLaVA export of a merged adapter, first to a new repository, then where the card was written by hand."""
    FACTS["llava"] = push(merged, f"{USER}/llava", form="llava", license="apache-2.0")
    FACTS["files of llava"] = sorted(files("llava"))
    FACTS["card of llava"] = files("llava")["README.md"].decode()
    mine = b"---\nlicense: mit\n---\nMine.\n"
    HUB.repositories[f"{USER}/llava"].commit("main", {**files("llava"), "README.md": mine})
    with without_loading():
        FACTS["push under a card"] = push(merged, f"{USER}/llava", form="llava", license="mit")
    FACTS["card stays"] = files("llava")["README.md"] == mine
    with without_loading():
        FACTS["whole over adapter"] = push(merged, f"{USER}/adapter", license="mit")
    FACTS["files of whole over adapter"] = sorted(files("adapter"))


def push_nf4(start: Path) -> None:
    """A quantized model, then loaded by id and tag in a process that cannot import this package."""
    options = {"form": "nf4", "license": "mit", "base_models": [WHOLE], "private": True}
    name = f"{USER}/nf4"
    with without_loading():
        FACTS["nf4"] = push(start, name, **options, tag="v4")
        FACTS["second nf4"] = push(start, name, **options)
        FACTS["tag again"] = push(start, name, **options, tag="v4")
        (start / "results.json").write_text("{}")
        FACTS["no results"] = push(start, name, **options, results=[start / "results.json"])
        (start / "results.json").unlink()
        HUB.role = "read"
        FACTS["read-only token"] = push(start, name, **options)
        HUB.role = "write"
        FACTS["int8"] = push(start, f"{USER}/int8", form="int8", license="mit", dry_run=True)
    FACTS["files of nf4"] = sorted(files("nf4"))
    FACTS["card of nf4"] = files("nf4")["README.md"].decode()
    tensors = load(files("nf4")["model.safetensors"])
    FACTS["types of nf4"] = {name: str(tensor.dtype) for name, tensor in tensors.items() if name.endswith(".weight")}
    FACTS["verify"] = vtlmm("verify", name, "--revision", "v4")


def push_gguf(source: Path) -> None:
    """GGUF files, pushed twice, then to a repository that contains a model for transformers."""
    name = f"{USER}/gguf"
    FACTS["gguf"] = push(source, name, form="gguf", license="mit")
    FACTS["second gguf"] = push(source, name, form="gguf", license="mit")
    FACTS["gguf over model"] = push(source, WHOLE, form="gguf", license="mit")
    FACTS["files of gguf"] = sorted(files("gguf"))
    FACTS["card of gguf"] = files("gguf")["README.md"].decode()
    FACTS["start of gguf"] = files("gguf")["model-f16.gguf"][:4].decode()
    FACTS["verify gguf"] = vtlmm("verify", name)


def push_hosted(folder: Path) -> None:
    """A model with `handler.py` and a Space, pushed twice, then what cannot have them."""
    name, space = f"{USER}/hosted", f"{USER}/page"
    options = {"license": "mit", "handler": True, "space": space, "private": True}
    FACTS["hosted"] = push(folder, name, **options)
    FACTS["second hosted"] = push(folder, name, **options)
    FACTS["files of hosted"] = sorted(files("hosted"))
    FACTS["space"] = {name: text.decode() for name, text in files("page").items()}
    FACTS["private space"] = HUB.repositories[space].private
    FACTS["space of llava"] = push(folder, name, form="llava", license="mit", space=space)
    FACTS["handler of gguf"] = push(folder, name, form="gguf", license="mit", handler=True)
    FACTS["invalid space"] = push(folder, name, license="mit", space="page")


def refused(folder: Path) -> None:
    """Missing and foreign repositories, invalid tokens, and then no Hub."""
    nothing = f"{USER}/nothing"
    FACTS["not ours"] = push(folder, "another/model")
    FACTS["no adapter"] = push(folder, WHOLE, form="adapter")
    FACTS["missing"] = vtlmm("verify", nothing)
    FACTS["missing revision"] = vtlmm("verify", WHOLE, "--revision", "v9")
    FACTS["missing to convert"] = vtlmm("convert", nothing, "--output", WORK / "nowhere")
    FACTS["missing tower"] = vtlmm("compose", "--vision", nothing, "--text", nothing, "--output", WORK / "nowhere")
    HUB.repositories[f"{USER}/secret"] = Repository(private=True)
    os.environ["HF_TOKEN"] = "hf_wrong"
    FACTS["wrong token"] = push(folder, WHOLE)
    FACTS["private to others"] = vtlmm("convert", f"{USER}/secret", "--output", WORK / "nowhere")
    del os.environ["HF_TOKEN"]
    FACTS["no token"] = push(folder, WHOLE)
    os.environ["HF_TOKEN"] = TOKEN
    HUB.__exit__()
    close_session()  # with its open connections
    FACTS["push to no Hub"] = push(folder, WHOLE)
    FACTS["verify without a Hub"] = vtlmm("verify", nothing)


def session() -> None:
    settings = write_start(WORK)
    folder = write_model(WORK / "model", max_shard_size="100KB")
    with without_loading():
        push_a_model(folder)
        push_the_parts(folder)
        push_another_model(write_model(WORK / "other", seed=1))
        push_hosted(WORK / "other")
        push_from_trainers(settings)
        push_with_all_strategies(settings)
    push_llava(WORK / "merged")
    if find_spec("bitsandbytes"):
        push_nf4(WORK / "start")
    if find_spec("gguf"):
        push_gguf(write_gguf_source(WORK / "gguf_source", "smollm2", "clip_vision_model"))
    refused(folder)


gc.freeze()  # the imported modules
session()
print("FACTS" + json.dumps(FACTS))
