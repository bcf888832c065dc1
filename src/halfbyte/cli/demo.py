"""`halfbyte demo`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from halfbyte.cli.options import DraftLength, Temperature
from halfbyte.cli.render import (
    JsonFlag,
    describe_speculation,
    interruptible,
    parse_draft_length,
    print_json,
    print_table,
    summarize_speculation,
)
from halfbyte.errors import HalfbyteError

if TYPE_CHECKING:
    from halfbyte.evaluation.sampler import SamplerSpeed
    from halfbyte.evaluation.sampler_demo import Fit

app = typer.Typer(
    help="Show a part at work.",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
)

SAMPLE, PROMPT = "sample:smollm2-135m", "The history of bread begins long before the first town. In the"

SPECULATION = """\
A cheap draft proposes a few tokens, the target checks all of them in one pass, which takes hardly longer than a step
for one token, because a step is spent on reading the weights. Rejection sampling keeps those that may stay, so text is
distributed as without a draft; at temperature 0 it is the same text. Both are run three times, in turn."""

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
    """Show a part at work."""


@app.command("sampler", short_help="Rejection samplers: right, equal, how fast.")
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


@app.command("speculative", short_help="The same text with a draft and without, timed.")
@interruptible
def speculative_command(
    model: Annotated[str, typer.Option(help="The target: a folder, sample:NAME, or a hub name.")] = SAMPLE,
    draft: Annotated[
        str, typer.Option(help="int4 (made once: minutes), ngram, skip, or a smaller model with the same tokenizer.")
    ] = "int4",
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = PROMPT,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 128,
    draft_length: DraftLength = "auto",
    temperature: Temperature = 0.0,
    json: JsonFlag = False,
) -> None:
    """Continue a text with a draft and without, and show what the draft did to the time and not to the text.

    Example: halfbyte demo speculative --draft smollm2-4bit --temperature 1
    """
    from halfbyte.evaluation.speculation import measure_speculation
    from halfbyte.generation.model import load

    length = parse_draft_length(draft_length)
    target = load(model)
    if not json:
        print(SPECULATION)
    target.generate(prompt, max_new_tokens=2, draft=draft, draft_length=length)  # whatever is made is made now
    found = list(
        measure_speculation(
            target,
            [prompt],
            draft,
            draft_length=length,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            rounds=3,
        )
    )
    if not found:
        raise HalfbyteError("demo speculative: the text ended at once; give another prompt")
    one = found[0]
    if json:
        print_json(
            {
                "demo": "speculative",
                **asdict(one),
                **{name: getattr(one, name) for name in ("speed_up", "predicted", "sampler_share")},
                "counters": describe_speculation(one.counters),
            }
        )
        return
    print(f"\n{prompt}|{one.text}\n")
    print(f"the same text without the draft: {'yes' if one.same_tokens else 'no: it was sampled'}")
    print(summarize_speculation(one.counters))
    places = ", ".join(f"{share:.0%}" for share in one.counters.acceptance_by_position)
    print(f"accepted at place 1, 2, …: {places or 'nothing'}")
    print(
        f"{1 / one.plain_seconds_per_token:.1f} → {1 / one.seconds_per_token:.1f} tokens/s: {one.speed_up:.2f} ×"
        + ("" if one.predicted is None else f"; acceptance and costs predict {one.predicted:.2f} ×")
    )


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
