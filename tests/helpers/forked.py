# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Run a function in a forked process, which does not import torch again."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path


def fork(function: Callable[[], int], log: Path) -> int:
    """Start a process that ends with the exit code of `function` and writes its output to `log`. Return its id."""
    process = os.fork()
    if process == 0:
        sys.stdout = sys.stderr = open(log, "a", buffering=1, encoding="utf-8")  # pytest replaced both
        os.dup2(sys.stdout.fileno(), 1), os.dup2(sys.stdout.fileno(), 2)
        code = 99
        try:
            code = function()
        finally:
            os._exit(code)
    return process


def wait(process: int) -> int:
    """Return the exit code of a process, negative after a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def wait_until(condition: Callable[[], object], log: Path, seconds: float = 60) -> None:
    """Wait until `condition` is true. Fail after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, log.read_text()[-3000:]
        time.sleep(0.01)


def arguments(settings: dict) -> list[str]:
    """Return the arguments of `vtlmm train`."""
    return ["train", *(word for name, value in settings.items() for word in (f"--{name}", str(value)))]
