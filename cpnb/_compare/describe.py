"""Values of a recipe as JSON can hold them, the same in every process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from importlib import import_module
from typing import Any


def describe(value: Any, name: str = "value") -> Any:
    """Say what a value is, in the types of JSON.

    Args:
        value: A number, a string, None, a mapping, a sequence, a function or class, a
            `functools.partial` of one, or a dataclass; nested as deep as one likes.
        name: What it is called in an error.

    Returns:
        Equal results for equal values. Functions and classes by their names: public
        ones of cpnb stay the same when they move to another file.

    Raises:
        TypeError: If the value has no lasting description.

    >>> from cpnb import load_data
    >>> describe(partial(load_data, "mnist", train_size=100))
    {'call': 'cpnb.load_data', 'args': ['mnist'], 'train_size': 100}
    """
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key): describe(entry, name) for key, entry in value.items()}
    if isinstance(value, Sequence | range):
        return [describe(entry, name) for entry in value]
    if isinstance(value, partial):
        made = {"call": describe(value.func, name)}
        if value.args:
            made["args"] = describe(value.args, name)
        return made | describe(value.keywords, name)
    if is_dataclass(value) and not isinstance(value, type):
        entries = {field.name: getattr(value, field.name) for field in fields(value)}
        return {"call": _name(type(value)), **describe(entries, name)}
    if callable(value) and hasattr(value, "__qualname__"):
        return _name(value)
    raise TypeError(
        f"{name} holds a {type(value).__name__}, which a record cannot describe, "
        "expected numbers, strings, functions or functools.partial of them."
    )


def _name(function: Any) -> str:
    name = function.__qualname__
    public = import_module("cpnb").__dict__.get(name) is function
    return f"cpnb.{name}" if public else f"{function.__module__}.{name}"
