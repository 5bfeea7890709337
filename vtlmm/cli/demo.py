# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""`vtlmm demo [--output …]`"""

from pathlib import Path

from . import options


EXAMPLES = ("vtlmm demo", "vtlmm demo --output outputs/demo_1 --seed 1")


def demo(output: options.Output = Path("outputs/demo"), seed: options.Seed = 0) -> None:
    """Train a tiny VT-LMM through all four stages on the CPU and show its visual tokens."""
    from vtlmm.demo.run import run_demo

    run_demo(output, seed=seed)
