"""Named data sets, through the `datasets` library where it is installed.

A data set is spelled NAME[:CONFIG[:SPLIT[:FIELD]]]; NAME is a hub name, a local folder or one of `SHORT_NAMES`, and an
empty part takes its default: "wikitext2", "allenai/c4:en", "Salesforce/wikitext:wikitext-2-raw-v1:train",
"HuggingFaceH4/ultrachat_200k::train_sft:messages", "my-folder::test".
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from halfbyte.errors import CalibrationError

# name, configuration, split, field
SHORT_NAMES: dict[str, tuple[str, str | None, str, str]] = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "text"),
    "c4": ("allenai/c4", "en", "train", "text"),
    "pileval": ("mit-han-lab/pile-val-backup", None, "validation", "text"),
    "ultrachat": ("HuggingFaceH4/ultrachat_200k", None, "train_sft", "messages"),
}
# Read from the beginning of the split: some 4 million tokens, of which the seed picks.
READ_CHARACTERS = 16_000_000
ARTICLE = re.compile(r"\s*= [^=]+ =\s*")


def names_data_set(name: str) -> bool:
    """Whether a string that is no file reads as a data set: a short name, a folder, organisation/name, or colons."""
    first = name.partition(":")[0]
    if first in SHORT_NAMES or (first and Path(first).is_dir()):
        return True
    on_hub = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", first) is not None
    return on_hub and ("/" in first or ":" in name) and not first.endswith((".txt", ".md", ".json", ".jsonl", ".csv"))


def read_data_set(
    spelling: str, *, splits: Sequence[str] = ("train",), articles: bool = True
) -> Iterator[tuple[Any, str | None, str]]:
    """Rows of a data set, streamed from its beginning.

    Args:
        spelling: see above; NAME may also be a Parquet or a compressed JSON file, which has no splits.
        splits: where neither the spelling nor `SHORT_NAMES` names one, the first of these that there is.
        articles: put rows of WikiText, which are paragraphs, together to articles.

    Yields:
        The row, the field that holds the document (None to go by its name), and what the row is called in messages.

    Raises:
        CalibrationError: the library is missing, or says that the data set, configuration or split is.
    """
    parts = spelling.split(":")
    if len(parts) > 4:
        raise CalibrationError(f"calibration {spelling!r}: expected at most NAME:CONFIG:SPLIT:FIELD")
    defaults = SHORT_NAMES.get(parts[0], (parts[0], None, None, None))
    given = [None, *parts[1:], *[None] * (4 - len(parts))]
    name, config, split, field = (part or default for part, default in zip(given, defaults, strict=True))
    assert name is not None
    read = 0
    # The library raises whatever its loaders, parsers and connections raise, and when it is iterated, too.
    try:
        rows: Iterable[Any] = _open(spelling, name, config, split, splits)
        if articles and name.rpartition("/")[2].startswith("wikitext"):
            rows, field = filter(str.strip, _articles(rows, field or "text")), None
        for number, row in enumerate(rows, start=1):
            yield row, field, f"calibration {spelling}, row {number}"
            read += len(str(row))
            if read >= READ_CHARACTERS:
                return
    except CalibrationError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CalibrationError(f"calibration {spelling}: datasets cannot load it ({reason})") from error


def _open(spelling: str, name: str, config: str | None, split: str | None, splits: Sequence[str]) -> Iterable[Any]:
    """The rows of one split."""
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise CalibrationError(
            f"calibration {spelling}: named data sets need the datasets library: pip install datasets"
        ) from None
    path = Path(name)
    if (path / "state.json").is_file():  # written by save_to_disk, as are the next
        return datasets.load_from_disk(name)  # type: ignore[no-any-return]
    if (path / "dataset_dict.json").is_file():
        found = datasets.load_from_disk(name)
    elif path.is_file():
        kind = "parquet" if path.suffix == ".parquet" else "json"
        found, split = datasets.load_dataset(kind, data_files=name, streaming=True), "train"
    elif split is not None or len(splits) == 1:
        return datasets.load_dataset(name, config, split=split or splits[0], streaming=True)  # type: ignore[no-any-return]
    else:
        found = datasets.load_dataset(name, config, streaming=True)
    rows: Iterable[Any] = found[split or next((one for one in splits if one in found), splits[0])]
    return rows


def _articles(rows: Iterable[Any], field: str) -> Iterator[str]:
    """WikiText has a row for each paragraph: put together what stands under one title."""
    article: list[str] = []
    for row in rows:
        if ARTICLE.fullmatch(row[field]):
            yield "".join(article)
            article = []
        article.append(row[field])
    yield "".join(article)
