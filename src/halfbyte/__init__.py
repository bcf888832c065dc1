"""halfbyte: any Hugging Face causal language model in 4 bits, run fast, with nothing hidden.

The public API, stable from version 0.1 on. Names are resolved when first used, so `import halfbyte` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from halfbyte.registration import register_with_transformers

if TYPE_CHECKING:
    from halfbyte.conversion.convert import convert
    from halfbyte.conversion.gguf_file import export_gguf
    from halfbyte.conversion.result import Conversion
    from halfbyte.conversion.verification import Verification
    from halfbyte.conversion.verify import verify
    from halfbyte.device.snapshot import Snapshot, snapshot
    from halfbyte.device.timing import Benchmarker, CUDATimer, Timer, profile_scope
    from halfbyte.errors import HalfbyteError
    from halfbyte.evaluation.compare import compare
    from halfbyte.evaluation.comparison import Comparison
    from halfbyte.evaluation.harness import evaluate_tasks
    from halfbyte.evaluation.perplexity import perplexity
    from halfbyte.evaluation.profile import profile
    from halfbyte.evaluation.profile_result import Profile
    from halfbyte.generation.chat import Chat
    from halfbyte.generation.loop import Generation
    from halfbyte.generation.model import Model, load
    from halfbyte.publishing.card import model_card
    from halfbyte.quantization.config import QuantConfig
    from halfbyte.quantization.pipeline import quantize
    from halfbyte.quantization.report import QuantizationReport
    from halfbyte.report.build import build_report
    from halfbyte.report.html_report import Report
    from halfbyte.runtime.transformers_quantizer import HalfbyteConfig
    from halfbyte.sampling.rejection import rejection_sample
    from halfbyte.tensor import QuantizedTensor

__version__ = "0.1.0"

_HOMES = {
    "Benchmarker": "halfbyte.device.timing",
    "CUDATimer": "halfbyte.device.timing",
    "Chat": "halfbyte.generation.chat",
    "Comparison": "halfbyte.evaluation.comparison",
    "Conversion": "halfbyte.conversion.result",
    "Generation": "halfbyte.generation.loop",
    "HalfbyteConfig": "halfbyte.runtime.transformers_quantizer",
    "HalfbyteError": "halfbyte.errors",
    "Model": "halfbyte.generation.model",
    "Profile": "halfbyte.evaluation.profile_result",
    "QuantConfig": "halfbyte.quantization.config",
    "QuantizationReport": "halfbyte.quantization.report",
    "QuantizedTensor": "halfbyte.tensor",
    "Report": "halfbyte.report.html_report",
    "Snapshot": "halfbyte.device.snapshot",
    "Timer": "halfbyte.device.timing",
    "Verification": "halfbyte.conversion.verification",
    "build_report": "halfbyte.report.build",
    "compare": "halfbyte.evaluation.compare",
    "convert": "halfbyte.conversion.convert",
    "evaluate_tasks": "halfbyte.evaluation.harness",
    "export_gguf": "halfbyte.conversion.gguf_file",
    "load": "halfbyte.generation.model",
    "model_card": "halfbyte.publishing.card",
    "perplexity": "halfbyte.evaluation.perplexity",
    "profile": "halfbyte.evaluation.profile",
    "profile_scope": "halfbyte.device.timing",
    "quantize": "halfbyte.generation.self_calibration",
    "rejection_sample": "halfbyte.sampling.rejection",
    "snapshot": "halfbyte.device.snapshot",
    "verify": "halfbyte.conversion.verify",
}

__all__ = [
    "Benchmarker",
    "CUDATimer",
    "Chat",
    "Comparison",
    "Conversion",
    "Generation",
    "HalfbyteConfig",
    "HalfbyteError",
    "Model",
    "Profile",
    "QuantConfig",
    "QuantizationReport",
    "QuantizedTensor",
    "Report",
    "Snapshot",
    "Timer",
    "Verification",
    "build_report",
    "compare",
    "convert",
    "evaluate_tasks",
    "export_gguf",
    "load",
    "model_card",
    "perplexity",
    "profile",
    "profile_scope",
    "quantize",
    "rejection_sample",
    "snapshot",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'halfbyte' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


register_with_transformers()
