from __future__ import annotations

import contextlib
import struct
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.checkpoints.gguf_header import read_gguf_header
from halfbyte.checkpoints.gguf_reader import GgufFile
from halfbyte.errors import CheckpointError, HalfbyteError, UnsupportedError
from tests.cli.verbs import run
from tests.hostile.broken_gguf import ARRAY, BROKEN, STRING, U32, array, entry, file, nested, sound, string


def written(folder: Path, raw: bytes) -> Path:
    path = folder / "x.gguf"
    path.write_bytes(raw)
    return path


def test_the_sound_file_opens(tmp_path: Path) -> None:
    found = GgufFile(written(tmp_path, sound()))
    assert (found.architecture, list(found.tensors)) == ("llama", ["a"])
    assert found.rows("a").numpy().tobytes() == struct.pack("<2f", 1.0, 2.0)


@pytest.mark.parametrize("kind", BROKEN)
def test_each_is_refused_in_one_line_that_says_what_is_wrong(kind: str, tmp_path: Path) -> None:
    make, message = BROKEN[kind]
    path = written(tmp_path, make())
    with pytest.raises(CheckpointError, match=message) as error:
        read_gguf_header(path)
    assert str(error.value).startswith(f"{path}: ")
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("kind", BROKEN)
def test_none_of_them_makes_it_allocate(kind: str, tmp_path: Path) -> None:
    path = written(tmp_path, BROKEN[kind][0]())
    with contextlib.suppress(CheckpointError):
        read_gguf_header(path)  # what imports once is not its own
    tracemalloc.start()
    with pytest.raises(CheckpointError):
        read_gguf_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_arrays_in_arrays_are_read_as_far_as_anyone_has_them(tmp_path: Path) -> None:
    raw = file((entry("k", ARRAY, nested(3)),))
    value = read_gguf_header(written(tmp_path, raw)).metadata["k"]
    for _ in range(3):
        (value,) = value
    assert value.tolist() == [7]


def test_a_file_that_shrinks_after_it_was_opened_is_noticed(tmp_path: Path) -> None:
    path = written(tmp_path, sound())
    found = GgufFile(path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="ended inside tensor a"):
        found.rows("a")


def test_one_of_several_files_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, file((entry("split.count", U32, struct.pack("<I", 3)),)))
    with pytest.raises(UnsupportedError, match="is one of 3 files; join them first"):
        GgufFile(path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (entry("n", STRING, string("7")), "metadata n: expected a whole number, found 7"),
        (entry("n", 5, struct.pack("<i", -1)), "metadata n: expected a whole number, found -1"),
        (entry("n", 6, struct.pack("<f", 7.0)), "metadata n: expected a whole number, found 7.0"),
        (entry("n", ARRAY, array(U32, 2, bytes(8))), "metadata n: expected a whole number, found 2 values"),
        (entry("n", 7, b"\1"), "metadata n: expected a whole number, found True"),
        (entry("m", U32, bytes(4)), "metadata n: missing"),
    ],
)
def test_metadata_of_another_type_is_refused(value: bytes, message: str, tmp_path: Path) -> None:
    found = GgufFile(written(tmp_path, file((value,))))
    with pytest.raises(CheckpointError, match=message):
        found.whole("n")


@pytest.mark.parametrize("kind", ["2^60 tensors", "big-endian", "data cut off"])
def test_the_command_line_prints_that_line_and_exits_with_2(kind: str, tmp_path: Path) -> None:
    path = written(tmp_path, BROKEN[kind][0]())
    result = run("verify", path)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"halfbyte: {path}: ")
    assert result.stderr.count("\n") == 1


@settings(max_examples=300)
@given(
    changes=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4), cut=st.booleans()
)
def test_any_damage_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]], cut: bool
) -> None:
    """Bytes changed at random: either one line, or tensors that lie inside the file."""
    data = bytearray(sound())
    for position, value in changes:
        data[position % len(data)] = value
    raw = bytes(data[: len(data) - (changes[0][0] % 40 if cut else 0)])
    path = written(tmp_path_factory.mktemp("damaged"), raw)
    with contextlib.suppress(HalfbyteError):
        found = GgufFile(path)
        for name, info in found.tensors.items():
            assert info.offset + info.nbytes <= len(raw)
            assert found.rows(name).numpy().tobytes() == raw[info.offset : info.offset + info.nbytes]
