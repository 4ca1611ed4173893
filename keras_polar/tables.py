"""Rows as text, and as HTML for a notebook."""

import html
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

WIDTH = 120


def table_text(columns: Sequence[str], rows: Iterable[Sequence[str]], note: str = "") -> str:
    """A table as plain text; numbers are aligned to the right."""
    table = Table(caption=note or None)
    rows = list(rows)
    for column, justify in zip(columns, _justified(columns, rows), strict=True):
        table.add_column(column, justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console(width=WIDTH, record=False, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip()


def table_html(columns: Sequence[str], rows: Iterable[Sequence[str]], note: str = "") -> str:
    """The same table for a notebook."""
    rows = list(rows)
    sides = _justified(columns, rows)
    lines = [_html_row("th", columns, sides), *(_html_row("td", row, sides) for row in rows)]
    caption = f"<caption>{html.escape(note)}</caption>" if note else ""
    return f"<table>{caption}{''.join(lines)}</table>"


def _html_row(tag: str, cells: Sequence[str], sides: Sequence[str]) -> str:
    found = (
        f'<{tag} style="text-align: {side}">{html.escape(cell)}</{tag}>'
        for cell, side in zip(cells, sides, strict=True)
    )
    return f"<tr>{''.join(found)}</tr>"


def _justified(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[Any]:
    """ "right" for columns of numbers, "left" for others."""
    numbers = [all(r[i][:1] in "0123456789?" for r in rows if r[i]) for i in range(len(columns))]
    return ["right" if is_number else "left" for is_number in numbers]
