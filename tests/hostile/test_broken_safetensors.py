from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from halfbyte.checkpoints.reader import Checkpoint
from halfbyte.errors import HalfbyteError
from tests.hostile.broken_safetensors import BROKEN, sound


def test_the_sound_folder_opens(tmp_path: Path) -> None:
    sound(tmp_path)
    assert Checkpoint.open(tmp_path).read("a").tolist() == [0.0, 0.0]


@pytest.mark.parametrize("kind", BROKEN)
def test_each_is_refused_in_one_line_that_says_what_is_wrong(kind: str, tmp_path: Path) -> None:
    make, message = BROKEN[kind]
    make(tmp_path)
    with pytest.raises(HalfbyteError, match=message) as error:
        Checkpoint.open(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["truncated data", "a pickle", "no config"])
def test_the_command_line_prints_that_line_and_exits_with_2(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    make, _ = BROKEN[kind]
    make(folder)
    command = [sys.executable, "-m", "halfbyte", "quantize", str(folder), "-o", str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("halfbyte: ")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_file_that_shrinks_after_it_was_opened_is_noticed(tmp_path: Path) -> None:
    sound(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(HalfbyteError, match="ended inside tensor a"):
        checkpoint.read("a")
