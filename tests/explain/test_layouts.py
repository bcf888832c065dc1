"""What the lessons say of layouts, against the code and the sources they speak of."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from halfbyte.explain import cpu_layout
from halfbyte.explain.kernel import INSTRUCTIONS
from halfbyte.explain.matrix import Matrix, quantize
from halfbyte.explain.packing import disk_bytes, word_maps
from halfbyte.explain.tensor_core import fragment_a, fragment_b, fragment_c
from halfbyte.formats import gemm, native
from halfbyte.quantization.grid import Grid
from halfbyte.tensor import QuantizedTensor

NATIVE = Path(__file__).parents[2] / "native" / "cpu"


def constant(header: str, name: str) -> list[int]:
    found = re.search(rf"constexpr int {name}(?:\[\w+\])? = ([^;]+);", (NATIVE / header).read_text())
    assert found is not None
    return [int(number) for number in re.findall(r"\d+", found[1])]


def test_the_constants_are_those_of_the_core() -> None:
    assert constant("w4.hpp", "BLOCK_ROWS") == [cpu_layout.BLOCK_ROWS]
    assert constant("w4.hpp", "OCTET") == [cpu_layout.OCTET]
    assert constant("w4.hpp", "NIBBLE_INPUT") == list(cpu_layout.NIBBLE_INPUT)
    assert constant("a8.hpp", "A8_META") == [cpu_layout.META_BYTES]


@pytest.mark.parametrize(
    ("tier", "call"),
    [
        ("avx512_vnni", "_mm512_dpbusd_epi32"),
        ("avx_vnni", "_mm256_dpbusd_avx_epi32"),
        ("avx2", "_mm256_maddubs_epi16"),
        ("neon", "vdotq_laneq_s32"),
    ],
)
def test_the_tiers_use_the_instructions_that_are_named(tier: str, call: str) -> None:
    assert tier in INSTRUCTIONS
    assert call in (NATIVE / f"tier_{tier}.cpp").read_text()


@pytest.mark.parametrize(("rows", "columns", "size"), [(24, 96, 32), (8, 256, 128)])
@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_quantizing_without_torch_gives_what_the_quantizer_gives(
    rows: int, columns: int, size: int, shift: float
) -> None:
    weight = np.random.default_rng(0).normal(shift, 0.3, (rows, columns)).astype(np.float32)
    weight[0, :size] = 0
    expected = Grid(4, size, True).quantize(torch.from_numpy(weight))
    found = quantize("", weight, size)
    for name in ("codes", "scales", "zeros"):
        assert torch.equal(getattr(found.tensor, name), getattr(expected, name))
    assert np.array_equal(found.dequantized, expected.dequantize().numpy())


def made_up(rows: int, columns: int) -> Matrix:
    return quantize("", np.random.default_rng(1).normal(0, 1, (rows, columns)).astype(np.float32), 32)


@pytest.mark.parametrize(("rows", "columns"), [(24, 96), (8, 32)])
def test_the_bytes_on_disk_are_counted_right(rows: int, columns: int) -> None:
    matrix = made_up(rows, columns)
    packed = {"gemm": gemm.pack(matrix.tensor), "stream": native.pack(matrix.tensor)}
    assert disk_bytes(matrix) == {name: sum(t.nbytes for t in parts.values()) for name, parts in packed.items()}


def test_the_maps_show_the_words_that_packing_fills() -> None:
    rows, columns = 24, 32
    maps = word_maps(rows, columns)
    for n, k in ((0, 0), (7, 3), (8, 9), (23, 31)):
        codes = torch.zeros(rows, columns, dtype=torch.uint8)
        codes[n, k] = 15
        tensor = QuantizedTensor(codes, torch.ones(rows, 1), torch.zeros(rows, 1, dtype=torch.uint8), 4, columns)
        word = int(gemm.pack(tensor)["qweight"].reshape(-1).nonzero()[0])
        byte = int(native.pack(tensor)["codes"].reshape(-1).nonzero()[0])
        assert (word, byte // 4) == (maps["gemm"][n, k], maps["stream"][n, k])
        assert maps["kernel"][n, k] == (n // 16 * 4 + k // 8) * 16 + n % 16


def test_fragments_are_those_of_the_ptx_manual() -> None:
    """mma.m16n8k16, element by element: groupID = lane >> 2, threadID_in_group = lane % 4."""
    a, b, c = fragment_a(), fragment_b(), fragment_c()
    for lane in range(32):
        group, thread = lane >> 2, lane % 4
        for i in range(8):
            row = group if i < 2 or 4 <= i < 6 else group + 8
            column = thread * 2 + (i & 1) + (0 if i < 4 else 8)
            assert (a[0][lane, i], a[1][lane, i]) == (row, column)
        for i in range(4):
            assert (b[0][lane, i], b[1][lane, i]) == (thread * 2 + (i & 1) + (0 if i < 2 else 8), group)
            assert (c[0][lane, i], c[1][lane, i]) == (group if i < 2 else group + 8, thread * 2 + (i & 1))
