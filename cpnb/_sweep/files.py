"""Rank sweeps as small JSON files."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpnb._files import replacing
from cpnb._sweep.points import SweptLayer

if TYPE_CHECKING:
    from cpnb._sweep.table import RankSweep

FORMAT, VERSION = "cpnb rank sweep", 2
_KINDS = {
    "other_parameters": int,
    "other_flops": int,
    "key": str,
    "refit": bool | str,
    "fingerprint": str,
    "provenance": dict,
    "status": str,
    "methods": dict,
    "times": dict,
}
AGAIN = "Make it again with rank_sweep(model, data).save(path)."


def sweep_content(sweep: RankSweep) -> dict[str, Any]:
    """A table as lists, dicts, strings and numbers.

    Args:
        sweep: The table.

    Returns:
        Its public fields; ``"measured"`` as rows of ranks, accuracy and loss,
        ``"errors"`` as pairs of rank and error for each layer.
    """
    fields = {name: entry for name, entry in vars(sweep).items() if name[0] != "_"}
    fields["layers"] = [asdict(layer) for layer in sweep.layers]
    fields["measured"] = [[*ranks, *found] for ranks, *found in sweep.points()]
    fields["errors"] = [sweep.errors(layer.name) for layer in sweep.layers]
    return fields


def write_sweep(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """Write the content of a sweep; a crash leaves the old file or the new one.

    Args:
        path: Target; its folder must exist.
        content: JSON-serialisable, without NaN.
    """
    document = {"format": FORMAT, "version": VERSION, **content}
    # One line per entry: small, and a change stays readable in a diff.
    lines = ",\n".join(
        f"{json.dumps(name)}:"
        + json.dumps(entry, allow_nan=False, separators=(",", ":"))
        for name, entry in document.items()
    )
    with replacing(path) as temporary:
        temporary.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


def read_sweep(path: str | os.PathLike[str], cls: type[RankSweep]) -> RankSweep:
    """Read what :func:`write_sweep` wrote.

    Args:
        path: File written by ``RankSweep.save``.
        cls: The class of the table.

    Returns:
        The table.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not a rank sweep, is damaged, or has another version.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is not readable as JSON ({error}), expected a file written by "
            f"RankSweep.save. {AGAIN}"
        ) from error
    found = content.pop("format", None) if isinstance(content, dict) else None
    if found != FORMAT:
        raise ValueError(
            f"{path} has the format {found!r}, expected {FORMAT!r}, as written by "
            f"RankSweep.save. {AGAIN}"
        )
    version = content.pop("version", None)
    if version != VERSION:
        raise ValueError(
            f"{path} has version {version!r} of the format, expected {VERSION}. {AGAIN}"
        )
    try:
        return _from_content(cls, content)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is a damaged rank sweep: {error}. {AGAIN}") from error


def _from_content(cls: type[RankSweep], content: dict[str, Any]) -> RankSweep:
    for name, kind in _KINDS.items():
        if not isinstance(content[name], kind):
            wanted = getattr(kind, "__name__", kind)
            raise TypeError(f"{name} is {content[name]!r}, expected {wanted}")
    measured, errors = content.pop("measured"), content.pop("errors")
    layers = tuple(
        SweptLayer(**{**layer, "kernel_shape": tuple(layer["kernel_shape"])})
        for layer in content.pop("layers")
    )
    axes, keeps = tuple(content.pop("axes")), tuple(content.pop("keeps"))
    sweep = cls(layers=layers, axes=axes, keeps=keeps, **content)
    for layer, known in zip(layers, errors, strict=True):
        for rank, error in known:
            sweep.add_error(layer.name, rank, error)
    for *ranks, accuracy, loss in measured:
        sweep.add(dict(zip(sweep.ranks, ranks, strict=True)), accuracy, loss, {})
    return sweep
