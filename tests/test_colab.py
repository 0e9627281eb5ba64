"""The notebooks for Colab: up to date, in plain Markdown, with the book's code and numbers; one is run."""

import json
import re
import sys
import types
from importlib.metadata import version

import nbformat
import notebooks
import pytest
import yaml
from colab import Exporter, table_of_contents
from conftest import ROOT, require, wheel_kernel
from IPython.core.inputtransformer2 import TransformerManager
from packaging.requirements import Requirement

import nsgf_lite

FOLDER = ROOT / "colab" / "book"
NAMES = [path.stem for path in notebooks.chapters()]
SYNTAX = re.compile(
    r":::|^ *(`{3,}|~{3,})\s*\{|\{[a-z]+(:[a-z]+)?\}`|[(`](eq|thm|def|ex|fig|proof|sec)-"
    r"|^\([\w-]+\)=|^ *:\w+: |<!--|^% |\?\?|\bTheorem \?",
    re.M,
)
each_notebook = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def fresh():
    return Exporter(ROOT).export()


def stored(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code(notebook):
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def prose(notebook):
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def test_exports_are_up_to_date(fresh):
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == sorted(fresh), "run make notebooks"
    for name, notebook in fresh.items():
        assert (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8") == notebooks.text(notebook), (
            f"{name}: run make notebooks"
        )


@each_notebook
def test_no_directive_or_role_survives(name):
    left = SYNTAX.search(prose(stored(name)))
    assert left is None, prose(stored(name))[max(0, left.start() - 100) : left.end() + 100]


@each_notebook
def test_code_is_the_chapters_own(name):
    pair = nbformat.read(ROOT / "book" / f"{name}.ipynb", as_version=4)
    assert code(stored(name))[1:] == code(pair)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in stored(name).cells)


def test_chapters_are_numbered_through_the_parts():
    toc = yaml.safe_load("""
        root: book/intro
        parts:
        - {numbered: true, chapters: [{file: book/a, sections: [{file: book/a1}]}, {file: book/b}]}
        - {chapters: [{file: book/c}]}
        - {numbered: true, chapters: [{file: book/d}]}
    """)
    numbers = {"book/intro": None, "book/a": 1, "book/a1": 1, "book/b": 2, "book/c": None, "book/d": 3}
    assert table_of_contents(toc) == numbers


def test_every_form(tmp_path):
    """A page with each form that chapters use, and what becomes of it."""
    (tmp_path / "book").mkdir()
    for path, content in {
        "_toc.yml": "root: book/intro\nparts:\n- {numbered: true, chapters: [{file: book/a}]}",
        "_config.yml": "repository: {url: 'https://example.org/x'}",
        "pyproject.toml": '[project]\nversion = "1.2.3"',
        "book/intro.md": "# Hello",
        "book/references.bib": BIBLIOGRAPHY,
        "book/a.md": PAGE,
    }.items():
        (tmp_path / path).write_text(content, encoding="utf-8")
    assert prose(Exporter(tmp_path).export()["a"]) == EXPORTED.strip()
    for wrong in (
        "{prf:ref}`thm-none`",
        ":::{unheard-of}\n:::",
        "{unheard}`of`",
        "{cite:t}`nobody`",
        "[](nowhere)",
    ):
        (tmp_path / "book" / "a.md").write_text(f"{PAGE}\n\n{wrong}\n", encoding="utf-8")
        with pytest.raises(ValueError, match="no form for Colab"):
            Exporter(tmp_path).export()


def test_first_cell_installs_the_release_on_colab_and_leaves_torch_alone(tmp_path, monkeypatch):
    sources = {code(stored(name))[0] for name in NAMES}
    assert len(sources) == 1
    python = TransformerManager().transform_cell(sources.pop())
    asked = []
    shell = types.SimpleNamespace(run_line_magic=lambda magic, line: asked.append((magic, line)))
    monkeypatch.chdir(tmp_path)
    exec(python, {"get_ipython": lambda: shell})
    assert not asked and not list(tmp_path.iterdir()), "nothing happens outside Colab"

    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    exec(python, {"get_ipython": lambda: shell})
    ((magic, line),) = asked
    held = (tmp_path / "held.txt").read_text(encoding="utf-8").split()
    assert magic == "pip" and held == [f"torch=={version('torch')}", f"numpy=={version('numpy')}"]
    wanted = Requirement(re.search(r'"(.+)"', line)[1])
    url = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))["repository"]["url"]
    assert (wanted.name, wanted.extras) == ("nsgf-lite", {"book"})
    assert wanted.url == f"git+{url}.git@v{nsgf_lite.__version__}"
    assert "--constraint held.txt" in line


def test_one_runs_in_an_empty_folder(tmp_path):
    from nbclient import NotebookClient

    require(NAMES, "a chapter")
    name = min(NAMES, key=lambda name: sum(map(len, code(stored(name)))))
    notebook = stored(name)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=120, kernel_name=wheel_kernel(), resources=resources).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert cells[0].outputs == [] and not (tmp_path / "held.txt").exists()
    pair = nbformat.read(ROOT / "book" / f"{name}.ipynb", as_version=4)
    for cell, of_pair in zip(cells[1:], [cell for cell in pair.cells if cell.cell_type == "code"], strict=True):
        if notebooks.is_claim(of_pair):
            printed = ["".join(output.get("text", "") for output in c.outputs) for c in (cell, of_pair)]
            assert printed[0] == printed[1], json.dumps(printed)


BIBLIOGRAPHY = r"""
@article{k, author={S{\'e}journ{\'e}, T and Feydy, J and Vialard, F}, title={T}, journal={J}, year={2019}}
@book{v, author={Villani, C}, title={Old and New}, publisher={P}, year={2009}}
"""
PAGE = r"""---
jupytext:
  formats: md:myst,ipynb
  text_representation: {extension: .md, format_name: myst}
kernelspec: {name: python3, display_name: Python 3}
---
<!-- not
shown -->
(here)=
# Piles

% a remark to authors
See {prf:ref}`thm-x`, {eq}`eq-x`, {numref}`fig-x`, {numref}`picture %s <fig-x>`, {ref}`ex-x`, {ref}`here`,
[](thm-x), {doc}`intro`, {doc}`the start <intro>`, [the proof](proof-x), [out](https://example.org),
{cite:t}`k,v`, {cite:p}`k`, `{prf:ref}` in code,
$a[i](b)$ in formulas, {py:func}`~nsgf_lite.plan`.

:::{prf:theorem} Of $x$
:label: thm-x

Let

$$
x=1 .
$$ (eq-x)

1. a list

   $$y=2$$ (eq-y)
:::

::::{dropdown} Proof
:name: proof-x

:::{note}
Inside {eq}`eq-y`.
:::

$$
z=3
$$
::::

```{code-cell} ipython3
---
mystnb:
  figure:
    name: fig-x
    caption: |
      A figure, {prf:ref}`thm-x`.
---
1 + 1
```

:::{prf:lemma}
:label: thm-l
Short.
:::

:::{exercise} Title
:label: ex-x
(pen) Do it.
:::

:::{solution-start} ex-x
:class: dropdown
:::

Done.

:::{solution-end}
:::

```python
plain = {"code": 1}
```
"""
EXPORTED = r"""
# Piles

See Theorem 1.1, (1.1), Figure 1.1, picture 1.1, Exercise 1.1, Piles,
Theorem 1.1, Hello, the start, the proof, [out](https://example.org),
Séjourné et al. (2019), Villani (2009), (Séjourné et al., 2019), `{prf:ref}` in code,
$a[i](b)$ in formulas, `plan`.

**Theorem 1.1 (Of $x$).**

Let

$$
x=1 . \tag{1.1}
$$

1. a list

   $$y=2 \tag{1.2}$$

**Proof.**

**Note.**

Inside (1.2).

$$
z=3
$$

∎

**Figure 1.1.** A figure, Theorem 1.1.

**Lemma 1.1.**

Short.

**Exercise 1.1 (Title).**

(pen) Do it.

**Solution to Exercise 1.1.**

Done.

```python
plain = {"code": 1}
```

## References

- T Séjourné, J Feydy, and F Vialard. T. *J*, 2019.
- C Villani. *Old and New*. P, 2009.
"""
