"""Write the README's picture, book/_static/idea.png, by running the cells of book/intro.md up to the figure.

    python tools/picture.py

The landing page computes its own copy of the picture whenever the book is built; this one is for the README only.
"""

from pathlib import Path
from typing import Any

import jupytext
import matplotlib

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Run the cells in order until one of them makes `fig`, and save it."""
    matplotlib.use("agg")
    names: dict[str, Any] = {}
    for cell in jupytext.read(ROOT / "book" / "intro.md").cells:
        if cell.cell_type == "code" and "fig" not in names:
            exec(compile(cell.source, "book/intro.md", "exec"), names)
    names["fig"].savefig(ROOT / "book" / "_static" / "idea.png", dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
