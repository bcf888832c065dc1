"""`compare`: models side by side on one text, in one process: size, quality with its uncertainty, speed."""

from __future__ import annotations

import json
import string
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil
import torch

from halfbyte.architectures.skeleton import build_skeleton
from halfbyte.architectures.tokenizer import load_tokenizer
from halfbyte.checkpoints.reader import Checkpoint, read_config, read_json_object
from halfbyte.checkpoints.sources import resolve_model
from halfbyte.device.cpu import cpu_info, pick_tier, thread_count
from halfbyte.device.torch_device import pick_device
from halfbyte.errors import ConfigError, UnsupportedError
from halfbyte.evaluation.bootstrap import CONFIDENCE, RESAMPLES, bootstrap_mean
from halfbyte.evaluation.closeness import WindowMeasures, measure_windows
from halfbyte.evaluation.comparison import Comparison, Side, pair_up
from halfbyte.evaluation.nf4 import QUANTIZATION, SUFFIX, check_nf4, load_nf4
from halfbyte.evaluation.texts import BUILTIN, EvaluationText, read_text
from halfbyte.evaluation.throughput import Throughput, measure_throughputs
from halfbyte.generation.model import Model, load
from halfbyte.quantization.identity import versions
from halfbyte.quantization.on_the_fly import CALIB_SAMPLES, CALIB_SEQ_LEN, model_folder, parse_copy_request
from halfbyte.quantization.report import MANIFEST_NAME

WINDOW = 512
SEED = 0


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        windows: of text at most.
        max_calib_samples: of models quantized on the fly.
        max_calib_seq_len: likewise.
        prompt_tokens: of the speed measurement.
        new_tokens: likewise.
        repeats: likewise.
    """

    windows: int
    max_calib_samples: int
    max_calib_seq_len: int
    prompt_tokens: int
    new_tokens: int
    repeats: int


FULL = Effort(64, CALIB_SAMPLES, CALIB_SEQ_LEN, 256, 64, 5)
# Two AWQ searches of a 135M model and the rest in four minutes on two cores.
QUICK = Effort(16, 16, 256, 128, 32, 3)


def compare(
    *models: str | Path,
    data: str | Path = BUILTIN,
    window: int = WINDOW,
    n_samples: int | None = None,
    skip_original: bool = False,
    skip_speed: bool = False,
    quick: bool = False,
    progress: bool = True,
    **loading: Any,
) -> Comparison:
    """Measure models side by side: size, perplexity, divergence from the first, speed; and say what differs.

    All of them are in memory together, so that each window of text and each round of timing goes through all in turn.
    They must share a tokenizer. Perplexity, divergence and every two models' difference carry a bootstrap confidence
    interval over windows; see `bootstrap`.

    Args:
        models: folders, "sample:NAME", hub names, or any of these with @METHOD, which are quantized on the built-in
            calibration text and kept in the cache (`halfbyte.quantization.on_the_fly`). @nf4 is bitsandbytes' 4-bit
            normal float (extra `nf4`). The first model is the reference.
        data: "builtin" (the part of Python's prose that nothing is calibrated on), or a UTF-8 text file.
        window: tokens of context; windows do not overlap.
        n_samples: windows to measure at most, from the beginning of the text; None for 64, or 16 where `quick`.
        skip_original: do not load models that are not quantized: of them only the size on disk is told. Then the
            first of the others is the reference.
        skip_speed: do not time prefill and decoding.
        quick: calibrate on 16 × 256 tokens instead of 128 × 512, measure fewer windows and shorter runs. The verdict
            is provisional.
        progress: show bars on a terminal.
        loading: `device`, `backend`, `compute`, `head_bits` and what else `load` takes; the same for all models.

    Raises:
        ConfigError: fewer than two models, tokenizers that differ, too little text or memory, or nothing to measure.
        HalfbyteError: a model that cannot be opened or quantized.
    """
    started = time.monotonic()
    effort = QUICK if quick else FULL
    n_samples = effort.windows if n_samples is None else n_samples
    _check(models, window, n_samples)
    text = read_text(data)
    contestants = [_Contestant(name, label) for name, label in zip(models, string.ascii_uppercase, strict=False)]
    chosen = [one for one in contestants if one.quantized or not skip_original]
    if not chosen:
        raise ConfigError("skip_original: none of these models is quantized, so nothing would be measured")
    windows = _windows(_shared_tokenizer(chosen), text, window, n_samples)
    for one in contestants:
        one.make(effort, progress)
    _check_memory(chosen, loading)
    loaded = [one.load(loading) for one in chosen]
    running = [model for model, _ in loaded]
    measures = measure_windows(running, windows, progress=progress)
    speeds = [None] * len(running) if skip_speed else _speeds(running, effort, progress)

    tokens = [len(ids) - 1 for ids in windows]
    measured = {
        one.label: _measured(one.side(contestants[0]), *loaded[index], measures[index], tokens, speeds[index])
        for index, one in enumerate(chosen)
    }
    sides = tuple(measured.get(one.label) or one.side(contestants[0]) for one in contestants)
    calibrated = any(one.calibrated for one in contestants)
    return Comparison(
        sides=sides,
        pairs=pair_up(sides, tokens, reference=chosen[0].label, seed=SEED),
        reference=chosen[0].label,
        provisional=quick,
        calibration=(
            {"max_calib_samples": effort.max_calib_samples, "max_calib_seq_len": effort.max_calib_seq_len}
            if calibrated
            else None
        ),
        text={
            "name": text.name,
            "sha256": text.sha256,
            "characters": len(text.text),
            "windows": len(windows),
            "window": window,
            "tokens": tokens,
        },
        manifest=_manifest(loading),
        seconds=time.monotonic() - started,
    )


class _Contestant:
    """A model on its way: named, found, quantized if it must be."""

    def __init__(self, model: str | Path, label: str):
        self.name, self.label = str(model), label
        self.nf4 = self.name.endswith(SUFFIX) and not Path(self.name).is_dir()
        if self.nf4:
            check_nf4(self.name)
        request = None if self.nf4 else parse_copy_request(model)
        # Of MODEL@METHOD the model that the copy is made from, until `make`.
        name = self.name.removesuffix(SUFFIX) if self.nf4 else model
        plain = request is None and not self.nf4
        self.folder = model_folder(name) if plain else resolve_model(name if request is None else request.model)
        self.on_the_fly = request is not None
        self.calibrated = request is not None and request.config.calibrated
        stored = "quantization_config" in read_config(self.folder)
        if stored and self.nf4:
            raise UnsupportedError(f"{self.name}: the model is quantized already; give the 16-bit model it came from")
        self.quantized = stored or self.nf4 or self.on_the_fly
        self.tensor_bytes = 0

    def make(self, effort: Effort, progress: bool) -> None:
        """Quantize it unless that is done; from here on `folder` is where it is."""
        if self.on_the_fly:
            self.folder = model_folder(
                self.name,
                max_calib_samples=effort.max_calib_samples,
                max_calib_seq_len=effort.max_calib_seq_len,
                progress=progress,
            )
        self.tensor_bytes = Checkpoint.open(self.folder).total_bytes

    @property
    def disk_bytes(self) -> int | None:
        """Of all its tensors on disk; None of what is never stored."""
        return None if self.nf4 else self.tensor_bytes

    def load(self, loading: dict[str, Any]) -> tuple[Model, float]:
        """The model and the seconds it took to load, without the import of its architecture's code."""
        build_skeleton(str(self.folder), torch.bfloat16)
        if self.nf4:
            import_module("bitsandbytes")
        start = time.perf_counter()
        model = (
            load_nf4(self.folder, device=loading.get("device", "auto")) if self.nf4 else load(self.folder, **loading)
        )
        return model, time.perf_counter() - start

    def side(self, first: _Contestant) -> Side:
        """What is known without loading it."""
        mine, other = self.disk_bytes, first.disk_bytes
        return Side(
            label=self.label,
            name=self.name,
            folder=self.folder,
            quantized=self.quantized,
            measured=False,
            disk_bytes=mine,
            compression=None if mine is None or other is None else other / mine,
            quantization=self._quantization(),
        )

    def _quantization(self) -> dict[str, Any] | None:
        if self.nf4:
            return dict(QUANTIZATION)
        manifest = self.folder / MANIFEST_NAME
        document = read_json_object(manifest) if manifest.is_file() else {}
        if "config" in document:  # a conversion of someone else's checkpoint has a manifest without one
            return {key: document.get(key) for key in ("model", "config", "calibration")}
        stored: dict[str, Any] | None = read_config(self.folder).get("quantization_config")
        return stored


def _check(models: Sequence[str | Path], window: int, n_samples: int) -> None:
    most = len(string.ascii_uppercase)
    if not 2 <= len(models) <= most:
        raise ConfigError(f"compare: expected 2 to {most} models, got {len(models)}; such as MODEL MODEL@awq")
    if window < 2:
        raise ConfigError(f"window: expected at least 2 tokens, got {window}")
    if n_samples < 1:
        raise ConfigError(f"n_samples: expected at least 1 window, got {n_samples}")


def _shared_tokenizer(contestants: Sequence[_Contestant]) -> Any:
    """The first one's; refused where another model's token ids mean something else."""
    mine = load_tokenizer(contestants[0].folder)
    vocabulary = mine.get_vocab()
    for other in contestants[1:]:
        if other.folder == contestants[0].folder:
            continue
        if load_tokenizer(other.folder).get_vocab() != vocabulary:
            raise ConfigError(
                f"{other.name}: has another tokenizer than {contestants[0].name}, so that their losses are of "
                "different tokens; compare models that share one"
            )
    return mine


def _windows(tokenizer: Any, text: EvaluationText, window: int, n_samples: int) -> list[torch.Tensor]:
    ids = tokenizer(text.text, add_special_tokens=False, verbose=False, return_tensors="pt")["input_ids"][0]
    windows = [part for part in ids.split(window) if len(part) > 1][:n_samples]
    if not windows:
        raise ConfigError(f"data {text.name}: expected at least two tokens to predict one from another, got {len(ids)}")
    return windows


def _check_memory(contestants: Sequence[_Contestant], loading: dict[str, Any]) -> None:
    """Refuse what would be killed: all models are in memory together."""
    if pick_device(loading.get("device", "auto")).type != "cpu":
        return
    needed = sum(one.tensor_bytes for one in contestants)
    free = psutil.virtual_memory().available
    if needed > free:
        raise ConfigError(
            f"compare: the models need {needed / 1e9:.1f} GB together, {free / 1e9:.1f} GB are free; compare fewer "
            "at a time, or leave out the unquantized ones with --skip-original (skip_original=True)"
        )


def _speeds(models: Sequence[Model], effort: Effort, progress: bool) -> Sequence[Throughput | None]:
    return measure_throughputs(
        models,
        prompt_tokens=effort.prompt_tokens,
        new_tokens=effort.new_tokens,
        repeats=effort.repeats,
        progress=progress,
    )


def _measured(
    side: Side, model: Model, seconds: float, measures: WindowMeasures, tokens: Sequence[int], speed: Throughput | None
) -> Side:
    agreement = None
    if measures.agreement:
        agreement = sum(share * n for share, n in zip(measures.agreement, tokens, strict=True)) / sum(tokens)
    return replace(
        side,
        measured=True,
        memory_bytes=model.nbytes,
        load_seconds=seconds,
        engine=model.engine.name,
        not_fused=model.not_fused,
        kernels=model.kernels,
        window_nll=tuple(measures.nll),
        window_kl=tuple(measures.kl),
        window_agreement=tuple(measures.agreement),
        perplexity=bootstrap_mean(measures.nll, tokens, seed=SEED).exp(),
        kl=bootstrap_mean(measures.kl, tokens, seed=SEED) if measures.kl else None,
        top1_agreement=agreement,
        throughput=speed,
    )


def _manifest(loading: dict[str, Any]) -> dict[str, Any]:
    return {
        "versions": versions(),
        "machine": asdict(cpu_info()),
        "tier": pick_tier(),
        "threads": thread_count(),
        "loading": json.loads(json.dumps(loading, default=str)),
        "bootstrap": {"resamples": RESAMPLES, "confidence": CONFIDENCE, "seed": SEED},
    }
