"""`halfbyte explain`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from halfbyte.cli.render import JsonFlag, print_json, print_table
from halfbyte.errors import ConfigError

if TYPE_CHECKING:
    from halfbyte.explain.lesson import Lesson


def command(
    lesson: Annotated[
        str | None, typer.Argument(help="packing, rounding, awq, kernel, gpu or speculative; none lists them.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Take a layer of this model: a folder, sample:NAME or a hub name; not quantized.")
    ] = None,
    layer: Annotated[str | None, typer.Option(help="Which one, such as model.layers.3.mlp.up_proj.")] = None,
    m: Annotated[int | None, typer.Option("--m", help="packing: rows of activations for --verify.")] = None,
    n: Annotated[int | None, typer.Option("--n", help="packing, gpu: outputs of the matrix.")] = None,
    k: Annotated[int | None, typer.Option("--k", help="packing, gpu: inputs of the matrix.")] = None,
    verify: Annotated[
        bool, typer.Option(help="packing: also compare 16-bit × 16-bit with 16-bit × INT4 on the whole matrix.")
    ] = False,
    step: Annotated[bool, typer.Option("--step", help="Wait for a key before each step; q ends.")] = False,
    lang: Annotated[
        str | None, typer.Option(help="Language of the headings: en, vi or zh_TW; by default that of LANG.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Explain a part of halfbyte by running it on real bytes; a lesson checks everything it states.

    Example: halfbyte explain packing --m 4 --n 64 --k 128 --verify
    """
    from halfbyte.explain.lessons import Options, explain, list_lessons

    if lesson is None:
        _list(list_lessons(lang), json)
        return
    if step and (json or not (sys.stdin.isatty() and sys.stdout.isatty())):
        raise ConfigError("--step: expected a terminal and no --json; leave it out")
    options = Options(model, layer, m, n, k, verify, progress=not json)
    made = explain(lesson, options, language=lang)
    if json:
        print_json(made.to_dict())
    else:
        _show(made, step)


def _list(lessons: list[tuple[str, str, str]], json: bool) -> None:
    if json:
        print_json([{"lesson": name, "title": title, "summary": summary} for name, title, summary in lessons])
        return
    print_table(("lesson", "what it shows"), [(name, summary) for name, _, summary in lessons])
    print("Begin with: halfbyte explain packing")


def _show(lesson: Lesson, step: bool) -> None:
    from halfbyte.cli.lesson_view import make_console, print_step, print_title

    console = make_console()
    print_title(console, lesson)
    for index, part in enumerate(lesson.steps, start=1):
        if step and index > 1 and not _wait():
            return
        print_step(console, part, index, len(lesson.steps))
    print(f"\n{len(lesson.checks)} statements were checked while this was made.")


def _wait() -> bool:
    """Whether to go on."""
    print("\n[any key for the next step, q to end]", end="", flush=True)
    key = typer.getchar()
    print()
    return key not in ("q", "Q", "\x1b", "\x04")
