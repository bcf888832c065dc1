"""`halfbyte bench`."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halfbyte.cli.options import Decoding, spread
from halfbyte.cli.render import JsonFlag, interruptible, megabytes, print_json, print_table
from halfbyte.errors import ConfigError

if TYPE_CHECKING:
    from halfbyte.evaluation.bench import DecodeSpeed, KernelSpeed, PrefillSpeed
    from halfbyte.evaluation.phases import PhaseSpeed
    from halfbyte.evaluation.sampler import SamplerSpeed
    from halfbyte.generation.model import Model

app = typer.Typer(
    help="Measure the fused decoder and the samplers.",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
)

BatchOption = Annotated[str, typer.Option(help="Sequences at a time; several as 1,4,16.")]
ThreadsOption = Annotated[str, typer.Option(help="Threads; several as 1,2; auto for HALFBYTE_THREADS or all cores.")]
RoundsOption = Annotated[int, typer.Option(help="Rounds to take the median of; one more warms up.")]


@dataclass(frozen=True)
class Subject:
    """What is measured."""

    model: Annotated[str | None, typer.Argument(help="A folder, sample:NAME, or a hub name.")] = None
    shape: Annotated[
        str | None, typer.Option(help="Instead of a model: 1b, a random 4-bit Llama of that shape, made for the run.")
    ] = None


@app.callback()
def _group() -> None:
    """Measure the fused decoder and the samplers against the machine."""


@app.command("decode", short_help="Steps of one token, against memory's speed.")
@interruptible
@spread
def decode_command(
    *,
    subject: Subject,
    context: Annotated[str, typer.Option(help="Tokens before the first step; several as 0,512,2048.")] = "0,512,2048",
    batch: BatchOption = "1",
    threads: ThreadsOption = "auto",
    steps: Annotated[int, typer.Option(help="Steps in a round.")] = 16,
    rounds: RoundsOption = 5,
    decoding: Decoding,
    json: JsonFlag = False,
) -> None:
    """Time steps of one token a sequence, and hold them against reading the bytes they need.

    Bytes are the layers' weights, the output head, and the keys and values of the context; the bandwidth is measured
    beside the steps, on a buffer as large as the weights.

    Example: halfbyte bench decode smollm2-4bit --context 0,512 --batch 1,4 --threads 1,2
    """
    cells = _cells(numbers("--threads", threads, 1), numbers("--context", context, 0), numbers("--batch", batch, 1))

    def measure(loaded: Model) -> list[DecodeSpeed]:
        from halfbyte.evaluation.bench import measure_decode

        return [measure_decode(loaded, context=c, batch=b, threads=t, steps=steps, rounds=rounds) for t, c, b in cells]

    columns = ("threads", "context", "batch", "tok/s", "ms/token", "MB/token", "GB/s", "machine", "share")
    _report("decode", _measure(subject, decoding, measure), columns, _decode_row, json)


@app.command("prefill", short_help="Prompts, against the machine's arithmetic.")
@interruptible
@spread
def prefill_command(
    *,
    subject: Subject,
    context: Annotated[str, typer.Option(help="Tokens of a prompt; several as 128,512.")] = "512",
    batch: BatchOption = "1",
    threads: ThreadsOption = "auto",
    rounds: RoundsOption = 5,
    decoding: Decoding,
    json: JsonFlag = False,
) -> None:
    """Time prompts, and hold them against the fp32 arithmetic the machine can do.

    Operations are those of the matrix products. Activations in 8 bits can exceed the fp32 peak.

    Example: halfbyte bench prefill smollm2-4bit --context 128,512
    """
    cells = _cells(numbers("--threads", threads, 1), numbers("--context", context, 1), numbers("--batch", batch, 1))

    def measure(loaded: Model) -> list[PrefillSpeed]:
        from halfbyte.evaluation.bench import measure_prefill

        return [measure_prefill(loaded, context=c, batch=b, threads=t, rounds=rounds) for t, c, b in cells]

    columns = ("threads", "context", "batch", "tok/s", "ms/token", "GFLOP/s", "fp32 peak", "share")
    _report("prefill", _measure(subject, decoding, measure), columns, _prefill_row, json)


@app.command("kernels", short_help="Each matrix of a model, by rows of activations.")
@interruptible
@spread
def kernels_command(
    *,
    subject: Subject,
    rows: Annotated[str, typer.Option(help="Rows of activations, 1 first.")] = "1,2,4,8,16",
    threads: ThreadsOption = "auto",
    rounds: RoundsOption = 15,
    decoding: Decoding,
    json: JsonFlag = False,
) -> None:
    """Time the model's matrices by shape, with one row of activations and with a few.

    The ratio to one row is what a batch, or the check of a speculated token, costs in that matrix.

    Example: halfbyte bench kernels smollm2-4bit --threads 1
    """
    counts, sizes = numbers("--threads", threads, 1), numbers("--rows", rows, 1)

    def measure(loaded: Model) -> list[KernelSpeed]:
        from halfbyte.evaluation.bench import measure_kernels

        return [row for t in counts for row in measure_kernels(loaded, rows=sizes, threads=t, rounds=rounds)]

    columns = ("out × in", "form", "count", "threads", "M", "µs", "to M = 1", "GB/s", "machine", "share")
    _report("kernels", _measure(subject, decoding, measure), columns, _kernel_row, json)


@app.command("phases", short_help="The parts of a step.")
@interruptible
@spread
def phases_command(
    *,
    subject: Subject,
    context: Annotated[str, typer.Option(help="Tokens before the step; several as 0,512.")] = "512",
    batch: BatchOption = "1",
    threads: ThreadsOption = "auto",
    steps: Annotated[int, typer.Option(help="Steps to take the median of.")] = 64,
    decoding: Decoding,
    json: JsonFlag = False,
) -> None:
    """Time the parts of a step of one token a sequence, and hold each against reading its bytes.

    A part is summed over the layers. Waiting for the other threads belongs to it.

    Example: halfbyte bench phases smollm2-4bit --threads 1
    """
    cells = _cells(numbers("--threads", threads, 1), numbers("--context", context, 0), numbers("--batch", batch, 1))

    def measure(loaded: Model) -> list[PhaseSpeed]:
        from halfbyte.evaluation.phases import measure_phases

        return [row for t, c, b in cells for row in measure_phases(loaded, context=c, batch=b, threads=t, steps=steps)]

    columns = ("threads", "context", "batch", "part", "µs", "of the step", "MB", "floor µs")
    _report("phases", _measure(subject, decoding, measure), columns, _phase_row, json)


@app.command("sampler", short_help="The rejection samplers.")
@interruptible
def sampler_command(
    batch: BatchOption = "1,4,16,64",
    drafts: Annotated[str, typer.Option(help="Drafted tokens of a sequence; several as 4,8.")] = "4",
    vocabulary: Annotated[str, typer.Option(help="Sizes of the vocabulary.")] = "32000",
    acceptance: Annotated[float, typer.Option(help="Share of drafts that stand: 0.3, 0.7 or 0.95.")] = 0.7,
    threads: ThreadsOption = "auto",
    seconds: Annotated[float, typer.Option(help="To measure each implementation for, in each cell.")] = 0.2,
    json: JsonFlag = False,
) -> None:
    """Time the rejection samplers on synthetic distributions, and hold them against reading what they must.

    benchmarks/rejection_sampler.py has more cells, and the plain PyTorch loop that all are compared with.

    Example: halfbyte bench sampler --batch 1,16 --vocabulary 32000,128000
    """
    cells = _cells(
        numbers("--threads", threads, 1), numbers("--vocabulary", vocabulary, 1), numbers("--batch", batch, 1),
        numbers("--drafts", drafts, 1),
    )  # fmt: skip
    from halfbyte.device.cpu import cpu_info, pick_tier
    from halfbyte.evaluation.sampler import measure_samplers, synthetic_case, using_threads

    results = []
    for count, size, sequences, length in cells:
        case = synthetic_case(sequences, length, size, acceptance)
        with using_threads(count):
            results += measure_samplers(case, acceptance=case.acceptance, threads=count, seconds=seconds)
    machine = cpu_info()
    if json:
        documents = [_document(result) for result in results]
        print_json({"benchmark": "sampler", "machine": vars(machine), "tier": pick_tier(), "results": documents})
        return
    columns = ("implementation", "threads", "vocabulary", "batch", "K", "accepted", "µs", "µs/row", "floor µs", "share")
    print_table(columns, map(_sampler_row, results), f"Rejection samplers; {machine.model}, {pick_tier()}")


def _measure(subject: Subject, decoding: Decoding, measure: Callable[[Model], Sequence[Any]]) -> dict[str, Any]:
    if (subject.model is None) == (subject.shape is None):
        raise ConfigError("MODEL or --shape: expected one of them; such as `halfbyte bench decode --shape 1b`")
    from halfbyte.device.cpu import cpu_info, pick_tier
    from halfbyte.generation.model import load

    settings = decoding.settings()
    with _folder(subject) as folder:
        loaded = load(folder, device="cpu", **settings)
        results = measure(loaded)
    return {
        "model": subject.model or f"random {subject.shape}",
        "machine": vars(cpu_info()),
        "tier": pick_tier(),
        "memory_bytes": loaded.nbytes,
        "kernels": loaded.kernels,
        "results": results,
    }


@contextmanager
def _folder(subject: Subject) -> Iterator[str | Path]:
    """The model, or a random one that is there for as long as it is needed."""
    if subject.model is not None:
        yield subject.model
    elif subject.shape is not None:
        from halfbyte.evaluation.shapes import write_random_model

        with tempfile.TemporaryDirectory() as temporary:
            write_random_model(Path(temporary) / "model", subject.shape)
            yield Path(temporary) / "model"


def _report(
    benchmark: str, found: dict[str, Any], columns: Sequence[str], row: Callable[[Any], Sequence[str]], json: bool
) -> None:
    results = found["results"]
    if json:
        print_json({"benchmark": benchmark, **found, "results": [_document(result) for result in results]})
        return
    forms = ", ".join(f"{count} × {name}" for name, count in found["kernels"].items()) or "not quantized"
    machine = f"{found['machine']['model']}, {found['tier']}"
    title = f"{found['model']}: {megabytes(found['memory_bytes'])}, {forms}; {machine}"
    print_table(columns, map(row, results), title)


def _document(result: Any) -> dict[str, Any]:
    """The fields of a result, and what follows from them."""
    derived = [name for name, value in vars(type(result)).items() if isinstance(value, property)]
    return {**asdict(result), **{name: getattr(result, name) for name in derived}}


def _decode_row(result: DecodeSpeed) -> Sequence[str]:
    return (
        *map(str, (result.threads, result.context, result.batch)),
        f"{result.tokens_per_second:,.1f}",
        f"{1e3 / result.tokens_per_second:.2f}",
        f"{result.bytes_per_token / 1e6:,.1f}",
        f"{result.bytes_per_second / 1e9:.1f}",
        f"{result.bandwidth / 1e9:.1f}",
        f"{result.bandwidth_share:.0%}",
    )


def _prefill_row(result: PrefillSpeed) -> Sequence[str]:
    return (
        *map(str, (result.threads, result.context, result.batch)),
        f"{result.tokens_per_second:,.1f}",
        f"{1e3 / result.tokens_per_second:.2f}",
        f"{result.flops_per_second / 1e9:.0f}",
        f"{result.peak_flops / 1e9:.0f}",
        f"{result.peak_share:.0%}",
    )


def _kernel_row(result: KernelSpeed) -> Sequence[str]:
    return (
        f"{result.out_features} × {result.in_features}",
        result.form,
        *map(str, (result.matrices, result.threads, result.rows)),
        f"{result.seconds * 1e6:,.1f}",
        f"{result.ratio:.2f}",
        f"{result.bytes_per_second / 1e9:.1f}",
        f"{result.bandwidth / 1e9:.1f}",
        f"{result.bandwidth_share:.0%}",
    )


def _phase_row(result: PhaseSpeed) -> Sequence[str]:
    return (
        *map(str, (result.threads, result.context, result.batch)),
        result.phase,
        f"{result.seconds * 1e6:,.0f}",
        f"{result.seconds / result.whole_seconds:.1%}",
        f"{result.nbytes / 1e6:,.1f}",
        f"{result.floor_seconds * 1e6:,.0f}",
    )


def _sampler_row(result: SamplerSpeed) -> Sequence[str]:
    return (
        result.implementation,
        *map(str, (result.threads, result.vocabulary, result.batch, result.drafts)),
        f"{result.acceptance:.2f}",
        f"{result.seconds * 1e6:,.1f}",
        f"{result.seconds * 1e6 / result.batch:,.1f}",
        f"{result.floor_seconds * 1e6:,.1f}",
        f"{result.floor_share:.0%}",
    )


def _cells(*axes: Iterable[int]) -> list[tuple[int, ...]]:
    return list(itertools.product(*axes))


def numbers(option: str, text: str, least: int) -> list[int]:
    """Whole numbers from `least` on, separated by commas; for threads also "auto".

    Raises:
        ConfigError: anything else.
    """
    if option == "--threads" and text == "auto":
        from halfbyte.device.cpu import thread_count

        return [thread_count()]
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and least <= int(part) <= 1 << 20 for part in parts):
        raise ConfigError(f"{option} {text}: expected whole numbers from {least} on, separated by commas")
    return [int(part) for part in parts]
