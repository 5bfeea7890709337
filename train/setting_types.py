# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Convert the values of settings to the types that their dataclass fields declare."""

import dataclasses
import difflib
import math
import re
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from vtlmm.data.columns import parse_columns


# Names that people write for a setting, where the closest spelling would not find it.
OTHER_NAMES = {
    "adapter": "use_peft",
    "batch_size": "per_device_train_batch_size",
    "dataset": "dataset_name",
    "dataset_split": "dataset_train_split",
    "epochs": "num_train_epochs",
    "eval_split": "dataset_test_split",
    "grad_accum": "gradient_accumulation_steps",
    "lr": "learning_rate",
    "model": "model_name_or_path",
    "output": "output_dir",
    "quantization": "load_in_4bit",
    "resume": "resume_from_checkpoint",
    "revision": "model_revision",
    "steps": "max_steps",
    "streaming": "dataset_streaming",
    "torch_dtype": "dtype",
}
# `true` stands for a default path in these settings, which are declared as texts, and `false` for no path.
TRUE_OR_PATH = ("cache_image_features", "resume_from_checkpoint")
TRUE_TEXTS, FALSE_TEXTS, NONE_TEXTS = ("true", "yes", "on"), ("false", "no", "off"), ("None", "null", "~", "")


@dataclass(frozen=True)
class Setting:
    """One setting of `vtlmm train`, as `vtlmm train --list-settings` prints it."""

    group: str
    name: str
    type: str
    default: str
    help: str


def setting_hints(configs: Iterable[type]) -> dict[str, Any]:
    """Return the type hint of every setting that can be given, by name, in the order of the dataclasses."""
    hints = {}
    for config in configs:
        resolved = get_type_hints(config)
        hints.update({f.name: resolved[f.name] for f in dataclasses.fields(config) if f.init})
    return hints


def suggest(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean …?" for an unknown setting, or an empty text if no known name is similar."""
    known = list(known)
    simple = name.replace("-", "_").lower()
    names = [OTHER_NAMES[simple]] if OTHER_NAMES.get(simple) in known else difflib.get_close_matches(simple, known, 1)
    return f" Did you mean {names[0]!r}?" if names else ""


def convert_setting(name: str, value: Any, hint: Any) -> Any:
    """
    Return `value` as the type that a setting declares.

    Args:
        name (`str`): the setting, for the error.
        value: what YAML or Python gave: `"1e3"` and `1000.0` are an integer, `"None"` is None.
        hint: the type hint of the field.

    Raises:
        `ValueError`: if the value does not have that type. The error names the setting, the value and the type.
    """
    options = _options(hint)
    if isinstance(value, str) and value.strip() in NONE_TEXTS and str not in options:
        value = None
    if value is None:
        if type(None) in options:
            return None
        raise ValueError(f"`{name}` must be {_describe(options)}, not null. Leave it out to use its default.")
    if name == "columns" and isinstance(value, str):
        return parse_columns(value)
    if name in TRUE_OR_PATH and isinstance(switch := _convert(value, bool, name), bool):
        return switch or None
    if isinstance(value, str) and str in options and any(get_origin(option) is list for option in options):
        return value  # a text, where a list of texts is possible too
    if isinstance(value, str) and value.strip() in ("None", "null", "~") and type(None) in options:
        return None
    for option in options:
        converted = _convert(value, option, name)
        if converted is not _NO_MATCH:
            return converted
    raise ValueError(f"`{name}` must be {_describe(options)}, not {value!r}.")


_NO_MATCH = object()


def _options(hint: Any) -> list[Any]:
    """The members of a union, the strictest first: a text would accept everything."""
    members = list(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else [hint]
    if any(isinstance(member, type) and issubclass(member, Enum) for member in members):
        members = [member for member in members if member is not str]  # the enumeration lists all valid texts
    order = {bool: 0, int: 1, float: 2, str: 9}
    return sorted(members, key=lambda member: order.get(member, 5) if isinstance(member, type) else 5)


def _convert(value: Any, option: Any, name: str) -> Any:
    """`value` as one member of a type hint, or `_NO_MATCH`."""
    origin = get_origin(option) or option
    if origin is Literal:
        return value if value in get_args(option) else _NO_MATCH
    if origin is Any:
        return value
    if origin is list or origin is tuple:
        return _convert_list(value, option, name)
    if isinstance(origin, type) and issubclass(origin, dict):
        return {key: _plain_number(item) for key, item in value.items()} if isinstance(value, Mapping) else _NO_MATCH
    if isinstance(value, Mapping) or isinstance(value, list | tuple):
        return _NO_MATCH
    if isinstance(origin, type) and issubclass(origin, Enum):
        return _convert_enum(value, origin)
    scalar = {bool: _convert_bool, int: _convert_int, float: _convert_float, str: _convert_text}.get(origin)
    if scalar is not None:
        return scalar(value)
    return value if isinstance(origin, type) and isinstance(value, origin) else _NO_MATCH


def _convert_list(value: Any, option: Any, name: str) -> Any:
    if isinstance(value, Mapping):
        return _NO_MATCH
    items = list(value) if isinstance(value, list | tuple) else [value]
    members = get_args(option)
    return [convert_setting(f"{name}[{i}]", item, members[0]) for i, item in enumerate(items)] if members else items


def _convert_enum(value: Any, option: type[Enum]) -> Any:
    if isinstance(value, option):
        return value
    text = "no" if value is False else str(value)  # YAML reads an unquoted no as false
    return text if text in [member.value for member in option] else _NO_MATCH


def _convert_bool(value: Any) -> Any:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in (*TRUE_TEXTS, *FALSE_TEXTS):
        return value.lower() in TRUE_TEXTS
    return bool(value) if isinstance(value, int) and value in (0, 1) else _NO_MATCH


def _convert_float(value: Any) -> Any:
    if isinstance(value, bool):
        return _NO_MATCH
    try:
        number = float(value)
    except (TypeError, ValueError):
        return _NO_MATCH
    return _NO_MATCH if math.isnan(number) else number


def _convert_int(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    number = _convert_float(value)
    return int(number) if number is not _NO_MATCH and math.isfinite(number) and number.is_integer() else _NO_MATCH


def _convert_text(value: Any) -> Any:
    if isinstance(value, bool):
        return _NO_MATCH
    return str(value) if isinstance(value, str | int | float | date | Enum) else _NO_MATCH


def _plain_number(value: Any) -> Any:
    """A value inside a mapping: YAML reads 1e-6 as a text, and mappings declare no types."""
    if isinstance(value, Mapping):
        return {key: _plain_number(item) for key, item in value.items()}
    if isinstance(value, str):
        if value in ("None", "null"):
            return None
        return float(value) if re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value) else value
    return value


def _describe(options: list[Any]) -> str:
    """The types of a hint in words."""
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "null"}
    parts: list[str] = []
    for option in options:
        origin = get_origin(option) or option
        if origin is Literal:
            parts += [repr(choice) for choice in get_args(option)]
        elif isinstance(origin, type) and issubclass(origin, Enum):
            return "one of " + ", ".join(str(member.value) for member in origin)
        elif origin in (list, tuple):
            parts.append("a list")
        elif isinstance(origin, type) and issubclass(origin, dict):
            parts.append("a mapping")
        else:
            parts.append(words.get(origin, getattr(origin, "__name__", str(origin))))
    return " or ".join(sorted(parts, key=lambda part: part == "null"))


def format_hint(hint: Any) -> str:
    """Return a type hint as a user writes the value, e.g. `int or null`."""
    short = {type(None): "null"}
    parts = []
    for option in _options(hint):
        origin = get_origin(option) or option
        choices = origin is Literal or (isinstance(origin, type) and issubclass(origin, Enum))
        parts.append("text" if choices else short.get(origin, getattr(origin, "__name__", str(origin))))
    unique = dict.fromkeys({"str": "text"}.get(part, part) for part in parts)
    return " or ".join(sorted(unique, key=lambda part: part == "null"))
