"""Long runs in pieces: each piece of work writes one file, so that a run that was stopped goes on where it stood."""

import json
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm


def keep(file: Path, result: dict) -> None:
    """Write the result of a piece as JSON, atomically."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_suffix(".part")
    draft.write_text(json.dumps(result))
    os.replace(draft, file)


def everything(jobs: list[tuple], workers: int, bar: tqdm) -> None:
    """Do the pieces (file, function, arguments…) that have no file yet; the first that fails ends the run."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(*job[1:]) for job in jobs if not job[0].exists()]
        bar.update(len(jobs) - len(futures))
        for future in as_completed(futures):
            future.result()
            bar.update()
