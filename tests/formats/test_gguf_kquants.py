"""K-quants: blocks by hand from the formulas. Against the gguf package: test_gguf_blocks.py."""

from __future__ import annotations

from itertools import chain

import torch

from halfbyte.formats.gguf_blocks import unpack

HALF, TWO = [0x00, 0x38], [0x00, 0x40]  # 0.5 and 2.0 in fp16, low byte first


def codes_and_weight(kind: str, *fields: list[int]) -> tuple[list[int], list[float]]:
    tensor = unpack(torch.tensor([[*chain(*fields)]], dtype=torch.uint8), kind)
    return tensor.codes[0].tolist(), tensor.dequantize()[0].tolist()


def test_q4_k() -> None:
    """Scale and minimum of sub-block j are j + 40 and j + 20, of six bits each; codes 3 and 12 in turn."""
    scales = [40 + j for j in range(8)]
    minima = [20 + j for j in range(8)]
    packed = [scales[j] | (scales[j + 4] >> 4) << 6 for j in range(4)]
    packed += [minima[j] | (minima[j + 4] >> 4) << 6 for j in range(4)]
    packed += [scales[j + 4] & 15 | (minima[j + 4] & 15) << 4 for j in range(4)]
    codes, weight = codes_and_weight("Q4_K", HALF, TWO, packed, [3 | 12 << 4] * 128)
    for j in range(8):
        expected = 12 if j % 2 else 3
        assert codes[32 * j : 32 * j + 32] == [expected] * 32
        assert weight[32 * j] == 0.5 * scales[j] * expected - 2.0 * minima[j]


def test_q5_k() -> None:
    """As Q4_K, with fifth bits: bit j of qh[l] is that of element l of sub-block j. Here of element j alone."""
    high = [1 << element if element < 8 else 0 for element in range(32)]
    codes, weight = codes_and_weight("Q5_K", HALF, TWO, [1] * 4 + [0] * 4 + [1] * 4, high, [0x21] * 128)
    for j in range(8):
        low = 2 if j % 2 else 1
        assert codes[32 * j : 32 * j + 32] == [low + 16 * (element == j) for element in range(32)]
    assert weight[0] == 0.5 * 17
    assert weight[255] == 0.5 * 2


def test_q6_k() -> None:
    """Element 32 i + l of a half: low bits in ql[l + 32 (i % 2)], by its nibble i // 2; high bits i of qh[l]."""
    low = [0x51] * 32 + [0x62] * 32 + [0x73] * 32 + [0x84] * 32
    scales = [(j - 8) % 256 for j in range(16)]  # int8 -8 to 7
    codes, weight = codes_and_weight("Q6_K", low, [0b11100100] * 64, scales, HALF)
    expected = [1, 2 + 16, 5 + 32, 6 + 48, 3, 4 + 16, 7 + 32, 8 + 48]
    for i, code in enumerate(expected):
        assert codes[32 * i : 32 * i + 32] == [code] * 32
        assert weight[32 * i] == 0.5 * (2 * i - 8) * (code - 32)
        assert weight[32 * i + 16] == 0.5 * (2 * i - 7) * (code - 32)


def test_q2_k() -> None:
    """Bits 2 i of the 32 bytes of a half are run i of 32; its two sub-blocks have a scale and a minimum each."""
    scales = [j | (15 - j) << 4 for j in range(16)]
    codes, weight = codes_and_weight("Q2_K", scales, [0b11100100] * 64, HALF, TWO)
    for j in range(16):
        code = (j // 2) % 4
        assert codes[16 * j : 16 * j + 16] == [code] * 16
        assert weight[16 * j] == 0.5 * j * code - 2.0 * (15 - j)


def test_q3_k() -> None:
    """Third bits: bit i of hmask[l] is that of run i. Six bits of a scale: four, and two in the last four bytes."""
    mask = [0b10101010] * 32
    scales = [4 * j + 1 for j in range(16)]
    packed = [scales[j] & 15 | (scales[j + 8] & 15) << 4 for j in range(8)]
    packed += [sum((scales[j + 4 * i] >> 4) << 2 * i for i in range(4)) for j in range(4)]
    codes, weight = codes_and_weight("Q3_K", mask, [0b11100100] * 64, packed, HALF)
    for j in range(16):
        code = (j // 2) % 4 + 4 * (j // 2 % 2)
        assert codes[16 * j : 16 * j + 16] == [code] * 16
        assert weight[16 * j] == 0.5 * (scales[j] - 32) * (code - 4)
