"""What the book needs of Sphinx beyond its extensions: an execution cache that knows the library, and generated tables.

A page asks for a table with a line such as ``<!-- table: theorems -->``; the tables are the functions at the end.
"""

import ast
import hashlib
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import claims

ROOT = Path(__file__).resolve().parents[1]
GENERATED = ("book/theorem_index", "book/environment")  # written anew in every build
KINDS = ("theorem", "proposition", "lemma", "corollary")
# Ways to check a theorem that do not pass through the code in which it is written.
ROUTES = (
    "finite differences",
    "primal value",
    "linear program",
    "brute force",
    "quadrature",
    "exact arithmetic",
    "computer algebra",
    "closed form",
    "another library",
    "simulation",
    "definition",
)
SHOWN = (
    "torch numpy scipy POT geomloss ott-jax jax matplotlib ipywidgets scikit-learn "
    "jupyter-book sphinx myst-nb sphinx-book-theme jupytext nbval pytest"
).split()


class Statement(NamedTuple):
    page: str  # as in the table of contents: book/optimal_transport
    kind: str  # theorem, proposition, lemma or corollary
    title: str
    label: str  # thm-…, or empty where the statement has none


def pages(root: Path = ROOT) -> list[str]:
    """The pages of the table of contents, in order."""
    toc = (root / "_toc.yml").read_text(encoding="utf-8")
    return re.findall(r"^\s*(?:root|-\s*file):\s*(\S+)", toc, flags=re.M)


def chapter_title(text: str) -> str:
    """The first heading of a page, outside code."""
    plain = re.sub(r"^(`{3,}).*?^\1`*\s*$", "", text, flags=re.M | re.S)
    found = re.search(r"^# +(.+?)\s*$", plain, flags=re.M)
    return found[1] if found else ""


def statements(root: Path = ROOT) -> Iterator[Statement]:
    """Every theorem, proposition, lemma and corollary of the book, in order."""
    opening = re.compile(rf"^:{{3,}}\{{prf:({'|'.join(KINDS)})\}}[ \t]*(.*)\n((?::[\w-]+:.*\n)*)", re.M)
    for page in pages(root):
        source = root / f"{page}.md"
        if not source.exists():
            continue
        for kind, title, options in opening.findall(source.read_text(encoding="utf-8")):
            label = re.search(r"^:label:[ \t]*(\S+)", options, flags=re.M)
            yield Statement(page, kind, title.strip(), label[1] if label else "")


def name_of_test(label: str) -> str:
    """thm-first-variation is tested by test_thm_first_variation."""
    return "test_" + label.replace("-", "_")


def execution_key(root: Path = ROOT) -> str:
    """A hash of what outputs depend on beside their chapter's text: the library, recorded results, the scale, torch."""
    digest = hashlib.sha256()
    for path in sorted([*root.glob("nsgf_lite/**/*.py"), *root.glob("book/results/**/*")]):
        if path.is_file() and path.name != "mutations.json":
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    digest.update(os.environ.get("NSGF_SCALE", "fast").encode() + version("torch").encode())
    return digest.hexdigest()[:16]


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def machine() -> dict[str, str]:
    """The machine in words: processor, cores, memory, system."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(encoding="utf-8"), flags=re.M)
        processor = found[1] if found else processor
    told = {"processor": processor, "cores": str(os.cpu_count())}
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        told["memory"] = f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB"
    told["system"] = f"{platform.system()}, {platform.machine()}"
    told["Python"] = platform.python_version()
    told["threads of the linear algebra"] = os.environ.get("OMP_NUM_THREADS", "as many as the machine offers")
    told["NSGF_SCALE"] = os.environ.get("NSGF_SCALE", "fast")
    return told


# --- the tables ---------------------------------------------------------------------------------------------------


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", r"\|").replace("\n", " ") for cell in cells) + " |"

    header = list(header)
    return "\n".join([line(header), line(["---"] * len(header)), *map(line, rows)])


def recorded_mutations(root: Path = ROOT) -> list[dict[str, Any]]:
    path = root / "book/results/mutations.json"
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []


def bare(test: str) -> str:
    """tests/test_x.py::test_thm_y[3] without its file and its parameters."""
    return re.sub(r"\[.*", "", test.rsplit("::", 1)[-1], flags=re.S)


def routes(root: Path = ROOT) -> dict[str, tuple[str, ...]]:
    """For each theorem's test the independent routes that its docstring names in the line ``Checked by: …``."""
    found = {}
    for path in sorted((root / "tests").glob("test_thm_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_thm_"):
                line = re.search(r"^ *Checked by: ([\w ,-]+)\.", ast.get_docstring(node) or "", re.M)
                found[node.name] = tuple(re.split(", ", line[1])) if line else ()
    return found


def recorded_sharpness(root: Path = ROOT) -> dict[str, float]:
    """For each theorem's test with a bound the largest measured/bound of its recorded run."""
    path = root / "book/results/mutations.json"
    return json.loads(path.read_text(encoding="utf-8")).get("sharp", {}) if path.exists() else {}


def theorems_table(root: Path = ROOT) -> str:
    killed: dict[str, set[str]] = {}
    for row in recorded_mutations(root):
        for test in row["killed_by"]:
            killed.setdefault(bare(test), set()).add(row["mutation"])
    ways, sharp = routes(root), recorded_sharpness(root)
    parts = []
    for page in pages(root):
        here = [s for s in statements(root) if s.page == page]
        if not here:
            continue
        title = chapter_title((root / f"{page}.md").read_text(encoding="utf-8"))
        rows = []
        for s in here:
            test = name_of_test(s.label)
            share = f"{sharp[test]:.2g}" if test in sharp else ""
            rows.append(
                (
                    f"{{prf:ref}}`{s.label}`",
                    s.title,
                    ", ".join(ways.get(test, ())),
                    share,
                    str(len(killed.get(test, ()))),
                )
            )
        header = ("Statement", "What it says", "Checked by", "Measured / bound", "Mutations it catches")
        parts.append(f"## {{doc}}`{title} </{page}>`\n\n{table(header, rows)}")
    return "\n\n".join(parts)


def mutations_table(root: Path = ROOT) -> str:
    labels = {s.label: name_of_test(s.label) for s in statements(root)}
    rows = []
    for row in recorded_mutations(root):
        change = " → ".join(f"`{side.strip()}`" for side in row["what"].split("→"))
        killers = {bare(test) for test in row["killed_by"]}
        noticed = [f"{{prf:ref}}`{label}`" for label, test in labels.items() if test in killers]
        noticed += [f"`{test}`" for test in sorted(killers - set(labels.values()))]
        rows.append((row["mutation"], f"{change} in `{row['file']}`", ", ".join(noticed)))
    if not rows:
        return "No run of the mutations has been recorded yet."
    return table(("Mutation", "The formula, and what it became", "Noticed by the tests of"), rows)


def claims_table(root: Path = ROOT) -> str:
    """What the checks of each page measured in the last run of it, page by page, folded."""
    runs, parts = claims.noted(checks_folder(root)), []
    for page in pages(root):
        notebook = root / f"{page}.ipynb"
        made = claims.ran(notebook, runs) if notebook.exists() else []
        if made is None:
            parts.append(f"{{doc}}`/{page}`: its notebook is not of this text; run `make notebooks`.")
        elif made:
            shown = [("" if c.share is None else f"{c.share:.2g}", c.claim) for c in made]
            title = chapter_title((root / f"{page}.md").read_text(encoding="utf-8"))
            head = f"{title}: {len(made)} claims, median {claims.nearest(made):.2g}"
            parts.append(f":::{{dropdown}} {head}\n\n{table(('Share', 'Claim'), shown)}\n:::")
    return "\n\n".join(parts)


def versions_table(root: Path = ROOT) -> str:
    return table(("Package", "Version"), [(name, version(name)) for name in ("nsgf-lite", *SHOWN)])


def machine_table(root: Path = ROOT) -> str:
    return table(("This build ran on", ""), machine().items())


def vendored_table(root: Path = ROOT) -> str:
    vendored = json.loads((root / "book/_static/vendored.json").read_text(encoding="utf-8"))
    rows = [(v["package"], v["version"], v["license"], v["why"], str(len(v["files"]))) for v in vendored]
    return table(("Package", "Version", "Licence", "What for", "Files"), rows)


TABLES = {
    "theorems": theorems_table,
    "claims": claims_table,
    "mutations": mutations_table,
    "versions": versions_table,
    "machine": machine_table,
    "vendored": vendored_table,
}


# --- Sphinx -------------------------------------------------------------------------------------------------------


def checks_folder(root: Path = ROOT) -> Path:
    """Where the checks of executed pages note what they measured: beside the cache, since a cached page runs none."""
    return root / "_build" / ".jupyter_cache" / execution_key(root) / "checks"


def set_cache(app: Any, config: Any) -> None:
    folder = checks_folder()
    folder.mkdir(parents=True, exist_ok=True)
    config.nb_execution_cache_path = str(folder.parent)
    os.environ["NSGF_CHECKS"] = str(folder)


def generated_last(app: Any, env: Any, docnames: list[str]) -> None:
    """The tables say what the pages did, so the pages are read, and that is executed, before them."""
    docnames.sort(key=lambda name: (name in GENERATED, name))


def insert_tables(app: Any, docname: str, source: list[str]) -> None:
    if docname in GENERATED:
        source[0] = re.sub(r"<!-- table: (\w+) -->", lambda found: TABLES[found[1]](), source[0])


def always_outdated(app: Any, env: Any, added: set[str], changed: set[str], removed: set[str]) -> list[str]:
    return [page for page in GENERATED if page in env.found_docs]


def setup(app: Any) -> dict[str, Any]:
    app.connect("config-inited", set_cache, priority=1)
    app.connect("env-before-read-docs", generated_last)
    app.connect("source-read", insert_tables)
    app.connect("env-get-outdated", always_outdated)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
