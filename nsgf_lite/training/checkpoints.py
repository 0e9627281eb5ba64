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
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    notes = json.dumps(metadata)
    content = safetensors.torch.save(tensors, {"json": notes, "crc32": _checksum(tensors, notes)})
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(draft, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise OSError(
            error.errno, f"could not write {len(content) / 1e6:.1f} MB ({error.strerror})", str(path)
        ) from error


def sweep(path: str | Path) -> None:
    """Delete the drafts that killed runs left beside the file; a pattern in its name stands for many.

    Used in
    -------
    :func:`nsgf_lite.training.train`, :class:`nsgf_lite.Pool`
    """
    for draft in Path(path).parent.glob(f".{Path(path).name}.*.part"):
        draft.unlink(missing_ok=True)


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
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, "pt") as file:
            notes = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from None
    if not {"json", "crc32"} <= notes.keys():
        raise ValueError(f"{path} was not written by nsgf_lite: its metadata lack json and crc32")
    if notes["crc32"] != _checksum(tensors, notes["json"]):
        raise ValueError(f"{path} is damaged: its content does not have the checksum it was written with")
    return tensors, json.loads(notes["json"])
