"""What pages say of recorded files is tied to the files: falsify a record, and a claim of a page turns red.

A claim cell that reads a record, directly or through other cells, is run with what it needs and nothing else, on the
true record and on false ones.
"""

import ast
import builtins
import copy
import json
import re
import symtable
from collections.abc import Callable, Iterator
from typing import NamedTuple

import matplotlib
import pytest
from conftest import ROOT
from notebooks import chapters, is_claim, read

from benchmarks.provenance import read_record

RESULTS = ROOT / "book" / "results"
RECORDS = sorted(path.stem for path in RESULTS.glob("*.json"))


# --- the cells of a page that depend on a record ------------------------------------------------------------------


class Cell(NamedTuple):
    source: str
    claims: bool
    bound: set[str]  # names that it binds anew
    changed: set[str]  # names whose items or attributes it sets
    used: set[str]  # names that it takes from earlier cells


def globals_of(statement: ast.stmt) -> tuple[set[str], set[str]]:
    """Names that a simple statement or a definition binds, and names that it reads, at the level of the page."""
    table = symtable.symtable(ast.unparse(statement), "cell", "exec")
    bound = {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported() or s.is_namespace()}
    read, scopes = {s.get_name() for s in table.get_symbols() if s.is_referenced()}, list(table.get_children())
    while scopes:
        scope = scopes.pop()
        read |= {s.get_name() for s in scope.get_symbols() if s.is_global() and s.is_referenced()}
        scopes += scope.get_children()
    return bound, read - set(dir(builtins))


def scan(statements: list[ast.stmt], bound: set[str], used: set[str]) -> None:
    """Collect what statements bind, and what they read before they have bound it, in the order in which they run."""
    for statement in statements:
        blocks = [getattr(statement, name, []) for name in ("body", "orelse", "finalbody")]
        if isinstance(statement, ast.For | ast.While | ast.If | ast.With):
            head = {ast.For: ("iter",), ast.With: ("items",)}.get(type(statement), ("test",))[0]
            parts = getattr(statement, head)
            for part in parts if isinstance(parts, list) else [parts]:
                expression = part.context_expr if isinstance(part, ast.withitem) else part
                used |= globals_of(ast.Expr(expression))[1] - bound
            targets = [statement.target] if isinstance(statement, ast.For) else []
            targets += [w.optional_vars for w in getattr(statement, "items", []) if w.optional_vars]
            bound |= {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
            for block in blocks:
                scan(block, bound, used)
        else:
            binds, reads = globals_of(statement)
            used |= reads - bound
            bound |= binds


def read_cells(page: str) -> list[Cell]:
    cells = []
    for cell in read(ROOT / "book" / f"{page}.md").cells:
        if cell.cell_type != "code":
            continue
        bound, changed, used = set(), set(), set()
        tree = ast.parse(re.sub(r"^\s*[%!].*$", "pass", cell.source, flags=re.M))
        scan(tree.body, bound, used)
        for node in ast.walk(tree):
            if isinstance(node, ast.Subscript | ast.Attribute) and isinstance(node.ctx, ast.Store):
                base = node.value
                while isinstance(base, ast.Subscript | ast.Attribute):
                    base = base.value
                changed |= {base.id} & used if isinstance(base, ast.Name) else set()
        cells.append(Cell(cell.source, is_claim(cell), bound, changed, used))
    return cells


def dependent(page: str, record: str) -> list[list[str]]:
    """For each claim cell of the page that depends on the record the cells that have to run, itself the last."""
    cells, tainted, chosen = read_cells(page), set(), []
    for k, cell in enumerate(cells):
        touched = f"{record}.json" in cell.source or cell.used & tainted
        tainted = tainted | cell.bound | cell.changed if touched else tainted - cell.bound
        if not (touched and cell.claims):
            continue
        needed, run = set(cell.used), [k]
        for j in range(k - 1, -1, -1):
            if (cells[j].bound | cells[j].changed) & needed:
                needed = (needed - cells[j].bound) | cells[j].used
                run.append(j)
        chosen.append([cells[j].source for j in sorted(run)])
    return chosen


READERS = {
    record: [path.stem for path in chapters() if f"{record}.json" in path.read_text(encoding="utf-8")]
    for record in RECORDS
}


def fault(page: str, sources: list[str], record: str, content: dict, folder) -> str:
    """What stops these cells of the page when the record has this content; empty if nothing does."""
    (folder / "results").mkdir(exist_ok=True)
    for other in RECORDS:
        there = content if other == record else json.loads((RESULTS / f"{other}.json").read_text(encoding="utf-8"))
        (folder / "results" / f"{other}.json").write_text(json.dumps(there), encoding="utf-8")
    space: dict = {"display": lambda *_: None, "__name__": "__main__"}
    try:
        for source in sources:
            exec(compile(source, page, "exec"), space)
    except Exception as error:  # a claim that fails, or a row that is missing
        return f"{page}: {type(error).__name__}: {error}"
    return ""


# --- how a record is falsified ------------------------------------------------------------------------------------


def inside(content, *path) -> Iterator[tuple]:
    """Containers and keys at the end of a path of keys; ``...`` stands for every key or index."""
    key, *rest = path
    keys = list(content) if isinstance(content, dict) else range(len(content))
    for k in keys if key is ... else [key] if not isinstance(content, dict) or key in content else []:
        if rest:
            yield from inside(content[k], *rest)
        else:
            yield content, k


def times(factor: float, *path, where: Callable[[dict], bool] = lambda row: True) -> Callable[[dict], None]:
    """Multiply the numbers at the end of the path, in the rows (the containers) that fit."""

    def change(content: dict) -> None:
        def scaled(value):
            if isinstance(value, list):
                return [scaled(v) for v in value]
            return value * factor if isinstance(value, int | float) and not isinstance(value, bool) else value

        found = [(box, key) for box, key in inside(content, *path) if not isinstance(box, dict) or where(box)]
        assert found, f"nothing at {path}"
        for box, key in found:
            box[key] = scaled(box[key])

    return change


def exchanged(one, other, *path) -> Callable[[dict], None]:
    """Exchange two names where they are values, or the entries of two keys."""

    def change(content: dict) -> None:
        turned = {one: other, other: one}
        for box, key in list(inside(content, *path)):
            if isinstance(box[key], dict) and {one, other} <= set(box[key]):
                box[key][one], box[key][other] = box[key][other], box[key][one]
            elif isinstance(box[key], str) and box[key] in turned:
                box[key] = turned[box[key]]

    return change


def ours(row: dict) -> bool:
    return "nsgf_lite" in row["method"]


FALSE = {
    "sinkhorn_benchmark": {
        "our times": times(20, "rows", ..., "milliseconds", where=ours),
        "our errors": times(100, "rows", ..., "error", where=ours),
        "their times": times(1 / 20, "rows", ..., "milliseconds", where=lambda row: not ours(row)),
        "seconds of the large problem": times(20, "large", "seconds"),
        "memory of the large problem": times(10, "large", "gibibytes"),
        "price of a pass": times(20, "passes", "exponentials"),
    },
    "pool_benchmark": {
        "our times": times(10, "rows", ..., "seconds", where=ours),
        "our errors": times(300, "rows", ..., "error", where=ours),
        "their times": times(1 / 10, "rows", ..., "seconds", where=lambda row: not ours(row)),
    },
    "stacked_benchmark": {
        "stacks": times(10, "rows", ..., "stack"),
        "loops": times(10, "rows", ..., "loop"),
    },
    "cells": {
        "generated": times(3, "rows", ..., "generated", ...),
        "floors": times(3, "rows", ..., "floor", ...),
        "floors, small": times(1 / 3, "rows", ..., "floor", ...),
    },
    "fields_benchmark": {
        "our times": times(30, "rows", ..., "ms", 0),
        "their times": times(30, "rows", ..., "ms", 1),
        "differences": times(1e4, "rows", ..., "difference"),
        "memory": times(10, "rows", ..., "bytes", 0),
        "stacks": times(10, "ensembles", ..., "stack"),
    },
    "drifting": {
        "Sinkhorn's distances": times(3, "rows", ..., "w2", where=lambda row: row["field"] == "Sinkhorn"),
        "Sinkhorn's MMD": times(30, "rows", ..., "mmd2", where=lambda row: row["field"] == "Sinkhorn"),
        "order of scores and Sinkhorn": exchanged("KL, smoothed scores", "Sinkhorn", "rows", ..., "field"),
        "order of proxy and Algorithm 2": exchanged("Sinkhorn proxy", "DA2", "rows", ..., "field"),
        "floors": times(3, "floor", ..., "w2"),
    },
    "table1": {
        "NSGF's distances": times(1.2, "sets", ..., "methods", "NSGF", "10", ...),
        "NSGF's distances, long": times(1.2, "sets", ..., "methods", "NSGF", "100", ...),
        "order of NSGF and FM": exchanged("NSGF", "FM", "sets", ..., "methods"),
        "order of OT-CFM and EPT": exchanged("OT-CFM", "EPT", "sets", ..., "methods"),
        "floors": times(1.5, "sets", ..., "floor"),
        "other draws": times(1.3, "sets", ..., "again", "10", ...),
        "differences of the pair": times(-1, "sets", ..., "pair", ..., "by_seed"),
        "gaps of the pair": times(0.2, "sets", ..., "pair", ..., "gap"),
        "verdicts of the pair": exchanged("worse", "better", "sets", ..., "pair", ..., "verdict"),
        "samples that left": times(0, "sets", ..., "pair", ..., "left"),
        "the fuller pool": times(1.1, "full", ..., "by_seed"),
        "curves": exchanged("NSGF", "FM", "curves", ...),
    },
    "two_phase": {
        "NSGF++": times(0.4, "rows", ..., "w2", where=lambda row: row["method"] == "NSGF++"),
        "order of NSGF and NSGF++": exchanged("NSGF", "NSGF++", "rows", ..., "method"),
        "floors": times(3, "floor", ...),
        "times at the handover": times(0.3, "handover", ..., 0),
    },
    "diffusions": {
        "JKO's divergences": times(1.5, "rows", ..., "flow", where=lambda row: row["method"] == "jko"),
        "the trapezoid's": times(30, "rows", ..., "flow", where=lambda row: row["method"] == "trapezoid"),
        "order of the schemes": exchanged("jko", "trapezoid", "rows", ..., "method"),
        "exact steps": times(1.1, "rows", ..., "steps"),
        "the critics' values": times(1.5, "rows", ..., "F", ...),
        "the rivals' times": times(0.3, "rows", ..., "processor", where=lambda row: row.get("method") == "exact"),
        "Jensen and Shannon's": times(20, "rows", ..., "at", ..., "js", 0),
        "energies of the porous flow": times(1.3, "rows", ..., "at", ..., "own F"),
        "distances": times(3, "rows", ..., "at", ..., "w2"),
    },
    "aggregation": {
        "radii": times(1.03, "rows", ..., "along", ..., "radius"),
        "energies": times(3, "rows", ..., "along", ..., "excess"),
        "variances": times(1.2, "rows", ..., "along", ..., "variance"),
        "distances": times(2, "rows", ..., "along", ..., "w2"),
        "the two schemes": exchanged("forward-backward", "at once", "rows", ..., "problem"),
        "the two classes": exchanged("residual", "convex", "rows", ..., "maps"),
        "widths": times(1.1, "rows", ..., "along", ..., "x"),
    },
    "posteriors": {
        "R-hats": times(1.01, "rows", ..., "rhat", where=lambda row: row["method"] == "NUTS"),
        "effective draws": times(0.1, "rows", ..., "ess", where=lambda row: row["method"] == "NUTS"),
        "the posterior's accuracy": times(1.02, "rows", ..., "accuracy", where=lambda row: row["method"] == "NUTS"),
        "the grid": times(1.01, "rows", ..., "log likelihood", where=lambda row: row["method"] == "quadrature"),
        "JKO's log likelihoods": times(1.05, "rows", ..., "log likelihood", where=lambda row: row["method"] == "JKO"),
        "two methods": exchanged("JKO", "Langevin", "rows", ..., "method"),
        "JKO's spreads": times(2, "rows", ..., "sd", where=lambda row: row["method"] == "JKO"),
        "the other prior": times(0.99, "rows", ..., "accuracy", where=lambda row: row["method"] == "NUTS, rate 100"),
    },
}
CASES = [(record, what) for record, lies in FALSE.items() for what in lies]


@pytest.fixture(autouse=True)
def drawn_nowhere(tmp_path, monkeypatch):
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("record", RECORDS)
def test_a_record_says_what_was_written(record):
    assert read_record(RESULTS / f"{record}.json")


def test_every_record_that_a_page_reads_is_falsified():
    assert set(FALSE) == {record for record, pages in READERS.items() if pages}
    assert set(RECORDS) - set(FALSE) == {"mutations"}, "which `make mutations` runs again"


@pytest.mark.parametrize(("record", "what"), CASES, ids=[f"{r}: {w}" for r, w in CASES])
def test_a_false_record_is_found(record, what, tmp_path):
    true = json.loads((RESULTS / f"{record}.json").read_text(encoding="utf-8"))
    lie = copy.deepcopy(true)
    FALSE[record][what](lie)
    assert lie != true, "nothing was changed"
    read_by = [(page, sources) for page in READERS[record] for sources in dependent(page, record)]
    assert read_by, "no claim cell reads it"
    found = []
    for page, sources in sorted(read_by, key=lambda case: len(case[1])):
        found.append(fault(page, sources, record, lie, tmp_path))
        if "AssertionError: broken:" in found[-1]:
            assert fault(page, sources, record, true, tmp_path) == "", "the claim is broken by the true record, too"
            return
    pytest.fail(f"no claim notices {what} (found: {[text for text in found if text]})")
