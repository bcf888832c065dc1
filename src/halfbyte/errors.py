"""The one family of errors halfbyte raises on purpose.

Every message names the file, tensor, shape or flag at fault, what was expected and what to do. The command line
prints it as one line and exits with code 2; anything that is not a `HalfbyteError` is a bug and keeps its traceback.
"""


class HalfbyteError(Exception):
    """Base of every error raised on purpose."""


class ModelNotFoundError(HalfbyteError):
    """A MODEL argument names nothing that can be opened."""


class CheckpointError(HalfbyteError):
    """A file on disk is missing, truncated, malformed or contradicts another file."""


class ConfigError(HalfbyteError, ValueError):
    """An option has a value that cannot work, alone or with the model at hand."""


class CalibrationError(HalfbyteError, ValueError):
    """The calibration text cannot serve: empty, too short, or not text."""


class OutputError(HalfbyteError):
    """The result cannot be written: the folder is taken, the disk is full."""


class UnsupportedError(HalfbyteError):
    """Something sound that halfbyte cannot do: an architecture, a layout, a missing instruction set."""
