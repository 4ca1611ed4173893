"""Rows of results in a file, one JSON object per line: what stands there is not repeated.

A line that was cut off while it was written counts as not written.
"""

import json
from pathlib import Path


def read_lines(path: Path) -> list[dict]:
    """All rows, in order."""
    return list(map(json.loads, _whole_lines(path).splitlines()))


def read_rows(path: Path) -> dict[str, dict]:
    """Row name -> row; the later of two with the same name."""
    return {row["name"]: row for row in read_lines(path)}


def add_row(path: Path, row: dict) -> None:
    """Appends a row; the file and its folder are made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = _whole_lines(path).encode()
    with path.open("ab") as file:
        file.truncate(len(whole))
        file.write(json.dumps(row).encode() + b"\n")


def put_row(path: Path, row: dict) -> None:
    """Writes a row in the place of the one with its name, or behind all others."""
    rows = read_rows(path) | {row["name"]: row}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows.values()), encoding="utf-8")


def _whole_lines(path: Path) -> str:
    text = path.read_bytes().decode() if path.exists() else ""
    return text[: text.rfind("\n") + 1]
