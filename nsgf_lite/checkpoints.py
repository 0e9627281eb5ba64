"""Files that are whole or not there: tensors and metadata in one safetensors file, with a checksum."""

import json
import os
import zlib
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor


def _checksum(tensors: dict[str, Tensor], notes: str) -> str:
    """Of the numbers, and of what says how to read them: names, shapes, kinds of number, metadata."""
    crc = zlib.crc32(notes.encode())
    for name in sorted(tensors):
        t = tensors[name]
        crc = zlib.crc32(f"{name} {t.dtype} {tuple(t.shape)}".encode(), crc)
        crc = zlib.crc32(t.flatten().view(torch.uint8).numpy().data, crc)
    return str(crc)


def write(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, object]) -> None:
    """Write the tensors and the metadata (anything JSON can say) to one file, atomically; its folder is made.

    The file gets its name only when all of it is on the disk: a run that is killed leaves the old file or the new one.

    Raises
    ------
    OSError
        If the disk is full or the folder cannot be written, with the size that was needed.

    Used in
    -------
    :func:`nsgf_lite.training.train`, :class:`nsgf_lite.Pool`


def sweep(path: str | Path) -> None:
    """Delete the drafts that killed runs left beside the file; a pattern in its name stands for many.

    Used in
    -------
    :func:`nsgf_lite.training.train`, :class:`nsgf_lite.Pool`


def read(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """Read the tensors (mapped from the file, on the CPU) and the metadata of a file that :func:`write` made.

    Raises
    ------
    ValueError
        If the file is no such file, is cut short, or its content is not what was written.
    FileNotFoundError
        If there is no file.

    Used in
    -------
    :func:`nsgf_lite.training.train`, :class:`nsgf_lite.Pool`
