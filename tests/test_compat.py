# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Private names of other libraries exist with the expected signatures, and the list is complete."""

import inspect

import pytest
from trl import SFTTrainer

from vtlmm.train.compat import PRIVATE_NAMES, PrivateName, find_problems
from vtlmm.train.trainer import VTLMMTrainer


@pytest.mark.slow
def test_private_names_exist_with_their_parameters():
    assert find_problems() == []


def test_missing_names_and_parameters_are_found():
    names = (
        PrivateName("transformers.Trainer._gone", "a.py"),
        PrivateName("transformers.gone.function", "a.py"),
        PrivateName("transformers.Trainer.self._gone", "a.py"),
        PrivateName("transformers.Trainer._save", "a.py", ("folder",)),
    )
    problems = find_problems(names)
    assert len(problems) == 4 and "has no parameter folder" in problems[3]


def test_every_private_method_that_the_trainer_overrides_is_listed():
    listed = {name.path.rpartition(".")[2] for name in PRIVATE_NAMES}
    own_classes = [cls for cls in VTLMMTrainer.__mro__ if cls.__module__.startswith("vtlmm.")]
    assert len(own_classes) > 1
    overridden = {name for cls in own_classes for name in vars(cls) if hasattr(SFTTrainer, name)}
    private = {name for name in overridden if name.startswith("_") and not name.startswith("__")}
    assert private and private <= listed


def test_every_method_keeps_the_parameters_of_the_base_class():
    own_classes = [cls for cls in VTLMMTrainer.__mro__ if cls.__module__.startswith("vtlmm.")]
    for cls in own_classes:
        for name, method in vars(cls).items():
            base = getattr(SFTTrainer, name, None)
            if name.startswith("__") or not inspect.isfunction(method) or not inspect.isfunction(base):
                continue
            parameters = inspect.signature(method).parameters
            if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters.values()):
                continue
            assert set(inspect.signature(base).parameters) <= set(parameters), f"{cls.__name__}.{name}"
