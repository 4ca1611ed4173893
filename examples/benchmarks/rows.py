"""Rows of results in a file, one JSON object per line: what stands there is not repeated."""

import json
from pathlib import Path


def read_rows(path: Path) -> dict[str, dict]:
    """Row name -> row; the later of two with the same name."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {row["name"]: row for row in map(json.loads, lines)}


def add_row(path: Path, row: dict) -> None:
    """Appends a row; the file and its folder are made if need be."""
    path.parent.mkdir(exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
