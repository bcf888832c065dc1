"""What is made once in a run of the tests, whichever of its processes wants it first."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder that `make` fills; not to be written to afterwards. Workers of pytest-xdist wait for each other.

    Args:
        factory: of this process.
        name: of the folder, and of what is in it: one name, one content.
        make: gets the folder, empty. Where it fails, the next who asks calls it again.
    """
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # each has a folder of its own in that of the run
        root = root.parent
    folder, finished = root / "made-once" / name, root / "made-once" / f"{name}.finished"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{name}.lock")):
        if not finished.exists():
            make(folder)
            finished.touch()
    return folder
