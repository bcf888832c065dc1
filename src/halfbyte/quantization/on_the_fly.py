"""MODEL@METHOD: a 4-bit copy that is made when it is first asked for, and kept in the cache.

sample:smollm2-135m@awq                     a method as `halfbyte quantize --method` has it
my-model@awq-l2:group_size=32,bits=3        and fields of `QuantConfig`
organisation/name@rtn:modules_to_not_convert=v_proj+o_proj

What decides about the copy decides about its folder: another model, option, calibration or version is another copy.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from halfbyte.checkpoints.cache import cache_folder
from halfbyte.checkpoints.disk import writes_explained
from halfbyte.checkpoints.gguf_copy import gguf_folder, is_gguf
from halfbyte.checkpoints.reader import read_config
from halfbyte.checkpoints.sources import HUB_PATTERNS, resolve_model
from halfbyte.errors import ConfigError, UnsupportedError
from halfbyte.formats.gguf_linears import CodedLinears
from halfbyte.quantization.config import METHODS, SPELLINGS, QuantConfig

# What `quantize` takes where nothing else is said: MODEL@awq is what `halfbyte quantize MODEL` makes.
CALIB_SAMPLES, CALIB_SEQ_LEN = 128, 512
BOOLEANS = {"true": True, "yes": True, "false": False, "no": False}
WHOLE = re.compile(r"-?\d{1,9}")


@dataclass(frozen=True)
class CopyRequest:
    """MODEL@METHOD, taken apart.

    Attributes:
        model: what stands before the @.
        config: the quantization that stands after it.
    """

    model: str
    config: QuantConfig


def model_folder(
    model: str | Path,
    *,
    max_calib_samples: int = CALIB_SAMPLES,
    max_calib_seq_len: int = CALIB_SEQ_LEN,
    progress: bool = True,
) -> Path:
    """The folder of a model; fetched, and for MODEL@METHOD quantized, if it is not there yet.

    Of a GGUF file the linears stay the codes they are, in halfbyte's own layout.

    Args:
        model: an existing folder (which always wins), a GGUF file, "sample:NAME", a hub name, or one of these with
            @METHOD.
        max_calib_samples: of a copy, blocks of the built-in calibration text at most.
        max_calib_seq_len: of a copy, tokens in a block at most.
        progress: show bars on a terminal, and say when a copy is made.

    Raises:
        HalfbyteError: no such model or method, an option that cannot work, or a model that is quantized already.
    """
    if is_gguf(model):
        linears = CodedLinears()
        return gguf_folder(model, pack=linears.pack, section=linears.section, progress=progress)
    request = parse_copy_request(model)
    if request is None:
        return resolve_model(model, progress=progress)
    return quantized_copy(
        resolve_model(request.model, progress=progress),
        request.config,
        max_calib_samples=max_calib_samples,
        max_calib_seq_len=max_calib_seq_len,
        progress=progress,
    )


def parse_copy_request(model: str | Path) -> CopyRequest | None:
    """MODEL@METHOD taken apart; None if it is a plain model.

    Args:
        model: as a user writes it.

    Raises:
        ConfigError: no such method or option, or options that cannot work.
    """
    text = str(model)
    name, at, described = text.rpartition("@")
    # Folders may have an @ in their names, wherever in their path.
    if not at or not name or "/" in described or os.path.isdir(os.path.expanduser(text)):  # noqa: PTH111, PTH112
        return None
    method, _, listed = described.partition(":")
    if method not in METHODS:
        raise ConfigError(
            f"{text}: no such method {method!r}; expected MODEL@METHOD, METHOD out of {', '.join(METHODS)}"
        )
    values: dict[str, Any] = {"method": method}
    for part in filter(None, listed.split(",")):
        option, equals, value = part.partition("=")
        if not equals or not value or option in values:
            raise ConfigError(f"{text}: {part!r}: expected OPTION=VALUE, each once, such as @awq:group_size=32,bits=3")
        values[option] = _parse(text, option, value)
    try:
        return CopyRequest(name, QuantConfig.from_dict(values))
    except ConfigError as error:
        raise ConfigError(f"{text}: {error}") from None


def quantized_copy(
    folder: Path,
    config: QuantConfig,
    *,
    max_calib_samples: int = CALIB_SAMPLES,
    max_calib_seq_len: int = CALIB_SEQ_LEN,
    progress: bool = True,
) -> Path:
    """The folder of a model's quantized copy, which is made if it is not in the cache yet; whole, or not at all.

    An interrupted run goes on where it was, as with `quantize`.

    Args:
        folder: of the model, not quantized.
        config: what to do to it.
        max_calib_samples: blocks of the built-in calibration text at most.
        max_calib_seq_len: tokens in a block at most.
        progress: show bars on a terminal, and say that a copy is made.

    Raises:
        UnsupportedError: the model is quantized already.
        HalfbyteError: it cannot be quantized so, or the cache cannot be written.
    """
    if "quantization_config" in read_config(folder):
        raise UnsupportedError(
            f"{folder}@{config.method}: the model is quantized already; give the 16-bit model it came from, "
            f"or leave @{config.method} out"
        )
    blocks = (max_calib_samples, max_calib_seq_len) if config.calibrated else None
    copy = cache_folder() / "quantized" / f"{folder.name}-{config.method}-{_identity(folder, config, blocks)}"
    if (copy / "config.json").is_file():
        return copy
    if progress:
        text = f" on {blocks[0]} × {blocks[1]} tokens at most of the built-in text" if blocks else ""
        print(f"halfbyte: quantizing {folder.name} with {config.method}{text}, once; kept in {copy}", file=sys.stderr)
    from halfbyte.quantization.pipeline import quantize

    with writes_explained(copy):
        copy.parent.mkdir(parents=True, exist_ok=True)
    quantize(
        folder.absolute(),
        copy,
        config,
        max_calib_samples=max_calib_samples,
        max_calib_seq_len=max_calib_seq_len,
        overwrite=True,  # of an unfinished copy that another machine began
        progress=progress,
    )
    return copy


def _parse(text: str, option: str, value: str) -> Any:
    """The value as the type of its field; fields that do not exist are for `QuantConfig` to refuse."""
    kinds = {field.name: str(field.type) for field in fields(QuantConfig)}
    kind = kinds.get(SPELLINGS.get(option, option), "str")
    if "bool" in kind and value in BOOLEANS:
        return BOOLEANS[value]
    if "int" in kind and WHOLE.fullmatch(value):
        return int(value)
    if "float" in kind:
        try:
            return float(value)
        except ValueError:
            pass
    if "tuple" in kind:
        return tuple(value.split("+"))
    if "str" in kind or "Literal" in kind:
        return value
    wanted = "true or false" if "bool" in kind else "a whole number" if "int" in kind else "a number"
    raise ConfigError(f"{text}: {option}={value}: expected {wanted}")


def _identity(folder: Path, config: QuantConfig, blocks: tuple[int, int] | None) -> str:
    """Hash of all that the manifest of the copy would tell from that of another."""
    from halfbyte.quantization.identity import versions

    identity = {
        "model": _fingerprint(folder),
        "config": config.to_dict(),
        "calibration": None if blocks is None else [*blocks, _builtin_text()],
        **versions(),
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _fingerprint(folder: Path) -> list[str]:
    """Names, sizes and times of the files a copy is made from; reading them would take as long as loading."""
    files = {path for pattern in HUB_PATTERNS for path in folder.glob(pattern) if path.is_file()}
    facts = ((path.name, path.stat()) for path in sorted(files))
    return [f"{name} {fact.st_size} {fact.st_mtime_ns}" for name, fact in facts]


def _builtin_text() -> str:
    """Hash of the built-in calibration text, which comes with Python and changes with it."""
    from halfbyte.quantization.calibration_sources import builtin_documents

    digest = hashlib.sha256()
    for document in builtin_documents():
        digest.update(document.encode())
    return digest.hexdigest()
