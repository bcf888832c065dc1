"""Files a verb writes beside what it prints."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from halfbyte.checkpoints.disk import replacing


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a table, all of it or nothing; missing values stay empty.

    Args:
        path: replaced if it exists.
        rows: with the same keys; one at least.

    Raises:
        OutputError: the folder is missing, or the file cannot be written.
    """
    with replacing(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0]], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
