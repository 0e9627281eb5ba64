"""Chapters as notebooks for Colab, which knows no directives and roles: everything becomes plain Markdown.

    python tools/colab.py [--to FOLDER]                  book/NAME.md -> colab/book/NAME.ipynb

The chapters are rendered twice in the order of _toc.yml. The first pass counts theorems, equations, figures
and exercises as the book does and notes what each label is called; the second writes. A directive, role or
label that is not known here is an error, never something that slips through.
"""

import argparse
import re
import sys
import tomllib
from collections import Counter
from pathlib import Path

import jupytext
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell
from notebooks import ROOT, chapters, name_cells, text
from pybtex.database import parse_file
from pybtex.plugin import find_plugin

STATEMENTS = {
    *(
        "theorem",
        "lemma",
        "proposition",
        "corollary",
        "definition",
        "remark",
        "example",
        "algorithm",
        "assumption",
    ),
    *("conjecture", "observation", "property", "axiom", "criterion"),
}
ADMONITIONS = {
    "note",
    "tip",
    "hint",
    "important",
    "warning",
    "caution",
    "attention",
    "danger",
    "error",
    "seealso",
}
TITLED = {"admonition", "dropdown", "card", "grid-item-card", "tab-item", "sidebar", "topic"}
PLAIN = {"margin", "tab-set", "grid", "grid-item", "container", "div", "epigraph", "glossary", "only"}
NOWHERE = {"tableofcontents", "raw", "index", "contents", "bibliography"}  # references go to the end

FENCE = re.compile(r"^( *)(:{3,}|`{3,}|~{3,}) *(?:\{([\w:-]+)\})? *(.*)$")
OPTION = re.compile(r"^ *:([\w-]+): *(.*)$")
LABEL = re.compile(r"^\(([\w:-]+)\)=\s*$\n*(?=(#+ (.*)$)?)", re.M)
END_OF_MATH = re.compile(r"\$\$ *(?:\(([\w:-]+)\))? *$")
INLINE = re.compile(
    r"\{(?P<role>[\w:-]+)\}`(?P<body>[^`]+)`"
    r"|(?P<code>(?P<ticks>`+)(?!`).+?(?<!`)(?P=ticks)(?!`))"
    r"|(?P<math>\$[^$]+\$)"
    r"|(?P<image>!)?\[(?P<text>[^\]]*)\]\((?P<target>[^()\s]*)\)",
    re.S,
)
INSTALL = """\
import sys

if "google.colab" in sys.modules:  # nothing is done elsewhere
    from importlib.metadata import version

    with open("held.txt", "w") as held:  # Colab's own versions stay
        for name in ("torch", "numpy"):
            print(f"{name}=={version(name)}", file=held)
    %pip install --quiet --constraint held.txt \\
        "nsgf-lite[book] @ git+URL@vVERSION"
"""


class Exporter:
    def __init__(self, root):
        self.root = root
        self.url = yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8"))["repository"]["url"].rstrip("/")
        self.version = library_version(root)
        toc = (root / "_toc.yml").read_text(encoding="utf-8")
        self.docs = table_of_contents(yaml.safe_load(toc))  # name -> chapter number or None
        bibliography = root / "book" / "references.bib"
        self.references = parse_file(str(bibliography)).entries if bibliography.exists() else {}
        self.names, self.titles, self.final = {}, {}, False

    def export(self):
        """{chapter: notebook}, for all chapters that have a notebook."""
        self.chapters = {f"book/{path.stem}" for path in chapters(self.root)}
        if lost := self.chapters - set(self.docs):
            raise ValueError(f"not in _toc.yml: {', '.join(sorted(lost))}")
        for self.final in (False, True):
            self.count = Counter()
            notebooks = {name: self.notebook(name) for name in self.docs if (self.root / f"{name}.md").exists()}
        return {name.removeprefix("book/"): notebooks[name] for name in self.docs if name in self.chapters}

    def notebook(self, name):
        """One chapter, rendered; afterwards self.names knows its labels."""
        self.doc, self.cited = name, []
        notebook = jupytext.read(self.root / f"{name}.md", fmt="md:myst")
        if heading := re.search(
            r"^# +(.*)$", "\n".join(c.source for c in notebook.cells if c.cell_type != "code"), re.M
        ):
            self.titles[name] = heading[1].strip()
        cells = [new_code_cell(INSTALL.replace("URL", f"{self.url}.git").replace("VERSION", self.version).rstrip())]
        for cell in notebook.cells:
            if cell.cell_type == "code":
                tags = {"tags": list(cell.metadata.tags)} if cell.metadata.get("tags") else {}
                cells.append(new_code_cell(cell.source, metadata=tags))
                source = self.caption(cell.metadata.get("mystnb", {}).get("figure", {}))
            else:
                source = self.markdown(cell.source)
            if source.strip():
                cells.append(new_markdown_cell(source.strip()))
        if self.cited:
            references = "\n".join(f"- {self.full_reference(key)}" for key in sorted(set(self.cited)))
            cells.append(new_markdown_cell(f"## References\n\n{references}"))
        notebook.cells = cells
        kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
        notebook.metadata = {"kernelspec": kernel, "colab": {"provenance": []}}
        return name_cells(notebook)

    # numbers and names

    def number(self, kind, label=None, form="{kind} {number}"):
        """The next number of this kind in this chapter, as the book writes it, noted as the label's name."""
        chapter = self.docs[self.doc]
        self.count[chapter, kind] += 1
        number = f"{chapter}.{self.count[chapter, kind]}" if chapter else str(self.count[chapter, kind])
        name = form.format(kind=kind.capitalize(), number=number)
        if label:
            if not self.final and label in self.names:
                raise ValueError(f"{self.doc}: label {label} occurs twice")
            self.names[label] = name
        return name

    def name(self, label):
        if label in self.names:
            return self.names[label]
        return self.unknown("label", label) if self.final else "?"

    def unknown(self, what, which):
        if self.doc not in self.chapters:
            return "?"  # read for its labels only
        raise ValueError(f"{self.doc}.md: {what} {which!r} has no form for Colab; see tools/colab.py")

    # blocks

    def markdown(self, source):
        source = re.sub(r"<!--.*?-->", "", source, flags=re.S)
        rendered = "\n".join(self.blocks(source.split("\n")))
        return re.sub(r"\n{3,}", "\n\n", rendered)

    def blocks(self, lines):
        """Render lines: fences and displayed formulas are taken out whole; `inline` gets the text between."""
        waiting, i = [], 0
        while i < len(lines):
            line, fence = lines[i], FENCE.match(lines[i])
            if not fence and not line.lstrip().startswith("$$"):
                waiting.append(line)
                i += 1
                continue
            yield self.inline("\n".join(waiting))
            waiting = []
            if fence:
                close = re.compile(rf" *{fence[2][0]}{{{len(fence[2])},}} *$")
                end = next((j for j in range(i + 1, len(lines)) if close.match(lines[j])), None)
                if end is None:
                    raise ValueError(f"{self.doc}.md: this fence is never closed: {line}")
                yield from self.fenced(fence, lines[i : end + 1])
            else:
                opening = END_OF_MATH.search(line) if line.count("$$") == 2 else None
                end = (
                    i if opening else next((j for j in range(i + 1, len(lines)) if END_OF_MATH.search(lines[j])), None)
                )
                if end is None:
                    raise ValueError(
                        f"{self.doc}.md: this formula is never closed: {line} {''.join(lines[i + 1 : i + 2])}"
                    )
                pad, formula = "\n".join(lines[i : end + 1]).split("$$", 1)
                yield pad + self.formula(END_OF_MATH.sub("", formula), END_OF_MATH.search(lines[end])[1], pad)
            i = end + 1
        yield self.inline("\n".join(waiting))

    def fenced(self, fence, lines):
        """Render one fenced block."""
        pad, _, name, argument = fence.groups()
        if name is None and fence[2][0] != ":":
            yield from lines  # a listing
            return
        body, options = [line.removeprefix(pad) for line in lines[1:-1]], {}
        while body and (option := OPTION.match(body[0])):
            options[option[1]] = option[2].strip()
            body = body[1:]
        rendered = self.directive(name or "container", argument.strip(), options, body)
        yield "\n".join(pad + line if line else line for line in f"\n{rendered}\n".split("\n"))

    def directive(self, name, argument, options, body):
        label = options.get("label", options.get("name"))
        kind = name.removeprefix("prf:")
        if name in NOWHERE or name.endswith(("solution-end", "exercise-end")):
            return ""
        if name in ("code-block", "code", "sourcecode"):
            return "\n".join([f"```{argument}", *body, "```"])
        if name == "math":
            return self.formula("\n".join(["", *body, ""]), label)
        if name in ("figure", "image"):
            picture = f"![{options.get('alt', '')}]({self.url}/raw/v{self.version}/book/{argument})"
            caption = self.caption({"caption": "\n".join(body), "name": label}) if name == "figure" else ""
            return f"{picture}\n\n{caption}"
        if name == "table":
            head, tail = f"**{self.number('table', label)}.** {self.inline(argument)}", ""
        elif name.startswith("prf:") and kind in STATEMENTS or kind in ("exercise", "exercise-start"):
            kind = kind.removesuffix("-start")
            number = kind.capitalize() if "nonumber" in options else self.number(kind, label)
            head, tail = heading(number, self.inline(argument)), ""
        elif name in ("solution", "solution-start"):
            head, tail = f"**Solution to {self.name(argument)}.**", ""
        elif name in TITLED or name in ADMONITIONS:
            title = self.inline(argument) or name.replace("seealso", "see also").capitalize()
            if label:
                self.names[label] = title
            head, tail = heading(title), "\n\n∎" if title.startswith("Proof") else ""
        elif name in PLAIN:
            head, tail = "", ""
        else:
            return self.unknown("directive", name)
        inside = self.markdown("\n".join(body)).strip()
        return f"{head}\n\n{inside}{tail}"

    def formula(self, formula, label, pad=""):
        tag = rf" \tag{{{self.number('equation', label, '({number})')[1:-1]}}}" if label else ""
        end = f"\n{pad}" if "\n" in formula else ""
        return f"$${formula.rstrip()}{tag}{end}$$"

    def caption(self, figure):
        if not figure or not figure.get("caption"):
            return ""
        return f"**{self.number('figure', figure.get('name'))}.** {self.markdown(figure['caption']).strip()}"

    # what stands in a line

    def inline(self, source):
        def target(match):
            self.names[match[1]] = self.inline(match[3]) if match[3] else match[1]
            return ""

        source = re.sub(r"^%.*\n?", "", source, flags=re.M)
        return INLINE.sub(self.replace, LABEL.sub(target, source))

    def replace(self, match):
        if match["code"] or match["math"]:
            return match[0]
        if match["role"]:
            return self.role(match["role"], match["body"])
        outside = re.match(r"https?://|mailto:", match["target"])
        if outside:
            return match[0]
        if match["image"]:
            return f"![{match['text']}]({self.url}/raw/v{self.version}/book/{match['target']})"
        if match["text"]:
            return self.inline(match["text"])
        return self.name(match["target"].removeprefix("#"))

    def role(self, role, body):
        shown, target = re.fullmatch(r"(?:(.*\S)\s*<([^>]+)>|.*)", body, re.S).groups()
        target = (target or body).strip()
        if role.startswith("cite"):
            return self.citation(role, body)
        if role in ("prf:ref", "ref", "numref"):
            name = self.name(target)
            return (shown or "%s").replace("%s", name.split()[-1] if shown else name)
        if role == "eq":
            return self.name(target)
        if role == "doc":
            name = str((Path(self.doc).parent / target) if not target.startswith("/") else target[1:]).removesuffix(
                ".md"
            )
            return shown or self.titles.get(name) or (self.unknown("page", target) if self.final else "?")
        if role.split(":")[-1] in ("func", "class", "meth", "mod", "attr", "data", "obj", "exc", "file"):
            return f"`{shown or (target.split('.')[-1] if target.startswith('~') else target)}`"
        if role == "math":
            return f"${body}$"
        if role in ("abbr", "term", "kbd"):
            return shown or re.sub(r"\s*\(.*\)$", "", body)
        return self.unknown("role", role)

    def citation(self, role, keys):
        said = []
        for key in (key.strip() for key in keys.split(",")):
            if key not in self.references:
                return self.unknown("reference", key)
            entry = self.references[key]
            self.cited.append(key)
            people = [" ".join(map(str, person.rich_last_names)) for person in entry.persons["author"]]
            who = people[0] + (" et al." if len(people) > 2 else f" and {people[1]}" if len(people) == 2 else "")
            year = entry.fields.get("year", "n.d.")
            said.append(f"{who} ({year})" if role.endswith(":t") else f"{who}, {year}")
        return ", ".join(said) if role.endswith(":t") else f"({'; '.join(said)})"

    def full_reference(self, key):
        style = find_plugin("pybtex.style.formatting", "plain")()
        reference = style.format_entry(key, self.references[key]).text.render_as("markdown")
        return re.sub(r"\\([.+-])", r"\1", reference.replace("\n", " "))  # escapes that Markdown does not need


def heading(name, title=""):
    said = f"{name} ({title})" if title else name
    return f"**{said}{'' if said[-1] in '.?!:' else '.'}**"


def library_version(root):
    stated = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"].get("version")
    if stated:
        return stated
    init = (root / "nsgf_lite" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"', init, re.M)[1]


def table_of_contents(toc):
    """{document: chapter number}, in the book's order; None for pages that are not numbered."""
    docs, last = {toc["root"]: None}, 0
    everywhere = {**toc.get("defaults", {}), **toc.get("options", {})}

    def add(entries, numbered, chapter):
        nonlocal last
        for entry in entries:
            if "file" not in entry:
                continue
            if numbered and chapter is None:
                last += 1
            docs[entry["file"]] = (chapter or last) if numbered else None
            for part in [entry, *entry.get("subtrees", [])]:
                add(part.get("sections", []), numbered, docs[entry["file"]])

    for part in toc.get("parts", [toc]):
        settings = {**everywhere, **part.get("options", {}), **part}
        add(part.get("chapters", []), settings.get("numbered", False), None)
    return docs


def export(root, folder):
    """Write all notebooks to the folder and remove those that no chapter has."""
    notebooks = Exporter(root).export()
    folder.mkdir(parents=True, exist_ok=True)
    for name, notebook in notebooks.items():
        (folder / f"{name}.ipynb").write_text(text(notebook), encoding="utf-8")
    for path in folder.glob("*.ipynb"):
        if path.stem not in notebooks:
            path.unlink()
    print(f"{len(notebooks)} notebooks in {folder}")
    return 0


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=ROOT / "colab" / "book")
    return export(ROOT, parser.parse_args(arguments).to)


if __name__ == "__main__":
    sys.exit(main())
