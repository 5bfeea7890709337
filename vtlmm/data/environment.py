# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Describe where a result was computed: the commit of the code, the machine and the versions of packages."""

import os
import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import torch


def commit_of_code() -> str | None:
    """Return the commit of the repository of this file, with `-dirty` after changes; None for an installed copy."""

    def git(*command: str) -> str | None:
        result = subprocess.run(["git", "-C", str(Path(__file__).parent), *command], capture_output=True, text=True)
        return result.stdout.strip() if result.returncode == 0 else None

    try:
        tracked = git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("describe", "--always", "--dirty") if tracked else None
    except FileNotFoundError:  # git is not installed
        return None


def package_versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the installed version of each package."""
    return {package: version(package) for package in packages}


def processor_name() -> str:
    """Return the name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def gpu_name() -> str | None:
    """Return the name of the first CUDA GPU, or None without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def machine() -> str:
    """Return the GPU if there is one, the CPU, its cores and the threads of torch, in one line."""
    text = f"{processor_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{gpu_name()}; {text}" if gpu_name() else text
