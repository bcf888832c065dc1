"""The command line: one file per verb; each parses, calls the library and renders.

Only typer is imported here; a verb imports torch when it starts to work, so that `--help` answers at once.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from halfbyte.cli import (
    backends,
    bench,
    chat,
    compare,
    convert,
    demo,
    device,
    doctor,
    evaluate,
    explain,
    generate,
    inspect,
    models,
    profile,
    quantize,
    report,
    verify,
)
from halfbyte.cli.render import fail, interruptible
from halfbyte.errors import HalfbyteError

# \b keeps the lines of a paragraph as they are.
HELP = """Quantize any Hugging Face causal language model to 4 bits, run it, measure it, and see what happened to it.

\b
Start with:
  halfbyte quantize sample:smollm2-135m -o smollm2-4bit
  halfbyte generate smollm2-4bit "The history of bread"
  halfbyte compare sample:smollm2-135m smollm2-4bit --quick
  halfbyte report smollm2-4bit -o report.html

A model is a folder, a name on the Hugging Face hub, or sample:smollm2-135m, which needs no hub.
"""

app = typer.Typer(
    name="halfbyte",
    help=HELP,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from halfbyte import __version__

        print(f"halfbyte {__version__}")
        raise typer.Exit


@app.callback()
def _halfbyte(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """The help is above."""


app.command("quantize")(interruptible(quantize.command))
app.command("generate")(interruptible(generate.command))
app.command("chat")(interruptible(chat.command))
app.command("eval")(interruptible(evaluate.command))
app.command("compare")(interruptible(compare.command))
app.add_typer(bench.app, name="bench")
app.add_typer(demo.app, name="demo")
app.command("profile")(interruptible(profile.command))
app.add_typer(models.app, name="models")
app.add_typer(inspect.app, name="inspect")
app.command("convert")(interruptible(convert.command))
app.command("verify")(interruptible(verify.command))
app.command("report")(interruptible(report.command))
app.command("explain")(interruptible(explain.command))
app.command("backends")(interruptible(backends.command))
app.command("device")(interruptible(device.command))
app.command("doctor")(interruptible(doctor.command))


def main() -> None:
    """Run the command line; what goes wrong on purpose becomes one line and exit code 2."""
    try:
        app()
    except HalfbyteError as error:
        fail(str(error))
    except BrokenPipeError:
        # The reader of our output has gone (`halfbyte … | head`): nothing is left to say, not even at exit.
        sys.stderr.close()
        sys.exit(0)
