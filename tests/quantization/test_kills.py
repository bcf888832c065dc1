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
# Of how long a whole run takes: kills in start-up, between blocks, inside them, and around the last rename.
LATEST = 1.1


def contents(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {path.name: path.read_bytes() for path in folder.iterdir()}
    manifest = json.loads(found["halfbyte_manifest.json"])
    del manifest["run"]
    return {**found, "halfbyte_manifest.json": manifest}


@pytest.mark.slow
def test_twenty_kills_give_twenty_times_the_same_bits(tmp_path: Path) -> None:
    model = make_llama(
        tmp_path / "model", num_hidden_layers=6, hidden_size=256, intermediate_size=512, num_attention_heads=8
    )
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    command = [sys.executable, "-m", "halfbyte", "quantize", str(model), "--calibration", str(text), "-o"]
    folder = tmp_path / "work"
    folder.mkdir()
    started = time.monotonic()
    subprocess.run([*command, str(folder / "out")], check=True, capture_output=True)
    seconds = time.monotonic() - started
    expected = contents(folder / "out")

    moments = random.Random(0)
    blocks_kept = set()
    for number in range(KILLS):
        output = folder / f"out-{number}"
        process = subprocess.Popen([*command, str(output)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            # The moments fill the run evenly, each at random within its share.
            process.wait((number + moments.random()) / KILLS * LATEST * seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        partial = folder / f".out-{number}.partial"
        blocks_kept.add(len(list(partial.glob("blocks/*.json"))))
        if not output.exists() or partial.exists():
            subprocess.run([*command, str(output)], check=True, capture_output=True)
        assert contents(output) == expected, f"kill {number}"
    assert len(blocks_kept) >= 4, f"the kills hit too few different moments: {blocks_kept}"
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
