"""What nvcc makes of the kernels; no GPU is needed. `make cuda-check` prints it all."""

import shutil

import pytest
from cuda_check import ARCHS, VARIANTS, Entry, check, compile_variant

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


def nvcc() -> str:
    found = shutil.which("nvcc")
    assert found is not None
    return found


@needs_nvcc
@pytest.mark.parametrize("arch", ["sm_86", "sm_90a"])
def test_hardest_variant_has_no_spills(arch: str) -> None:
    entries = compile_variant(nvcc(), arch, VARIANTS[-1])
    assert len(entries) == 4
    assert [entry.problem for entry in entries] == [None] * 4
    assert all(entry.registers > 32 for entry in entries)


@needs_nvcc
@pytest.mark.slow
def test_no_variant_has_problems() -> None:
    entries = list(check(nvcc(), ARCHS, VARIANTS))
    assert len(entries) == len(ARCHS) * sum(len(variant.kernels) for variant in VARIANTS)
    assert [f"{entry.arch} {entry.variant} {entry.kernel}: {entry.problem}" for entry in entries if entry.problem] == []


def test_problems_are_seen() -> None:
    def problem(**changes: int) -> str | None:
        values = {"registers": 128, "shared": 50000, "stack": 0, "spills": 0, "blocks": 1}
        return Entry("sm_86", "", "", **(values | changes)).problem

    assert problem() is None
    assert "8 bytes of local memory" in str(problem(stack=8))
    assert "4 bytes of spills" in str(problem(spills=4))
    assert "102,400 bytes of shared memory, a block may have 101,376" in str(problem(shared=100 << 10))
    assert "no block fits" in str(problem(blocks=0))
