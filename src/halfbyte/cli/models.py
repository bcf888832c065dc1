"""`halfbyte models list` and `halfbyte models pull`."""

from __future__ import annotations

from typing import Annotated

import typer

from halfbyte.cli.render import JsonFlag, interruptible, print_json, print_table

app = typer.Typer(
    help="The models halfbyte knows by name.",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
)


@app.command("list")
def list_command(json: JsonFlag = False) -> None:
    """List the sample models and whether they are on this machine.

    Example: halfbyte models list
    """
    from halfbyte.checkpoints.sources import list_models

    entries = list_models()
    if json:
        print_json([{**vars(entry), "path": str(entry.path)} for entry in entries])
        return
    rows = [(entry.name, "yes" if entry.cached else "no", entry.description) for entry in entries]
    print_table(("model", "on this machine", "what"), rows)
    print("Any folder in Hugging Face form works too, and hub names (organisation/name) where the hub can be reached.")


@app.command("pull")
@interruptible
def pull_command(
    model: Annotated[str, typer.Argument(help="sample:NAME or a hub name.")], json: JsonFlag = False
) -> None:
    """Fetch a model into the cache and print its folder.

    Example: halfbyte models pull sample:smollm2-135m
    """
    from halfbyte.checkpoints.sources import resolve_model

    folder = resolve_model(model)
    if json:
        print_json({"model": model, "path": str(folder)})
    else:
        print(folder)
