"""Every kernel of the W4A16 product against the definition in fp64, over shapes, tails, dtypes and tiers."""

import os
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from weights import random_weight, truth

from halfbyte import _native
from halfbyte.errors import ConfigError, UnsupportedError
from halfbyte.kernels.registry import Kernel, PreparedLinear, pick
from halfbyte.kernels.w4a16 import NativeLinear, prepare, verdicts
from halfbyte.tensor import QuantizedTensor

CPU = torch.device("cpu")
TIERS = _native.available_tiers()
# Rounding of fp32 sums, in units of Σ|x|·(scale·code + |offset|). The worst case is (terms of a chain) · 2^-24,
# 3e-5 for the longest here; roundings do not conspire, and an error of indexing is of the order of 1.
TOLERANCE = 1e-6
# in, group size, out: blocks and octets cut short, ragged last groups, one group, SmolLM2's own.
SHAPES = [
    (8, 8, 1), (24, 8, 7), (24, 32, 16), (64, 32, 33), (172, 32, 33), (172, 172, 7), (576, 64, 64), (576, 128, 192),
    (576, 576, 33), (576, 64, 192), (1536, 128, 576), (1536, 32, 64), (1000, 64, 48), (576, 8, 16),
]  # fmt: skip
ROWS = [*range(1, 18), 64, 100]


@pytest.fixture(params=TIERS)
def tier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HALFBYTE_ISA", request.param)
    return str(request.param)


def native(weight: QuantizedTensor) -> PreparedLinear:
    return prepare(weight, backend="native", device=CPU)[1]


def spread(rows: int, columns: int) -> torch.Tensor:
    """Activations with an outlier channel, as language models have them."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    x[:, columns // 2] *= 50.0
    return x


@pytest.mark.parametrize(("columns", "group_size", "rows"), SHAPES)
def test_native_matches_fp64(tier: str, columns: int, group_size: int, rows: int) -> None:
    weight = random_weight(rows, columns, group_size, bias=rows % 2 == 1, float_zeros=columns % 3 == 1)
    linear = native(weight)
    x = spread(max(ROWS), columns)
    expected, size = truth(weight, x)
    for m in ROWS:
        error = ((linear(x[:m]) - expected[:m]).abs() / size[:m]).max().item()
        assert error < TOLERANCE, f"M = {m}"


# Of columns 172 and 30 neither is a multiple of 8; 20 and 12 are group sizes that are none; 16 to -1 the usual ones.
FIELDS: dict[str, dict[str, Any]] = {
    "8 bits": {"bits": 8},
    "8 bits, minima": {"bits": 8, "float_zeros": True},
    "2 bits": {"bits": 2},
    "3 bits": {"bits": 3},
    "5 bits": {"bits": 5},
    "one kept": {"kept": 1},
    "kept bf16": {"kept": 9},
    "kept fp16": {"kept": 14, "kept_dtype": torch.float16},
    "kept, 8 bits": {"kept": 14, "bits": 8, "float_zeros": True},
    "kept all": {"kept": 30},
    "activation order": {"group_index": True},
    "input scale": {"input_scale": True},
    "everything": {"kept": 14, "group_index": True, "input_scale": True, "bits": 3},
}


@pytest.mark.parametrize("fields", FIELDS)
@pytest.mark.parametrize(
    ("columns", "group_size", "rows"), [(30, 12, 5), (172, 32, 33), (576, 64, 64), (172, 172, 16), (600, 16, 48)]
)
def test_native_honours_every_field(tier: str, columns: int, group_size: int, rows: int, fields: str) -> None:
    weight = random_weight(rows, columns, group_size, **FIELDS[fields])
    linear = native(weight)
    x = spread(100, columns)
    expected, size = truth(weight, x)
    alone = linear(x[:1])
    for m in [*range(1, 18), 100]:
        found = linear(x[:m])
        error = ((found - expected[:m]).abs() / size[:m]).max().item()
        assert error < TOLERANCE, f"M = {m}"
        assert m > 16 or torch.equal(found[:1], alone), f"M = {m}"
    assert torch.allclose(linear.dequantize(), weight.dequantize(), rtol=1e-5, atol=1e-6)
    for dtype in (torch.bfloat16, torch.float16):
        half = x[:20].to(dtype)
        assert torch.equal(linear(half), linear(half.float()).to(dtype))


@pytest.mark.parametrize("group_size", [16, 32, 64, 128, 256, 600])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_width_and_group_size_runs_natively(tier: str, bits: int, group_size: int) -> None:
    """600 inputs: a ragged last group for each size but 600 itself."""
    weight = random_weight(33, 600, group_size, bits=bits)
    kernel, linear = prepare(weight, device=CPU)
    assert kernel.name == "native"
    x = spread(17, 600)
    expected, size = truth(weight, x)
    for m in (1, 2, 17):
        assert ((linear(x[:m]) - expected[:m]).abs() / size[:m]).max() < TOLERANCE


@pytest.mark.parametrize("ratio", [0.01, 0.3, 0.5, 0.7])
def test_kept_columns_cost_their_own_bytes_and_no_codes(ratio: float) -> None:
    plain, kept = (
        random_weight(64, 1024, 1024, bias=False),
        random_weight(64, 1024, 1024, bias=False, kept=int(1024 * ratio)),
    )
    count = int(1024 * ratio)
    coded = -(-(1024 - count) // 8) * 8
    order = 4 * (coded + count)
    assert native(kept).nbytes == native(plain).nbytes - 64 * (1024 - coded) // 2 + 2 * 64 * count + order


def test_an_outlier_in_a_kept_column_leaves_no_trace_in_its_group() -> None:
    """Its codes are skipped, not cancelled: 3e30 · (code - zero) would drown everything else."""
    weight = random_weight(16, 64, 32, bias=False, kept=1)
    assert weight.kept_columns is not None
    assert weight.kept_weight is not None
    weight.kept_weight.zero_()
    x = spread(3, 64)
    x[:, int(weight.kept_columns[0])] = 0
    expected = native(weight)(x)
    x[:, int(weight.kept_columns[0])] = 3e30
    assert torch.equal(native(weight)(x), expected)


@pytest.mark.parametrize(("columns", "group_size", "rows"), [(576, 64, 192), (172, 32, 33), (1536, 128, 48)])
def test_a_row_has_the_same_bits_in_any_company(tier: str, columns: int, group_size: int, rows: int) -> None:
    linear = native(random_weight(rows, columns, group_size))
    x = spread(16, columns)
    alone = torch.cat([linear(row) for row in x.split(1)])
    for m in range(1, 17):
        for first in range(0, 17 - m, 3):
            assert torch.equal(linear(x[first : first + m]), alone[first : first + m])


@pytest.mark.parametrize("m", [1, 5, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_activations_round_once_at_the_end(tier: str, m: int, dtype: torch.dtype) -> None:
    linear = native(random_weight(33, 172, 32))
    x = spread(m, 172).to(dtype)
    assert torch.equal(linear(x), linear(x.float()).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_extremes(tier: str, dtype: torch.dtype) -> None:
    """Every 16-bit pattern passes through a weight of one: subnormals, infinities and NaN come back as they went in."""
    weight = QuantizedTensor(
        torch.ones(1, 8, dtype=torch.uint8), torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.uint8), 4, 8
    )
    x = torch.zeros(65536, 8, dtype=dtype)
    x[:, 5] = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    for y in (native(weight)(x), torch.cat([native(weight)(x[:: 1024 * 4])])):
        wanted = x[:, 5] if len(y) == len(x) else x[:: 1024 * 4, 5]
        torch.testing.assert_close(y[:, 0], wanted, rtol=0, atol=0, equal_nan=True)


@settings(max_examples=80)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 200),
    group_size=st.integers(1, 160),
    bits=st.integers(2, 8),
    float_zeros=st.booleans(),
    group_index=st.booleans(),
    kept=st.integers(0, 200),
    seed=st.integers(0, 2**31),
)
def test_packing_keeps_every_code(rows: int, columns: int, group_size: int, kept: int, **options: Any) -> None:
    weight = random_weight(rows, columns, group_size, kept=min(kept, columns), **options)
    index = weight.column_groups
    exact = weight.scales[:, index] * weight.codes.float() + weight.offsets[:, index]
    if weight.kept_columns is not None and weight.kept_weight is not None:
        exact[:, weight.kept_columns.long()] = weight.kept_weight.float()
    assert torch.equal(native(weight).dequantize(), exact)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("fields", [*FIELDS, "4 bits"])
def test_other_kernels_match_fp64(backend: str, fields: str) -> None:
    weight = random_weight(33, 172, 20, **FIELDS.get(fields, {}))
    x = spread(9, 172)
    expected, size = truth(weight, x)
    y = prepare(weight, backend=backend, device=CPU)[1](x)
    assert ((y - expected).abs() / size).max() < TOLERANCE


def test_threads_forks_and_callers_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several Python threads on one pool, then a forked child with a pool of its own: all get the same bits."""
    monkeypatch.setenv("HALFBYTE_THREADS", "3")
    linear = native(random_weight(1536, 576, 64))
    x = spread(8, 576)
    expected = linear(x)
    wrong: list[int] = []

    def call(number: int) -> None:
        for _ in range(20):
            if not torch.equal(linear(x), expected):
                wrong.append(number)

    callers = [threading.Thread(target=call, args=(number,)) for number in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=60)
    assert not wrong
    y = torch.empty_like(expected)
    child = os.fork()
    if child == 0:  # torch's own pools do not survive a fork, so only the native call is made here
        linear._matrix.multiply(x.data_ptr(), 576, y.data_ptr(), 8, 0)  # type: ignore[attr-defined]
        os._exit(0 if y.numpy().tobytes() == expected.numpy().tobytes() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_number_of_threads_changes_no_bit(tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, results = random_weight(576, 1536, 64), []
    for threads in ("1", "2", "5"):
        monkeypatch.setenv("HALFBYTE_THREADS", threads)
        linear = native(weight)
        results.append([linear(spread(m, 1536)) for m in (1, 4, 33)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_wrong_input_is_refused_in_words() -> None:
    linear = native(random_weight(16, 64, 32))
    for x in (torch.zeros(2, 63), torch.zeros(2, 64, dtype=torch.float64), torch.zeros(2, 64, dtype=torch.int8)):
        with pytest.raises(UnsupportedError, match=r"expected a CPU tensor \[\.\.\., 64\]"):
            linear(x)


def test_forced_tier(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(16, 64, 32)
    monkeypatch.setenv("HALFBYTE_ISA", "sse9")
    with pytest.raises(UnsupportedError, match="no such tier"):
        native(weight)
    for missing in set(_native.known_tiers()) - set(TIERS):
        monkeypatch.setenv("HALFBYTE_ISA", missing)
        with pytest.raises(UnsupportedError, match=f"this CPU lacks it; it has .*{TIERS[-1]}"):
            native(weight)


def test_selection_is_explained() -> None:
    with pytest.raises(ConfigError, match="native, torch, reference"):
        prepare(random_weight(16, 64, 32), backend="fast", device=CPU)
    found = {verdict.kernel.name: verdict for verdict in verdicts(random_weight(16, 64, 20, bits=3), CPU)}
    assert found["native"].picked
    assert "native is faster" in found["torch"].reason


def test_what_a_kernel_declares_is_what_it_refuses() -> None:
    narrow = Kernel("narrow", NativeLinear, frozenset({"cpu"}), frozenset({4}), 8, 1, lambda _: None, "for this test")
    assert narrow.refuses(random_weight(16, 64, 32), CPU) is None
    assert "not 3" in str(narrow.refuses(random_weight(16, 64, 32, bits=3), CPU))
    assert "multiple of 8, not 20" in str(narrow.refuses(random_weight(16, 64, 20), CPU))
    assert "not on cuda" in str(narrow.refuses(random_weight(16, 64, 32), torch.device("cuda")))
    with pytest.raises(UnsupportedError, match="backend narrow: holds 4 bits, not 3"):
        pick(random_weight(16, 64, 32, bits=3), CPU, [narrow], "narrow")


def test_native_core_checks_its_arguments() -> None:
    weight = random_weight(16, 64, 32)
    codes, scales, offsets = weight.codes.numpy(), weight.scales.numpy(), weight.offsets.numpy()
    tier = TIERS[0]
    ones = np.ones(64, np.float32)
    kept = np.zeros((16, 2), np.uint16)

    def extra(**fields: Any) -> Callable[[], object]:
        return lambda: _native.W4Matrix(codes, scales, offsets, None, 32, tier, **fields)

    extra(
        bits=8, group_index=np.zeros(64, np.int32), input_scale=ones,
        kept_columns=np.array([0, 63], np.int32), kept_weight=kept, kept_dtype=2,
    )()  # fmt: skip
    for bad in (
        extra(bits=3),
        extra(group_index=np.zeros(63, np.int32)),
        extra(group_index=np.full(64, 2, np.int32)),
        extra(group_index=np.full(64, -1, np.int32)),
        extra(input_scale=ones[:63].copy()),
        extra(kept_columns=np.array([0, 1], np.int32)),
        extra(kept_weight=kept),
        extra(kept_columns=np.array([1, 0], np.int32), kept_weight=kept),
        extra(kept_columns=np.array([0, 64], np.int32), kept_weight=kept),
        extra(kept_columns=np.array([0], np.int32), kept_weight=kept),
        extra(kept_columns=np.array([0, 1], np.int32), kept_weight=kept, kept_dtype=0),
        lambda: _native.W4Matrix(codes + 16, scales, offsets, None, 32, tier),
        lambda: _native.W4Matrix(codes, scales[:, :1].copy(), offsets, None, 32, tier),
        lambda: _native.W4Matrix(codes, scales, offsets, scales[0].copy(), 32, tier),
        lambda: _native.W4Matrix(codes, scales, offsets, None, 12, tier),
        lambda: _native.W4Matrix(codes, scales, offsets, None, 32, "sse9"),
        lambda: _native.W4Matrix(codes, scales, offsets, None, 32, tier).multiply(0, 64, 0, 1, 0),
    ):
        with pytest.raises(ValueError):  # noqa: PT011
            bad()
