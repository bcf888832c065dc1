"""A checkpoint's own tensors in a new folder, byte for byte, in shards of another size."""

from __future__ import annotations

from pathlib import Path

from halfbyte.checkpoints.disk import ensure_space
from halfbyte.checkpoints.reader import Checkpoint, read_json_object
from halfbyte.checkpoints.writer import CheckpointWriter
from halfbyte.progress import progress_bar
from halfbyte.publishing.card import CARD_NAME, Compared, model_card
from halfbyte.quantization.budget import parse_bytes
from halfbyte.quantization.report import MANIFEST_NAME


def save_checkpoint(
    folder: Path,
    output_dir: str | Path,
    *,
    max_shard_size: int | str = "5GB",
    comparison: Compared | None = None,
    name: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Copy a checkpoint: tensors, config, tokenizer, generation config, manifest; and a model card if it is quantized.

    A card that is there is kept, unless there is a comparison to write a new one from.

    Args:
        folder: the checkpoint.
        output_dir: the new one; appears when it is complete.
        max_shard_size: bytes of tensors in a file at most, or "5GB", "800MiB"; a tensor is never split.
        comparison: for the card, see `model_card`.
        name: for the card, likewise; None for that of `output_dir`.
        overwrite: replace a checkpoint that is there already.
        progress: show a bar on a terminal.

    Returns:
        `output_dir`.

    Raises:
        ConfigError: not a size, or a comparison without this model.
        CheckpointError: the checkpoint is broken.
        OutputError: the target is taken, or the disk is full.
    """
    shard_bytes = parse_bytes(max_shard_size, "max_shard_size")
    checkpoint = Checkpoint.open(folder)
    card = _card(checkpoint, comparison, name or Path(output_dir).resolve().name)
    with CheckpointWriter(output_dir, overwrite=overwrite, source=folder, max_shard_bytes=shard_bytes) as writer:
        ensure_space(writer.target, checkpoint.total_bytes)
        with progress_bar("Saving", checkpoint.total_bytes, enabled=progress, unit="bytes") as ticker:
            for tensor in checkpoint.names():
                writer.add(tensor, checkpoint.read(tensor))
                ticker.advance(checkpoint.info(tensor).nbytes)
        writer.copy_files_from(folder)
        writer.add_json("config.json", checkpoint.config)
        if (folder / MANIFEST_NAME).is_file():
            writer.add_json(MANIFEST_NAME, {**read_json_object(folder / MANIFEST_NAME), "sha256": writer.sha256})
        if card is not None:
            writer.add_text(CARD_NAME, card)
        writer.commit()
    return Path(output_dir)


def _card(checkpoint: Checkpoint, comparison: Compared | None, name: str) -> str | None:
    present = checkpoint.folder / CARD_NAME
    if comparison is None and present.is_file():
        return present.read_text(encoding="utf-8")
    if comparison is None and "quantization_config" not in checkpoint.config:
        return None
    return model_card(checkpoint.folder, comparison, name=name)
