from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.errors import CheckpointError, ConfigError, UnsupportedError
from halfbyte.formats import gemm, native
from halfbyte.formats.bits import pack_stream, stream_bytes, unpack_stream
from halfbyte.tensor import QuantizedTensor

FIELDS = (
    "codes", "scales", "zeros", "bits", "group_size", "bias", "group_index", "input_scale", "kept_columns",
    "kept_weight",
)  # fmt: skip


def make(
    seed: int = 0,
    rows: int = 6,
    columns: int = 20,
    *,
    bits: int = 3,
    group_size: int = 8,
    kept: int = 0,
    minima: bool = False,
    half: bool = True,
    group_index: bool = False,
    input_scale: bool = False,
    dtype: torch.dtype | None = None,
) -> QuantizedTensor:
    """A random tensor whose kept columns hold the codes the layout stores for them."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-columns // group_size)

    def numbers(*shape: int) -> torch.Tensor:
        values = torch.rand(*shape, generator=generator) + 0.1
        return values.half().float() if half else values

    codes = torch.randint(2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(2**bits, (rows, groups), generator=generator, dtype=torch.uint8)
    index = torch.arange(columns) // group_size
    if group_index:
        index = index[torch.randperm(columns, generator=generator)]
    chosen = torch.randperm(columns, generator=generator)[:kept].sort().values
    codes[:, chosen] = 0 if minima else zeros[:, index[chosen]]
    return QuantizedTensor(
        codes=codes,
        scales=numbers(rows, groups),
        zeros=-numbers(rows, groups) if minima else zeros,
        bits=bits,
        group_size=group_size,
        bias=None if dtype is None else torch.randn(rows, generator=generator).to(dtype),
        group_index=index.int() if group_index else None,
        input_scale=torch.rand(columns, generator=generator) if input_scale else None,
        kept_columns=chosen.int() if kept else None,
        kept_weight=torch.randn(rows, kept, generator=generator).bfloat16() if kept else None,
    )


def assert_same(found: QuantizedTensor, expected: QuantizedTensor) -> None:
    for field in FIELDS:
        a, b = getattr(found, field), getattr(expected, field)
        if isinstance(b, torch.Tensor):
            assert a.dtype == b.dtype, field
            assert torch.equal(a, b), field
        else:
            assert a == b, field


# ---- the stream of bits


def test_three_bit_codes_by_hand() -> None:
    """1 2 3 4 5 6 7 0, lowest bit first: 001 010 011 100 101 110 111 000 read from the right is 0x1F58D1."""
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0]], dtype=torch.uint8)
    assert pack_stream(codes, 3).tolist() == [[0xD1, 0x58, 0x1F]]


@pytest.mark.parametrize(
    ("bits", "codes", "expected"),
    [
        (2, [3, 0, 1, 2, 3], [0b10_01_00_11, 0b11]),
        (3, [7, 0, 5], [0b01_000_111, 0b1]),
        (4, [1, 15, 7], [0xF1, 0x07]),
        (8, [255, 0, 128], [255, 0, 128]),
    ],
)
def test_each_width_by_hand(bits: int, codes: list[int], expected: list[int]) -> None:
    packed = pack_stream(torch.tensor([codes], dtype=torch.uint8), bits)
    assert packed.tolist() == [expected]
    assert unpack_stream(packed, bits, len(codes)).tolist() == [codes]


@settings(max_examples=80)
@given(st.integers(2, 8), st.integers(1, 5), st.integers(1, 70), st.integers(0, 2**31))
def test_streams_go_round_and_every_bit_is_where_the_formula_puts_it(
    bits: int, rows: int, count: int, seed: int
) -> None:
    codes = torch.randint(2**bits, (rows, count), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack_stream(codes, bits)
    assert packed.shape == (rows, stream_bytes(count, bits))
    assert torch.equal(unpack_stream(packed, bits, count), codes)
    for row, stream in zip(codes.tolist(), packed.tolist(), strict=True):
        assert sum(code << bits * k for k, code in enumerate(row)) == int.from_bytes(bytes(stream), "little")


# ---- whole linears


@settings(max_examples=150)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 9),
    columns=st.integers(1, 40),
    bits=st.sampled_from([2, 3, 4, 8, 5]),
    group_size=st.integers(1, 48),
    kept=st.integers(0, 40),
    minima=st.booleans(),
    half=st.booleans(),
    group_index=st.booleans(),
    input_scale=st.booleans(),
    dtype=st.sampled_from([None, torch.float16, torch.bfloat16, torch.float32]),
)
def test_unpack_is_the_inverse_of_pack(rows: int, columns: int, kept: int, **options: Any) -> None:
    tensor = make(rows=rows, columns=columns, kept=min(kept, columns), **options)
    packed = native.pack(tensor)
    assert set(packed) <= set(native.KEYS)
    found = native.unpack(packed)
    assert_same(found, tensor)
    again = native.pack(found)
    assert packed.keys() == again.keys()
    assert all(torch.equal(value, again[key]) for key, value in packed.items())
    assert torch.equal(found.dequantize(), tensor.dequantize())


def test_golden_bytes_of_a_linear() -> None:
    """Two rows of five 3-bit codes in groups of four, one column kept; every byte worked out by hand."""
    tensor = QuantizedTensor(
        codes=torch.tensor([[1, 2, 6, 4, 5], [7, 7, 6, 0, 1]], dtype=torch.uint8),
        scales=torch.tensor([[0.5, 0.25], [1.0, 2.0]]),
        zeros=torch.tensor([[3, 4], [0, 7]], dtype=torch.uint8),
        bits=3,
        group_size=4,
        kept_columns=torch.tensor([2], dtype=torch.int32),
        kept_weight=torch.tensor([[1.0], [-2.0]], dtype=torch.bfloat16),
    )
    packed = native.pack(tensor)
    assert {key: value.dtype for key, value in packed.items()} == {
        "grid": torch.int32, "codes": torch.uint8, "scales": torch.float16, "zeros": torch.uint8,
        "kept_columns": torch.int32, "kept_weight": torch.bfloat16,
    }  # fmt: skip
    assert packed["grid"].tolist() == [3, 4, 5]
    # Row 0: 1, 2, zero point 3, 4, 5: 1 + 2·8 + 3·64 + 4·512 + 5·4096 = 22737 = 0x58D1. Row 1: 7, 7, 0, 0, 1 = 0x103F.
    assert packed["codes"].tolist() == [[0xD1, 0x58], [0x3F, 0x10]]
    assert packed["zeros"].tolist() == [[3 + 4 * 8], [0 + 7 * 8]]
    expected = [[-1.0, -0.5, 1.0, 0.5, 0.25], [7.0, 7.0, -2.0, 0.0, -12.0]]
    assert native.unpack(packed).dequantize().tolist() == expected
    assert tensor.dequantize().tolist() == expected


def test_codes_of_kept_columns_do_not_matter() -> None:
    tensor, other = make(kept=5), make(kept=5)
    assert other.kept_columns is not None
    other.codes[:, other.kept_columns.long()] = 7
    assert torch.equal(native.pack(tensor)["codes"], native.pack(other)["codes"])


def test_scales_take_16_bits_only_if_that_is_exact() -> None:
    assert native.pack(make(half=True, minima=True))["scales"].dtype == torch.float16
    packed = native.pack(make(half=False, minima=True))
    assert packed["scales"].dtype == packed["minima"].dtype == torch.float32
    large = make()
    large.scales.fill_(1e6)
    assert native.pack(large)["scales"].dtype == torch.float32


def test_three_bits_waste_nothing_but_the_end_of_a_row() -> None:
    assert native.pack(make(columns=576, group_size=64))["codes"].shape == (6, 216)
    assert native.pack(make(columns=577, group_size=64))["codes"].shape == (6, 217)


@pytest.mark.parametrize(("part", "found"), [("codes", 8), ("zeros", 9)])
def test_values_that_would_run_into_their_neighbours_are_refused(part: str, found: int) -> None:
    tensor = make()
    getattr(tensor, part)[3, 1] = found
    with pytest.raises(ConfigError, match=f"^layer: {part}: expected values below 8, got {found}"):
        native.pack(tensor, "layer")


@pytest.mark.parametrize("part", ["scales", "zeros"])
def test_numbers_that_are_not_finite_are_not_written(part: str) -> None:
    tensor = make(minima=True)
    getattr(tensor, part)[3, 1] = float("nan")
    with pytest.raises(ConfigError, match=f"^layer: {part}: expected finite numbers"):
        native.pack(tensor, "layer")


INT = torch.int32


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("codes", None, "codes: missing"),
        ("codes", torch.zeros(6, 9, dtype=torch.uint8), r"codes: expected uint8 \[out, 8\] .* found uint8 \[6, 9\]"),
        ("codes", torch.zeros(6, 8, dtype=INT), r"codes: .* found int32"),
        ("codes", torch.full((6, 8), 255, dtype=torch.uint8), "codes: the unused bits"),
        ("grid", None, "grid: missing"),
        ("grid", torch.tensor([3, 8], dtype=INT), r"grid: expected int32 \[3\]"),
        ("grid", torch.tensor([3.0, 8.0, 20.0]), "grid: .* found float32"),
        ("grid", torch.tensor([9, 8, 20], dtype=INT), "grid: expected 2 to 8 bits"),
        ("grid", torch.tensor([3, 0, 20], dtype=INT), "grid: .* found 3, 0, 20"),
        ("grid", torch.tensor([3, 8, -20], dtype=INT), "grid: "),
        ("grid", torch.tensor([3, 8, 2**31 - 1], dtype=INT), r"codes: expected uint8 \[out, 805306368\]"),
        ("grid", torch.tensor([3, 1, 20], dtype=INT), r"scales: expected float16 or float32 \[6, 20\]"),
        ("scales", None, "scales: missing"),
        ("scales", torch.ones(6, 3).bfloat16(), "scales: .* found bfloat16"),
        ("scales", torch.full((6, 3), float("inf")), "scales: .* not finite"),
        ("zeros", None, "zeros: expected either zeros or minima"),
        ("minima", torch.zeros(6, 3), "zeros: expected either zeros or minima"),
        ("zeros", torch.zeros(6, 3, dtype=torch.uint8), r"zeros: expected uint8 \[6, 2\]"),
        ("zeros", torch.full((6, 2), 255, dtype=torch.uint8), "zeros: the unused bits"),
        ("group_index", torch.zeros(19, dtype=INT), r"group_index: expected int32 \[20\]"),
        ("group_index", torch.full((20,), 3, dtype=INT), r"group_index: expected numbers in \[0, 3\), found 3 to 3"),
        ("group_index", torch.full((20,), -1, dtype=INT), "group_index: .* found -1"),
        ("input_scale", torch.ones(20).half(), "input_scale: expected float32"),
        ("input_scale", torch.full((20,), float("nan")), "input_scale: .* not finite"),
        ("kept_columns", None, "kept_weight: expected kept_columns and kept_weight together"),
        ("kept_columns", torch.tensor([0, 20], dtype=INT), r"kept_columns: expected numbers in \[0, 20\)"),
        ("kept_columns", torch.tensor([3, 3], dtype=INT), "kept_columns: expected ascending"),
        ("kept_columns", torch.tensor([5, 3], dtype=INT), "kept_columns: expected ascending"),
        ("kept_columns", torch.tensor([3], dtype=INT), r"kept_weight: .* \[6, 1\], found bfloat16 \[6, 2\]"),
        ("kept_columns", torch.tensor([[3, 5]], dtype=INT), r"kept_columns: expected int32 \[2\]"),
        ("kept_weight", None, "kept_weight: expected kept_columns and kept_weight together"),
        ("kept_weight", torch.zeros(6, 2), "kept_weight: expected float16 or bfloat16"),
        ("kept_weight", torch.full((6, 2), float("nan")).half(), "kept_weight: .* not finite"),
        ("bias", torch.zeros(5), r"bias: .* \[6\]"),
        ("bias", torch.full((6,), float("inf")), "bias: .* not finite"),
    ],
)  # fmt: skip
def test_files_that_lie_are_refused_by_name(key: str, value: torch.Tensor | None, message: str) -> None:
    packed = {k: v for k, v in {**native.pack(make(kept=2)), key: value}.items() if v is not None}
    with pytest.raises(CheckpointError, match=f"^tensor layer.{message}"):
        native.unpack(packed, name="layer")


@settings(max_examples=150)
@given(st.data())
def test_random_damage_is_refused_or_read_as_a_sound_tensor(data: st.DataObject) -> None:
    """Whatever bytes stand in the tensors, nothing but a CheckpointError comes out, and nothing large is allocated."""
    options = {"kept": 3, "group_index": True, "input_scale": True, "dtype": torch.float16}
    packed = native.pack(make(**options, minima=data.draw(st.booleans())))
    key = data.draw(st.sampled_from(sorted(packed)))
    damaged = packed[key].clone()
    flat = damaged.view(torch.uint8).reshape(-1)
    for _ in range(data.draw(st.integers(1, 4))):
        flat[data.draw(st.integers(0, flat.numel() - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(CheckpointError):
        found = native.unpack({**packed, key: damaged}, name="layer")
        assert found.dequantize().shape == (found.out_features, found.in_features)


# ---- config.json, and the choice between the layouts


def test_config_goes_round() -> None:
    section = native.quantization_config(bits=3, group_size=-1, modules_to_not_convert=["lm_head"])
    assert section["quant_method"] == "halfbyte"
    assert native.read_quantization_config(section) == native.NativeConfig(3, -1, ("lm_head",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2"),
        ({"version": True}, "version True"),
        ({"bits": 1}, "bits 1"),
        ({"bits": "4"}, "bits '4'"),
        ({"group_size": 0}, "group_size 0"),
        ({"modules_to_not_convert": "lm_head"}, "expected a list of strings"),
    ],
)
def test_configs_that_cannot_be_read_are_refused(change: dict[str, Any], message: str) -> None:
    section = native.quantization_config(bits=4, group_size=64, modules_to_not_convert=[])
    with pytest.raises((CheckpointError, UnsupportedError), match=message):
        native.read_quantization_config({**section, **change})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, None),
        ({"dtype": torch.float16}, None),
        ({"bits": 3}, "holds 4-bit codes, not 3-bit ones"),
        ({"rows": 6}, "has 6 outputs"),
        ({"columns": 20}, "20 inputs to be whole groups of 8"),
        ({"minima": True}, "floating minima"),
        ({"half": False}, "scales that fp16 cannot hold exactly"),
        ({"kept": 1}, "columns kept in 16 bit"),
        ({"group_index": True}, "groups of columns that are no neighbours"),
        ({"input_scale": True}, "a scale on its input"),
    ],
)
def test_the_awq_layout_says_what_it_cannot_hold(options: dict[str, Any], message: str | None) -> None:
    tensor = make(**{"rows": 8, "columns": 24, "bits": 4, **options})
    reason = gemm.cannot_hold(tensor)
    if message is None:
        assert reason is None
        gemm.pack(tensor, "layer")
    else:
        assert reason is not None
        assert message in reason
        with pytest.raises(UnsupportedError, match=f"^layer: .*{message}"):
            gemm.pack(tensor, "layer")
    assert_same(native.unpack(native.pack(tensor)), tensor)
