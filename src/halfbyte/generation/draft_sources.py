"""What `draft=` may name, and the drafter that it becomes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.errors import ConfigError, UnsupportedError
from halfbyte.generation.drafting import Drafter, ModelDrafter, NgramDrafter
from halfbyte.quantization.config import QuantConfig
from halfbyte.quantization.on_the_fly import model_folder, quantized_copy
from halfbyte.runtime.decoder import NativeDecoder
from halfbyte.runtime.engine import Engine
from halfbyte.runtime.torch_decoder import TorchDecoder

if TYPE_CHECKING:
    from halfbyte.generation.model import Model

NGRAM, INT4, SKIP = "ngram", "int4", "skip"
DRAFT_HEAD_BITS = 4
# Layers that a self-draft leaves out of three, but for the first and the last few.
EDGE_LAYERS = 2


def make_drafter(model: Model, draft: str | Path) -> Drafter:
    """The drafter that a name means.

    Args:
        model: the target.
        draft: "ngram" (what followed the same tokens before), "int4" (the model's own 4-bit copy, made once and kept
            in the cache), "skip" (the model itself without every second layer), or another model with the same
            tokenizer: a folder, "sample:NAME", a hub name, or one of these with @METHOD.

    Raises:
        UnsupportedError: a draft that the model cannot have.
        ConfigError: a model with another tokenizer.
        HalfbyteError: a model that cannot be loaded.
    """
    if draft == NGRAM:
        return NgramDrafter()
    if draft == SKIP:
        return ModelDrafter(_without_layers(model), "skip", vocabulary=model.engine.vocabulary)
    if draft == INT4:
        if model.quantized:
            raise UnsupportedError(
                f"draft int4: {model.folder} is quantized already, so a 4-bit copy would be no faster; try ngram"
            )
        folder = quantized_copy(model.folder, QuantConfig())
    else:
        folder = model_folder(draft)
    from halfbyte.generation.model import load

    # A draft needs to be cheap rather than exact: a head of 4 bits halves what it reads most of.
    bits: Any = DRAFT_HEAD_BITS if draft == INT4 else "auto"
    other = load(folder, device=str(model.device), head_bits=bits)
    _check_tokenizers(model, other)
    return ModelDrafter(other.engine, str(draft), vocabulary=model.engine.vocabulary)


def draft_cost(target: Engine, drafter: Drafter) -> float:
    """Of a draft step, in target steps: the ratio of what they read."""
    if not isinstance(drafter, ModelDrafter):
        return 0.0
    return _step_bytes(drafter.engine) / _step_bytes(target)


def _without_layers(model: Model) -> Engine:
    engine = model.engine
    if not isinstance(engine, NativeDecoder | TorchDecoder):
        raise UnsupportedError(
            f"draft skip: the fused decoder does not run {model.folder}: {model.not_fused}; try ngram"
        )
    layers = engine.record.layers
    kept = [n for n in range(layers) if n < EDGE_LAYERS or n >= layers - EDGE_LAYERS or n % 2 == 0]
    if len(kept) == layers:
        raise UnsupportedError(f"draft skip: {model.folder} has {layers} layers, too few to leave any out; try ngram")
    return engine.with_layers(kept)


def _step_bytes(engine: Engine) -> int:
    return engine.step_bytes if isinstance(engine, NativeDecoder | TorchDecoder) else engine.nbytes


def _check_tokenizers(target: Model, draft: Model) -> None:
    """Refuse a draft whose token ids mean something else."""
    mine: dict[str, Any] = target.tokenizer.get_vocab()
    other: dict[str, Any] = draft.tokenizer.get_vocab()
    if mine == other:
        return
    differing = next((token for token in mine if other.get(token) != mine[token]), None)
    if differing is None:
        differing = next(token for token in other if token not in mine)
    raise ConfigError(
        f"draft {draft.folder}: has another tokenizer than {target.folder}: token {differing!r} is "
        f"{other.get(differing, 'missing')} there and {mine.get(differing, 'missing')} here; a draft must share it"
    )
