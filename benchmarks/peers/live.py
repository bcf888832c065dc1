"""The other end of peers/serving.py: contestants as live processes that take turns."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil


class Live:
    """A contestant's process; it computes while `ask` waits, and must sleep otherwise.

    Attributes:
        name: for tables.
        idle_seconds: CPU time it took between its turns, so far: what it disturbed others with.
    """

    def __init__(self, name: str, command: Sequence[str | Path]):
        self.name = name
        self.idle_seconds = 0.0
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  (until __exit__)
        self._process = subprocess.Popen(
            list(map(str, command)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        self._usage = psutil.Process(self._process.pid)
        self._before = 0.0
        self._answer()

    def __enter__(self) -> Live:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._errors.close()

    def ask(self, action: str, **arguments: Any) -> dict[str, Any]:
        """One request and its answer."""
        assert self._process.stdin is not None
        self.idle_seconds += self._cpu_seconds() - self._before
        self._process.stdin.write(json.dumps({"do": action, **arguments}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            raise RuntimeError(f"{self.name}: ended with exit code {code}\n{self._errors.read()[-4000:]}")
        self._before = self._cpu_seconds()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _cpu_seconds(self) -> float:
        times = self._usage.cpu_times()
        return float(times.user + times.system)
