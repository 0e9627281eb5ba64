"""Long runs in pieces: each piece of work writes one file, so that a run that was stopped goes on where it stood."""

import hashlib
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

from nsgf_lite.training.checkpoints import held

ROOT = Path(__file__).resolve().parent.parent


def keep_text(file: Path, text: str) -> None:
    """Write a text, atomically: a run that is killed leaves the old file or the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{file.name}.{os.getpid()}.part")
    with open(draft, "w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    os.replace(draft, file)


def keep(file: Path, result: dict) -> None:
    """Write the result of a piece as JSON, atomically."""
    keep_text(file, json.dumps(result))


def end_with_parent() -> None:
    """End this process as soon as the one that started it has ended, however it did."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def everything(jobs: list[tuple], workers: int, bar: tqdm) -> None:
    """Do the pieces (file, function, arguments…) that have no file yet; the first that fails ends the run.

    The folder that all files are in is held meanwhile: OSError if another run is at work there.
    """
    if not jobs:
        return
    home = Path(os.path.commonpath([job[0].parent for job in jobs]))
    spawn = multiprocessing.get_context("spawn")
    with (
        held(home, folder=True),
        ProcessPoolExecutor(workers, mp_context=spawn, initializer=end_with_parent) as pool,
    ):
        futures = [pool.submit(*job[1:]) for job in jobs if not job[0].exists()]
        bar.update(len(jobs) - len(futures))
        try:
            for future in as_completed(futures):
                future.result()
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def home(name: str, settings: object, files: Iterable[str]) -> Path:
    """Folder of a run's pieces: named after its settings and the code, the library and `files`, that makes them."""
    digest = hashlib.sha256(json.dumps(settings, default=str).encode())
    for file in sorted([*(ROOT / "nsgf_lite").rglob("*.py"), *(ROOT / file for file in files)]):
        digest.update(file.read_bytes())
    return ROOT / "_build" / name / digest.hexdigest()[:12]


def _piece(file: Path, do: Callable[..., dict], *given: object) -> None:
    begin, clock = time.perf_counter(), time.process_time()
    row = do(*given)
    keep(file, {"row": row, "seconds": time.perf_counter() - begin, "processor": time.process_time() - clock})


def results(folder: Path, jobs: dict[str, tuple], workers: int, label: str) -> list[dict]:
    """For each job (function, arguments…) its row, its seconds and its processor seconds; each a file of the folder."""
    listed = [(folder / f"{name}.json", _piece, folder / f"{name}.json", *job) for name, job in jobs.items()]
    with tqdm(total=len(listed), desc=label, unit="piece", smoothing=0) as bar:
        everything(listed, workers, bar)
    return [json.loads(file.read_text(encoding="utf-8")) for file, *_ in listed]


def digits(value: object) -> object:
    """With five significant digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, list | tuple):
        return [digits(part) for part in value]
    return {key: digits(part) for key, part in value.items()} if isinstance(value, dict) else value
