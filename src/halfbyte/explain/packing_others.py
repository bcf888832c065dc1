"""The step of the lesson on packing about the layouts that other tools write: whose codes share their first word."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from halfbyte.explain.lesson import Row, Span, Step
from halfbyte.explain.matrix import Matrix
from halfbyte.explain.writing import StepWriter
from halfbyte.formats.runs import AWQ_ORDER, NATURAL, split_bytes, word_bytes

# A word is written highest nibble first.
_DOWN = range(7, -1, -1)


@dataclass(frozen=True)
class Word:
    """The first 32 bits of a layout's codes.

    Attributes:
        layout: its name.
        tensor: that begins with them.
        outputs: of the weight in nibble i.
        inputs: likewise.
    """

    layout: str
    tensor: str
    outputs: tuple[int, ...]
    inputs: tuple[int, ...]

    def codes(self, matrix: Matrix) -> npt.NDArray[np.uint8]:
        """The eight codes, nibble by nibble."""
        taken: npt.NDArray[np.uint8] = matrix.codes[list(self.outputs), list(self.inputs)]
        return taken

    def fits(self, matrix: Matrix) -> bool:
        """Whether the matrix is large enough to fill it."""
        outputs, inputs = matrix.shape
        return max(self.outputs) < outputs and max(self.inputs) < inputs


# Two 16-bit words of every eighth input.
_STRIDED = tuple(8 * (i % 4) + i // 4 for i in range(8))
# What thread 0 needs for a tensor core: see formats/marlin.py.
_FRAGMENT = tuple((8 * (e // 4), e % 2 + 8 * (e // 2 % 2)) for e in AWQ_ORDER)
WORDS = (
    Word("AutoAWQ GEMM", "qweight", AWQ_ORDER, (0,) * 8),
    Word("AutoAWQ GEMV", "qweight", (0,) * 8, NATURAL),
    Word("AutoAWQ GEMV_FAST, llm-awq", "qweight", (0,) * 8, _STRIDED),
    Word("GPTQ", "qweight", (0,) * 8, NATURAL),
    Word("compressed-tensors", "weight_packed", (0,) * 8, NATURAL),
    Word("Marlin", "qweight", *map(tuple, zip(*_FRAGMENT, strict=True))),
)


def others(write: StepWriter, matrix: Matrix) -> Step:
    """The first word of each layout."""
    write.say()
    rows: list[Row] = []
    found: list[tuple[str, int, bool]] = []
    for word in WORDS:
        if not word.fits(matrix):
            continue
        codes = word.codes(matrix)
        packed = word_bytes(codes, NATURAL)
        back = np.empty_like(codes)
        split_bytes(packed, back, NATURAL)
        value = int.from_bytes(packed.tobytes(), "little")
        marks = [(word.outputs[i] + word.inputs[i]) % 8 for i in _DOWN]
        places = [f"{word.outputs[i]}:{word.inputs[i]}" for i in _DOWN]
        rows.append([word.layout, *map(Span, places, marks)])
        rows.append(
            [f"  {word.tensor}: 0x{value:08X}", *(Span(f"{back[7 - i]:X}", mark) for i, mark in enumerate(marks))]
        )
        right = np.array_equal(back, codes) and [value >> 4 * i & 15 for i in range(8)] == codes.tolist()
        found.append((word.layout, value, right))
    write.table("words", rows)
    for layout, value, right in found:
        write.check("word", right, layout=layout, value=value)
    write.say("why")
    return write.step()
