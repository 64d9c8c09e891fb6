"""Values of a recipe as JSON can hold them, the same in every process."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from importlib import import_module
from types import CodeType, FunctionType
from typing import Any

# Entries of a class that say where it stands, not what it does.
_WHERE = {"__module__", "__firstlineno__"}


def describe(value: Any, name: str = "value") -> Any:
    """Say what a value is, in the types of JSON.

    Args:
        value: A number, a string, None, a mapping, a sequence, a function or class, a
            `functools.partial` of one, or a dataclass; nested as deep as one likes.
        name: What it is called in an error.

    Returns:
        Equal results for equal values. Functions and classes by their names: public
        ones of cpnb stay the same when they move to another file, and those of a script
        or notebook, a lambda or a function within another get a hash of their code and
        of what they take from around them. An object among that counts as itself: no
        other process has an equal one.

    Raises:
        TypeError: If the value has no lasting description, as a method of an object.

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
        return {"call": _name(type(value), name), **describe(entries, name)}
    if callable(value) and hasattr(value, "__qualname__"):
        return _name(value, name)
    raise TypeError(
        f"{name} holds a {type(value).__name__}, which a record cannot describe, "
        "expected numbers, strings, functions or functools.partial of them."
    )


def _name(function: Any, name: str) -> str:
    own, module = function.__qualname__, function.__module__
    if import_module("cpnb").__dict__.get(own) is function:
        return f"cpnb.{own}"
    found: Any = sys.modules.get(module)
    for part in own.split("."):
        found = getattr(found, part, None)
    if module == "__mp_main__":  # the script that started a pool, in its processes
        module = "__main__"
    if found is function and module != "__main__":
        return f"{module}.{own}"
    code = _code(function)
    if code is None:
        raise TypeError(
            f"{name} holds {own} of {module}, which no record can tell from others. "
            "Define it with def or class at the top level of a module or notebook."
        )
    return f"{module}.{own}#{hashlib.sha256(repr(code).encode()).hexdigest()[:12]}"


def _code(value: Any, within: tuple[Any, ...] = ()) -> Any:
    """What a function does, or those of a class, alike in every process."""
    if any(value is outer for outer in within):  # as a class that calls super()
        return value.__qualname__
    inner = (*within, value)
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        taken = [_code(each, inner) or _object(each) for each in cells]
        return _code(value.__code__), _code(value.__defaults__), taken
    if isinstance(value, type):
        parts = {k: v for k, v in vars(value).items() if k not in _WHERE}
        parts = [(name, _code(part, inner)) for name, part in parts.items()]
        return [base.__qualname__ for base in value.__bases__], parts
    if isinstance(value, CodeType):
        return value.co_code, value.co_names, [_code(each) for each in value.co_consts]
    if isinstance(value, tuple):
        return [_code(each) for each in value]
    if isinstance(value, frozenset):
        return sorted(map(repr, value))
    return repr(value) if isinstance(value, str | bytes | int | float) else None


def _object(value: Any) -> str:
    """An object that may change, as itself: another process has no such."""
    return "None" if value is None else f"{type(value).__qualname__} {id(value):x}"
