"""Chapters and notebooks agree; each claim is stored, each statement is tested, each exercise is solved."""

import ast
import re
from collections import Counter

import book_extension
import jupytext
import nbformat
import pytest
from conftest import ROOT
from notebooks import chapters, is_claim, read, text

BOOK = ROOT / "book"
CHAPTERS = [path.stem for path in chapters()]
STATEMENT = re.compile(
    r"^ *(?::{3,}|`{3,})\{prf:(theorem|proposition|lemma|corollary)\}(.*)\n((?: *:[\w-]+:.*\n)*)", re.M
)
OPTION = re.compile(r"^ *:(?:label|name): *(\S+)", re.M)
CHANCE = {"randn", "rand", "randint", "randperm", "normal", "multinomial", "bernoulli", "poisson"}
each_chapter = pytest.mark.parametrize("name", CHAPTERS)


def source(name):
    return (BOOK / f"{name}.md").read_text(encoding="utf-8")


def code_cells(name):
    return [cell for cell in read(BOOK / f"{name}.md").cells if cell.cell_type == "code"]


def calls(cell, *, inside_functions=True):
    """The names of what a cell calls, last part only (`plt.subplots` is `subplots`), with the calls."""
    tree = ast.parse(re.sub(r"^\s*[%!].*$", "pass", cell.source, flags=re.M))
    body = [node for node in tree.body if inside_functions or not isinstance(node, ast.FunctionDef)]
    found = [node for part in body for node in ast.walk(part) if isinstance(node, ast.Call)]
    return [(getattr(call.func, "attr", getattr(call.func, "id", "")), call) for call in found]


def badly_stored(notebook):
    """What is wrong with the outputs that a notebook stores: they must be those of the claim cells."""
    faults = []
    for number, cell in enumerate(cell for cell in notebook.cells if cell.cell_type == "code"):
        if not is_claim(cell):
            if cell.outputs or cell.execution_count is not None:
                faults.append(f"cell {number}: claims nothing, yet an output or a count is stored")
            continue
        printed = "".join(output.get("text", "") for output in cell.outputs)
        if cell.execution_count is None:
            faults.append(f"cell {number}: stored unexecuted, so nbval would not compare it")
        elif any((output.output_type, output.get("name")) != ("stream", "stdout") for output in cell.outputs):
            faults.append(f"cell {number}: stores something that is not printed text")
        elif not re.fullmatch(r"(holds: .+\n)+", printed):
            faults.append(f"cell {number}: prints something else than holds-lines: {printed!r}")
    return faults


def test_there_are_chapters_and_each_has_its_notebook():
    assert CHAPTERS
    assert CHAPTERS == sorted(path.stem for path in BOOK.glob("*.ipynb")), "run make notebooks"


@each_chapter
def test_pair_agrees(name):
    path = BOOK / f"{name}.ipynb"
    chapter, stored = jupytext.read(BOOK / f"{name}.md"), jupytext.read(path)
    cells = [[(c.cell_type, c.source, dict(c.metadata)) for c in notebook.cells] for notebook in (chapter, stored)]
    for of_chapter, of_notebook in zip(*cells, strict=False):
        assert of_chapter == of_notebook, "run make notebooks"
    assert len(cells[0]) == len(cells[1]), "run make notebooks"


@each_chapter
def test_notebook_is_as_make_notebooks_writes_it(name):
    path = BOOK / f"{name}.ipynb"
    stored, fresh = nbformat.read(path, as_version=4), read(BOOK / f"{name}.md")
    for cell, from_file in zip(fresh.cells, stored.cells, strict=True):
        if is_claim(cell):
            cell.outputs, cell.execution_count = from_file.outputs, from_file.execution_count
    assert path.read_text(encoding="utf-8") == text(fresh), "run make notebooks"


@each_chapter
def test_claims_are_stored_executed_and_nothing_else_is(name):
    notebook = nbformat.read(BOOK / f"{name}.ipynb", as_version=4)
    assert any(is_claim(cell) for cell in notebook.cells) or not STATEMENT.search(source(name))
    assert not badly_stored(notebook)


def test_a_claim_stored_unexecuted_is_found():
    assert "unexecuted" in badly_stored(nbformat.read(ROOT / "tests" / "broken" / "silent.ipynb", as_version=4))[0]


@each_chapter
def test_cells_that_check_are_tagged_as_claims(name):
    for cell in code_cells(name):
        checks = any(called == "check" for called, _ in calls(cell))
        assert checks == is_claim(cell), f"check() and the tag nbval-check-output go together:\n{cell.source}"


def test_each_statement_has_its_test_and_each_test_its_statement():
    labels = Counter()
    for path in BOOK.glob("*.md"):
        for kind, title, options in STATEMENT.findall(path.read_text(encoding="utf-8")):
            label = OPTION.search(options)
            assert label, f"{path.name}: {kind}{title} has no label"
            assert label[1].startswith("thm-"), f"{path.name}: {label[1]} must begin with thm-"
            labels[label[1].replace("-", "_")] += 1
    tests = Counter(
        node.name.removeprefix("test_")
        for path in (ROOT / "tests").glob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_thm_")
    )
    assert set(labels.values()) <= {1} and set(tests.values()) <= {1}, "a label or a test occurs twice"
    assert sorted(labels.keys() - tests.keys()) == [], "statements without a test of their name"
    assert sorted(tests.keys() - labels.keys()) == [], "tests test_thm_… without a statement of their name"


def test_each_theorem_is_checked_by_a_route_that_its_test_names():
    ways = book_extension.routes()
    assert ways and {route for named in ways.values() for route in named} <= set(book_extension.ROUTES)
    assert [name for name, named in ways.items() if not named] == [], "no line `Checked by: ROUTE.` in the docstring"


def test_each_theorem_is_seen_to_fail_when_it_is_damaged():
    lacking = []
    for path in (ROOT / "tests").glob("test_thm_*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        of = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}

        def damages(node, of=of):
            names = {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}  # called, or listed as a case
            return "damaged" in names or any(damages(of.pop(name)) for name in names & set(of) if name in of)

        lacking += [name for name in list(of) if name.startswith("test_thm_") and not damages(of[name], dict(of))]
    assert sorted(lacking) == [], "no damaged(...) in the test"


@each_chapter
def test_each_exercise_has_one_solution(name):
    exercises = re.findall(r"\{exercise(?:-start)?\}.*\n(?: *:[\w-]+:.*\n)*? *:label: *(\S+)", source(name))
    solutions = re.findall(r"\{solution(?:-start)?\} *(\S+)", source(name))
    assert len(exercises) == len(re.findall(r"\{exercise(?:-start)?\}", source(name))), "an exercise has no label"
    assert sorted(exercises) == sorted(solutions)
    assert source(name).count("{solution-start}") == source(name).count("{solution-end}")


@each_chapter
def test_figures_have_name_caption_and_alternative_text(name):
    for cell in code_cells(name):
        settings = cell.metadata.get("mystnb", {})
        drawn = dict(calls(cell, inside_functions=False))
        if "figure" not in settings and not drawn.keys() & {"subplots", "figure", "frames", "imshow"}:
            continue
        figure = settings.get("figure", {})
        assert figure.get("name", "").startswith("fig-") and figure.get("caption", "").strip(), cell.source
        slider = {keyword.arg for keyword in drawn["frames"].keywords} if "frames" in drawn else ()
        assert settings.get("image", {}).get("alt", "").strip() or "alt" in slider, f"no alt text:\n{cell.source}"
        last = ast.parse(cell.source).body[-1]
        method = isinstance(last, ast.Expr) and isinstance(last.value, ast.Call) and ast.unparse(last.value.func)
        shows = method and re.search(
            r"\.(set\w*|plot|scatter|legend|text|annotate|ax[hv]line|imshow|suptitle)$", method
        )
        silent = cell.source.rstrip().endswith(";")
        assert silent or not shows, f"what {method} returns is shown beside the figure, as a second one: give it to _"


@each_chapter
def test_code_fits_the_page(name):
    for cell in code_cells(name):
        lines = cell.source.split("\n")
        assert len(lines) <= 25, f"more than 25 lines:\n{cell.source}"
        assert not [line for line in lines if len(line) > 72], f"a line of more than 72 characters:\n{cell.source}"


@each_chapter
def test_no_hidden_chance_and_no_expected_exceptions(name):
    for cell in code_cells(name):
        tags = set(cell.metadata.get("tags", []))
        assert not tags & {"raises-exception", "nbval-raises-exception", "nbval-skip", "nbval-ignore-output"}
        seeding = re.search(r"(torch\.|np\.random\.|numpy\.random\.|random\.)(manual_seed|seed)\(", cell.source)
        legacy = re.search(r"\b(np|numpy)\.random\.(?!default_rng|Generator)\w+\(", cell.source)
        assert not seeding and not legacy, f"the global state of chance:\n{cell.source}"
        for called, call in calls(cell):
            given = {keyword.arg for keyword in call.keywords}  # None: **settings
            of_torch = getattr(getattr(call.func, "value", None), "id", "") == "torch" and called in CHANCE
            if of_torch or called == "sample" and len(call.args) < 2:
                assert given & {"generator", None}, f"{called} without its generator:\n{cell.source}"
