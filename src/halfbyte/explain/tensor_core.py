"""The GPU half of the lesson on kernels: one tile of a W4A16 product on tensor cores, emulated lane by lane in numpy.

Which lane of a warp holds which element: PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type". This
is the instruction a kernel has to feed, and what AutoAWQ's words are to it. halfbyte's own kernel, native/cuda, has
another layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from halfbyte.explain.lesson import Row, Span, Step, number
from halfbyte.explain.matrix import Matrix
from halfbyte.explain.writing import StepWriter
from halfbyte.formats.runs import AWQ_ORDER, word_bytes

LANES = 32
M, N, K = 16, 8, 16
# Rows of activations in the example, and parts that the inputs are cut into (split-K).
ROWS, PARTS = 4, 2
SHOWN_LANES = (0, 1, 4, 31)
Indices = npt.NDArray[np.int64]


def fragment_a() -> tuple[Indices, Indices]:
    """Row and column of A [16, 16] that lane l holds as element i: int64 [32, 8] each."""
    lane, i = np.indices((LANES, 8))
    row = lane // 4 + 8 * (i // 2 % 2)
    return row, lane % 4 * 2 + i % 2 + 8 * (i // 4)


def fragment_b() -> tuple[Indices, Indices]:
    """Row and column of B [16, 8] likewise: int64 [32, 4] each."""
    lane, i = np.indices((LANES, 4))
    return lane % 4 * 2 + i % 2 + 8 * (i // 2), lane // 4


def fragment_c() -> tuple[Indices, Indices]:
    """Row and column of C and D [16, 8] likewise: int64 [32, 4] each."""
    lane, i = np.indices((LANES, 4))
    return lane // 4 + 8 * (i // 2), lane % 4 * 2 + i % 2


def mma(a: npt.NDArray[np.float16], b: npt.NDArray[np.float16], c: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """D = A · B + C of one warp: a [32, 8], b [32, 4], c [32, 4] as the lanes hold them, in the same form."""
    left, right, sums = np.empty((M, K), np.float32), np.empty((K, N), np.float32), np.empty((M, N), np.float32)
    left[fragment_a()], right[fragment_b()], sums[fragment_c()] = a, b, c
    result: npt.NDArray[np.float32] = (left @ right + sums)[fragment_c()]
    return result


def tell_tile(step: Callable[[str], StepWriter], matrix: Matrix, x: npt.NDArray[np.float32]) -> Iterator[Step]:
    """The steps, in order."""
    yield _fragments(step("fragments"))
    yield _phases(step("phases"), matrix, x)


def _owners(fragment: tuple[Indices, Indices], shape: tuple[int, int]) -> Indices:
    """The lane that holds each element; -1 for none."""
    owners = np.full(shape, -1, np.int64)
    rows, columns = fragment
    owners[rows, columns] = np.broadcast_to(np.arange(LANES)[:, None], rows.shape)
    return owners


def _fragments(write: StepWriter) -> Step:
    write.say()
    fragments = {"a": (fragment_a(), (M, K)), "b": (fragment_b(), (K, N)), "c": (fragment_c(), (M, N))}
    for name, (fragment, shape) in fragments.items():
        owners = _owners(fragment, shape)
        lines = [
            [f"{row:>4} "] + [Span(f"{lane:>3}", int(lane) % 4) for lane in owners[row]] for row in range(shape[0])
        ]
        write.drawing(name, lines)
        held = len({(int(r), int(c)) for r, c in zip(*(part.reshape(-1) for part in fragment), strict=True)})
        write.check("each", held == shape[0] * shape[1] == fragment[0].size and owners.min() == 0, name=name.upper())
    generator = np.random.default_rng(1)
    left, right, sums = (generator.integers(-8, 9, shape) for shape in ((M, K), (K, N), (M, N)))
    found = np.empty((M, N), np.float32)
    found[fragment_c()] = mma(
        left.astype(np.float16)[fragment_a()],
        right.astype(np.float16)[fragment_b()],
        sums.astype(np.float32)[fragment_c()],
    )
    write.check("product", np.array_equal(found, left @ right + sums))
    return write.step()


def _words(matrix: Matrix) -> npt.NDArray[np.uint32]:
    """AutoAWQ's qweight uint32 [in, 1] of the first eight outputs."""
    runs = np.ascontiguousarray(matrix.codes[:N].T)
    packed: npt.NDArray[np.uint8] = word_bytes(runs, AWQ_ORDER)
    return np.ascontiguousarray(packed).view("<u4")[:, 0]


def weights_of_lanes(matrix: Matrix, words: npt.NDArray[np.uint32], first: int) -> npt.NDArray[np.float16]:
    """B of the inputs from `first` on as the lanes make it: each takes four words and of each its own nibble."""
    inputs, outputs = fragment_b()
    nibble = np.argsort(AWQ_ORDER)[outputs]
    codes = words[first + inputs] >> (4 * nibble).astype(np.uint32) & np.uint32(15)
    group = (first + inputs) // matrix.group_size
    zeros, scales = matrix.zeros[outputs, group], matrix.scales[outputs, group].astype(np.float16)
    # A code less its zero point is exact in fp16; the product with the scale is rounded once.
    return (codes.astype(np.float16) - zeros.astype(np.float16)) * scales


def emulate(matrix: Matrix, x: npt.NDArray[np.float16]) -> tuple[npt.NDArray[np.float32], int]:
    """x [rows, in] · Ŵᵀ for the first eight outputs: fp32 [rows, 8], and the number of `mma` it took."""
    words = _words(matrix)
    inputs = matrix.shape[1]
    padded = np.zeros((M, inputs), np.float16)
    padded[: len(x)] = x
    rows, columns = fragment_a()
    parts = []
    steps = inputs // K
    for part in np.array_split(np.arange(steps), PARTS):
        sums = np.zeros((LANES, 4), np.float32)
        for number_of_step in part:
            first = int(number_of_step) * K
            sums = mma(padded[rows, first + columns], weights_of_lanes(matrix, words, first), sums)
        parts.append(sums)
    result = np.empty((M, N), np.float32)
    result[fragment_c()] = sum(parts)
    return result[: len(x)], steps


def _phases(write: StepWriter, matrix: Matrix, row: npt.NDArray[np.float32]) -> Step:
    outputs, inputs = matrix.shape
    x = np.stack([np.roll(row, shift) for shift in range(ROWS)]).astype(np.float16)
    words = _words(matrix)
    write.say(rows=ROWS, n=outputs, k=inputs, parts=PARTS)
    steps = inputs // K
    phases = {
        "global": {"stride": outputs // 8 * 4},
        "shared": {"bytes": 4 * K + 2 * M * K},
        "registers": {},
        "dequantize": {},
        "mma": {"steps": steps // PARTS},
        "reduce": {"parts": PARTS},
    }
    write.table(
        "phases",
        [[write.word(f"names.{name}"), write.word(f"what.{name}", **values)] for name, values in phases.items()],
    )
    inputs_of, outputs_of = fragment_b()
    weights = weights_of_lanes(matrix, words, 0)
    table: list[Row] = []
    for lane in SHOWN_LANES:
        output = int(outputs_of[lane, 0])
        nibble = AWQ_ORDER.index(output)
        taken = inputs_of[lane]
        codes = [int(words[k]) >> 4 * nibble & 15 for k in taken]
        table.append(
            [number(lane), number(output, mark=output), " ".join(str(k) for k in taken),
             " ".join(f"{words[k]:08X}" for k in taken), number(nibble), " ".join(map(str, codes)),
             " ".join(f"{float(weight):+.4f}" for weight in weights[lane])]
        )  # fmt: skip
    write.table("lanes", table)
    found, _ = emulate(matrix, x)
    restored = matrix.dequantized[:N].astype(np.float64)
    exact = x.astype(np.float64) @ restored.T
    bound = 2.0**-11 * (np.abs(x.astype(np.float64)) @ np.abs(restored).T) + 1e-5 * np.abs(exact) + 1e-7
    write.table("result", [
        [number(index), *(number(float(value), "+.4f") for value in values)] for index, values in enumerate(found)
    ])  # fmt: skip
    write.check("product", bool((np.abs(found - exact) <= bound).all()), count=found.size)
    write.say("later")
    return write.step()
