# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""What the benchmarks share: where numbers come from, and ratios that a slow minute of the machine does not change."""

import datetime
import os
import platform
import statistics
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch


def machine(device):
    """Where the numbers come from."""
    try:
        cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
        cpu = cpu.partition(":")[2].strip()
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        commit = subprocess.check_output(
            [*git, "describe", "--always", "--dirty"], text=True, stderr=subprocess.DEVNULL
        )
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu,
        "gpu": torch.cuda.get_device_name() if torch.device(device).type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0],
        "commit": commit.strip(),
        **{name: version(name) for name in ("torch", "transformers", "trl")},
    }


def ratio(values, reference):
    """Median, least and greatest of the ratios within a round; one value a round."""
    ratios = [a / b for a, b in zip(values, reference, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
