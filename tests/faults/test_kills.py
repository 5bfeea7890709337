# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Kill `vtlmm train` at random moments, half of them during a save. The final weights do not change.

`VTLMM_FAULT_KILLS=40 pytest tests/faults` sets the number of kills over all kinds of runs, and `VTLMM_FAULT_SEED` the
moments.
"""

import os
import random
import signal
import time
from functools import partial
from pathlib import Path

import pytest
from helpers.forked import arguments, fork, wait
from helpers.training import write_start

from vtlmm.cli.main import main
from vtlmm.train.checkpoints import STAGING


pytestmark = pytest.mark.slow

NUM_KILLS = int(os.environ.get("VTLMM_FAULT_KILLS", "10"))
SEED = int(os.environ.get("VTLMM_FAULT_SEED", "0"))
KINDS = {
    "projector": {"stage": "projector"},
    "decoder": {"stage": "decoder"},
    "visual_head": {"stage": "visual_head"},
    "joint": {"stage": "joint"},
    "lora": {"stage": "joint", "use_peft": True, "lora_r": 2},
}
STEPS = {"max_steps": 8, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "learning_rate": 1e-2}


def kill(process: int, moment: float, staging: Path | None) -> int:
    """Send SIGKILL after `moment` seconds, counted from the next save if there is a `staging` folder to wait for."""
    while staging is not None and not staging.is_dir():
        if os.waitpid(process, os.WNOHANG)[0]:
            return 0
        time.sleep(0.0005)
    time.sleep(moment)
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        pass
    return wait(process)


@pytest.mark.parametrize("kind", KINDS)
def test_killed_runs_resume_to_the_same_weights(tmp_path, kind):
    log = tmp_path / "log.txt"
    rng = random.Random(f"{SEED} {kind}")
    settings = {**write_start(tmp_path), **STEPS, **KINDS[kind]}
    settings["output_dir"] = str(tmp_path / "whole")
    begin = time.monotonic()
    assert wait(fork(partial(main, arguments(settings)), log)) == 0, log.read_text()
    seconds = time.monotonic() - begin
    settings |= {"output_dir": str(tmp_path / "killed"), "resume_from_checkpoint": True}
    for number in range(max(2, NUM_KILLS // len(KINDS))):
        process = fork(partial(main, arguments(settings)), log)
        if number % 2:
            code = kill(process, rng.uniform(0, 0.05), tmp_path / "killed" / STAGING)
        else:
            code = kill(process, rng.uniform(0, seconds), None)
        assert code in (0, -signal.SIGKILL), log.read_text()[-3000:]
        if code == 0:  # finished before the signal: begin again
            for path in (tmp_path / "killed").glob("*.json"):
                path.unlink()
    assert wait(fork(partial(main, arguments(settings)), log)) == 0, log.read_text()[-3000:]
    name = "adapter_model.safetensors" if kind == "lora" else "model.safetensors"
    assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
