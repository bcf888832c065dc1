"""`kill -9` at random moments: the same checkpoint every time."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TEXT, make_llama

KILLS = 20
# The rest comes once the run has begun: between blocks, inside them, around the last rename, and after it.
IN_START_UP = 3
LATEST = 1.1


def contents(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {path.name: path.read_bytes() for path in folder.iterdir()}
    manifest = json.loads(found["halfbyte_manifest.json"])
    del manifest["run"]
    return {**found, "halfbyte_manifest.json": manifest}


@pytest.mark.slow
def test_twenty_kills_give_twenty_times_the_same_bits(tmp_path: Path) -> None:
    model = make_llama(tmp_path / "model", num_hidden_layers=6, hidden_size=128, intermediate_size=256)
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    command = [sys.executable, "-m", "halfbyte", "quantize", str(model), "--calibration", str(text)]
    command += ["--max-calib-samples", "16", "--max-calib-seq-len", "64", "-o"]
    folder = tmp_path / "work"
    folder.mkdir()

    def start(output: Path) -> tuple[subprocess.Popen[bytes], float]:
        """A run, and how long it took to begin with the first block."""
        started = time.monotonic()
        process = subprocess.Popen([*command, str(output)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not output.with_name(f".{output.name}.partial").exists() and process.poll() is None:
            time.sleep(0.002)
        return process, time.monotonic() - started

    process, start_up = start(folder / "out")
    begun = time.monotonic()
    assert process.wait() == 0
    seconds = time.monotonic() - begun
    expected = contents(folder / "out")

    moments = random.Random(0)
    blocks_kept = set()
    for number in range(KILLS):
        output, partial = folder / f"out-{number}", folder / f".out-{number}.partial"
        if number < IN_START_UP:
            process = subprocess.Popen([*command, str(output)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            time.sleep(moments.random() * start_up)
        else:
            process, _ = start(output)
            # The moments fill the run evenly, each at random within its share.
            time.sleep((number - IN_START_UP + moments.random()) / (KILLS - IN_START_UP) * LATEST * seconds)
        process.kill()
        process.wait()
        blocks_kept.add(len(list(partial.glob("blocks/*.json"))))
        if not output.exists() or partial.exists():
            subprocess.run([*command, str(output)], check=True, capture_output=True)
        assert contents(output) == expected, f"kill {number}"
    assert len(blocks_kept) >= 4, f"the kills hit too few different moments: {blocks_kept}"
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
