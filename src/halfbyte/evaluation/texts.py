"""The text that models are measured on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from halfbyte.errors import ConfigError

BUILTIN = "builtin"


@dataclass(frozen=True)
class EvaluationText:
    """A text and what it is called.

    Attributes:
        name: "builtin", or the file as it was given.
        text: all of it.
    """

    name: str
    text: str

    @property
    def sha256(self) -> str:
        """Of the text in UTF-8."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def read_text(data: str | Path = BUILTIN) -> EvaluationText:
    """The text that `data` names.

    Args:
        data: "builtin" (the part of Python's prose that nothing is calibrated on), or a UTF-8 text file.

    Raises:
        ConfigError: the file cannot be read, or is not UTF-8.
    """
    if data == BUILTIN:
        from halfbyte.quantization.calibration_sources import builtin_documents

        return EvaluationText(BUILTIN, "\n\n".join(builtin_documents("heldout")))
    try:
        return EvaluationText(str(data), Path(data).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"data {data}: not UTF-8 text (byte {error.start}); convert it first") from None
    except OSError as error:
        raise ConfigError(
            f"data {data}: cannot be read ({error.strerror}); expected builtin or a UTF-8 text file"
        ) from None
