"""`build_report`: from models and documents to a `Report`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import halfbyte
from halfbyte.analysis.pair import N_SAMPLES, read_manifest
from halfbyte.analysis.result import Analysis
from halfbyte.analysis.weights import ERROR_LIMIT, WEIGHT_LIMIT, together
from halfbyte.errors import ConfigError, HalfbyteError
from halfbyte.evaluation.comparison import Comparison
from halfbyte.evaluation.profile_result import Profile
from halfbyte.quantization.calibration import Calibration
from halfbyte.quantization.on_the_fly import model_folder
from halfbyte.report.examined import ExaminedLinear, examine
from halfbyte.report.html_report import Report
from halfbyte.report.sections import Document, comparison_section, lessons_section, profile_section, speculation_section
from halfbyte.report.weight_plots import place_of

# Histograms and curves are kept of so many linears at most, over all models: about 4 kB each, 4 MB together.
DETAILED = 1000
ERROR_COLUMNS = (
    "out_features", "in_features", "bits", "group_size", "scale", "mse", "weight_error", "output_mse", "output_error",
    "weight_snr_db", "output_snr_db", "zero_point_gain_db", "stages_gain_db", "recorded_rtn", "recorded_scaled",
    "recorded_ranged", "recorded_stored",
)  # fmt: skip
ROUNDING_COLUMNS = ("weights", "up", "down", "exact", "bias", "rms", "clipped", "moved")
CHANNEL_COLUMNS = (
    "activation_share", "weight_ratio", "scale_ratio", "error_share_rtn", "error_share", "error_kept", "others_kept",
)  # fmt: skip


@dataclass(frozen=True)
class ExaminedModel:
    """A quantized model's part of a report.

    Attributes:
        label: its letter in the comparison; empty without one.
        analysis: of every linear.
        manifest: what `quantize` recorded; empty for a checkpoint made by others.
    """

    label: str
    analysis: Analysis[ExaminedLinear]
    manifest: dict[str, Any]


def build_report(
    model: str | Path | None = None,
    reference: str | Path | None = None,
    *,
    comparison: Comparison | Document | None = None,
    profile: Profile | Document | None = None,
    speculation: Mapping[str, Document] | None = None,
    lessons: Sequence[Document] = (),
    calibration: Calibration = "builtin",
    n_samples: int = N_SAMPLES,
    activations: bool = True,
    title: str | None = None,
    progress: bool = True,
) -> Report:
    """Gather what is known of a quantized checkpoint, or of all that a comparison is about, for one page.

    Args:
        model: a quantized checkpoint: a folder, a hub name, or MODEL@METHOD; None for those of a `Comparison` object.
        reference: the 16-bit model it came from; None for the one its manifest names.
        comparison: what `halfbyte.compare` found, or its `to_dict`. Of the object alone, every quantized model is
            examined; one that cannot be is named in the notes, with the reason.
        profile: what `halfbyte.profile` found, or its `to_dict`.
        speculation: what to call it → counters of a draft (`asdict(Speculation)`), or what `halfbyte generate --draft`
            prints with --json.
        lessons: `Lesson.to_dict` each, or what `halfbyte explain` prints with --json.
        calibration: text the activations are collected over, as `halfbyte.quantize` takes it.
        n_samples: blocks of 512 tokens of it at most.
        activations: False leaves them out, which saves running the model.
        title: of the page.
        progress: show bars on a terminal.

    Raises:
        ConfigError: nothing to report on, or a document that is something else.
        HalfbyteError: a bad model, reference or text.
    """
    if model is None and comparison is None and profile is None and not speculation and not lessons:
        raise ConfigError(
            "report: expected a model, a comparison, a profile, a draft's counters or a lesson to report on"
        )
    sections: dict[str, Any] = {"comparison": None, "profile": None, "speculation": None}
    if comparison is not None:
        sections["comparison"] = comparison_section(_document(comparison))
    if profile is not None:
        sections["profile"] = profile_section(_document(profile))
    if speculation:
        sections["speculation"] = speculation_section(speculation)
    settings: dict[str, Any] = {
        "calibration": calibration, "n_samples": n_samples, "activations": activations, "progress": progress
    }  # fmt: skip
    examined: list[ExaminedModel] = []
    notes: list[str] = []
    if model is not None:
        examined.append(_examine("", model, reference, settings))
    elif isinstance(comparison, Comparison):
        examined, notes = _examine_sides(comparison, settings)
    title = title or _title(examined, sections)
    models = _model_sections(examined)
    told = lessons_section(lessons)
    return Report(
        title, {"version": halfbyte.__version__, **sections, "models": models, "lessons": told, "notes": notes}
    )


def _examine(label: str, model: str | Path, reference: str | Path | None, settings: dict[str, Any]) -> ExaminedModel:
    analysis = examine(model, reference, **settings)
    return ExaminedModel(label, analysis, read_manifest(model_folder(model, progress=False)))


def _examine_sides(comparison: Comparison, settings: dict[str, Any]) -> tuple[list[ExaminedModel], list[str]]:
    """A report tells of what it could not look at; it does not fail after minutes of comparing."""
    examined, notes = [], []
    for side in comparison.sides:
        if not side.quantized:
            continue
        if side.disk_bytes is None:
            notes.append(f"{side.label} was quantized while it was loaded: there is no checkpoint to examine.")
            continue
        try:
            found = _examine(side.label, side.folder, None, settings)
        except HalfbyteError as error:
            notes.append(f"{side.label} was not examined layer by layer: {error}")
            continue
        # Its name as the user knows it, not where the cache has it.
        examined.append(replace(found, analysis=replace(found.analysis, model=side.name)))
    return examined, notes


def _document(found: Comparison | Profile | Document) -> Document:
    return found.to_dict() if isinstance(found, Comparison | Profile) else found


def _title(examined: Sequence[ExaminedModel], sections: Mapping[str, Any]) -> str:
    if sections["comparison"] is not None:
        return " · ".join(sections["comparison"]["names"])
    if examined:
        return f"{Path(examined[0].analysis.model).name} from {_shown(examined[0].analysis.reference)}"
    if sections["profile"] is not None:
        return "Profile"
    return "Speculative decoding" if sections["speculation"] is not None else "Lessons"


def _shown(name: str) -> str:
    """A page is sent to others: of a folder of this machine only the name."""
    return Path(name).name if Path(name).is_absolute() else name


def _model_sections(examined: Sequence[ExaminedModel]) -> list[dict[str, Any]]:
    allowed = DETAILED // max(len(examined), 1)
    return [_model_section(one, allowed) for one in examined]


def _model_section(one: ExaminedModel, allowed: int) -> dict[str, Any]:
    layers = one.analysis.layers
    total = together("all", [layer.weights for layer in layers])
    places = [place_of(layer.name) for layer in layers]
    worst = sorted(range(len(layers)), key=lambda index: -_badness(layers[index]))
    detailed = set(worst[:allowed])
    columns: dict[str, list[Any]] = {
        "name": [layer.name for layer in layers],
        "kind": [kind for kind, _ in places],
        "block": [block for _, block in places],
    }
    for names, part in ((ERROR_COLUMNS, "error"), (ROUNDING_COLUMNS, "rounding"), (CHANNEL_COLUMNS, "channels")):
        for name in names:
            columns[name] = [getattr(getattr(layer, part), name, None) for layer in layers]
    columns["critical"] = [None if layer.channels is None else len(layer.channels.critical) for layer in layers]
    columns["entropy"] = [layer.weights.entropy for layer in layers]
    return {
        "label": one.label,
        "name": one.analysis.model,
        "reference": _shown(one.analysis.reference),
        "calibration": one.analysis.calibration,
        "limits": {"weights": WEIGHT_LIMIT, "errors": ERROR_LIMIT},
        "columns": columns,
        "details": [layer.to_dict() if index in detailed else None for index, layer in enumerate(layers)],
        "total": {
            "weights": total.weights,
            "entropy": total.entropy,
            "code_bits": total.code_bits,
            **{
                name: [histogram.below, *histogram.counts, histogram.above]
                for name, histogram in (("before", total.before), ("after", total.after), ("errors", total.errors))
            },
            "codes": total.codes,
        },
        "manifest": {key: value for key, value in one.manifest.items() if key not in ("linears", "sha256")},
    }


def _badness(layer: ExaminedLinear) -> float:
    error = layer.error.output_error
    return layer.error.weight_error if error is None else error
