"""Tables of text cells, for reading in a terminal and in a notebook."""

import html
from collections.abc import Collection, Sequence


def text_table(cells: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """Align columns, those in ``left`` to the left, the others to the right.

    >>> print(text_table([["layer", "rank"], ["conv", "12"]]))
    layer  rank
    conv     12
    """
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if n in left else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )


def html_table(cells: Sequence[Sequence[str]]) -> str:
    """Markup of the table, its first row as the head."""
    head, *body = cells
    rows = "".join(f"<tr>{_tags('td', row)}</tr>" for row in body)
    return f"<table><tr>{_tags('th', head)}</tr>{rows}</table>"


def _tags(tag: str, cells: Sequence[str]) -> str:
    return "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
