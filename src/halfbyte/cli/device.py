"""`halfbyte device`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halfbyte.cli.render import JsonFlag, print_json, print_table
from halfbyte.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table


def command(
    hierarchy: Annotated[
        bool, typer.Option("--hierarchy", help="Draw registers, caches and memory, with sizes and measured bandwidths.")
    ] = False,
    monitor: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Show what the machine is doing, for so long or to Ctrl-C.")
    ] = None,
    interval: Annotated[float, typer.Option(help="Seconds between two samples of --monitor.")] = 1.0,
    kernel_config: Annotated[
        str | None,
        typer.Option(
            metavar="GRID;BLOCK",
            help='Draw what a launch does to a GPU: "128,4,1;256,1,1", with ";registers=96;shared=49152" if known.',
        ),
    ] = None,
    benchmark: Annotated[
        bool, typer.Option("--benchmark", help="Time matrix products in fp32, fp16, bf16 and with 4-bit weights.")
    ] = False,
    sizes: Annotated[str, typer.Option(help="n of the n × n matrices of --benchmark.")] = "512,1024,2048",
    arch: Annotated[
        str | None,
        typer.Option(help="A GPU by its architecture, such as sm_90, for --hierarchy and --kernel-config; from facts."),
    ] = None,
    device: Annotated[str, typer.Option(help="Of --benchmark: auto, cpu, cuda or cuda:N.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="Of the CPU; HALFBYTE_THREADS or all cores if not said.")] = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="Write CSV and PNG of --hierarchy, --monitor or --benchmark here.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Show this machine: what it is, what it can do at most, where data can be, what it is doing.

    Without a mode: a snapshot, with bandwidth and peaks measured in about a second. GPU numbers come from NVML, which
    needs the extra `gpu`. A GPU that is not here can be looked at by its architecture.

    Example: halfbyte device --kernel-config "128,4,1;256,1,1;registers=96" --arch sm_90
    """
    modes = {"--hierarchy": hierarchy, "--monitor": monitor is not None,
             "--kernel-config": kernel_config is not None, "--benchmark": benchmark}  # fmt: skip
    chosen = [name for name, wanted in modes.items() if wanted]
    if len(chosen) > 1:
        raise ConfigError(f"{' and '.join(chosen)}: expected one of them at a time")
    mode = chosen[0] if chosen else None
    if arch is not None and mode not in ("--hierarchy", "--kernel-config"):
        raise ConfigError("--arch: belongs to --hierarchy or --kernel-config")
    if output_dir is not None:
        if mode not in ("--hierarchy", "--monitor", "--benchmark"):
            raise ConfigError("--output-dir: belongs to --hierarchy, --monitor or --benchmark")
        from halfbyte.report.profile import check_folder

        check_folder(output_dir)
    if threads is not None and kernel_config is None and monitor is None:
        from halfbyte.device.cpu import use_threads

        use_threads(threads)
    if hierarchy:
        _show_hierarchy(arch, output_dir, json)
    elif monitor is not None:
        _monitor(monitor, interval, output_dir, json)
    elif kernel_config is not None:
        _show_launch(kernel_config, arch, json)
    elif benchmark:
        _benchmark(sizes, device, output_dir, json)
    else:
        _show_snapshot(json)


def _show_snapshot(json: bool) -> None:
    from halfbyte.device.snapshot import snapshot

    found = snapshot()
    if json:
        print_json(found.to_dict())
    else:
        print_table(*found.table())


def _show_hierarchy(arch: str | None, output_dir: Path | None, json: bool) -> None:
    from halfbyte.cli.device_view import hierarchy_lines
    from halfbyte.device.gpu import found_gpus
    from halfbyte.device.gpu_facts import known_gpu
    from halfbyte.device.hierarchy import cpu_hierarchy, gpu_hierarchy

    no_gpu = None
    if arch is not None:
        found = [gpu_hierarchy(known_gpu(arch), measured=False)]
    else:
        gpus, no_gpu = found_gpus()
        found = [cpu_hierarchy(), *(gpu_hierarchy(gpu, measured=True) for gpu in gpus)]
    written: list[Path] = []
    missing = None
    if output_dir is not None:
        from halfbyte.report.device import write_hierarchies

        written, missing = write_hierarchies(found, output_dir)
    if json:
        _print_json({"hierarchies": [one.to_dict() for one in found], "no_gpu": no_gpu}, written, missing)
        return
    print("\n\n".join("\n".join(hierarchy_lines(one)) for one in found))
    if no_gpu is not None:
        print(f"no GPU: {no_gpu}")
    _say_written(written, missing)


def _show_launch(text: str, arch: str | None, json: bool) -> None:
    from halfbyte.cli.device_view import launch_lines
    from halfbyte.device.gpu import found_gpu
    from halfbyte.device.gpu_facts import known_gpu
    from halfbyte.device.kernel_config import parse_kernel_config, plan_launch

    config = parse_kernel_config(text)
    plan = plan_launch(found_gpu() if arch is None else known_gpu(arch), config)
    if json:
        print_json(plan.to_dict())
        return
    print("\n".join(launch_lines(plan)))
    if "registers" not in text:
        print(f"registers were not given: {config.registers} a thread are assumed, which never limit")


def _monitor(seconds: float, interval: float, output_dir: Path | None, json: bool) -> None:
    from halfbyte.device.monitor import monitor

    taken: list[dict[str, float | None]] = []
    samples = monitor(seconds, interval)
    view = nullcontext() if json else _View()
    with view:
        try:
            for sample in samples:
                taken.append(sample.to_dict())
                if isinstance(view, _View):
                    view.show(taken)
        except KeyboardInterrupt:
            if not taken:
                raise
    written: list[Path] = []
    missing = None
    if output_dir is not None:
        from halfbyte.report.device import write_monitor

        written, missing = write_monitor(taken, output_dir)
    if json:
        _print_json({"samples": taken}, written, missing)
        return
    _say_written(written, missing)


class _View:
    """Samples as they come: a table that moves on a terminal, a line each in a pipe."""

    ROWS = 12

    def __init__(self) -> None:
        import sys

        self._live: Any = None
        if sys.stdout.isatty():
            from rich.live import Live

            self._live = Live(auto_refresh=False)

    def __enter__(self) -> _View:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, taken: Sequence[Mapping[str, float | None]]) -> None:
        """The last sample, on a terminal with those before it."""
        last = taken[-1]
        if self._live is not None:
            self._live.update(_table(taken[-self.ROWS :]), refresh=True)
            return
        if len(taken) == 1:
            print("  ".join(last), flush=True)
        print("  ".join(f"{_cell(value):>{len(name)}}" for name, value in last.items()), flush=True)


def _table(taken: Sequence[Mapping[str, float | None]]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for name in taken[-1]:
        table.add_column(name.replace("_", " "), justify="right")
    for sample in taken:
        table.add_row(*map(_cell, sample.values()))
    return table


def _cell(value: float | None) -> str:
    return "—" if value is None else f"{value:,.1f}"


def _benchmark(sizes: str, device: str, output_dir: Path | None, json: bool) -> None:
    wanted = sizes.replace(",", " ").split()
    if not wanted or not all(size.isdecimal() for size in wanted):
        raise ConfigError(f"--sizes {sizes}: expected whole numbers, such as 512,1024,2048")
    from halfbyte.evaluation.matmul import benchmark_matmul

    found = benchmark_matmul(sizes=list(map(int, wanted)), device=device, progress=not json)
    written: list[Path] = []
    missing = None
    if output_dir is not None:
        from halfbyte.report.device import write_matmul

        written, missing = write_matmul(found, output_dir)
    if json:
        _print_json(found.to_dict(), written, missing)
        return
    where = found.machine if found.threads is None else f"{found.machine}, {found.threads} threads"
    print_table(*found.table(), title=f"matrix products, medians of rounds in turn; {where}")
    for left_out in found.skipped:
        print(f"left out: {left_out}")
    _say_written(written, missing)


def _print_json(document: dict[str, Any], written: Sequence[Path], missing: str | None) -> None:
    print_json({**document, "files": [str(path) for path in written], "no_pictures": missing})


def _say_written(written: Sequence[Path], missing: str | None) -> None:
    if written:
        print(f"written: {', '.join(map(str, written))}")
    if missing is not None:
        print(f"no pictures: {missing}")
