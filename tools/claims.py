"""The claims of the pages, as they ran: what each check measured, and whether a page's lines are those of its checks.

    python tools/claims.py FOLDER NOTEBOOK [NOTEBOOK ...]     fails if a notebook stores a line that no check printed

FOLDER holds what nl.check noted where NSGF_CHECKS named it, one file for each kernel. A kernel does not know the name
of its page; but the claims of a page, in their order, are its own.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import nbformat


class Claim(NamedTuple):
    claim: str
    value: float
    below: float | None
    above: float | None

    @property
    def share(self) -> float | None:
        """How much of its room the value takes: 1 touches a bound, 0 is far from it; None if a bound is only a sign."""
        shares = []
        if self.below is not None and self.below != 0:
            shares.append(self.value / self.below if self.below > 0 else self.below / self.value)
        if self.above is not None and self.above != 0:
            shares.append(self.above / self.value if self.above > 0 else self.value / self.above)
        return max(0.0, *shares) if shares else None


def stored(notebook: Path) -> list[str]:
    """The claims of the lines ``holds:`` that a notebook stores, in order."""
    cells = nbformat.read(notebook, as_version=4).cells
    text = "".join(output.get("text", "") for cell in cells for output in cell.get("outputs", ()))
    return [line.removeprefix("holds: ") for line in text.splitlines() if line.startswith("holds: ")]


def noted(folder: Path) -> list[list[Claim]]:
    """What each kernel's checks noted, the newest kernel first."""
    files = sorted(folder.glob("*.jsonl"), key=lambda file: file.stat().st_mtime, reverse=True)
    return [[Claim(**json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()] for file in files]


def ran(notebook: Path, runs: list[list[Claim]]) -> list[Claim] | None:
    """The checks of the newest run of this notebook; None if no run made just the claims that it stores, in order."""
    lines = stored(notebook)
    return next((run for run in runs if [c.claim for c in run] == lines), None if lines else [])


def nearest(claims: list[Claim]) -> float:
    """Median share of the bound."""
    return statistics.median([c.share for c in claims if c.share is not None] or [0.0])


def main(folder: str, *notebooks: str) -> int:
    runs = noted(Path(folder))
    strange = [name for name in notebooks if ran(Path(name), runs) is None]
    for name in strange:
        print(f"{name}: its lines 'holds: …' are not those of the checks that ran", file=sys.stderr)
    return int(bool(strange))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
