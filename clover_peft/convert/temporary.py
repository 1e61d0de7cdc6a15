"""Tensors in temporary files, for hidden states and moments that memory may have no room for."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor


class TemporaryTensors:
    """Writes tensors into files of a folder, and reads them back onto one device."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._folder, self._device = folder, device

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor, in place of one of the same name."""
        torch.save(tensor.cpu(), self._folder / f"{name}.pt")

    def read(self, name: str, last: bool = False) -> Tensor:
        """A tensor that was written; the last reader deletes the file."""
        path = self._folder / f"{name}.pt"
        tensor: Tensor = torch.load(path, map_location=self._device)
        if last:
            path.unlink()
        return tensor


@contextmanager
def temporary_tensors(needed: int, device: torch.device) -> Iterator[TemporaryTensors]:
    """A temporary folder with room for some bytes of tensors, which is removed at the end.

    Raises:
        OSError: the disk has no room.
    """
    with tempfile.TemporaryDirectory(prefix="clover-") as folder:
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise OSError(
                f"{folder}: expected room for {needed / 2**30:.1f} GiB of temporary files, found {free / 2**30:.1f} "
                "GiB; set TMPDIR to a folder on a larger disk, or pass less calibration data"
            )
        yield TemporaryTensors(Path(folder), device)
