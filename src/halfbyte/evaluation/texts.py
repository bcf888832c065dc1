"""The texts that models are measured on: built in, in files, and published ones by name.

builtin                 the part of Python's prose that nothing is calibrated on
wiki.test.raw           a UTF-8 text file, as it is
rows.jsonl rows.json    one document a line, or an array of them, put together with a blank line between
rows.parquet  folder    the same, through the `datasets` library; of a folder the split "test", if it has one
wikitext2  c4           as GPTQ's and AWQ's papers put their rows together; from the hub, or from a copy of the rows
lambada                 passages whose last word is to be guessed: `read_passages`
NAME:CONFIG:SPLIT:FIELD any other data set, see quantization/calibration_datasets.py
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from halfbyte.errors import CalibrationError, ConfigError

BUILTIN = "builtin"
LAMBADA = "lambada"
LIBRARY_SUFFIXES = (".parquet", ".gz")
ROW_SUFFIXES = (".jsonl", ".json")
SPLITS = ("test", "validation", "train")


@dataclass(frozen=True)
class _Published:
    """A data set that papers report on, and what they make of it.

    `spelling` is what `read_data_set` takes, `between` stands between rows, and only the first `rows` count.
    """

    spelling: str
    between: str
    rows: int | None = None


# The joins of GPTQ's datautils.py (Frantar et al. 2023), which AWQ's numbers and most after them use.
PUBLISHED = {
    "wikitext2": _Published("wikitext2::test", "\n\n"),
    "c4": _Published("c4::validation", " ", 1100),
    LAMBADA: _Published("EleutherAI/lambada_openai:default:test:text", "\n\n"),
}


@dataclass(frozen=True)
class EvaluationText:
    """A text and what it is called.

    Attributes:
        name: "builtin", a published name, or the file as it was given.
        text: all of it.
    """

    name: str
    text: str

    @property
    def sha256(self) -> str:
        """Of the text in UTF-8."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def read_text(data: str | Path = BUILTIN, path: str | Path | None = None) -> EvaluationText:
    """The text that `data` names.

    Args:
        data: one of the spellings at the top of this file, but lambada.
        path: a local copy of the rows of wikitext2 or c4: Parquet, JSON lines, a JSON array, text with a row a line, or
            a folder of these; None for the hub's.

    Raises:
        ConfigError: it cannot be read, is not text, is not in reach, or is no text to measure perplexity on.
    """
    name = str(data)
    if name == LAMBADA:
        raise ConfigError("data lambada: a test of last words, not one text; expected halfbyte eval --data lambada")
    if name in PUBLISHED and not Path(name).exists():
        return EvaluationText(name, PUBLISHED[name].between.join(_published_rows(name, path)))
    if path is not None:
        raise ConfigError(f"data_path {path}: only for {', '.join(PUBLISHED)}; expected the file itself as data")
    if name == BUILTIN:
        from halfbyte.quantization.calibration_sources import builtin_documents

        return EvaluationText(BUILTIN, "\n\n".join(builtin_documents("heldout")))
    if _is_rows(name):
        return EvaluationText(name, "\n\n".join(_rows(name)))
    return EvaluationText(name, _plain_text(name))


def read_passages(path: str | Path | None = None) -> list[str]:
    """The 5,153 passages of LAMBADA (Paperno et al. 2016) in OpenAI's form, or those of a local copy.

    Args:
        path: as for `read_text`; None for the hub's EleutherAI/lambada_openai.

    Raises:
        ConfigError: it cannot be read or is not in reach.
    """
    return list(_published_rows(LAMBADA, path))


def _published_rows(name: str, path: str | Path | None) -> Iterable[str]:
    published = PUBLISHED[name]
    spelling = published.spelling if path is None else _local(published.spelling, Path(path))
    if path is None or _is_rows(spelling):
        rows: Iterable[str] = _rows(spelling, None if path else name)
    else:
        rows = io.StringIO(_plain_text(spelling), newline="\n")
    if name == "wikitext2":  # a line a row, with its end; of a blank one nothing is left
        rows = (row if row.strip() else "" for row in rows)
    else:
        rows = (stripped for row in rows if (stripped := row.strip("\n")))
    return islice(rows, published.rows)


def _local(spelling: str, path: Path) -> str:
    """A local copy of what `spelling` names, as `_rows` takes it: of a folder the same configuration and split."""
    from halfbyte.quantization.calibration_datasets import SHORT_NAMES

    if not path.exists():
        raise ConfigError(f"data_path {path}: expected a file or a folder, there is none")
    if path.is_file():
        return str(path)
    name, config, split, *field = spelling.split(":")
    subfolder = path / (SHORT_NAMES[name][1] or "" if name in SHORT_NAMES else config)
    return ":".join((str(subfolder if subfolder.is_dir() else path), "", split, *field))


def _is_rows(name: str) -> bool:
    """Whether a spelling stands for rows rather than for one text."""
    from halfbyte.quantization.calibration_datasets import names_data_set

    path = Path(name)
    if path.is_file():
        return path.suffix in (*LIBRARY_SUFFIXES, *ROW_SUFFIXES)
    return names_data_set(name)


def _rows(spelling: str, published: str | None = None) -> Iterator[str]:
    """The documents of a data set or of a file of rows."""
    from halfbyte.quantization.calibration_datasets import read_data_set
    from halfbyte.quantization.calibration_sources import document_of, read_documents

    try:
        if Path(spelling).suffix in ROW_SUFFIXES and Path(spelling).is_file():
            documents: Iterable[object] = read_documents(spelling)
        else:
            found = read_data_set(spelling, splits=SPLITS, articles=False)
            documents = (row if isinstance(row, str) else document_of(row, field, at) for row, field, at in found)
        for number, document in enumerate(documents, start=1):
            if not isinstance(document, str):
                raise ConfigError(f"data {spelling}, row {number}: a conversation; expected text")
            yield document
    except CalibrationError as error:  # the same readers, which speak of calibration
        reason = str(error).removeprefix("calibration ")
        hint = f"; or give a copy of it: --data {published} --data-path FILE" if published else ""
        raise ConfigError(f"data {reason}{hint}") from None


def _plain_text(name: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"data {name}: not UTF-8 text (byte {error.start}); convert it first") from None
    except OSError as error:
        raise ConfigError(
            f"data {name}: cannot be read ({error.strerror}); expected builtin, {', '.join(PUBLISHED)}, a file of text "
            "or rows, or NAME:CONFIG:SPLIT of a data set"
        ) from None
