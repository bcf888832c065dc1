"""The command line: one file per verb; each parses, calls the library and renders.

Only typer is imported here; a verb imports torch when it starts to work, so that `--help` answers at once.
"""

from __future__ import annotations

import sys

import typer

from halfbyte.cli import backends, doctor, evaluate, generate, models, quantize
from halfbyte.cli.render import fail
from halfbyte.errors import HalfbyteError

app = typer.Typer(
    name="halfbyte",
    help="Quantize any Hugging Face causal language model to 4 bits, run it, measure it.\n\n"
    "Start with: halfbyte quantize sample:smollm2-135m -o smollm2-4bit",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("quantize")(quantize.command)
app.command("generate")(generate.command)
app.command("eval")(evaluate.command)
app.add_typer(models.app, name="models")
app.command("backends")(backends.command)
app.command("doctor")(doctor.command)


def main() -> None:
    """Run the command line; what goes wrong on purpose becomes one line and exit code 2."""
    try:
        app()
    except HalfbyteError as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("stopped by Ctrl-C; nothing unfinished was kept")
    except BrokenPipeError:
        # The reader of our output has gone (`halfbyte … | head`): nothing is left to say, not even at exit.
        sys.stderr.close()
        sys.exit(0)
