"""What holds the house together: lists of versions, configuration, vendored files, workflows, generated tables."""

import ast
import graphlib
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from types import ModuleType

import book_extension
import nbformat
import pytest
import repository
import yaml
from conftest import ROOT, require
from mutations import misplaced
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import nsgf_lite as nl


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


PROJECT = tomllib.loads(read("pyproject.toml"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
PINS = {
    canonicalize_name(name): Version(version)
    for name, version in (line.split("==") for line in read("constraints.txt").split("\n") if "==" in line)
}
CONFIG = yaml.safe_load(read("_config.yml"))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.y*ml"))


# --- versions -----------------------------------------------------------------------------------------------------


def test_the_version_is_stated_once_and_agrees_elsewhere():
    assert "version" in PROJECT["dynamic"]
    assert yaml.safe_load(read("CITATION.cff"))["version"] == nl.__version__
    assert f"\n## {nl.__version__}\n" in read("CHANGELOG.md")


def test_constraints_are_exact_versions_and_nothing_else():
    for line in read("constraints.txt").strip().split("\n")[1:]:
        assert re.fullmatch(r"[\w.-]+==[\w.]+", line), line


def test_every_requirement_is_pinned_at_a_version_it_allows():
    listed = [*PROJECT["dependencies"], *(r for extra, wants in EXTRAS.items() if extra != "gpu" for r in wants)]
    for requirement in map(Requirement, listed):
        pin = PINS.get(canonicalize_name(requirement.name))
        assert pin and pin in requirement.specifier, f"{requirement}: constraints.txt has {pin}"


def test_an_installation_leaves_newer_versions_alone():
    for requirement in map(Requirement, [*PROJECT["dependencies"], *EXTRAS["book"]]):
        assert {bound.operator for bound in requirement.specifier} == {">="}, f"{requirement}: a lower bound, no other"


def test_conda_users_get_the_same():
    parsed = yaml.safe_load(read("environment.yml"))
    python = next(Requirement(r) for r in parsed["dependencies"] if isinstance(r, str) and r.startswith("python"))
    assert f">={Version('3.11')}" in str(python.specifier) and PROJECT["requires-python"] == ">=3.11"
    (pip,) = [part["pip"] for part in parsed["dependencies"] if isinstance(part, dict)]
    assert pip[0] == "-c constraints.txt"
    torch = f"torch=={PINS['torch']}"
    assert torch in pip and re.search(rf"^TORCH \?= {re.escape(torch)}$", read("Makefile"), re.M)
    (extras,) = [re.fullmatch(r"-e \.\[(.+)\]", line)[1].split(",") for line in pip if line.startswith("-e")]
    assert set(extras) == {"book", "build", "test"} <= set(EXTRAS)


def test_what_chapters_import_is_installed_with_the_library_and_its_book_extra():
    import jupytext

    known = {canonicalize_name(Requirement(r).name) for r in [*PROJECT["dependencies"], *EXTRAS["book"]]}
    known |= {"nsgf-lite", "ipython"}  # ipywidgets brings IPython
    homes = importlib.metadata.packages_distributions()
    for page in sorted((ROOT / "book").glob("*.md")):
        for cell in jupytext.read(page).cells:
            if cell.cell_type != "code":
                continue
            for node in ast.walk(ast.parse(re.sub(r"^\s*[%!].*$", "", cell.source, flags=re.M))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) else []
                for top in {name.split(".")[0] for name in names} - {"nsgf_lite"}:
                    bringing = {canonicalize_name(home) for home in homes.get(top, [])}
                    assert top in sys.stdlib_module_names or bringing & known, f"{page.name} imports {top}"


# --- commands -----------------------------------------------------------------------------------------------------


def test_an_old_python_is_refused_in_words(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "nsgf_lite").mkdir()
    old = tmp_path / "python2"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 2.7.18 && exit 0\nexit 1\n')
    old.chmod(0o755)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    done = subprocess.run(
        ["make", "book", f"PYTHON={old}"], cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8"
    )
    assert done.returncode != 0
    assert "3.11 or newer is needed" in done.stderr and "Python 2.7.18" in done.stderr


@pytest.mark.parametrize("script", [".ci/run", "tools/nbval.sh"])
def test_scripts_stop_at_the_first_failure(script):
    assert "\nset -euo pipefail\n" in read(script) and os.access(ROOT / script, os.X_OK)
    subprocess.run(["bash", "-n", ROOT / script], check=True)


def test_ci_runs_the_readmes_command_and_skips_nothing():
    assert "\nexport CI=true " in read(".ci/run") and "\nexport NSGF_CI=1 " in read(".ci/run")
    assert "\nmake test\n" in read(".ci/run")
    assert "    make test " in read("README.md") and "    make book " in read("README.md")
    steps = re.search(r"^test: (.+)$", read("Makefile"), re.M)[1].split()
    assert steps == ["lint", "wheel", "book", "unit", "mutations", "notebook-checks", "browser"]
    assert "-W --keep-going" in read("Makefile") and "-o pipefail" in read("Makefile")


@pytest.mark.parametrize("variable", ["CI", "NSGF_CI"])
def test_what_is_missing_is_skipped_at_home_and_fails_on_ci(variable, monkeypatch):
    monkeypatch.delenv(variable, raising=False)
    require(True, "a thing that is there", where=variable)
    with pytest.raises(pytest.skip.Exception, match="a browser"):
        require(False, "a browser", where=variable)
    monkeypatch.setenv(variable, "1")
    require(True, "a thing that is there", where=variable)
    with pytest.raises(pytest.fail.Exception, match="missing on CI: a browser"):
        require(False, "a browser", where=variable)


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned_and_tokens_read_only(workflow):
    parsed = yaml.safe_load(workflow.read_text(encoding="utf-8"))
    assert parsed["permissions"] == {"contents": "read"}
    assert all("permissions" not in job for job in parsed["jobs"].values())
    used = re.findall(r"uses:\s*(.+)", workflow.read_text(encoding="utf-8"))
    assert used
    for action in used:
        assert re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action), action


def test_built_things_are_ignored_by_git():
    built = [
        ".venv/x",
        ".venv-wheel/x",
        "_build/x",
        "dist/x",
        "nsgf_lite/__pycache__/x",
        ".mypy_cache/x",
        ".ruff_cache/x",
    ]
    done = subprocess.run(["git", "check-ignore", *built], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.stdout.split() == built


# --- the public address -------------------------------------------------------------------------------------------


def test_the_address_is_changed_everywhere_and_back(tmp_path):
    old, new = repository.address(), "/".join(["https://example.org", "somebody", "another-name"])
    assert CONFIG["repository"]["url"] == old
    for path in repository.tracked():
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    changed = repository.replace(new, tmp_path)
    assert {"_config.yml", "CITATION.cff", "pyproject.toml", "README.md"} <= set(changed)
    address_without_scheme = old.removeprefix("https://").encode()
    assert not [path for path in before if address_without_scheme in path.read_bytes()]
    assert repository.address(tmp_path) == new
    repository.replace(old, tmp_path)
    assert before == {path: path.read_bytes() for path in before}


@pytest.mark.parametrize("bad", ["", "example.org/a/b", "https://example.org", "https://example.org/a/b.git"])
def test_an_address_that_is_none_is_refused(bad, tmp_path):
    shutil.copy(ROOT / "_config.yml", tmp_path)
    with pytest.raises(SystemExit, match="expected https"):
        repository.replace(bad, tmp_path)


# --- what is served with the page ---------------------------------------------------------------------------------


def test_vendored_files_are_those_listed():
    for package in json.loads(read("book/_static/vendored.json")):
        folder = ROOT / "book" / "_static" / package["folder"]
        assert package["version"] and package["license"] and package["license_text"] in package["files"]
        there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        assert there - {"hub-shim.js"} == set(package["files"])
        for name, sha256 in package["files"].items():
            assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == sha256, name


def test_our_own_style_and_scripts_ask_nothing_of_other_servers():
    for name in ("book.css", "book.js", "favicon.svg", "widgets/hub-shim.js"):
        text = read(f"book/_static/{name}").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|@import|url\(", text), name
    settings = CONFIG["sphinx"]["config"]
    served = [
        settings["mathjax_path"],
        *settings["nb_ipywidgets_js"],
        *settings["html_css_files"],
        *settings["html_js_files"],
    ]
    for name in served:
        assert (ROOT / "book" / "_static" / name).is_file(), name
    assert "sphinx_thebe" not in settings["extensions"] and not (ROOT / "_static").exists()


# --- pages --------------------------------------------------------------------------------------------------------


def test_the_table_of_contents_lists_every_page_once():
    there = sorted(path.relative_to(ROOT).with_suffix("").as_posix() for path in (ROOT / "book").glob("*.md"))
    assert sorted(book_extension.pages()) == there
    assert book_extension.pages()[0] == yaml.safe_load(read("_toc.yml"))["root"] == "book/intro"


def test_warnings_stay_errors():
    assert CONFIG["execute"]["stderr_output"] == "error" and CONFIG["execute"]["allow_errors"] is False
    assert "suppress_warnings" not in CONFIG["sphinx"]["config"]
    assert "linkify" not in CONFIG["parse"]["myst_enable_extensions"]


CHAPTER = """---
a: 1
---
```{code-cell}
# no title
```
# One $x$

:::{prf:theorem} First
:label: thm-first
Text.
:::

::::{prf:lemma} Second | with a bar
:class: tip
:label: thm-second-one
::::
"""


TESTS = '''
def test_thm_first():
    """The first.

    Checked by: closed form, linear program.
    """
'''


@pytest.fixture
def small_book(tmp_path):
    noticed = {"mutation": "sign", "file": "sinkhorn.py", "what": "x  →  -x | y", "killed_by": ["test_thm_first[2]"]}
    for name, text in {
        "_toc.yml": "format: jb-book\nroot: book/intro\nparts:\n  - chapters:\n      - file: book/one\n",
        "book/intro.md": "# Hello\n",
        "book/one.md": CHAPTER,
        "nsgf_lite/sinkhorn.py": "x = 1\n",
        "book/results/mutations.json": json.dumps({"rows": [noticed], "sharp": {"test_thm_first": 0.41234}}),
        "tests/test_thm_one.py": TESTS,
        "book/results/speed.json": "{}",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def test_statements_are_found_with_and_without_label(small_book):
    with open(small_book / "book/one.md", "a", encoding="utf-8") as chapter:
        chapter.write("\n:::{prf:corollary}\n:::\n")
    found = list(book_extension.statements(small_book))
    assert [(s.kind, s.title, s.label) for s in found] == [
        ("theorem", "First", "thm-first"),
        ("lemma", "Second | with a bar", "thm-second-one"),
        ("corollary", "", ""),
    ]


def test_every_mutation_finds_its_place():
    """In a second, and not after all that stands before the mutations."""
    assert misplaced() == []


def test_the_theorem_index_has_titles_links_routes_and_mutations(small_book):
    table = book_extension.theorems_table(small_book)
    assert "## {doc}`One $x$ </book/one>`" in table
    assert "| {prf:ref}`thm-first` | First | closed form, linear program | 0.41 | 1 |" in table
    assert r"| {prf:ref}`thm-second-one` | Second \| with a bar |  |  | 0 |" in table


def test_the_mutation_table_names_the_theorems_that_noticed(small_book):
    table = book_extension.mutations_table(small_book)
    assert r"| sign | `x` → `-x \| y` in `sinkhorn.py` | {prf:ref}`thm-first` |" in table
    (small_book / "book/results/mutations.json").unlink()
    assert "|" not in book_extension.mutations_table(small_book)


def ran(root, *claims):
    """Note what a kernel's checks measured, as nl.check does."""
    folder = book_extension.checks_folder(root)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"claim": c, "value": v, "below": 1.0, "above": None}) for c, v in claims]
    (folder / f"{len(list(folder.iterdir()))}.jsonl").write_text(
        "".join(f"{line}\n" for line in lines), encoding="utf-8"
    )


def test_the_claims_table_shows_what_ran_and_finds_a_line_printed_by_hand(small_book):
    cell = nbformat.v4.new_code_cell(outputs=[nbformat.v4.new_output("stream", text="holds: a\nholds: b\n")])
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), small_book / "book/one.ipynb")
    ran(small_book, ("a", 0.9))
    assert "make notebooks" in book_extension.claims_table(small_book), "b was printed, and not by a check"
    ran(small_book, ("a", 0.9), ("b", -2.0))
    table = book_extension.claims_table(small_book)
    assert "2 claims, median 0.45" in table and "| 0.9 | a |" in table and "| 0 | b |" in table


def test_an_edit_of_the_library_executes_the_chapters_again(small_book, monkeypatch):
    keys = [book_extension.execution_key(small_book)]
    (small_book / "book/results/mutations.json").write_text("[]", encoding="utf-8")
    assert book_extension.execution_key(small_book) == keys[0]
    (small_book / "nsgf_lite/sinkhorn.py").write_text("x = 2\n", encoding="utf-8")
    keys.append(book_extension.execution_key(small_book))
    (small_book / "book/results/speed.json").write_text("[]", encoding="utf-8")
    keys.append(book_extension.execution_key(small_book))
    monkeypatch.setenv("NSGF_SCALE", "full")
    keys.append(book_extension.execution_key(small_book))
    assert len(set(keys)) == 4


def test_generated_pages_ask_for_tables_that_exist():
    asked = {page: re.findall(r"<!-- table: (\w+) -->", read(f"{page}.md")) for page in book_extension.GENERATED}
    assert sorted(sum(asked.values(), [])) == sorted(book_extension.TABLES)
    assert all(book_extension.TABLES[name]() for names in asked.values() for name in names)


def test_the_api_page_has_every_public_name():
    page = read("book/api.md")
    for name in nl.__all__:
        value = getattr(nl, name)
        directive = (
            r"automodule:: nsgf_lite\.(?:\w+\.)?"
            if isinstance(value, ModuleType)
            else r"auto(?:function|class|exception):: "
        )
        assert re.search(rf"^\.\. {directive}{name}$", page, re.M), name
        assert (value.__doc__ or "").strip(), f"{name} has no docstring"
    assert set(re.findall(r"^\.\. auto(?:function|class|exception):: (\w+)$", page, re.M)) <= set(nl.__all__)


def documented():
    """Public functions and classes with the entries of their section "Used in"."""
    homes = [nl, *(value for value in vars(nl).values() if isinstance(value, ModuleType) and value.__name__ in API)]
    for home in homes:
        for name, value in vars(home).items():
            ours = getattr(value, "__module__", "").startswith("nsgf_lite") and not name.startswith("_")
            if ours and (home is nl or value.__module__.startswith(home.__name__)):
                section = re.search(r"Used in\n +-+\n(.+)", value.__doc__ or "", re.S)
                yield f"{home.__name__}.{name}", section[1] if section else ""


API = {f"nsgf_lite.{name}" for name in re.findall(r"automodule:: nsgf_lite\.([\w.]+)", read("book/api.md"))}
DOCUMENTED = dict(documented())


@pytest.mark.parametrize("name", DOCUMENTED)
def test_chapters_and_theorems_that_a_docstring_names_use_it(name):
    """A chapter calls it; of a theorem, the chapter or its tests do."""
    call, section = re.compile(rf"\b{name.rsplit('.')[-1]}\("), DOCUMENTED[name]
    for page in re.findall(r":doc:`/(.+?)`", section):
        assert call.search(read(f"{page}.md")), f"{page} does not use it"
    chapter = {s.label: s.page for s in book_extension.statements()}
    for label in re.findall(r":prf:ref:`(.+?)`", section):
        tests = f"tests/test_thm_{chapter[label].removeprefix('book/')}.py"
        assert call.search(read(f"{chapter[label]}.md")) or call.search(read(tests)), f"{label} does not use it"


# --- the house ----------------------------------------------------------------------------------------------------


def floors():
    """The lines of CONTRIBUTING's picture from the bottom up: the rooms and single files on each."""
    picture = re.search(r"without circles:\n\n((?:    .+\n)+)", read("CONTRIBUTING.md"))[1]
    lines = [re.findall(r"(\w+)(?:/|\.py)", re.split(r" {4,}\w[^/.]*$", line)[0]) for line in picture.splitlines()]
    rooms = dict(re.findall(r"^    (\w+)/ +((?:\w+ )+) ", picture, re.M))
    return lines[::-1], {room: names.split() for room, names in rooms.items()}


def imports(path):
    """The modules of the library that a file imports, as paths without suffix."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nsgf_lite"):
            assert not node.level, f"{path}: a relative import"
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [n if module_file(n) else node.module for n in inside]
        found |= {module_file(n) for n in names if n.startswith("nsgf_lite")}
    return found - {None}


def module_file(name):
    base = ROOT / name.replace(".", "/")
    return next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file()), None)


def test_contributing_draws_the_house_as_it_is():
    lines, rooms = floors()
    there = {p.stem for p in (ROOT / "nsgf_lite").iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()}
    assert sorted(sum(lines, [])) == sorted(there - {"__init__"})
    for room, names in rooms.items():
        assert sorted(names) == sorted(p.stem for p in (ROOT / "nsgf_lite" / room).glob("*.py") if p.stem != "__init__")


def test_no_file_imports_from_above_and_there_is_no_circle():
    height = {name: k for k, line in enumerate(floors()[0]) for name in line}
    house = ROOT / "nsgf_lite"
    graph = {path: imports(path) for path in house.rglob("*.py")}
    for path, others in graph.items():
        here, *_ = path.relative_to(house).with_suffix("").parts
        for other in others if here != "__init__" else ():
            there, *_ = other.relative_to(house).with_suffix("").parts
            within = here == there and path.parent != house
            assert within or height[there] < height[here], f"{path.name} imports {other.relative_to(house)}"
    files = {path: {o for o in others if o.name != "__init__.py"} for path, others in graph.items()}
    assert list(graphlib.TopologicalSorter(files).static_order())


def test_the_tools_form_no_circle():
    tools = {path.stem: path for path in (ROOT / "tools").glob("*.py")}
    words = {name: set(re.findall(r"^\s*(?:from|import) (\w+)", read(f"tools/{name}.py"), re.M)) for name in tools}
    assert list(graphlib.TopologicalSorter({name: found & set(tools) for name, found in words.items()}).static_order())


# --- README -------------------------------------------------------------------------------------------------------


def test_the_readmes_example_runs(capsys, tmp_path, monkeypatch):
    (example,) = re.findall(r"^```python\n(.+?)^```$", read("README.md"), re.M | re.S)
    for long, short in [
        ("steps=5000", "steps=20"),
        ("step=0.4, steps=10)", "step=0.4, steps=3, minibatch=16, pool=4)"),
        ("500", "60"),
        ("steps=40", "steps=4"),
    ]:
        assert long in example, f"the README's example has no {long} to shorten"
        example = example.replace(long, short)
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    assert capsys.readouterr().out.count("tensor(") == 2 and (tmp_path / "model.safetensors").exists()


def test_files_that_the_readme_names_are_there():
    named = re.findall(r"\]\(([^):]+)\)", read("README.md")) + re.findall(r"^\| `(\w+/)` \|", read("README.md"), re.M)
    assert len(named) >= 8
    for name in named:
        assert (ROOT / name).exists(), name
