"""Lesson: what a kernel does with packed codes: the native core with a cache line, a GPU's tensor cores with a tile."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from halfbyte.device.cpu import pick_tier
from halfbyte.explain.catalogue import Messages
from halfbyte.explain.cpu_layout import BLOCK_ROWS, NIBBLE_INPUT, OCTET, block_lines, quantize_row, split_line
from halfbyte.explain.lesson import Row, Span, Step, number
from halfbyte.explain.lessons import Options
from halfbyte.explain.matrix import Matrix, read_matrix
from halfbyte.explain.tensor_core import tell_tile
from halfbyte.explain.writing import StepWriter

OUTPUTS, INPUTS = 16, 192
# Bits of a vector, loads of a line, the instruction for bytes, and how many of those a line takes for one row of x.
INSTRUCTIONS = {
    "avx512_vnni": (512, 1, "vpdpbusd", 2),
    "avx_vnni": (256, 2, "vpdpbusd", 4),
    "avx2": (256, 2, "vpmaddubsw", 4),
    "neon": (128, 4, "sdot", 8),
}
SHOWN = 4
Floats = npt.NDArray[np.float32]


def tell(options: Options, messages: Messages) -> Iterator[Step]:
    """The steps, in order."""
    matrix = read_matrix(options, OUTPUTS, INPUTS)
    x = np.random.default_rng(9).normal(0, 1, matrix.shape[1]).astype(np.float32)

    def step(name: str) -> StepWriter:
        return StepWriter(messages, "kernel", name)

    lines = block_lines(_first_block(matrix))
    yield _line(step("line"), lines)
    yield _activations(step("activations"), matrix, x)
    yield _dot(step("dot"), matrix, lines, x)
    yield _group(step("group"), matrix, lines, x)
    yield _in_place(step("in_place"), matrix, lines, x)
    yield from tell_tile(step, matrix, x)


def _first_block(matrix: Matrix) -> npt.NDArray[np.uint8]:
    block = np.zeros((BLOCK_ROWS, matrix.shape[1]), np.uint8)
    block[: min(BLOCK_ROWS, matrix.shape[0])] = matrix.codes[:BLOCK_ROWS]
    return block


def _line(write: StepWriter, lines: npt.NDArray[np.uint8]) -> Step:
    write.say()
    rows: list[Row] = []
    for output, word in enumerate(lines[0]):
        places = [Span(f" {byte:02x}", NIBBLE_INPUT[2 * i]) for i, byte in enumerate(word)]
        nibbles = [
            number(int(byte >> 4 * half & 15), mark=NIBBLE_INPUT[2 * i + half])
            for i, byte in enumerate(word)
            for half in (0, 1)
        ]
        by_input = sorted(nibbles, key=lambda span: span.mark or 0)
        codes = [Span(f"{span.text:>3}", span.mark) for span in by_input]
        rows.append([f"{write.word('output', number=output, offset=4 * output):>22} ", *places, "   = ", *codes])
    write.drawing("drawing", rows)
    write.check("bytes", lines[0].nbytes == 64 and lines[0].flags["C_CONTIGUOUS"])
    return write.step()


def _activations(write: StepWriter, matrix: Matrix, x: Floats) -> Step:
    codes, scales = quantize_row(x, matrix.group_size)
    write.say(size=matrix.group_size)
    rows = [
        [
            number(k, mark=k),
            number(float(x[k]), "+.4f"),
            number(float(x[k] / scales[0]), "+.2f"),
            number(int(codes[k]), mark=k),
        ]
        for k in range(OCTET)
    ]
    write.table("table", rows, scale=float(scales[0]))
    back = codes.reshape(len(scales), -1) * scales[:, None]
    worst = np.abs(back - x.reshape(back.shape)) / np.maximum(scales[:, None], 1e-30)
    write.check("half", worst.max() <= 0.5 + 1e-4 and np.abs(codes).max() <= 127)
    return write.step()


def _dot(write: StepWriter, matrix: Matrix, lines: npt.NDArray[np.uint8], x: Floats) -> Step:
    q, _ = quantize_row(x, matrix.group_size)
    low, high = split_line(lines[0])
    first, second = dot4(low, q[:4]), dot4(high, q[4:OCTET])
    tier = pick_tier()
    write.say(tier=tier)
    write.table("tiers", [
        [Span(name, 2 if name == tier else None), number(bits), number(loads), instruction, number(count)]
        for name, (bits, loads, instruction, count) in INSTRUCTIONS.items()
    ])  # fmt: skip
    write.say("example", q=" ".join(f"{value:+d}" for value in q[:OCTET]))
    rows: list[Row] = []
    for output in range(SHOWN):
        rows.append(
            [number(output), " ".join(map(str, low[output])), number(int(first[output]), "+d"),
             " ".join(map(str, high[output])), number(int(second[output]), "+d"),
             number(int(first[output] + second[output]), "+d")]
        )  # fmt: skip
    write.table("table", rows)
    codes = _first_block(matrix)[:, :OCTET].astype(np.int64)
    write.check("sums", np.array_equal(first + second, codes @ q[:OCTET].astype(np.int64)))
    write.check("count", all(bits * count == 2 * 8 * 64 for bits, _, _, count in INSTRUCTIONS.values()))
    write.check("sixteen", 4 * 2 * 2 * 15 * 127 < 1 << 15, most=4 * 2 * 2 * 15 * 127)
    return write.step()


def dot4(codes: npt.NDArray[np.uint8], x: npt.NDArray[np.int8]) -> npt.NDArray[np.int64]:
    """What `vpdpbusd` adds to each 32-bit lane: four unsigned bytes [lanes, 4] times four signed ones [4], summed."""
    result: npt.NDArray[np.int64] = (codes.astype(np.int64) * x.astype(np.int64)).sum(axis=1)
    return result


def integer_sums(matrix: Matrix, lines: npt.NDArray[np.uint8], q: npt.NDArray[np.int8]) -> npt.NDArray[np.int64]:
    """Σ code · q of each output of the block and each group: int64 [16, groups], line by line as the core goes."""
    groups = matrix.shape[1] // matrix.group_size
    sums = np.zeros((BLOCK_ROWS, groups), np.int64)
    for octet, line in enumerate(lines):
        low, high = split_line(line)
        inputs = q[OCTET * octet : OCTET * (octet + 1)]
        sums[:, OCTET * octet // matrix.group_size] += dot4(low, inputs[:4]) + dot4(high, inputs[4:])
    return sums


def core_product(matrix: Matrix, x: Floats) -> Floats:
    """x · Ŵᵀ [out] with 8-bit activations, by the native core."""
    from halfbyte import _native

    linear = _native.a8_linear(matrix.codes, matrix.scales, matrix.zeros, None, pick_tier(), 4)
    y = np.empty((1, matrix.shape[0]), np.float32)
    _native.multiply_each([linear], np.ascontiguousarray(x[None]), y)
    row: Floats = y[0]
    return row


def _group(write: StepWriter, matrix: Matrix, lines: npt.NDArray[np.uint8], x: Floats) -> Step:
    q, scales = quantize_row(x, matrix.group_size)
    sums = integer_sums(matrix, lines, q)
    totals = q.astype(np.int64).reshape(len(scales), -1).sum(axis=1)
    count = min(BLOCK_ROWS, matrix.shape[0])
    exact = sums[:count] - matrix.zeros[:count].astype(np.int64) * totals
    parts = exact * (matrix.scales[:count].astype(np.float64) * scales)
    write.say(size=matrix.group_size)
    rows: list[Row] = []
    for group in range(min(SHOWN, len(scales))):
        rows.append(
            [number(group), number(int(sums[0, group]), ","), number(int(matrix.zeros[0, group])),
             number(int(totals[group]), "+,"), number(int(exact[0, group]), "+,"),
             number(float(matrix.scales[0, group]), ".6f"), number(float(scales[group]), ".6f"),
             number(float(parts[0, group]), "+.6f")]
        )  # fmt: skip
    write.table("table", rows)
    y = parts.sum(axis=1)
    core = core_product(matrix, x)[:count]
    bound = 1e-6 * np.abs(parts).sum(axis=1) + 1e-12
    write.say("result", y=float(y[0]), core=float(core[0]))
    write.check("core", bool((np.abs(core - y) <= bound).all()), count=count)
    plain = matrix.dequantized[:count].astype(np.float64) @ x
    write.say("error", error=float(np.linalg.norm(core - plain) / np.linalg.norm(plain)))
    return write.step()


def _in_place(write: StepWriter, matrix: Matrix, lines: npt.NDArray[np.uint8], x: Floats) -> Step:
    from halfbyte import _native

    word = int(lines[0].view("<u4")[0, 0])
    write.say(word=word)
    rows: list[Row] = []
    same = True
    for nibble, place in enumerate(NIBBLE_INPUT):
        masked = word & 15 << 4 * nibble
        as_float, factor = np.float32(masked), np.float32(2.0 ** (-4 * nibble))
        code = int(matrix.codes[0, place])
        same = same and float(as_float) == masked and as_float * factor == code
        rows.append(
            [number(nibble), number(place, mark=place), Span(f"0x{masked:08X}", place), number(float(as_float), ",.0f"),
             Span(f"16^-{nibble}"), number(code, mark=place)]
        )  # fmt: skip
    write.table("table", rows)
    write.check("exact", same)
    held = _native.W4Matrix(
        matrix.codes, matrix.scales, -matrix.scales * matrix.zeros, None, matrix.group_size, pick_tier()
    )
    y = np.empty(matrix.shape[0], np.float32)
    held.multiply(x.ctypes.data, len(x), y.ctypes.data, 1, 0)
    restored = matrix.dequantized.astype(np.float64)
    # The bound at the top of native/cpu/w4_kernel.hpp: on magnitudes before scale · code and offset cancel.
    size = np.abs(x) @ (np.repeat(matrix.scales * (matrix.codes.max() + matrix.zeros), matrix.group_size, axis=1)).T
    write.check("core", bool((np.abs(y - restored @ x) <= 1e-5 * size).all()), count=len(y))
    return write.step()
