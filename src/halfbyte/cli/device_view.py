"""Drawings of `halfbyte device`: the hierarchy of memory, a launch on a GPU."""

from __future__ import annotations

from halfbyte.cli.bars import bar
from halfbyte.device.gpu_facts import WARP
from halfbyte.device.hierarchy import Hierarchy, Level, describe
from halfbyte.device.kernel_config import LaunchPlan
from halfbyte.device.snapshot import binary, decimal, plural

_STEP = 4
_SHOWN_WARPS, _SHOWN_BLOCKS, _SHOWN_ROWS = 8, 32, 6
_BAR = 48


def hierarchy_lines(hierarchy: Hierarchy) -> list[str]:
    """Boxes that widen towards memory, with how fast each is read beside them."""
    levels = hierarchy.levels
    largest = max((level.together or 0.0) for level in levels)
    names = [f"{level.name}  {describe(level)}".strip() for level in levels]
    # Each box has room for its text and a blank at both ends, and is wider than the one above.
    widest = max(len(name) + 4 + _STEP * (len(levels) - 1 - place) for place, name in enumerate(names))
    lines = [f"{hierarchy.device}", hierarchy.source, ""]
    if hierarchy.threads is None:
        lines.append(" " * widest + "  all together        read")
    else:
        lines.append(" " * widest + f"    one thread    {plural(hierarchy.threads, 'thread'):>10}")
    for place, level in enumerate(levels):
        width = widest - _STEP * (len(levels) - 1 - place)
        margin = " " * ((widest - width) // 2)
        top = "┌" + "─" * (width - 2) + "┐" if place == 0 else "┌" + "┴".center(width - 2, "─") + "┐"
        bottom = "└" + ("─" * (width - 2) if place == len(levels) - 1 else "┬".center(width - 2, "─")) + "┘"
        lines.append(margin + top)
        lines.append(f"{margin}│{names[place]:^{width - 2}}│{margin}  {_speeds(level, hierarchy, largest)}".rstrip())
        lines.append(margin + bottom)
    notes = [f"{level.name}: {level.note}" for level in levels if level.note]
    buffers = [f"{level.name} {binary(level.buffer)}" for level in levels if level.buffer]
    if buffers:
        notes.append(f"read over and over by each thread: {', '.join(buffers)}")
    return [*lines, "", *notes]


def _speeds(level: Level, hierarchy: Hierarchy, largest: float) -> str:
    def cell(value: float | None) -> str:
        return f"{decimal(value)}B/s" if value else "—"

    drawn = bar(level.together or 0.0, largest, 24)
    if hierarchy.threads is None:
        total = "" if level.total is None else binary(level.total)
        return f"{total:>12}  {cell(level.together):>10}  {drawn}"
    return f"{cell(level.one):>12}  {cell(level.together):>12}  {drawn}"


def launch_lines(plan: LaunchPlan) -> list[str]:
    """The grid, a block in warps, an SM with what is resident on it, and the waves."""
    gpu, config = plan.gpu, plan.config
    sizes = {name: " × ".join(map(str, shape)) for name, shape in (("grid", config.grid), ("block", config.block))}
    lines = [
        f"{gpu.name} ({gpu.architecture}): {gpu.sms} SMs, each with room for {gpu.warps} warps and {gpu.blocks} blocks",
        "",
        f"grid {sizes['grid']} = {plural(plan.blocks, 'block')}",
        *_grid(plan),
        "",
        f"block {sizes['block']} = {plural(plan.threads, 'thread')} = {plural(plan.warps, 'warp')} of {WARP}"
        + (f", {plural(plan.idle_lanes, 'lane')} without a thread" if plan.idle_lanes else ""),
        *_warps(plan),
        "",
        *_occupancy(plan),
        "",
        *_waves(plan),
    ]
    return lines


def _grid(plan: LaunchPlan) -> list[str]:
    """The first layer of the grid, x to the right and y downwards."""
    x, y, z = plan.config.grid
    row = "▪" * min(x, _SHOWN_BLOCKS) + (" …" if x > _SHOWN_BLOCKS else "")
    lines = [f"  {row}" for _ in range(min(y, _SHOWN_ROWS))]
    if y > _SHOWN_ROWS:
        lines.append(f"  … {plural(y - _SHOWN_ROWS, 'more row')}")
    if z > 1:
        lines.append(f"  … {plural(z - 1, 'more layer')}")
    return lines


def _warps(plan: LaunchPlan) -> list[str]:
    lines = []
    for warp in range(min(plan.warps, _SHOWN_WARPS)):
        live = min(WARP, plan.threads - warp * WARP)
        first = warp * WARP
        lines.append(f"  warp {warp:<2} {'■' * live}{'·' * (WARP - live)}  threads {first}–{first + live - 1}")
    if plan.warps > _SHOWN_WARPS:
        lines.append(f"  … {plural(plan.warps - _SHOWN_WARPS, 'more warp')}")
    return lines


def _occupancy(plan: LaunchPlan) -> list[str]:
    gpu, config, found = plan.gpu, plan.config, plan.occupancy
    slots = "".join("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdef"[block % 32] * plan.warps for block in range(found.blocks))
    resident = found.blocks * plan.warps
    used = {
        "warps": (resident, gpu.warps, ""),
        "registers": (resident * WARP * config.registers, gpu.registers, ""),
        "shared memory": (found.blocks * (config.shared + gpu.shared_reserved), gpu.shared, " bytes"),
        "blocks": (found.blocks, gpu.blocks, ""),
    }
    lines = [
        f"one SM: {plural(found.blocks, 'block')}, {resident} of {gpu.warps} warps: occupancy {found.share:.0%}, "
        f"limited by {' and '.join(found.limits)}",
        f"  {slots}{'·' * (gpu.warps - len(slots))}  a letter a block, a place a warp",
    ]
    for name, (value, most, unit) in used.items():
        mark = "  ← the limit" if name in found.limits else ""
        lines.append(f"  {name:<14}{bar(value, most, 24):<24}  {value:,} of {most:,}{unit}{mark}")
    return lines


def _waves(plan: LaunchPlan) -> list[str]:
    lines = [
        f"{plural(plan.waves, 'wave')}: the GPU holds {plan.gpu.sms} × {plan.occupancy.blocks} = "
        f"{plural(plan.wave_blocks, 'block')} at a time"
    ]
    full = plan.waves - 1
    if full:
        named = "wave 1" if full == 1 else f"waves 1–{full:,}"
        lines.append(f"  {named:<14}{'█' * _BAR}  {plan.wave_blocks:,} blocks each" if full > 1 else
                     f"  {named:<14}{'█' * _BAR}  {plural(plan.wave_blocks, 'block')}")  # fmt: skip
    last = bar(plan.last_wave_share, 1.0, _BAR)
    lines.append(f"  {f'wave {plan.waves:,}':<14}{last:<{_BAR}}  {plural(plan.last_wave_blocks, 'block')}, "
                 f"{plan.last_wave_share:.1%} of the places")  # fmt: skip
    if plan.blocks < plan.gpu.sms:
        lines.append(f"  {plan.gpu.sms - plan.blocks} of {plan.gpu.sms} SMs have no block at all")
    elif full:
        lines.append(f"  if all blocks take equally long, {plan.efficiency:.0%} of the places are in use on average")
    return lines
