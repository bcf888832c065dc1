"""The native core's layouts of weights and activations in memory, said again in numpy.

The core does not hand its bytes out. What is made here follows native/cpu/w4.hpp and a8.hpp, whose constants the tests
compare; the lessons hold the sums that come of it against the core's.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from halfbyte.formats.runs import word_bytes

# w4.hpp: BLOCK_ROWS, OCTET, NIBBLE_INPUT; a8.hpp: A8_META.
BLOCK_ROWS = 16
OCTET = 8
NIBBLE_INPUT = (0, 4, 1, 5, 2, 6, 3, 7)
META_BYTES = 48
LINE_BYTES = 64


def block_lines(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """uint8 [16, in] codes of a block of output rows → uint8 [octets, 16, 4]: a line of 64 bytes an octet of inputs."""
    runs = codes.reshape(BLOCK_ROWS, -1, OCTET)
    packed: npt.NDArray[np.uint8] = word_bytes(runs, NIBBLE_INPUT)
    return np.ascontiguousarray(packed.transpose(1, 0, 2))


def split_line(line: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """uint8 [16, 4] → codes of inputs 0 to 3 and of 4 to 7, uint8 [16, 4] each: a mask, and a shift and a mask."""
    words = line.view("<u4")[:, 0]
    mask = np.uint32(0x0F0F0F0F)
    low, high = words & mask, (words >> np.uint32(4)) & mask
    return tuple(part.astype("<u4").view(np.uint8).reshape(-1, 4) for part in (low, high))  # type: ignore[return-value]


def a8_bytes(rows: int, columns: int, group_size: int) -> int:
    """Bytes of a matrix for the product with 8-bit activations: lines, then scales and zero points in whole lines."""
    blocks = -(-rows // BLOCK_ROWS)
    meta = blocks * (columns // group_size) * META_BYTES
    return blocks * columns // OCTET * LINE_BYTES + -(-meta // LINE_BYTES) * LINE_BYTES


def quantize_row(x: npt.NDArray[np.float32], group_size: int) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """float32 [in] activations → int8 [in] and their scale float32 [groups], max|x| / 127 of each group."""
    groups = x.reshape(-1, group_size)
    most = np.abs(groups).max(axis=1)
    inverse = np.where(most > 2.0**-120, np.float32(127) / np.where(most > 0, most, 1), 0).astype(np.float32)
    codes = np.rint(groups * inverse[:, None]).astype(np.int8)
    return codes.reshape(-1), most / np.float32(127)
