"""The kernels of native/cuda as they are, on a model of a GPU: cuda_machine.hpp says what that shows and what not."""

from pathlib import Path

import pytest
import torch
from cuda_machine import Machine
from cuda_model import Mutant, mutate, needs_compiler
from weights import random_weight

from halfbyte.kernels.cuda_layout import code_position, lay_out, restore

FP16, BF16 = torch.float16, torch.bfloat16
# y is rounded to 11 or 8 bits; the sums before that are in fp32.
ROUNDING = {FP16: 2.0**-11, BF16: 2.0**-8}
# Kernel, by the most rows of x it is for → numbers of rows to try it with.
ROWS = {8: (1, 3, 4, 8), 16: (1, 9, 16), 32: (17, 32), 64: (33, 64, 100)}


def check(
    machine: Machine, n: int, k: int, group_size: int, m: int, kernel: int, dtype: torch.dtype,
    *, zero_point: bool = True, bias: bool = False, blocks: int = 3, seed: int = 0,
) -> torch.Tensor:  # fmt: skip
    """The product by the kernel, held against fp64."""
    weight = random_weight(n, k, group_size, bias=bias, seed=n + k)
    if not zero_point:
        weight.zeros.fill_(8)
    laid_out = lay_out(weight)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).to(dtype)
    y, counts = machine.run(laid_out, x, kernel, blocks=blocks, seed=seed)
    matrix = restore(laid_out).double()
    expected, size = x.double() @ matrix.T, x.double().abs() @ matrix.abs().T
    if weight.bias is not None:
        expected, size = expected + weight.bias, size + weight.bias.abs()
    error = (y.double() - expected).abs()
    assert (error <= ROUNDING[dtype] * expected.abs() + 1e-6 * size + 2.0**-24).all()
    assert counts.bank_conflicts == 0
    assert counts.mma > 0
    assert counts.shared_loads > 0
    return y


@pytest.mark.parametrize(
    ("group_size", "zero_point"), [(32, True), (32, False), (64, True), (128, False), (128, True), (320, False)]
)
@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.parametrize("kernel", ROWS)
def test_matches_fp64(machine: Machine, kernel: int, dtype: torch.dtype, group_size: int, zero_point: bool) -> None:
    # 320 is 5 tiles: a half of the last step with two slices is missing. 192 is 3 strips, not whole tiles of y.
    for seed, m in enumerate(ROWS[kernel]):
        check(machine, 192, 320, group_size, m, kernel, dtype, zero_point=zero_point, bias=m % 2 == 0, seed=seed)


@pytest.mark.parametrize("kernel", ROWS)
def test_any_division_of_the_work(machine: Machine, kernel: int) -> None:
    """From one block for everything to tiles that many blocks share, in different orders of execution."""
    for seed, blocks in enumerate([1, 2, 5, 7, 13]):
        check(machine, 256, 832, 64, kernel, kernel, FP16, blocks=blocks, seed=seed)


def test_result_does_not_depend_on_who_is_first(machine: Machine) -> None:
    results = [check(machine, 256, 512, 128, 16, 16, FP16, blocks=6)]
    weight = lay_out(random_weight(256, 512, 128, bias=False, seed=768))
    x = torch.randn(16, 512, generator=torch.Generator().manual_seed(0)).to(FP16)
    results += [machine.run(weight, x, 16, blocks=6, seed=seed)[0] for seed in range(1, 6)]
    assert all(torch.equal(results[0], other) for other in results)


def test_flags_serve_launch_after_launch(machine: Machine) -> None:
    weight, flags = lay_out(random_weight(128, 1024, 128)), torch.zeros(7, dtype=torch.int32)
    x = torch.randn(4, 1024, generator=torch.Generator().manual_seed(0)).to(FP16)
    first, second = (machine.run(weight, x, 8, blocks=7, seed=seed, flags=flags)[0] for seed in range(2))
    assert torch.equal(first, second)


def test_outliers_do_not_overflow(machine: Machine) -> None:
    """x times a code does not fit fp16 here; sums are in fp32, and the result fits."""
    weight = lay_out(random_weight(64, 128, 64, bias=False))
    x = torch.zeros(1, 128, dtype=FP16)
    x[0, 5], x[0, 6] = 30000.0, -30000.0
    y, _ = machine.run(weight, x, 8, blocks=1)
    expected = x.double() @ restore(weight).double().T
    assert ((y.double() - expected).abs() <= 2.0**-11 * expected.abs() + 1e-3).all()


@pytest.mark.parametrize("dtype", [FP16, BF16])
def test_every_code_and_zero_point_is_exact(machine: Machine, dtype: torch.dtype) -> None:
    """All 16 × 16 pairs in every place of a word, by the kernel's own logic operations."""
    columns = [code_position(0, 0, nibble) for nibble in range(8)]
    # Registers a0 to a3, low half first, are nibbles 0 4, 1 5, 2 6, 3 7.
    order = [0, 4, 1, 5, 2, 6, 3, 7]
    assert [columns[nibble] for nibble in order] == [
        (0, 0), (0, 1), (8, 0), (8, 1), (0, 2), (0, 3), (8, 2), (8, 3),
    ]  # fmt: skip
    for code in range(16):
        others = [(code + 3 * nibble) % 16 for nibble in range(8)]
        word = sum(value << 4 * nibble for nibble, value in enumerate(others))
        symmetric = machine.dequantize(word, None, 0, dtype)
        assert symmetric.tolist() == [others[nibble] - 8 for nibble in order]
        for zero in range(16):
            for subtile in range(4):
                below = (zero + 5) % 16
                nibbles = zero << 4 * subtile | below << 4 * (4 + subtile) | (0x5A5A5A5A & ~(0x000F000F << 4 * subtile))
                values = machine.dequantize(word, nibbles, subtile, dtype)
                assert values.tolist() == [others[nibble] - (below if nibble % 2 else zero) for nibble in order]


MUTANTS: dict[str, Mutant] = {
    "no wait for copies": ("w4a16_gemm.cuh", "            await_copies<S::STAGES - 3>();\n", ""),
    "no barrier before a stage is filled again": (
        "w4a16_gemm.cuh",
        "            barrier();\n            loader.issue",
        "            loader.issue",
    ),
    "no barrier between the slices": (
        "w4a16_gemm.cuh",
        "        barrier();\n        if (slice == 1) return;",
        "        if (slice == 1) return;",
    ),
    "a flag before the sums are written": (
        "stripes.cuh",
        "        barrier();\n        if (thread_index() == 0) store_release",
        "        if (thread_index() == 0) store_release",
    ),
    "a flag left up": ("stripes.cuh", "store_release(flags + from, 0);", ""),
    "a group of copies not awaited": (
        "w4a16_gemv.cuh",
        "await_copies<DEPTH - 2>();",
        "await_copies<DEPTH - 1>();",
    ),
    "bank conflicts": ("w4a16_layout.cuh", "(row % 2 * 4)", "(row % 2 * 0)"),
    "zero points of the wrong rows": (
        "w4a16_types.cuh",
        "return {twice_low(pair), twice_high(pair)};",
        "return {twice_high(pair), twice_low(pair)};",
    ),
}


def try_all(machine: Machine) -> None:
    for seed in range(6):
        for kernel, dtype in ((8, FP16), (16, BF16), (64, FP16)):
            check(machine, 192, 832, 64, kernel, kernel, dtype, blocks=5, seed=seed)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants_are_caught(mutant: Mutant, tmp_path: Path) -> None:
    """The machine is strict enough: most of these would pass unseen on a GPU some of the time."""
    machine = Machine.build(tmp_path, mutate(mutant, tmp_path))
    with pytest.raises((AssertionError, RuntimeError)):
        try_all(machine)
