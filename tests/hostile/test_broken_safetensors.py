from __future__ import annotations

import contextlib
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from halfbyte.checkpoints.reader import Checkpoint
from halfbyte.errors import CheckpointError, HalfbyteError
from tests.cli.verbs import run
from tests.hostile.broken_safetensors import BROKEN, sound


def test_the_sound_folder_opens(tmp_path: Path) -> None:
    sound(tmp_path)
    assert Checkpoint.open(tmp_path).read("a").tolist() == [0.0, 0.0]


@pytest.mark.parametrize("kind", BROKEN)
def test_each_is_refused_in_one_line_that_says_what_is_wrong(kind: str, tmp_path: Path) -> None:
    make, message = BROKEN[kind]
    make(tmp_path)
    with pytest.raises(CheckpointError, match=message) as error:
        Checkpoint.open(tmp_path)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 1000
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["truncated data", "a pickle", "no config"])
def test_the_command_line_prints_that_line_and_exits_with_2(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    make, _ = BROKEN[kind]
    make(folder)
    result = run("quantize", folder, "-o", tmp_path / "out")
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


@settings(max_examples=300)
@given(
    changes=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4), cut=st.booleans()
)
def test_any_damage_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]], cut: bool
) -> None:
    """Bytes changed at random: either one line, or a file that the safetensors library reads alike."""
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "config.json").write_text("{}")
    path = folder / "model.safetensors"
    save_file({"a": torch.arange(4.0), "b": torch.ones(2, 3, dtype=torch.bfloat16), "e": torch.empty(0, 2)}, path)
    data = bytearray(path.read_bytes())
    for position, value in changes:
        data[position % len(data)] = value
    path.write_bytes(data[: len(data) - (changes[0][0] % 40 if cut else 0)])
    with contextlib.suppress(CheckpointError):
        checkpoint = Checkpoint.open(folder)
        found = {name: checkpoint.read(name) for name in checkpoint.names()}
        assert_the_library_agrees(path, found)


def assert_the_library_agrees(path: Path, found: dict[str, torch.Tensor]) -> None:
    expected = load_file(path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8))


def test_a_lying_header_allocates_nothing(tmp_path: Path) -> None:
    """A terabyte announced in the prefix, in a shape and in offsets: memory stays where it was."""
    for kind in ("header of 2^63 bytes", "shape that overflows", "empty but of absurd width"):
        folder = tmp_path / kind
        folder.mkdir()
        BROKEN[kind][0](folder)
        tracemalloc.start()
        with pytest.raises(CheckpointError):
            Checkpoint.open(folder)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1 << 20


def test_the_single_file_wins_over_an_index_left_behind(tmp_path: Path) -> None:
    sound(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    assert Checkpoint.open(tmp_path).names() == ["a"]


def test_a_document_too_large_to_be_a_config_is_not_read(tmp_path: Path) -> None:
    sound(tmp_path)
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(1 << 40)  # sparse: takes no room
    with pytest.raises(CheckpointError, match="expected a JSON document of at most"):
        Checkpoint.open(tmp_path)
