"""The sentinel: the command line by which CI executes the notebooks turns red on planted faults."""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import notebooks
import pytest
from conftest import ROOT, wheel_kernel

EXPECTED = {  # notebook: what must be in the report
    "good": "2 passed",
    "silent": "2 passed",  # which is why test_pairs looks for it
    "by_hand": "not those of the checks that ran",
    "false_theorem": "broken: only the missing 30 % moves",
    "other_output": "Cell outputs differ",
    "raising": "AssertionError",
}


@pytest.fixture(scope="module")
def reports():
    """All notebooks, two at a time: {name: (exit code, report)}."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "COV_"))}
    environment["NSGF_KERNEL"] = wheel_kernel()

    def run(name):
        command = [ROOT / "tools" / "nbval.sh", ROOT / "tests" / "broken" / f"{name}.ipynb"]
        return subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            timeout=300,
        )

    with ThreadPoolExecutor(2) as pool:
        return {
            name: (done.returncode, done.stdout) for name, done in zip(EXPECTED, pool.map(run, EXPECTED), strict=True)
        }


@pytest.mark.parametrize("name", EXPECTED)
def test_planted_faults_are_found(reports, name):
    code, report = reports[name]
    assert EXPECTED[name] in report, report
    assert code == (0 if name in ("good", "silent") else 1), report


def test_makefile_and_ci_use_this_command():
    """`make test`, which CI runs, contains `make notebook-checks`, and that is this command line with no arguments."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^test:.* notebook-checks\b", makefile, re.M)
    assert re.search(r"^notebook-checks:.*\n\ttools/nbval\.sh\n\n", makefile, re.M)


CHAPTER = """\
---
jupytext:
  formats: md:myst,ipynb
  text_representation: {extension: .md, format_name: myst}
kernelspec: {name: python3, display_name: Python 3}
---
# A page

```{code-cell} ipython3
x = %s
x
```

```{code-cell} ipython3
:tags: [nbval-check-output]
print("holds: x is", x)
```
"""


def test_written_notebooks_settle_and_a_raising_cell_stops_them(tmp_path, capsys):
    (tmp_path / "book").mkdir()
    chapter, notebook = tmp_path / "book" / "page.md", tmp_path / "book" / "page.ipynb"
    chapter.write_text(CHAPTER % "1", encoding="utf-8")
    assert notebooks.write(root=tmp_path) == 0
    first = notebook.read_bytes()
    assert first.count(b'"outputs": []') == 1 and b"holds: x is 1" in first and b"jupytext_version" not in first
    assert notebooks.write(root=tmp_path) == 0 and "unchanged" in capsys.readouterr().out
    assert notebooks.write(root=tmp_path, everything=True) == 0 and notebook.read_bytes() == first

    (tmp_path / "nsgf_lite").mkdir()
    (tmp_path / "nsgf_lite" / "new.py").write_text("", encoding="utf-8")
    assert notebooks.write(root=tmp_path) == 0 and "page: written" in capsys.readouterr().out, "the library changed"

    chapter.write_text(CHAPTER % "1 / 0", encoding="utf-8")
    assert notebooks.write(root=tmp_path) == 1 and "ZeroDivisionError" in capsys.readouterr().err
    assert notebook.read_bytes() == first, "a failed run leaves the old notebook"
    shutil.move(chapter, tmp_path / "book" / "other.md")
    (tmp_path / "book" / "other.md").write_text(CHAPTER % "2", encoding="utf-8")
    assert notebooks.write(root=tmp_path) == 0 and not notebook.exists(), "a notebook without a chapter goes"
