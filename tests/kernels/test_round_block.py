"""The native inner loop of compensated rounding against the reference."""

from __future__ import annotations

import pytest
import torch

from halfbyte.kernels.rounding import MAX_COLUMNS, round_block, round_by_torch


@pytest.mark.parametrize("revisit", [False, True])
@pytest.mark.parametrize(("columns", "rows"), [(1, 1), (MAX_COLUMNS, 40), (17, 32), (5, 97)])
def test_it_chooses_what_the_reference_chooses(columns: int, rows: int, revisit: bool) -> None:
    generator = torch.Generator().manual_seed(columns * rows)
    x = torch.randn(200, columns, generator=generator)
    couplings = x.T @ x / 200
    work, scales = torch.randn(2, columns, rows, generator=generator).unbind()
    scales = scales.abs() * 0.1 + 0.05
    zeros = torch.randint(0, 16, (columns, rows), generator=generator).float()
    codes = torch.randint(0, 16, (columns, rows), generator=generator).float()
    before, kept = codes.clone(), work.clone()
    expected = round_by_torch(work, couplings, scales, zeros, codes, 15, revisit)
    moved = round_block(work, couplings, scales, zeros, before, 15, revisit=revisit)
    assert torch.equal(work, kept)
    agree = before == codes  # fused or not, the arithmetic may put a tie on either side, and what follows with it
    assert float(agree.float().mean()) > 0.99
    lanes = agree.all(dim=0)
    torch.testing.assert_close(moved[:, lanes], expected[:, lanes], rtol=1e-4, atol=1e-5)


def test_values_off_the_grid_and_nan_end_on_it() -> None:
    work = torch.tensor([[1e30, -1e30, float("inf"), float("-inf"), float("nan")]])
    codes = torch.zeros_like(work)
    round_block(work, torch.ones(1, 1), torch.ones_like(work), torch.full_like(work, 8.0), codes, 15, revisit=False)
    assert codes.tolist()[0][:4] == [15, 0, 15, 0]
    assert 0 <= codes[0, 4] <= 15
