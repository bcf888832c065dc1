"""Lesson: where a GPU keeps data, how work is cut into blocks, and how many fit. Arithmetic on public facts."""

from __future__ import annotations

from collections.abc import Iterator

from halfbyte.device.gpu_facts import REGISTER_UNIT, SCHEDULERS, WARP, Gpu, known_gpu, occupancy
from halfbyte.errors import ConfigError
from halfbyte.explain.catalogue import Messages
from halfbyte.explain.lesson import Row, Span, Step, number
from halfbyte.explain.lessons import Options
from halfbyte.explain.writing import StepWriter

# One a row, with the operations a second of dense fp16 products on tensor cores summed in fp32 (data sheets).
FLOPS = {"sm_80": 312e12, "sm_86": 71e12, "sm_89": 165e12, "sm_90": 989e12}
GPUS = tuple(map(known_gpu, FLOPS))
OUTPUTS, INPUTS = 4096, 4096
GROUP = 128
# The tile of the example: outputs × inputs of weights and rows of activations, in so many stages.
TILE_OUTPUTS, TILE_INPUTS, TILE_ROWS, STAGES, THREADS = 128, 64, 16, 4, 128
REGISTERS = (64, 96, 128, 168, 255)
SPLITS = (1, 2, 4, 8)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
KIB, MIB = 1 << 10, 1 << 20
# Rows of activations looked at, at most.
MOST_ROWS = 1 << 14


def tell(options: Options, messages: Messages) -> Iterator[Step]:
    """The steps, in order."""
    outputs = OUTPUTS if options.n is None else options.n
    inputs = INPUTS if options.k is None else options.k
    for name, value, multiple in (("n", outputs, TILE_OUTPUTS), ("k", inputs, GROUP)):
        if value < multiple or value % multiple:
            raise ConfigError(f"--{name} {value}: expected a multiple of {multiple}, as the example's tiles want it")

    def step(name: str) -> StepWriter:
        return StepWriter(messages, "gpu", name)

    yield _memory(step("memory"), outputs, inputs)
    yield _blocks(step("blocks"), outputs, inputs)
    yield _occupancy(step("occupancy"))
    yield _roofline(step("roofline"), outputs, inputs)


def int4_bytes(outputs: int, inputs: int) -> int:
    """Bytes of a matrix in AutoAWQ's GEMM layout with groups of 128."""
    groups = inputs // GROUP
    return outputs * inputs // 2 + groups * outputs // 2 + 2 * groups * outputs


def _memory(write: StepWriter, outputs: int, inputs: int) -> Step:
    half, int4 = 2 * outputs * inputs, int4_bytes(outputs, inputs)
    write.say(n=outputs, k=inputs)
    rows: list[Row] = []
    for gpu in GPUS:
        registers, shared = 4 * gpu.registers * gpu.sms / MIB, gpu.shared * gpu.sms / MIB
        rows.append(
            [f"{gpu.name} ({gpu.architecture})", number(gpu.sms), number(4 * gpu.registers // KIB),
             number(gpu.shared // KIB), number(registers, ".1f"), number(shared, ".1f"), number(gpu.l2 / MIB, ".0f"),
             number(gpu.bandwidth / 1e9, ",.0f")]
        )  # fmt: skip
    write.table("table", rows)
    write.say("sizes", n=outputs, k=inputs, half=half / 1e6, int4=int4 / 1e6, share=int4 / half)
    fits: list[Row] = [
        [gpu.name, number(half / gpu.bandwidth * 1e6, ".1f"), number(int4 / gpu.bandwidth * 1e6, ".1f")] for gpu in GPUS
    ]
    write.table("times", fits)
    write.check("registers", all(4 * gpu.registers > gpu.shared for gpu in GPUS))
    return write.step()


def _blocks(write: StepWriter, outputs: int, inputs: int) -> Step:
    tiles, steps = outputs // TILE_OUTPUTS, inputs // TILE_INPUTS
    write.say(
        n=outputs,
        k=inputs,
        tiles=tiles,
        steps=steps,
        threads=THREADS,
        warps=THREADS // WARP,
        wide=TILE_OUTPUTS,
        deep=TILE_INPUTS,
    )
    rows: list[Row] = []
    shares: dict[str, list[float]] = {gpu.name: [] for gpu in GPUS}
    for split in SPLITS:
        blocks = tiles * split
        row = [number(split), number(blocks)]
        for gpu in GPUS:
            busy = min(blocks, gpu.sms)
            shares[gpu.name].append(busy / gpu.sms)
            row.append(number(busy / gpu.sms, ".0%"))
        rows.append(row)
    write.table("table", rows)
    write.check("more", all(series == sorted(series) for series in shares.values()))
    write.say("split")
    return write.step()


def _occupancy(write: StepWriter) -> Step:
    weights, activations = TILE_OUTPUTS * TILE_INPUTS // 2, 2 * TILE_ROWS * TILE_INPUTS
    shared = STAGES * (weights + activations)
    write.say(
        threads=THREADS,
        warps=THREADS // WARP,
        stages=STAGES,
        weights=weights,
        activations=activations,
        shared=shared,
        kib=shared / KIB,
    )
    rows: list[Row] = []
    right = True
    for registers in REGISTERS:
        row = [number(registers)]
        for gpu in GPUS:
            found = occupancy(gpu, THREADS, registers, shared)
            right = right and found.blocks == fill(gpu, THREADS, registers, shared)
            limits = "+".join(write.word(limit.replace(" ", "_")) for limit in found.limits)
            row.append(Span(f"{found.blocks}, {found.share:.0%}, {limits}"))
        rows.append(row)
    write.table("table", rows)
    write.check("filled", right)
    write.say("so")
    return write.step()


def fill(gpu: Gpu, threads: int, registers: int, shared: int) -> int:
    """Blocks that fit if they are put on an SM one by one, warp by warp, until something runs out."""
    if shared > gpu.block_shared:
        return 0
    free = [gpu.registers // SCHEDULERS] * SCHEDULERS
    memory, warps, blocks = gpu.shared, gpu.warps, 0
    while blocks < gpu.blocks:
        memory -= -(-(shared + gpu.shared_reserved) // gpu.shared_unit) * gpu.shared_unit
        for _ in range(-(-threads // WARP)):
            most = free.index(max(free))
            free[most] -= -(-registers * WARP // REGISTER_UNIT) * REGISTER_UNIT
            warps -= 1
        if memory < 0 or warps < 0 or min(free) < 0:
            break
        blocks += 1
    return blocks


def seconds(gpu: Gpu, weight_bytes: int, rows: int, outputs: int, inputs: int) -> tuple[float, bool]:
    """The least time of a product, and whether memory sets it: bytes over bandwidth or operations over the peak."""
    reading = (weight_bytes + 2 * rows * (outputs + inputs)) / gpu.bandwidth
    multiplying = 2 * rows * outputs * inputs / FLOPS[gpu.architecture]
    return max(reading, multiplying), reading >= multiplying


def _roofline(write: StepWriter, outputs: int, inputs: int) -> Step:
    half, int4 = 2 * outputs * inputs, int4_bytes(outputs, inputs)
    write.say(n=outputs, k=inputs)
    rows: list[Row] = []
    for gpu in GPUS:
        row: list[Span | str] = [gpu.name, number(FLOPS[gpu.architecture] / gpu.bandwidth, ".0f")]
        for size in (half, int4):
            found = crossing(gpu, size, outputs, inputs)
            row.append(write.word("never") if found is None else number(found))
        rows.append(row)
    write.table("ridge", rows)
    shown = GPUS[0]
    table: list[Row] = []
    curves = {}
    for rows_of_x in ROWS:
        of_half, by_memory = seconds(shown, half, rows_of_x, outputs, inputs)
        of_int4, int4_by_memory = seconds(shown, int4, rows_of_x, outputs, inputs)
        curves[rows_of_x] = of_half / of_int4
        table.append(
            [number(rows_of_x), number(of_half * 1e6, ".1f"), write.word("memory" if by_memory else "arithmetic"),
             number(of_int4 * 1e6, ".1f"), write.word("memory" if int4_by_memory else "arithmetic"),
             number(of_half / of_int4, ".2f")]
        )  # fmt: skip
    write.table("table", table, gpu=shown.name)
    write.check("one", abs(curves[1] / (half / int4) - 1) < 0.05, ratio=curves[1], bytes=half / int4)
    both = crossing(shown, half, outputs, inputs)
    if both is not None:
        times = [seconds(shown, size, both, outputs, inputs)[0] for size in (half, int4)]
        write.check("many", times[0] == times[1], m=both)
    return write.step()


def crossing(gpu: Gpu, weight_bytes: int, outputs: int, inputs: int) -> int | None:
    """The fewest rows of activations at which arithmetic sets the least time; None if memory always does."""
    found = (rows for rows in range(1, MOST_ROWS) if not seconds(gpu, weight_bytes, rows, outputs, inputs)[1])
    return next(found, None)
