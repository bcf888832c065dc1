"""Gram matrices: symmetric, so half of every product with one is enough.

Work is done on the tiles on and above the diagonal, `TILES` × `TILES` of them: 0.63 of the multiplications.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

# With 4, the products are still large enough to run at full speed (at 576 and 1536 channels 0.70 of the time).
TILES = 4


def add_outer(gram: torch.Tensor, rows: torch.Tensor) -> None:
    """gram += rowsᵀ · rows on and above the diagonal tiles; `mirror` fills in the rest in the end.

    Args:
        gram: float32 [in, in], changed in place.
        rows: float32 [tokens, in].
    """
    for tile, rest in _tiles(gram.shape[0]):
        gram[tile, rest].addmm_(rows[:, tile].T, rows[:, rest])


def mirror(gram: torch.Tensor) -> None:
    """Copy what is above the diagonal below it, in place."""
    for tile, _ in _tiles(gram.shape[0]):
        gram[tile.stop :, tile] = gram[tile, tile.stop :].T


def gram_error(delta: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """tr(ΔW · G · ΔWᵀ), a scalar: ΔW [rows, in], G [in, in] symmetric."""
    total = torch.zeros((), dtype=delta.dtype, device=delta.device)
    for tile, rest in _tiles(gram.shape[0]):
        product = (delta[:, tile] @ gram[tile, rest]).mul_(delta[:, rest])
        # What lies right of the diagonal tile stands for its mirror image, too.
        total += 2 * product.sum() - product[:, : tile.stop - tile.start].sum()
    return total


def _tiles(width: int) -> Iterator[tuple[slice, slice]]:
    """The columns of each diagonal tile, and those from it on."""
    step = -(-width // TILES)
    for start in range(0, width, step):
        yield slice(start, min(start + step, width)), slice(start, width)
