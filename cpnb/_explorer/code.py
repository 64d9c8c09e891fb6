"""A truncated network as the code that makes it."""

from __future__ import annotations

from collections.abc import Mapping

from cpnb._explorer.choices import Choice


def truncation_code(
    ranks: Mapping[str, int],
    choice: Choice,
    accuracy: float | None,
    *,
    drawn: bool = False,
) -> str:
    """Python that cuts ``net`` like the explorer and measures it on ``data``.

    Args:
        ranks: Components of every layer.
        choice: The key and the refit.
        accuracy: What the explorer shows, None while unknown.
        drawn: Whether the random key may have been drawn by a generator.

    Returns:
        Lines of code; run where the network is ``net`` and the data ``data``.

    >>> print(truncation_code({"fc": 3}, Choice("lam", False), 0.5))
    import cpnb
    cut = cpnb.truncate(net, rank={'fc': 3}, key='lam', refit=False)
    cpnb.accuracy(cut, data)  # 0.5
    """
    arguments = f"rank={dict(ranks)!r}, key={choice.key!r}, refit={choice.refit!r}"
    if choice.looks_at_data:
        arguments += ", data=data"
    lines = ["import cpnb"]
    if drawn:
        lines.append("# Pass the generator= of the sweep too, if it was given one.")
    shown = "not measured yet" if accuracy is None else repr(accuracy)
    lines.append(f"cut = cpnb.truncate(net, {arguments})")
    lines.append(f"cpnb.accuracy(cut, data)  # {shown}")
    return "\n".join(lines)
