"""`halfbyte demo`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from halfbyte.cli.render import JsonFlag, interruptible, print_json, print_table
from halfbyte.errors import HalfbyteError

if TYPE_CHECKING:
    from halfbyte.evaluation.sampler import SamplerSpeed
    from halfbyte.evaluation.sampler_demo import Fit

app = typer.Typer(
    help="Show a part at work, without a model.",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
)

INTRODUCTION = """\
Speculative decoding lets a cheap draft guess K tokens, and the target check all of them in one step. The rejection
sampler decides which guesses stand. A draft x, drawn from q, is kept with probability min(1, p(x) / q(x)), p being the
target; the first one that falls is replaced by a draw from max(p - q, 0), what p has more than q has already given.
So every token is distributed as if the target alone had drawn it (Leviathan et al. 2023)."""

WHY = """\
Why these times: whether a draft stands takes two numbers, p(x) and q(x). Only the last token takes a whole row: p and
q, {bytes} bytes at 32,000 tokens, once, at the first rejection. `floor` is the time to read that much memory.
  reference   does just that, one sequence after the other, with a dozen passes over the row in numpy.
  vectorized  does all sequences together in PyTorch, a pass of memory for each operation.
  native      reads the row once: sums of max(p - q, 0) for every 256 tokens, as integers, so that any order gives the
              same; then finds the block the random number points to, and looks again at its 256 tokens only."""


@app.callback()
def _group() -> None:
    """Show a part at work, without a model."""


@app.command("sampler")
@interruptible
def sampler_command(
    threads: Annotated[str, typer.Option(help="Threads; auto for HALFBYTE_THREADS or all cores.")] = "auto",
    seconds: Annotated[float, typer.Option(help="To measure each sampler for, at each batch size.")] = 0.25,
    json: JsonFlag = False,
) -> None:
    """Show the rejection samplers of speculative decoding: right, equal, and how fast, in less than half a minute.

    Example: halfbyte demo sampler
    """
    from halfbyte.cli.bench import numbers
    from halfbyte.evaluation.sampler_demo import count_equal_tokens, fit_to_target, measure_demo

    count = numbers("--threads", threads, 1)[0]
    if not json:
        print(INTRODUCTION)
    equal = count_equal_tokens()
    if not json:
        print("\nThe same random numbers, the same tokens, over six settings of temperature, top-k, top-p and min-p:")
        print_table(("implementation", "equal sequences"), [(name, f"{n} of {of}") for name, (n, of) in equal.items()])
    fits = fit_to_target()
    if not json:
        print("The first token against the exact target; an honest sampler exceeds the limit once in 10 million runs:")
        print_table(("sampler", "draws", "chi-square", "limit", ""), map(_fit_row, fits))
    speeds = measure_demo(count, seconds=seconds)
    if json:
        print_json(
            {
                "demo": "sampler",
                "equal_sequences": {name: {"equal": n, "of": of} for name, (n, of) in equal.items()},
                "fits": [{**asdict(fit), "fits": fit.fits} for fit in fits],
                "speeds": [{**asdict(speed), "floor_seconds": speed.floor_seconds} for speed in speeds],
            }
        )
    else:
        print_table(("batch", "implementation", "µs", "to reference", "floor µs", "share"), _speed_rows(speeds))
        print(WHY.format(bytes=f"{2 * 4 * 32_000:,}"))
    wrong = [fit.sampler for fit in fits[:-1] if not fit.fits]
    wrong += [name for name, (n, of) in equal.items() if n != of]
    if wrong or fits[-1].fits:
        raise HalfbyteError(f"demo sampler: not what was expected of {', '.join(wrong) or 'the chi-square test'}")


def _fit_row(fit: Fit) -> Sequence[str]:
    verdict = "fits" if fit.fits else "does not fit"
    return fit.sampler, f"{fit.draws:,}", f"{fit.chi_square:,.1f}", f"{fit.limit:.1f}", verdict


def _speed_rows(speeds: Sequence[SamplerSpeed]) -> list[Sequence[str]]:
    slowest = {speed.batch: speed.seconds for speed in speeds if speed.implementation == "reference"}
    return [
        (
            str(speed.batch),
            speed.implementation,
            f"{speed.seconds * 1e6:,.1f}",
            f"{slowest[speed.batch] / speed.seconds:.1f} ×",
            f"{speed.floor_seconds * 1e6:,.1f}",
            f"{speed.floor_share:.0%}",
        )
        for speed in speeds
    ]
