"""Long runs in pieces: each piece of work writes one file, so that a run that was stopped goes on where it stood."""

import json
import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

from nsgf_lite.training.checkpoints import held


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
