"""The hidden states between two blocks: in memory, or in files where they do not fit; on disk once a block is done.

One file for each batch and block, raw float32, named STEP-NUMBER.hidden: STEP is the index of the block they go into.
Files are read, not mapped: the pages of a map would count as resident memory, which is what they are to save.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from halfbyte.checkpoints.disk import fsync, writes_explained
from halfbyte.checkpoints.journal import file_hash, is_intact
from halfbyte.quantization.capture import Batch

# Hidden states are saved before every such block: a run that is taken up again computes at most that many blocks less
# one forward. Saving them before every block takes 5 % of the time of a small model.
SAVE_EVERY = 4


class States:
    """All batches on their way through the model.

    Args:
        folder: for the files; exists.
        target: named in messages.
        device: where the hidden states are used.
        spill: keep nothing in memory but what is in use.

    Attributes:
        batches: in the order of the calibration set. Theirs to replace: `hidden` and `kwargs`.
        step: index of the block they go into.
    """

    def __init__(self, folder: Path, target: Path, device: torch.device, *, spill: bool):
        self.folder = folder
        self.target = target
        self.device = device
        self.spill = spill
        self.batches: list[Batch] = []
        self.step = 0
        self._saved = -1

    def take(self, batch: Batch, saved: dict[str, Any] | None = None) -> None:
        """Add a batch.

        Args:
            batch: as it was captured before the first block.
            saved: from `save`: continue there, with the hidden states saved then.
        """
        number = len(self.batches)
        taken = _SpilledBatch(batch, self, number) if self.spill else batch
        if saved is None:
            taken.hidden = batch.hidden
        else:
            self.step = self._saved = saved["step"]
            path = self.path(self.step, number)
            place = path, torch.Size(saved["files"][path.name]["shape"])
            if isinstance(taken, _SpilledBatch):
                taken.place = place
            else:
                taken.hidden = read_state(*place).to(self.device)
        self.batches.append(taken)
        if isinstance(taken, _SpilledBatch):
            taken.ahead = 1

    def path(self, step: int, number: int) -> Path:
        """The file of a batch, by its place in `batches`, as it goes into block `step`."""
        return self.folder / f"{step}-{number}.hidden"

    def step_on(self) -> dict[str, Any] | None:
        """The batches have been moved to the next block: make them durable if it is time to.

        Returns:
            JSON values for `take` and `is_saved`, or None.

        Raises:
            OutputError: the disk is full or refuses.
        """
        self.step += 1
        return self._save() if self.batches and self.step % SAVE_EVERY == 0 else None

    def _save(self) -> dict[str, Any]:
        files: dict[str, Any] = {}
        with writes_explained(self.target):
            for number, batch in enumerate(self.batches):
                path = self.path(self.step, number)
                if isinstance(batch, _SpilledBatch):
                    shape = batch.place[1]
                else:
                    write_state(path, batch.hidden)
                    shape = batch.hidden.shape
                files[path.name] = {"shape": list(shape), "sha256": file_hash(path)}
            for name in files:
                fsync(self.folder / name)
            fsync(self.folder)
        self._saved = self.step
        return {"step": self.step, "files": files}

    def forget_earlier(self) -> None:
        """Remove the files of blocks before the current one, but for those saved last."""
        for path in self.folder.iterdir():
            step = path.name.partition("-")[0]
            if step.isdecimal() and int(step) < self.step and int(step) != self._saved:
                path.unlink()


def is_saved(folder: Path, saved: dict[str, Any] | None) -> bool:
    """Whether the files of a `save` are all there, as they were written."""
    return saved is not None and all(
        is_intact(folder / name, entry["sha256"]) for name, entry in saved["files"].items()
    )


def write_state(path: Path, tensor: torch.Tensor) -> None:
    """float32 of any shape → its bytes."""
    with path.open("wb") as file:
        file.write(tensor.detach().to("cpu", torch.float32).contiguous().reshape(-1).view(torch.uint8).numpy().data)


def read_state(path: Path, shape: torch.Size) -> torch.Tensor:
    """The inverse of `write_state`, in memory of torch's own and so aligned as a computed tensor is."""
    tensor = torch.empty(shape)
    with path.open("rb") as file:
        file.readinto(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return tensor


class _SpilledBatch(Batch):
    """A batch whose hidden states are in a file: read each time they are asked for, written when they are replaced."""

    place: tuple[Path, torch.Size]

    def __init__(self, batch: Batch, states: States, number: int):
        self.kwargs, self.counts = batch.kwargs, batch.counts
        self.ahead = 0  # what is set at first goes into the block to come, what is set later comes out of it
        self._states = states
        self._number = number

    @property
    def hidden(self) -> torch.Tensor:
        """Float32 [blocks, tokens, hidden], read from its file."""
        return read_state(*self.place).to(self._states.device)

    @hidden.setter
    def hidden(self, value: torch.Tensor) -> None:
        path = self._states.path(self._states.step + self.ahead, self._number)
        with writes_explained(self._states.target, value.nbytes):
            write_state(path, value)
        self.place = path, value.shape
