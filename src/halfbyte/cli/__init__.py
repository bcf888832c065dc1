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
    context_settings={"help_option_names": ["-h", "--help"]},
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


# In the order of the help; each with what fits one line of it.
for _name, _command, _summary in (
    ("quantize", quantize.command, "Make a 4-bit copy of a model."),
    ("generate", generate.command, "Generate text, streamed as it comes."),
    ("chat", chat.command, "Chat with a model, at a terminal or from a pipe."),
    ("convert", convert.command, "Store a quantized checkpoint in another layout."),
    ("verify", verify.command, "Check a checkpoint, and who else can open it."),
    ("eval", evaluate.command, "Measure perplexity and speed of one model."),
    ("compare", compare.command, "How much worse, how much faster: models in turn."),
    ("profile", profile.command, "Time one block's linears in 16 bit and in 4."),
    ("report", report.command, "Write one HTML page about a 4-bit copy, to send."),
    ("explain", explain.command, "Lessons: packing, rounding, awq, kernel, gpu, …"),
    ("backends", backends.command, "Which kernels run here, and why."),
    ("device", device.command, "What this machine has, and what it can do."),
    ("doctor", doctor.command, "Check the installation."),
):
    app.command(_name, short_help=_summary)(interruptible(_command))
app.add_typer(inspect.app, name="inspect", short_help="Layers, rounding, channels, weights, memory, folds.")
app.add_typer(bench.app, name="bench", short_help="Time the fused decoder and the samplers.")
app.add_typer(demo.app, name="demo", short_help="Samplers and speculative decoding at work.")
app.add_typer(models.app, name="models", short_help="The models halfbyte knows by name.")


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
