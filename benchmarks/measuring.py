# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Helpers of the benchmarks: a description of the machine, and ratios within rounds."""

import datetime
import gc
import os
import statistics
import time

import torch
from torch.profiler import ProfilerActivity, profile

from vtlmm.data.environment import commit_of_code, gpu_name, package_versions, processor_name


def machine(device):
    """Return the date, hardware, load and versions of a run."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": processor_name(),
        "gpu": gpu_name() if torch.device(device).type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0],
        "commit": commit_of_code() or "unknown",
        **package_versions(("torch", "transformers", "trl")),
    }


def ratio(values, reference):
    """Return the median, minimum and maximum of the ratios within a round. Both lists have one value per round."""
    ratios = [a / b for a, b in zip(values, reference, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def milliseconds(function, device):
    """Return the duration of one call of `function` in milliseconds."""
    gc.collect()
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    # The CPU time of a single thread excludes the time of other processes.
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    function()
    return (clock() - start) * 1e3


def peak_bytes(function, device):
    """Return the peak of the memory that one call of `function` allocates, in bytes."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # torch does not record the peak on a CPU, but its profiler records all allocations.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    current = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return peak
