"""The notebooks beside the chapters.

    python tools/notebooks.py [--all] [NAME ...]         book/NAME.md -> book/NAME.ipynb, executed

The .md is the source. This executes a chapter and keeps the outputs of its claim cells only (those tagged
nbval-check-output), so that the paired notebook stores nothing that another machine would draw differently. A
chapter is left alone without --all if its text, its notebook, the library and the recorded results are as they were
at its last execution.
It writes the same bytes when it is run again; tools/colab.py makes the notebooks for Colab.
"""

import argparse
import hashlib
import os
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import jupytext
import nbformat

ROOT = Path(__file__).resolve().parent.parent
CLAIM = "nbval-check-output"
TIMEOUT = 600  # seconds a cell may take


def chapters(root=ROOT):
    """The .md files of book/ that have a Jupytext header: those with a notebook beside them."""
    return [
        path
        for path in sorted((root / "book").glob("*.md"))
        if path.read_text(encoding="utf-8").startswith("---\njupytext:")
    ]


def is_claim(cell):
    return cell.cell_type == "code" and CLAIM in cell.metadata.get("tags", [])


def read(path):
    """A chapter as an unexecuted notebook, the same at each reading."""
    notebook = jupytext.read(path)
    notebook.metadata.get("jupytext", {}).get("text_representation", {}).pop("jupytext_version", None)
    notebook.metadata.kernelspec = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return name_cells(notebook)


def name_cells(notebook):
    """Give each cell an id that depends on its source only (and on how often that source came before)."""
    seen = Counter()
    for cell in notebook.cells:
        key = f"{cell.cell_type}\n{cell.source}"
        cell["id"] = hashlib.sha256(f"{seen[key]}\n{key}".encode()).hexdigest()[:12]
        seen[key] += 1
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    return notebook


def text(notebook):
    """The bytes of the file: sorted keys, one space of indentation, a newline at the end."""
    nbformat.validate(notebook)
    return nbformat.writes(notebook, version=nbformat.NO_CONVERT, indent=1, sort_keys=True).rstrip("\n") + "\n"


def execute(path):
    """Run a chapter; its notebook with the outputs of the claim cells. A cell that raises stops it."""
    from nbclient import NotebookClient

    os.environ.update(NSGF_SCALE="fast", OMP_NUM_THREADS="1")
    notebook, ran = read(path), read(path)
    NotebookClient(
        ran,
        timeout=TIMEOUT,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        record_timing=False,
        coalesce_streams=True,
    ).execute()
    for cell, run in zip(notebook.cells, ran.cells, strict=True):
        if is_claim(cell):
            cell.outputs, cell.execution_count = run.outputs, run.execution_count
    return text(notebook)


def fingerprint(path):
    """A hash of all that the notebook depends on, and of the notebook itself."""
    library = sorted((path.parents[1] / "nsgf_lite").glob("**/*.py"))
    results = sorted(set(path.parent.glob("results/*")) - {path.parent / "results/mutations.json"})  # no chapter's
    parts = [Path(__file__), path, path.with_suffix(".ipynb"), *library, *results]
    return hashlib.sha256(b"\0".join(p.read_bytes() if p.exists() else b"" for p in parts)).hexdigest()


def write(names=(), everything=False, root=ROOT):
    """Write the pairs; returns the number of chapters that failed."""
    known = {path.stem: path for path in chapters(root)}
    if missing := sorted(set(names) - set(known)):
        sys.exit(f"no such chapter: {', '.join(missing)} (there are: {', '.join(known)})")
    stamps = root / "_build" / ".notebooks"
    stamps.mkdir(parents=True, exist_ok=True)
    chosen = [known[name] for name in names or known]
    todo = []
    for path in chosen:
        stamp = stamps / path.stem
        if everything or not stamp.exists() or stamp.read_text(encoding="utf-8") != fingerprint(path):
            todo.append(path)
        else:
            print(f"{path.stem}: unchanged")
    failures = 0
    # Not forked: whoever calls this may have threads.
    with ProcessPoolExecutor(
        max_workers=int(os.environ.get("NSGF_WORKERS", "2")), mp_context=get_context("spawn")
    ) as pool:
        for path, job in [(path, pool.submit(execute, path)) for path in todo]:
            try:
                path.with_suffix(".ipynb").write_text(job.result(), encoding="utf-8")
            except Exception as error:  # the traceback in the cell, or a kernel that died
                failures += 1
                print(f"{path.stem}: FAILED\n{error}", file=sys.stderr)
            else:
                (stamps / path.stem).write_text(fingerprint(path), encoding="utf-8")
                print(f"{path.stem}: written")
    if not names:
        for path in sorted((root / "book").glob("*.ipynb")):
            if path.stem not in known:
                print(f"{path.name}: removed, it has no chapter")
                path.unlink()
    return failures


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--all", action="store_true", help="execute the unchanged chapters too")
    options = parser.parse_args(arguments)
    return 1 if write(options.names, options.all) else 0


if __name__ == "__main__":
    sys.exit(main())
