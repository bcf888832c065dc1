from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from halfbyte.checkpoints import shard
from halfbyte.checkpoints.header import DTYPES, read_header
from halfbyte.checkpoints.shard import ShardWriter
from halfbyte.checkpoints.writer import CheckpointWriter
from halfbyte.errors import UnsupportedError


@settings(max_examples=60)
@given(
    tensors=st.lists(
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 5), max_size=3)), min_size=1, max_size=8
    ),
    spill=st.sampled_from([0, 64, 1 << 20]),
)
def test_the_library_reads_what_was_streamed(
    tmp_path_factory: pytest.TempPathFactory, tensors: list[tuple[str, list[int]]], spill: int
) -> None:
    path = tmp_path_factory.mktemp("shard") / "model.safetensors"
    expected = {
        f"t{i}": torch.randint(0, 2, shape).to(DTYPES[dtype]) for i, (dtype, shape) in enumerate(tensors)
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard, "SPILL_BYTES", spill)
        writer = ShardWriter(path)
        for name, tensor in expected.items():
            writer.add(name, tensor)
        writer.finish()
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    found = load_file(path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8))
    for info in read_header(path).values():
        assert info.offset % info.dtype.itemsize == 0, "every tensor is aligned, so that it can be mapped"


def test_what_is_added_may_change_afterwards(tmp_path: Path) -> None:
    tensor = torch.ones(3)
    writer = ShardWriter(tmp_path / "s")
    writer.add("a", tensor)
    tensor.zero_()
    writer.finish()
    assert torch.equal(load_file(tmp_path / "s")["a"], torch.ones(3))


def test_views_are_written_as_they_look(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    writer = ShardWriter(tmp_path / "s")
    for name, view in (("t", base.T), ("row", base[1]), ("same", base), ("parameter", torch.nn.Parameter(base))):
        writer.add(name, view)
    writer.finish()
    found = load_file(tmp_path / "s")
    assert torch.equal(found["t"], base.T)
    assert torch.equal(found["row"], base[1])
    assert torch.equal(found["same"], found["parameter"])


def test_large_shards_go_to_disk_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard, "SPILL_BYTES", 1 << 16)
    writer = ShardWriter(tmp_path / "s")
    for number in range(8):
        writer.add(str(number), torch.full((1 << 14,), float(number)))
        assert sum(tensor.nbytes for _, tensor in writer._held) <= 1 << 16
    assert (tmp_path / "s").stat().st_size > 7 << 16
    writer.finish()
    (length,) = struct.unpack("<Q", (tmp_path / "s").read_bytes()[:8])
    assert (length + 8) % 4096 == 0
    assert load_file(tmp_path / "s")["5"].unique().tolist() == [5.0]


def test_a_header_without_room_begins_another_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard, "SPILL_BYTES", 0)
    monkeypatch.setattr(shard, "HEADER_ROOM", 0)
    with CheckpointWriter(tmp_path / "m") as writer:
        for number in range(40):
            writer.add(f"{'x' * 300}{number}", torch.full((2,), float(number)))
        writer.commit()
    files = sorted((tmp_path / "m").glob("*.safetensors"))
    assert len(files) > 1
    assert sorted(v[0].item() for path in files for v in load_file(path).values()) == list(range(40))


@pytest.mark.parametrize("tensor", [torch.zeros(2, dtype=torch.complex64), torch.zeros(2, device="meta")])
def test_what_safetensors_cannot_name_is_refused(tensor: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="^tensor a: safetensors holds no"):
        ShardWriter(tmp_path / "s").add("a", tensor)


def test_a_name_is_used_once(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "m") as writer:
        writer.add("a", torch.ones(1))
        with pytest.raises(ValueError, match="added twice"):
            writer.add("a", torch.ones(1))
