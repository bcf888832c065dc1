"""`halfbyte report`, and what `halfbyte compare --report` shares with it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halfbyte.cli.render import JsonFlag, print_json
from halfbyte.errors import ConfigError, OutputError, UnsupportedError

if TYPE_CHECKING:
    from halfbyte.report.html_report import Report


def command(
    model: Annotated[
        str | None, typer.Argument(help="A quantized checkpoint: a folder, a hub name, or MODEL@METHOD.")
    ] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="The page to write.")] = Path("report.html"),
    reference: Annotated[
        str | None, typer.Option(help="The 16-bit model it came from; else the one the checkpoint's manifest names.")
    ] = None,
    calibration: Annotated[
        str,
        typer.Option(help="Text to collect activations over, as `halfbyte quantize` takes it."),
    ] = "builtin",
    n_samples: Annotated[int, typer.Option("--n-samples", help="Blocks of 512 tokens of it at most.")] = 8,
    no_activations: Annotated[
        bool, typer.Option("--no-activations", help="Look at the weights alone, which is faster.")
    ] = False,
    comparison: Annotated[
        Path | None, typer.Option(help="Show this, too: the file of `halfbyte compare --output-json`.")
    ] = None,
    profile: Annotated[Path | None, typer.Option(help="Likewise: what `halfbyte profile --json` printed.")] = None,
    speculation: Annotated[
        list[Path] | None,
        typer.Option(help="Likewise: what `halfbyte generate --draft D --json` printed; may be given several times."),
    ] = None,
    lesson: Annotated[
        list[str] | None,
        typer.Option(help="Append this lesson of `halfbyte explain`, or all of them; may be given several times."),
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="Also write every table as CSV, every figure as PNG, and report.json here.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Write one page that shows what quantization did: it needs no network and nothing beside it.

    A heat map of all linears, each with its errors, histograms, salient channels, rounding and search curve; the
    manifest; and what other verbs measured, where it is given. Without MODEL it shows the latter alone.

    Example: halfbyte report smollm2-4bit -o report.html --output-dir figures
    """
    check_outputs(output, output_dir, option="--output")
    documents = {"comparison": _document(comparison), "profile": _document(profile)}
    lessons = _lessons(lesson or [], progress=not json)
    runs = {path.stem: _document(path) for path in speculation or []}
    from halfbyte.report.build import build_report

    report = build_report(
        model,
        reference,
        **documents,
        speculation=runs,
        lessons=lessons,
        calibration=calibration,
        n_samples=n_samples,
        activations=not no_activations,
        progress=not json,
    )
    written = write_outputs(report, output, output_dir)
    if json:
        print_json({**report.to_dict(), **written})
    else:
        print_written(written)


def _lessons(names: list[str], *, progress: bool) -> list[dict[str, Any]]:
    """Run them; a bad name is refused before the first."""
    from halfbyte.explain.lessons import LESSONS, Options, explain

    chosen = [*LESSONS] if "all" in names else list(dict.fromkeys(names))
    unknown = [name for name in chosen if name not in LESSONS]
    if unknown:
        raise ConfigError(f"--lesson {unknown[0]}: no such lesson; there are {', '.join(LESSONS)}, or all")
    return [explain(name, Options(progress=progress)).to_dict() for name in chosen]


def check_outputs(page: Path | None, folder: Path | None, *, option: str) -> None:
    """Before minutes of work, not after.

    Raises:
        OutputError: one could not be written.
    """
    if page is not None:
        if page.is_dir():
            raise OutputError(f"{option} {page}: is a folder; give a file, such as {page / 'report.html'}")
        parent = page.absolute().parent
        if not parent.is_dir():
            raise OutputError(f"{option} {page}: {parent} is no folder; make it first")
        if not os.access(parent, os.W_OK):
            raise OutputError(f"{option} {page}: {parent} is not yours to write to; name another folder")
    if folder is not None:
        from halfbyte.report.figures import check_folder

        check_folder(folder)


def write_outputs(report: Report, page: Path | None, folder: Path | None) -> dict[str, Any]:
    """The page and the folder of tables and figures, either of them only if asked for; what was written."""
    files = [] if page is None else [report.write(page)]
    missing = None
    if folder is not None:
        from halfbyte.report.figures import write_figures, write_tables

        files += write_tables(report, folder)
        try:
            files += write_figures(report, folder)
        except UnsupportedError as error:
            missing = str(error)
    return {"files": [str(path) for path in files], "no_pictures": missing}


def print_written(written: dict[str, Any]) -> None:
    """Where it is."""
    for file in written["files"]:
        opened = "; one file, opens in any browser" if file.endswith(".html") else ""
        print(f"written: {file} ({Path(file).stat().st_size / 1e3:,.0f} kB{opened})")
    if written["no_pictures"]:
        print(f"no pictures: {written['no_pictures']}")


def _document(path: Path | None) -> Any:
    if path is None:
        return None
    from halfbyte.checkpoints.reader import read_json_object

    if not path.is_file():
        raise ConfigError(f"{path}: no such file; expected what another verb wrote as JSON")
    return read_json_object(path)
