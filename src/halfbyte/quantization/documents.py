"""The files of a new checkpoint beside its tensors."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mode

from halfbyte.checkpoints.reader import Checkpoint
from halfbyte.checkpoints.writer import CheckpointWriter
from halfbyte.formats import gemm, native
from halfbyte.quantization.report import MANIFEST_NAME, QuantizationReport
from halfbyte.quantization.widening import Widening


def write_documents(
    writer: CheckpointWriter, checkpoint: Checkpoint, report: QuantizationReport, not_converted: Sequence[str]
) -> None:
    """config.json with its `quantization_config`, the manifest with the hashes of the tensors, and the tokenizer files.

    Args:
        writer: of the new checkpoint.
        checkpoint: the model it comes from.
        report: of the finished run.
        not_converted: names every loader understands for what stayed in 16 bit.
    """
    config, kept = report.config, list(not_converted)
    assert isinstance(config.group_size, int)
    if config.format == "gemm":
        quantization_config = gemm.quantization_config(group_size=config.group_size, modules_to_not_convert=kept)
    else:
        # Where matrices differ, what most have; each says its own.
        bits = mode(linear.bits for linear in report.linears)
        quantization_config = native.quantization_config(
            bits=bits, group_size=config.group_size, modules_to_not_convert=kept
        )
    writer.copy_files_from(checkpoint.folder)
    widening = Widening.of(config)
    model_config = checkpoint.config if widening is None else widening.widen_config(checkpoint.config)
    writer.add_json("config.json", {**model_config, "quantization_config": quantization_config})
    writer.add_json(MANIFEST_NAME, {**report.to_manifest(), "sha256": writer.sha256})
