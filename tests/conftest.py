# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Fixtures for all tests."""

import gc
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import SHARED, build_config, build_processor, scale_weights

from modeling_vtlmm import VTLMMForConditionalGeneration, VTLMMProcessor


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of shared reference data next to the repository; skip the test if it does not exist."""
    if not SHARED.is_dir():
        pytest.skip("../shared does not exist")
    return SHARED


@pytest.fixture(scope="session")
def processor() -> VTLMMProcessor:
    return build_processor()


@pytest.fixture
def build_model():
    """Return a function of the arguments of `build_config` that returns a seeded model in evaluation mode."""

    def build(*args, seed: int = 0, **kwargs) -> VTLMMForConditionalGeneration:
        torch.manual_seed(seed)
        return scale_weights(VTLMMForConditionalGeneration(build_config(*args, **kwargs))).eval()

    return build


def pytest_collection_finish():
    # The imports leave 650,000 objects. Without this, each full garbage collection visits them for 0.3 s.
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    # The files with the most slow tests come first, so that no process waits for another one at the end.
    num_slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: num_slow[item.path], reverse=True)
