# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""What people do with a Hub, in one process of its own: the client reads HF_ENDPOINT and HF_TOKEN when it is imported.

Prints as JSON what happened; tests/test_push.py looks at it.
"""

import contextlib
import io
import json
import os
import sys
from pathlib import Path

from loopback_hub import TOKEN, USER, LoopbackHub


HUB = LoopbackHub().__enter__()
WORK = Path(sys.argv[1])
os.environ.update(HF_ENDPOINT=HUB.endpoint, HF_TOKEN=TOKEN, HF_HOME=str(WORK / "home"), HF_HUB_OFFLINE="0")
os.environ.update(HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_DISABLE_PROGRESS_BARS="1")

import torch  # noqa: E402
from conftest import build_config, build_processor  # noqa: E402
from transformers import modeling_utils  # noqa: E402

from modeling_vtlmm import VTLMMForConditionalGeneration, VTLMMProcessor  # noqa: E402
from vtlmm.cli.main import main  # noqa: E402
from vtlmm.hub import verify  # noqa: E402


FACTS, SHARD_SIZES = {}, []


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
    model = VTLMMForConditionalGeneration(build_config())
    model.save_pretrained(folder, **options)
    build_processor().save_pretrained(folder)
    return folder


def run() -> None:
    folder = write_model(WORK / "model", max_shard_size="100KB")
    whole = f"{USER}/whole"
    publish = ["push", folder, whole, "--license", "apache-2.0"]

    FACTS["incomplete"] = vtlmm("push", folder, whole)
    with only_looked_at():
        FACTS["dry run"] = vtlmm(*publish, "--dry-run")
    FACTS["writes of both"] = [request for request in HUB.requests if not request.startswith("GET /api/whoami")]

    HUB.refuse = r"PUT /large"
    with only_looked_at():
        FACTS["first push fails"] = vtlmm(*publish, "--private")
    HUB.refuse = None
    with only_looked_at():
        FACTS["push"] = vtlmm(*publish, "--private")
    FACTS["files"] = sorted(files("whole"))
    FACTS["private"] = HUB.repositories[whole].private
    with only_looked_at():
        FACTS["second push"] = vtlmm("push", folder, whole)
    card = files("whole")["README.md"].decode()

    # the model's and the processor's own pushes: two commits
    commits = len(HUB.repositories[whole].commits)
    model, processor = VTLMMForConditionalGeneration.from_pretrained(folder), VTLMMProcessor.from_pretrained(folder)
    model.push_to_hub(whole)
    processor.push_to_hub(whole)
    FACTS["own pushes"] = {"commits": len(HUB.repositories[whole].commits) - commits}
    FACTS["cards"] = [card, files("whole")["README.md"].decode()]
    model.push_to_hub(f"{USER}/parts")
    processor.push_to_hub(f"{USER}/parts")
    FACTS["files of parts"] = sorted(files("parts"))
    FACTS["shard sizes"] = list(SHARD_SIZES)
    with only_looked_at():
        FACTS["push over parts"] = vtlmm("push", folder, f"{USER}/parts", "--license", "mit")
    FACTS["card of parts"] = files("parts")["README.md"].decode()

    # another model in larger files: fails in the middle, then all of it, on a branch and with a tag
    before = dict(files("whole"))
    other = write_model(WORK / "other", seed=1)
    with only_looked_at():
        HUB.refuse = r"POST .*/commit/"
        FACTS["failed push"] = vtlmm("push", other, whole, "--license", "mit")
        HUB.refuse = None
        FACTS["unchanged after it"] = files("whole") == before
        FACTS["branch"] = vtlmm("push", other, whole, "--license", "mit", "--revision", "dev", "--tag", "v1")
        FACTS["main unchanged"] = files("whole") == before
    FACTS["files of branch"] = sorted(files("whole", "dev"))
    FACTS["tag is the branch"] = files("whole", "v1") == files("whole", "dev")

    # by id, by everybody's means, where this package cannot be imported
    FACTS["verify without trust"] = vtlmm("verify", whole)
    FACTS["verify"] = vtlmm("verify", whole, "--revision", "v1", "--trust-remote-code")
    FACTS["twin"] = vtlmm("push", folder, f"{USER}/twin", "--twin", "--license", "apache-2.0")
    FACTS["files of twin"] = sorted(files("twin"))
    FACTS["card of twin"] = files("twin")["README.md"].decode()

    # a card that somebody wrote on the Hub stays
    repository = HUB.repositories[f"{USER}/twin"]
    mine = b"---\nlicense: mit\n---\nMine.\n"
    repository.commit("main", {**files("twin"), "README.md": mine})
    with only_looked_at():
        FACTS["push under a card"] = vtlmm("push", folder, f"{USER}/twin", "--twin", "--license", "mit")
    FACTS["card stays"] = files("twin")["README.md"] == mine

    adapter = WORK / "adapter"
    build_processor().save_pretrained(adapter)
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    for name, base in (("local", str(WORK / "model")), ("whole", whole)):
        values = {"base_model_name_or_path": base, "peft_type": "LORA", "r": 2}
        (adapter / "adapter_config.json").write_text(json.dumps(values))
        FACTS[f"adapter of {name}"] = vtlmm("push", adapter, f"{USER}/adapter", "--license", "mit")
    FACTS["card of adapter"] = files("adapter")["README.md"].decode()

    with only_looked_at():
        FACTS["not ours"] = vtlmm("push", folder, "another/model")
        FACTS["missing"] = vtlmm("verify", f"{USER}/nothing")
        FACTS["missing revision"] = vtlmm("verify", whole, "--revision", "v9")
        os.environ["HF_TOKEN"] = "hf_wrong"
        FACTS["wrong token"] = vtlmm("push", folder, whole)
        del os.environ["HF_TOKEN"]
        FACTS["no token"] = vtlmm("push", folder, whole)


run()
print("FACTS" + json.dumps(FACTS))
