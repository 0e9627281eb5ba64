"""Files that are whole or not there, and one run's own: tensors and metadata in one safetensors file, with a hash."""

import ast
import errno
import glob
import hashlib
import json
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

if sys.platform == "win32":
    import msvcrt

    def _claim(file: int) -> None:
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _claim(file: int) -> None:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


_claimed: set[str] = set()  # by this process, whose threads a lock of the system does not tell apart
_one_at_a_time = threading.Lock()


def hash_of(tensors: dict[str, Tensor], notes: str = "") -> str:
    """Of the numbers, and of what says how to read them: names, kinds of number, shapes, metadata."""
    digest = hashlib.blake2b(notes.encode(), digest_size=16)
    for name in sorted(tensors):
        t = tensors[name].detach().cpu().contiguous()
        digest.update(f"\0{name} {t.dtype} {tuple(t.shape)}\0".encode())
        digest.update(t.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def _named(path: Path, what: str) -> Iterator[None]:
    """An error of the system as one that names the path the reader gave."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"could not write {what} ({error.strerror})", str(path)) from error


def _draft(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def write(
    path: str | Path,
    tensors: dict[str, Tensor],
    metadata: dict[str, object],
    complete: Callable[[], object] = lambda: None,
) -> str:
    """Write the tensors and the metadata (anything JSON can say) to one file, atomically, and return its hash.

    The file gets its name only when all of it is on the disk: a run that is killed leaves the old file or the new one.
    Just before, `complete` is called: there processes wait for one another, so that their files change together.
    The folder is made. The same content makes the same bytes.

    Raises
    ------
    OSError
        If the disk is full or the folder cannot be written, with the size that was needed.

    Used in
    -------
    :func:`nsgf_lite.training.train`, :class:`nsgf_lite.Pool`
    """
    path = Path(path)
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    notes = json.dumps(metadata)
    mark = hash_of(tensors, notes)
    # one entry: safetensors writes several in an order of chance
    content = safetensors.torch.save(tensors, {"nsgf_lite": json.dumps({"hash": mark, "notes": notes})})
    draft = _draft(path)
    with _named(path, f"{len(content) / 1e6:.1f} MB"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(draft, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            complete()
            os.replace(draft, path)
        except OSError:
            with suppress(OSError):
                draft.unlink()
            raise
    with suppress(OSError):  # Windows opens no folder, and some file systems do not sync them: the file is there
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    return mark


def sweep(folder: Path, name: str) -> None:
    """Delete the drafts of the file that killed runs left in the folder; the name may be a pattern, such as ``a-*``.

    Used in
    -------
    :func:`nsgf_lite.training.train`, :class:`nsgf_lite.Pool`
    """
    for draft in folder.glob(f".{name}.*.part"):
        of, _, process = draft.name[1 : -len(".part")].rpartition(".")
        if fnmatchcase(of, name) and process.isdigit():  # run.1, another process's file, is not run
            draft.unlink(missing_ok=True)


@contextmanager
def held(path: str | Path, folder: bool = False) -> Iterator[None]:
    """Keep a file, or a folder, to this run until the block or the process ends, however it ends.

    Whether it can be written is tried first, before any work; drafts that a killed run left of the file are deleted.

    Raises
    ------
    ValueError
        If a file is needed, and the path is that of a folder.
    OSError
        If another run, of this process or another, holds the path, or it cannot be written.

    Used in
    -------
    :func:`nsgf_lite.training.train`
    """
    path = Path(path)
    if not folder and os.path.isdir(path):
        raise ValueError(f"a file is needed, and {path} is a folder")
    with _named(path, "here"):
        (path if folder else path.parent).mkdir(parents=True, exist_ok=True)
        lock = path / ".lock" if folder else path.with_name(f".{path.name}.lock")
        key = os.path.realpath(lock)
        busy = OSError(errno.EBUSY, "another run is at work here; each needs a path of its own", str(path))
        with _one_at_a_time:
            taken = key in _claimed
            _claimed.add(key)
        try:
            file = None if taken else _locked(lock)
        except OSError:
            _claimed.discard(key)
            raise
    if file is None:
        if not taken:
            _claimed.discard(key)
        raise busy
    try:
        if not folder:
            with _named(path, "here"):
                sweep(path.parent, glob.escape(path.name))
                _draft(path).touch()
                _draft(path).unlink()
        yield
    finally:
        with suppress(OSError):  # Windows deletes no open file: there it stays, unlocked
            if os.path.samestat(os.fstat(file), os.stat(lock)):  # or it is another run's: the folder was made anew
                lock.unlink()
        os.close(file)
        _claimed.discard(key)


def _locked(lock: Path) -> int | None:
    """The lock file, open and locked until it is closed or the process ends; None if another process has it."""
    while True:
        file = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _claim(file)
        except (BlockingIOError, PermissionError):
            os.close(file)
            return None
        except OSError:  # a file system without locks
            return file
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), os.stat(lock)):
                return file
        os.close(file)  # whoever had it has deleted it meanwhile


def read(path: str | Path, mapped: bool = False, mark: str | None = None) -> tuple[dict[str, Tensor], dict]:
    """Read the tensors, on the CPU, and the metadata of a file that :func:`write` made.

    Parameters
    ----------
    path : path
        The file.
    mapped : bool
        Leave the tensors in the file, and map it into memory, where it must not be written to.
    mark : str
        The hash that :func:`write` returned, of the one content that will do; None for any.

    Raises
    ------
    ValueError
        If the file is no such file, is cut short, is not what was written, or has another hash.
    FileNotFoundError
        If there is no file.

    Used in
    -------
    :func:`nsgf_lite.training.train`, :class:`nsgf_lite.Pool`
    """
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder, and a file is needed")
    if not Path(path).is_file():
        raise FileNotFoundError(errno.ENOENT, "there is no file", str(path))
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from None
    if "nsgf_lite" not in header:
        raise ValueError(f"{path} was not written by nsgf_lite, or by another version: its metadata lack nsgf_lite")
    damage = f"{path} is damaged: its content does not have the hash it was written with"
    try:
        inner = json.loads(header["nsgf_lite"])
        expected, notes = inner["hash"], inner["notes"]
    except (ValueError, KeyError):
        raise ValueError(damage) from None
    if expected != hash_of(tensors, notes):
        raise ValueError(damage)
    if mark not in (None, expected):
        raise ValueError(f"{path} is of another run, or in another's place: its hash is {expected}, and not {mark}")
    return tensors if mapped else {name: t.clone() for name, t in tensors.items()}, json.loads(notes)


# --- what a file belongs to -------------------------------------------------------------------------------------------


def code_of(files: Iterable[Path]) -> str:
    """Hash of the code in the files, by their names; comments and docstrings are not code.

    Used in
    -------
    The benchmarks, whose finished pieces are of one code.
    """
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(files):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, False):
                node.body = node.body[1:]
        digest.update(path.name.encode() + b"\0" + ast.dump(tree).encode())
    return digest.hexdigest()


@cache
def code() -> str:
    """Hash of the code of this library on which a training depends."""
    house = Path(__file__).parents[1]
    names = ("transport", "closed_forms", "networks", "training", "fields", "functionals", "models")
    rooms = [house / name for name in names]
    singles = [house / name for name in ("inputs.py", "particles.py", "toy.py", "targets.py", "logistic.py")]
    return code_of([*singles, *(path for room in rooms for path in room.glob("*.py"))])


def json_like(value: object) -> object:
    """The value as JSON gives it back: tuples become lists."""
    return json.loads(json.dumps(value))


def differences(was: object, now: object) -> str:
    """In words, what differs between two values in JSON's terms: ``models.0.eps was 0.1 and is 0.2``."""
    before, after = _leaves(was), _leaves(json_like(now))
    names = [name for name in before | after if before.get(name) != after.get(name)]
    return ", ".join(f"{name} was {before.get(name)!r} and is {after.get(name)!r}" for name in names)


def _leaves(value: object, name: str = "") -> dict[str, object]:
    """Numbers and texts within dicts and lists, each with its path, such as ``models.0.eps``."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if pairs is None:
        return {name: value}
    return {key: leaf for k, v in pairs for key, leaf in _leaves(v, f"{name}.{k}".lstrip(".")).items()}
