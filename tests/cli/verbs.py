"""Verbs of the command line, in this process or as processes of their own."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from halfbyte import _native
from halfbyte.cli import main
from halfbyte.device import cpu


def run(*arguments: object, stdin: str | bytes = "", folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`halfbyte ARGUMENTS` behind pipes, in this process: starting one is mostly importing torch and transformers."""
    text = stdin.encode() if isinstance(stdin, str) else stdin
    inputs, output, errors = (io.TextIOWrapper(io.BytesIO(data), encoding="utf-8") for data in (text, b"", b""))
    threads = _native.threads(), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["halfbyte", *map(str, arguments)])
        patch.setattr(sys, "stdin", inputs)
        patch.setattr(sys, "stdout", output)
        patch.setattr(sys, "stderr", errors)
        patch.setattr(cpu, "_chosen", cpu._chosen)  # what --threads changes ends with a process
        if folder is not None:
            patch.chdir(folder)
        with pytest.raises(SystemExit) as ending:
            main()
    _native.set_threads(threads[0])
    torch.set_num_threads(threads[1])
    written = []
    for stream in (output, errors):
        stream.flush()
        written.append(stream.buffer.getvalue().decode())  # type: ignore[attr-defined]
    assert ending.value.code is None or isinstance(ending.value.code, int)
    return subprocess.CompletedProcess(sys.argv, ending.value.code or 0, *written)


def run_process(*arguments: object, stdin: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """The same as a whole process: for what leaves Python by another way than print, and for the environment."""
    return subprocess.run(
        [sys.executable, "-m", "halfbyte", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
        timeout=600,
    )
