"""Every kernel of the W4A16 product against the definition in fp64, over shapes, tails, dtypes and tiers."""

import os
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from weights import random_weight, truth

from halfbyte import _native
from halfbyte.errors import ConfigError, UnsupportedError
from halfbyte.kernels.registry import PreparedLinear
from halfbyte.kernels.w4a16 import prepare, verdicts
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


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 200), st.integers(1, 20), st.booleans(), st.integers(0, 2**31))
def test_packing_keeps_every_code(rows: int, columns: int, octets: int, float_zeros: bool, seed: int) -> None:
    weight = random_weight(rows, columns, 8 * octets, float_zeros=float_zeros, seed=seed)
    index = torch.arange(columns) // weight.group_size
    exact = weight.scales[:, index] * weight.codes.float() + weight.offsets[:, index]
    assert torch.equal(native(weight).dequantize(), exact)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 5), (3, 172), (4, 32), (8, 16)])
def test_other_kernels_match_fp64(backend: str, bits: int, group_size: int) -> None:
    weight = random_weight(33, 172, group_size, bits=bits)
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
    with pytest.raises(UnsupportedError, match="multiple of 8, not 20"):
        prepare(random_weight(16, 64, 20), backend="native", device=CPU)
    found = {verdict.kernel.name: verdict for verdict in verdicts(random_weight(16, 64, 32, bits=3), CPU)}
    assert found["torch"].picked
    assert "not 3" in found["native"].reason


def test_native_core_checks_its_arguments() -> None:
    weight = random_weight(16, 64, 32)
    codes, scales, offsets = weight.codes.numpy(), weight.scales.numpy(), weight.offsets.numpy()
    tier = TIERS[0]
    for bad in (
        lambda: _native.W4Matrix(codes + 16, scales, offsets, None, 32, tier),
        lambda: _native.W4Matrix(codes, scales[:, :1].copy(), offsets, None, 32, tier),
        lambda: _native.W4Matrix(codes, scales, offsets, scales[0].copy(), 32, tier),
        lambda: _native.W4Matrix(codes, scales, offsets, None, 12, tier),
        lambda: _native.W4Matrix(codes, scales, offsets, None, 32, "sse9"),
        lambda: _native.W4Matrix(codes, scales, offsets, None, 32, tier).multiply(0, 64, 0, 1, 0),
    ):
        with pytest.raises(ValueError):  # noqa: PT011
            bad()
