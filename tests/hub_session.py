# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""What people do with a Hub, in one process of its own: the client reads HF_ENDPOINT and HF_TOKEN when it is imported.

Prints as JSON what happened; tests/test_push.py looks at it.
"""

import contextlib
import io
import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path

from loopback_hub import TOKEN, USER, LoopbackHub, Repository


HUB = LoopbackHub().__enter__()
WORK = Path(sys.argv[1])
os.environ.update(HF_ENDPOINT=HUB.endpoint, HF_TOKEN=TOKEN, HF_HOME=str(WORK / "home"), HF_HUB_OFFLINE="0")
os.environ.update(HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_DISABLE_PROGRESS_BARS="1")

import torch  # noqa: E402
from conftest import build_config, build_processor  # noqa: E402
from huggingface_hub.utils import close_session  # noqa: E402
from peft import PeftModel  # noqa: E402
from safetensors.torch import load  # noqa: E402
from training_setup import write_start  # noqa: E402
from transformers import modeling_utils  # noqa: E402

from modeling_vtlmm import VTLMMForConditionalGeneration, VTLMMProcessor  # noqa: E402
from vtlmm.cli.main import main  # noqa: E402
from vtlmm.hub import verify  # noqa: E402
from vtlmm.hub.isolated_load import probe  # noqa: E402
from vtlmm.train.stage_runner import build_trainer, run_training  # noqa: E402


FACTS, SHARD_SIZES = {}, []
WHOLE = f"{USER}/whole"


def split_noting_size(*arguments, max_shard_size, **options):
    SHARD_SIZES.append(max_shard_size)
    return split(*arguments, max_shard_size=max_shard_size, **options)


split, modeling_utils.split_torch_state_dict_into_shards = (
    modeling_utils.split_torch_state_dict_into_shards,
    split_noting_size,
)


def vtlmm(*command) -> dict:
    """Exit code, what was said, and the commits that came of it."""
    before = {name: len(repository.commits) for name, repository in HUB.repositories.items()}
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        code = main([str(part) for part in command])
    commits = {name: len(r.commits) - before.get(name, 1) for name, r in HUB.repositories.items()}
    return {"code": code, "out": out.getvalue(), "error": error.getvalue(), "commits": commits}


def files(name: str, revision: str = "main") -> dict[str, bytes]:
    repository = HUB.repositories[f"{USER}/{name}"]
    return repository.commits[repository.at(revision)]


@contextlib.contextmanager
def only_looked_at():
    """Without the process that loads the folder, for a folder that was loaded before."""
    load, verify.load_elsewhere = verify.load_elsewhere, lambda *arguments: []
    yield
    verify.load_elsewhere = load


def write_model(folder: Path, seed: int = 0, **options) -> Path:
    torch.manual_seed(seed)
    VTLMMForConditionalGeneration(build_config()).save_pretrained(folder, **options)
    build_processor().save_pretrained(folder)
    return folder


def push_a_model(folder: Path) -> None:
    """What is refused, what fails in a shard, all of it, and again."""
    publish = ["push", folder, WHOLE, "--license", "apache-2.0"]
    FACTS["incomplete"] = vtlmm("push", folder, WHOLE)
    FACTS["dry run"] = vtlmm(*publish, "--dry-run")
    FACTS["writes of both"] = [request for request in HUB.requests if not request.startswith("GET /api/whoami")]
    HUB.refuse = r"PUT /large"
    FACTS["first push fails"] = vtlmm(*publish, "--private")
    HUB.refuse = None
    FACTS["push"] = vtlmm(*publish, "--private")
    FACTS["files"] = sorted(files("whole"))
    FACTS["private"] = HUB.repositories[WHOLE].private
    FACTS["second push"] = vtlmm("push", folder, WHOLE)


def push_the_parts(folder: Path) -> None:
    """The model's and the processor's own pushes: two commits, over a repository and as a new one."""
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
    FACTS["push over parts"] = vtlmm("push", folder, f"{USER}/parts", "--license", "mit")
    FACTS["card of parts"] = files("parts")["README.md"].decode()


def push_another_model(other: Path) -> None:
    """In one file: fails in the middle, then all of it, on a branch and with a tag."""
    before = dict(files("whole"))
    HUB.refuse = r"POST .*/commit/"
    FACTS["failed push"] = vtlmm("push", other, WHOLE, "--license", "mit")
    HUB.refuse = None
    FACTS["unchanged after it"] = files("whole") == before
    FACTS["branch"] = vtlmm("push", other, WHOLE, "--license", "mit", "--revision", "dev", "--tag", "v1")
    FACTS["main unchanged"] = files("whole") == before
    FACTS["files of branch"] = sorted(files("whole", "dev"))
    FACTS["tag is the branch"] = files("whole", "v1") == files("whole", "dev")


def push_from_trainers(settings: dict) -> None:
    """A trainer's own push; a recipe's with an adapter, which then is merged."""
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
    FACTS["adapter"] = vtlmm("push", adapter, f"{USER}/adapter", "--form", "adapter", "--license", "mit")
    FACTS["card of adapter"] = files("adapter")["README.md"].decode()
    config = adapter / "adapter_config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": settings["model_name_or_path"]})
    )
    FACTS["adapter of local"] = vtlmm("push", adapter, f"{USER}/other", "--license", "mit")
    FACTS["merge"] = vtlmm("merge", adapter, "--base", settings["model_name_or_path"], "--output", WORK / "merged")


def push_twin(merged: Path) -> None:
    """Of a merged adapter; then over a card that somebody wrote on the Hub."""
    FACTS["twin"] = vtlmm("push", merged, f"{USER}/twin", "--form", "twin", "--license", "apache-2.0")
    FACTS["files of twin"] = sorted(files("twin"))
    FACTS["card of twin"] = files("twin")["README.md"].decode()
    mine = b"---\nlicense: mit\n---\nMine.\n"
    HUB.repositories[f"{USER}/twin"].commit("main", {**files("twin"), "README.md": mine})
    with only_looked_at():
        FACTS["push under a card"] = vtlmm("push", merged, f"{USER}/twin", "--form", "twin", "--license", "mit")
    FACTS["card stays"] = files("twin")["README.md"] == mine
    with only_looked_at():
        FACTS["whole over adapter"] = vtlmm("push", merged, f"{USER}/adapter", "--license", "mit")
    FACTS["files of whole over adapter"] = sorted(files("adapter"))


def push_nf4(start: Path) -> None:
    """Then by id and tag, by everybody's means, where this package cannot be imported."""
    publish = ["push", start, f"{USER}/nf4", "--form", "nf4", "--license", "mit", "--base-model", WHOLE, "--private"]
    with only_looked_at():
        FACTS["nf4"] = vtlmm(*publish, "--tag", "v4")
        FACTS["second nf4"] = vtlmm(*publish)
        FACTS["tag again"] = vtlmm(*publish, "--tag", "v4")
        (start / "results.json").write_text("{}")
        FACTS["no results"] = vtlmm(*publish, "--results", start / "results.json")
        (start / "results.json").unlink()
        HUB.role = "read"
        FACTS["read-only token"] = vtlmm(*publish)
        HUB.role = "write"
        FACTS["int8"] = vtlmm("push", start, f"{USER}/int8", "--form", "int8", "--license", "mit", "--dry-run")
    FACTS["files of nf4"] = sorted(files("nf4"))
    FACTS["card of nf4"] = files("nf4")["README.md"].decode()
    tensors = load(files("nf4")["model.safetensors"])
    FACTS["types of nf4"] = {name: str(tensor.dtype) for name, tensor in tensors.items() if name.endswith(".weight")}
    FACTS["verify without trust"] = vtlmm("verify", f"{USER}/nf4")
    FACTS["verify"] = vtlmm("verify", f"{USER}/nf4", "--revision", "v4", "--trust-remote-code")


def refused(folder: Path) -> None:
    """Repositories that are not there or not ours, tokens, and then no Hub."""
    nothing = f"{USER}/nothing"
    FACTS["not ours"] = vtlmm("push", folder, "another/model")
    FACTS["no adapter"] = vtlmm("push", folder, WHOLE, "--form", "adapter")
    FACTS["missing"] = vtlmm("verify", nothing)
    FACTS["missing revision"] = vtlmm("verify", WHOLE, "--revision", "v9")
    FACTS["missing to convert"] = vtlmm("convert", nothing, "--output", WORK / "nowhere")
    FACTS["missing tower"] = vtlmm("compose", "--vision", nothing, "--text", nothing, "--output", WORK / "nowhere")
    HUB.repositories[f"{USER}/secret"] = Repository(private=True)
    os.environ["HF_TOKEN"] = "hf_wrong"
    FACTS["wrong token"] = vtlmm("push", folder, WHOLE)
    FACTS["private to others"] = vtlmm("convert", f"{USER}/secret", "--output", WORK / "nowhere")
    del os.environ["HF_TOKEN"]
    FACTS["no token"] = vtlmm("push", folder, WHOLE)
    os.environ["HF_TOKEN"] = TOKEN
    HUB.__exit__()
    close_session()  # with its open connections
    FACTS["push to no Hub"] = vtlmm("push", folder, WHOLE)
    FACTS["verify without a Hub"] = vtlmm("verify", nothing)


def run() -> None:
    settings = write_start(WORK)
    folder = write_model(WORK / "model", max_shard_size="100KB")
    with only_looked_at():
        push_a_model(folder)
        push_the_parts(folder)
        push_another_model(write_model(WORK / "other", seed=1))
        push_from_trainers(settings)
    push_twin(WORK / "merged")
    if find_spec("bitsandbytes"):
        push_nf4(WORK / "start")
    refused(folder)


run()
print("FACTS" + json.dumps(FACTS))
