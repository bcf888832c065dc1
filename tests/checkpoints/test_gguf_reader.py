"""GGUF files: metadata of every type, versions, and what tensors come out as."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from halfbyte.checkpoints.gguf_header import read_gguf_header
from halfbyte.checkpoints.gguf_reader import GgufFile, floats
from halfbyte.errors import CheckpointError, UnsupportedError
from tests.hostile.broken_gguf import ARRAY, STRING, array, entry, file, string, tensor

VALUES: list[tuple[int, str, Any]] = [
    (0, "<B", 200), (1, "<b", -100), (2, "<H", 60_000), (3, "<h", -30_000), (4, "<I", 4_000_000_000),
    (5, "<i", -2_000_000_000), (6, "<f", 0.5), (7, "<?", True), (10, "<Q", 2**63 + 5), (11, "<q", -(2**62)),
    (12, "<d", 1e-300),
]  # fmt: skip


@pytest.mark.parametrize("version", [2, 3])
def test_every_type_of_metadata(version: int, tmp_path: Path) -> None:
    entries = [entry(f"v{kind}", kind, struct.pack(layout, value)) for kind, layout, value in VALUES]
    for kind, layout, value in VALUES:
        entries.append(entry(f"a{kind}", ARRAY, array(kind, 2, struct.pack(layout, value) * 2)))
    entries.append(entry("text", STRING, string("naïve")))
    entries.append(entry("texts", ARRAY, array(STRING, 3, string("") + string("Ġthe") + string("\n"))))
    entries.append(entry("none", ARRAY, array(STRING, 0)))
    (tmp_path / "x.gguf").write_bytes(file(tuple(entries), version=version))
    header = read_gguf_header(tmp_path / "x.gguf")
    assert header.version == version
    for kind, _, value in VALUES:
        assert header.metadata[f"v{kind}"] == value
        assert type(header.metadata[f"v{kind}"]) is type(value)
        assert header.metadata[f"a{kind}"].tolist() == [value, value]
    assert header.metadata["text"] == "naïve"
    assert (header.metadata["texts"], header.metadata["none"]) == (["", "Ġthe", "\n"], [])


def test_tensors_lie_where_the_alignment_puts_them(tmp_path: Path) -> None:
    aligned = entry("general.alignment", 4, struct.pack("<I", 128))
    tensors = (tensor("a", (3, 2)), tensor("b", (32,), kind=2, offset=128))
    header = file((aligned,), tensors, b"")
    start = -(-(24 + len(aligned) + sum(map(len, tensors))) // 128) * 128
    raw = header.ljust(start, b"\0")[:start] + struct.pack("<6f", *range(6)) + bytes(104) + bytes(range(18))
    (tmp_path / "x.gguf").write_bytes(raw)
    found = GgufFile(tmp_path / "x.gguf")
    assert (found.tensors["a"].shape, found.tensors["a"].kind, found.tensors["a"].elements) == ((2, 3), "F32", 6)
    assert floats(found.rows("a"), "F32", "a").tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert (found.tensors["b"].kind, found.tensors["b"].row_bytes) == ("Q4_0", 18)
    assert found.rows("b").tolist() == [list(range(18))]
    with pytest.raises(CheckpointError, match=r"x\.gguf: tensor c: missing"):
        found.info("c")


def test_a_float32_is_the_number_that_was_meant(tmp_path: Path) -> None:
    entries = (entry("eps", 6, struct.pack("<f", 1e-5)), entry("base", 6, struct.pack("<f", 500000.0)))
    (tmp_path / "x.gguf").write_bytes(file((*entries, entry("bad", 6, struct.pack("<f", float("nan"))))))
    found = GgufFile(tmp_path / "x.gguf")
    assert (found.number("eps"), found.number("base"), found.number("no", 3.0)) == (1e-5, 500000.0, 3.0)
    with pytest.raises(CheckpointError, match="metadata bad: expected a finite number, found nan"):
        found.number("bad")


def test_blocks_become_the_floats_that_hold_them() -> None:
    weight = np.random.default_rng(0).standard_normal((5, 512), dtype=np.float32)
    for kind in ("Q8_0", "Q4_0", "Q2_K", "IQ4_NL", "TQ2_0"):
        rows = torch.randint(0, 60, (5, 512), dtype=torch.uint8)
        try:
            rows = torch.from_numpy(gguf.quantize(weight, gguf.GGMLQuantizationType[kind]).copy())
        except NotImplementedError:  # the package only reads these
            _, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
            rows = rows[:, : 2 * size]
        wide = torch.from_numpy(gguf.dequantize(rows.numpy(), gguf.GGMLQuantizationType[kind]).copy())
        assert torch.equal(floats(rows, kind, "w"), wide.half()), kind
        assert torch.equal(floats(rows, kind, "w", torch.bfloat16), wide.bfloat16()), kind


def test_what_fp16_cannot_hold_becomes_bf16_and_nan_is_refused() -> None:
    row = torch.tensor([[0xFF, 0x7B, *[127] * 32]], dtype=torch.uint8)  # 65504 · 127
    assert floats(row, "Q8_0", "w").dtype == torch.bfloat16
    assert float(floats(row, "Q8_0", "w")[0, 0]) == pytest.approx(65504 * 127, rel=0.01)
    row[0, 1] = 0x7E
    with pytest.raises(CheckpointError, match="tensor w: holds numbers that are not finite"):
        floats(row, "Q8_0", "w")
    with pytest.raises(UnsupportedError, match="tensor w: Q8_K is not decoded here"):
        floats(torch.zeros(1, 292, dtype=torch.uint8), "Q8_K", "w")
