"""Lesson: eight weights, eight nibbles, one 32-bit word, in every layout halfbyte has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from halfbyte.device.cpu import pick_tier
from halfbyte.errors import ConfigError
from halfbyte.explain.catalogue import Messages
from halfbyte.explain.cpu_layout import BLOCK_ROWS, NIBBLE_INPUT, OCTET, a8_bytes, block_lines, split_line
from halfbyte.explain.lesson import Row, Span, Step, number
from halfbyte.explain.lessons import Options
from halfbyte.explain.matrix import Matrix, read_matrix
from halfbyte.explain.packing_others import others
from halfbyte.explain.writing import StepWriter
from halfbyte.formats.runs import AWQ_ORDER, NATURAL, split_bytes, word_bytes

ROWS, OUTPUTS, INPUTS = 4, 64, 128
MOST_ROWS = 4096
# Outputs and inputs of the map that shows which word holds what.
MAP_OUTPUTS, MAP_INPUTS = (0, 1, 7, 8, 15), 16
Codes = npt.NDArray[np.uint8]


def tell(options: Options, messages: Messages) -> Iterator[Step]:
    """The steps, in order."""
    rows = ROWS if options.m is None else options.m
    if not 1 <= rows <= MOST_ROWS:
        raise ConfigError(f"--m {rows}: expected 1 to {MOST_ROWS} rows of activations")
    matrix = read_matrix(options, OUTPUTS, INPUTS)

    def step(name: str) -> StepWriter:
        return StepWriter(messages, "packing", name)

    yield _codes(step("codes"), matrix)
    yield _stream(step("stream"), matrix)
    yield _gemm(step("gemm"), matrix)
    yield others(step("others"), matrix)
    yield _kernel(step("kernel"), matrix)
    yield _memory(step("memory"), matrix)
    yield _bytes(step("bytes"), matrix)
    if options.verify:
        from halfbyte.explain.packing_verified import verified

        yield verified(step("verify"), matrix, rows)


def _codes(write: StepWriter, matrix: Matrix) -> Step:
    """Weights to codes."""
    out, inputs = matrix.shape
    layer = write.word("layer", name=matrix.name) if matrix.name else write.word("made_up")
    scale, zero = float(matrix.scales[0, 0]), int(matrix.zeros[0, 0])
    write.say(layer=layer, n=out, k=inputs, size=matrix.group_size, scale=scale, zero=zero)
    restored = matrix.dequantized
    rows: list[Row] = []
    for k in range(OCTET):
        weight, code, back = float(matrix.weight[0, k]), int(matrix.codes[0, k]), float(restored[0, k])
        rows.append(
            (
                number(k, mark=k),
                number(weight, "+.5f"),
                number(weight / scale + zero, ".2f"),
                number(code, mark=k),
                Span(f"{code:04b}", k),
                number(back, "+.5f"),
                number((back - weight) / scale, "+.2f"),
            )
        )
    write.table("table", rows)
    scales = np.repeat(matrix.scales, matrix.group_size, axis=1)
    worst = float(np.abs((restored - matrix.weight) / scales).max())
    # Half a step, and what the last of fifteen steps moves when the scale is rounded to fp16.
    write.check("half_step", worst <= 0.5 + 15 * 2**-11, count=matrix.weight.size, worst=worst)
    write.check("range", matrix.codes.max() <= 15)
    return write.step()


def _word_rows(run: Codes, order: Sequence[int], write: StepWriter) -> list[list[Span | str]]:
    """A word as it is written, highest nibble first: number, position, code and bits of each."""
    places = [order[nibble] for nibble in range(7, -1, -1)]
    return [
        [write.word("position"), *(number(place, mark=place) for place in places)],
        [write.word("code"), *(number(int(run[place]), mark=place) for place in places)],
        [write.word("bits"), *(Span(f"{run[place]:04b}", place) for place in places)],
        [write.word("hex"), *(Span(f"{run[place]:X}", place) for place in places)],
    ]


def _pack_run(write: StepWriter, run: Codes, order: Sequence[int]) -> int:
    """The word of eight codes as the product packs it, which must come apart again."""
    packed = word_bytes(run, order)
    back = np.empty_like(run)
    split_bytes(packed, back, order)
    word = int.from_bytes(packed.tobytes(), "little")
    write.table("word", _word_rows(run, order, write), word=word)
    nibbles = [(word >> 4 * i) & 15 for i in range(8)]
    write.check("nibbles", nibbles == [int(run[place]) for place in order])
    write.check("back", np.array_equal(back, run), codes=" ".join(map(str, back)))
    return word


def _stream(write: StepWriter, matrix: Matrix) -> Step:
    """halfbyte's own layout: a stream of bits."""
    write.say()
    run = matrix.codes[0, :OCTET]
    word = _pack_run(write, run, NATURAL)
    write.say("three")
    threes = [int(code) >> 1 for code in run]
    stream = sum(code << 3 * place for place, code in enumerate(threes))
    packed = stream.to_bytes(3, "little")
    lines: list[Row] = []
    for index, byte in enumerate(packed):
        owners = [(8 * index + bit) // 3 for bit in range(7, -1, -1)]
        bits = [Span(f" {byte >> bit & 1}", (8 * index + bit) // 3) for bit in range(7, -1, -1)]
        lines.append([f"{write.word('byte', number=index, value=byte):<16}", *bits])
        lines.append([f"{write.word('owner'):>16}", *(Span(f" {owner}", owner) for owner in owners)])
    write.drawing("threes", lines, codes=" ".join(map(str, threes)))
    write.check("straddle", packed[0] >> 6 | (packed[1] & 1) << 2 == threes[2], code=threes[2])
    write.check("stream", sum(int(code) << 4 * place for place, code in enumerate(run)) == word)
    return write.step()


def _gemm(write: StepWriter, matrix: Matrix) -> Step:
    """AutoAWQ's layout: across outputs, interleaved."""
    write.say()
    run = np.ascontiguousarray(matrix.codes[:OCTET, 0])
    word = _pack_run(write, run, AWQ_ORDER)
    write.say("why")
    rows: list[Row] = []
    pairs = []
    for pair in range(4):
        found = (word >> 4 * pair) & 0x000F000F
        halves = [number(value, mark=2 * pair + half) for half, value in enumerate((found & 0xFFFF, found >> 16))]
        rows.append([f"(word >> {4 * pair:2}) & 0x000F000F", f"0x{found:08X}", *halves])
        pairs += [found & 0xFFFF, found >> 16]
    write.table("pairs", rows)
    write.check("pairs", pairs == [int(code) for code in run])
    counting = word_bytes(np.arange(8, dtype=np.uint8), AWQ_ORDER)
    write.check("counting", int.from_bytes(counting.tobytes(), "little") == 0x75316420)
    return write.step()


def _kernel(write: StepWriter, matrix: Matrix) -> Step:
    """The native core's layout in memory."""
    write.say()
    run = matrix.codes[0, :OCTET]
    word = _pack_run(write, run, NIBBLE_INPUT)
    low, high = word & 0x0F0F0F0F, word >> 4 & 0x0F0F0F0F
    rows = [
        (Span(f"{text}"), Span(f"0x{value:08X}"), *(number(value >> 8 * i & 255, mark=first + i) for i in range(4)))
        for text, value, first in (("word & 0x0F0F0F0F", low, 0), ("(word >> 4) & 0x0F0F0F0F", high, 4))
    ]
    write.table("halves", rows)
    found = [value >> 8 * i & 255 for value in (low, high) for i in range(4)]
    write.check("halves", found == [int(code) for code in run])
    block = _block(matrix.codes)
    lines = block_lines(block)
    halves = [np.concatenate(split_line(line), axis=1) for line in lines]
    write.check("lines", np.array_equal(np.concatenate(halves, axis=1), block), lines=len(lines))
    return write.step()


def _block(codes: Codes) -> Codes:
    """The first sixteen rows; code 0 where the matrix has fewer."""
    block = np.zeros((BLOCK_ROWS, codes.shape[1]), np.uint8)
    block[: min(BLOCK_ROWS, len(codes))] = codes[:BLOCK_ROWS]
    return block


def _memory(write: StepWriter, matrix: Matrix) -> Step:
    """Which word of memory holds which weight."""
    write.say()
    outputs, inputs = matrix.shape
    for name, words in word_maps(outputs, inputs).items():
        wide = len(str(int(words[-1 if outputs <= 15 else 15, :MAP_INPUTS].max()))) + 1
        lines: list[list[Span | str]] = [[f"{'':>11}", *(f"{k:>{wide}}" for k in range(MAP_INPUTS))]]
        for n in MAP_OUTPUTS:
            if n < outputs:
                cells = [Span(f"{words[n, k]:>{wide}}", int(words[n, k]) % 8) for k in range(MAP_INPUTS)]
                lines.append([f"{write.word('output', number=n):>11}", *cells])
        write.drawing(name, lines)
        count = np.unique(words, return_counts=True)[1]
        write.check("eight", (count == 8).all(), name=write.word(f"{name}.name"), words=len(count))
    write.say("so")
    return write.step()


def word_maps(outputs: int, inputs: int) -> dict[str, npt.NDArray[np.int64]]:
    """For each layout int64 [out, in]: the number of the 32-bit word that holds a weight's code.

    For the layouts on disk each word is filled with a bit of its own number and the product takes them apart.
    """
    padded = -(-outputs // BLOCK_ROWS) * BLOCK_ROWS
    n, k = np.indices((padded, inputs))
    return {
        "gemm": _probe(inputs * outputs // 8, AWQ_ORDER).reshape(inputs, outputs).T,
        "stream": _probe(inputs * outputs // 8, NATURAL).reshape(outputs, inputs),
        "kernel": ((n // BLOCK_ROWS * (inputs // OCTET) + k // OCTET) * BLOCK_ROWS + n % BLOCK_ROWS)[:outputs],
    }


def _probe(words: int, order: Sequence[int]) -> npt.NDArray[np.int64]:
    """int64 [8 · words]: the word that each code comes from, in the order in which they are taken apart."""
    numbers = np.arange(words)
    found = np.zeros((words, 8), np.int64)
    runs = np.empty((words, 8), np.uint8)
    for bit in range(max(words - 1, 1).bit_length()):
        filled = np.where(numbers >> bit & 1, 0x11, 0).astype(np.uint8)
        split_bytes(np.repeat(filled[:, None], 4, axis=1), runs, order)
        found |= runs.astype(np.int64) << bit
    return found.reshape(-1)


def _bytes(write: StepWriter, matrix: Matrix) -> Step:
    """What a weight takes."""
    from halfbyte import _native

    outputs, inputs = matrix.shape
    offsets = -matrix.scales * matrix.zeros
    held = _native.W4Matrix(matrix.codes, matrix.scales, offsets, None, matrix.group_size, pick_tier())
    a8 = _native.a8_linear(matrix.codes, matrix.scales, matrix.zeros, None, pick_tier(), 4)
    found = np.empty(matrix.shape, np.float32)
    held.dequantize(found)
    sizes = {"half": 2 * outputs * inputs, **disk_bytes(matrix), "a8": a8.nbytes, "a16": held.nbytes}
    write.say(size=matrix.group_size)
    rows = [
        (write.word(f"kinds.{name}"), number(size, ","), number(8 * size / matrix.weight.size, ".3f"),
         number(size / sizes["half"], ".3f"))
        for name, size in sizes.items()
    ]  # fmt: skip
    write.table("table", rows, n=outputs, k=inputs)
    write.check("a8", a8.nbytes == a8_bytes(outputs, inputs, matrix.group_size), size=a8.nbytes)
    write.check("held", np.allclose(found, matrix.dequantized, rtol=0, atol=float(matrix.scales.max()) * 2**-18))
    return write.step()


def disk_bytes(matrix: Matrix) -> dict[str, int]:
    """Bytes of codes, fp16 scales and zero points in either layout on disk."""
    outputs, inputs = matrix.shape
    groups = inputs // matrix.group_size
    return {
        "gemm": outputs * inputs // 2 + groups * outputs // 2 + 2 * groups * outputs,
        "stream": 12 + outputs * (inputs // 2 + 2 * groups + (groups + 1) // 2),
    }
