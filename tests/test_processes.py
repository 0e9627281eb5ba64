"""Runs that take hours, and the commands that start them: pieces, records, children, encodings, the Makefile."""

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from test_bad_input import refused
from tqdm import tqdm

sys.path.insert(0, str(ROOT))
from benchmarks import pieces, provenance  # noqa: E402
from nsgf_lite.training.checkpoints import held  # noqa: E402

RECORDS = sorted((ROOT / "book" / "results").glob("*.json"))


# --- records ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_a_record_says_what_was_recorded(path):
    assert provenance.read_record(path)["provenance"]["commit"]


def changes(value, where=()):
    """Every number of the record, as the path to it, and what it might become."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in pairs:
        if isinstance(part, int | float) and not isinstance(part, bool):
            yield value, key, part * 20 + 1
        else:
            yield from changes(part, (*where, key))


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_a_falsified_record_is_noticed(path, tmp_path):
    """Any number of it, some five of them tried; and an order that is turned."""
    copy, record = tmp_path / path.name, json.loads(path.read_text(encoding="utf-8"))
    found = list(changes(record))
    for holder, key, new in found[:: max(1, len(found) // 5)]:
        old, holder[key] = holder[key], new
        copy.write_text(json.dumps(record), encoding="utf-8")
        refused(lambda: provenance.read_record(copy), f"{path.name} is not as it was recorded")
        holder[key] = old
    copy.write_text(json.dumps(record, indent=3), encoding="utf-8")
    assert provenance.read_record(copy) == record  # the layout is free
    lists = [value for value in record.values() if isinstance(value, list) and len(value) > 1]
    for rows in lists:
        rows.reverse()
        copy.write_text(json.dumps(record), encoding="utf-8")
        refused(lambda: provenance.read_record(copy), "is not as it was recorded")
        rows.reverse()


@pytest.mark.parametrize("indent", [None, 1])
def test_a_record_is_written_whole_and_read_back(indent, tmp_path):
    record, path = {"rows": [{"ε": 0.1}, {"ε": 1e-300}], "provenance": {"x": None}}, tmp_path / "record.json"
    provenance.writable(path)
    assert not path.exists()
    provenance.write_record(path, record, json.dumps(record, indent=indent))
    read = provenance.read_record(path)
    assert read.pop("checksum") and read == record and [p.name for p in tmp_path.iterdir()] == [path.name]
    refused(lambda: provenance.write_record(path, json.loads(path.read_text(encoding="utf-8"))), "a checksum already")
    with pytest.raises(OSError, match="could not write here"):
        provenance.writable(path / "below")


# --- pieces of long runs ----------------------------------------------------------------------------------------------


def test_a_piece_is_whole_or_not_there(tmp_path, monkeypatch):
    pieces.keep(tmp_path / "new" / "piece.json", {"a": 1})
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        pieces.keep(tmp_path / "new" / "piece.json", {"a": 2})
    assert json.loads((tmp_path / "new" / "piece.json").read_text(encoding="utf-8")) == {"a": 1}


def double(file, k):
    pieces.keep(file, {"twice": 2 * k})


def test_pieces_that_are_there_are_not_done_again_and_one_run_is_at_work(tmp_path):
    """The first that fails ends the run, and what was done stays."""
    jobs = [(tmp_path / "new" / f"{k}.json", double, tmp_path / "new" / f"{k}.json", k) for k in range(3)]
    with held(tmp_path / "new", folder=True), pytest.raises(OSError, match="another run is at work"):
        pieces.everything(jobs, 1, tqdm(disable=True))
    pieces.keep(jobs[1][0], {"twice": "done before"})
    with pytest.raises(TypeError):
        pieces.everything([*jobs, (tmp_path / "new" / "none.json", double)], 1, tqdm(disable=True))
    pieces.everything([], 1, tqdm(disable=True))
    found = {path.name: json.loads(path.read_text(encoding="utf-8"))["twice"] for path in (tmp_path / "new").iterdir()}
    assert found.items() >= {"0.json": 0, "1.json": "done before"}.items() and ".lock" not in found


def halved(n):
    return {"half": n / 2}


def test_results_are_made_once_and_belong_to_the_code_that_made_them(tmp_path):
    jobs = {str(n): (halved, n) for n in (3, 5)}
    made = pieces.results(tmp_path, jobs, 1, "halves")
    assert [piece["row"]["half"] for piece in made] == [1.5, 2.5] and all(piece["processor"] >= 0 for piece in made)
    pieces.keep(tmp_path / "3.json", {**made[0], "row": "kept"})
    assert [piece["row"] for piece in pieces.results(tmp_path, jobs, 1, "halves")] == ["kept", {"half": 2.5}]
    homes = [pieces.home("x", settings, files) for settings in ([1], [2]) for files in ([], ["README.md"])]
    assert len(set(homes)) == 4 and homes[0] == pieces.home("x", [1], []) and homes[0].parent.name == "x"
    assert pieces.digits({"a": [1.23456789, (2,)], "b": "c"}) == {"a": [1.2346, [2]], "b": "c"}


PARENT = """
import sys
from pathlib import Path
from tqdm import tqdm
from benchmarks.pieces import everything
from test_processes import piece
if __name__ == "__main__":
    home = Path(sys.argv[1])
    jobs = [(home / str(k), piece, home, k) for k in range(4)]
    everything(jobs, 2, tqdm(disable=True))
"""


def piece(home, k):
    """A piece of work that says who does it, and does not end, but for the last, which fails."""
    (home / f"{k}.pid").write_text(str(os.getpid()), encoding="utf-8")
    time.sleep(600)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="looks at processes through /proc")
def test_children_end_with_a_parent_that_is_killed(tmp_path):
    """SIGKILL, of which the parent can tell nobody: the busy workers are gone, and so is what started them."""
    (tmp_path / "run.py").write_text(PARENT, encoding="utf-8")
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "run.py", tmp_path],
        env=os.environ | {"PYTHONPATH": path},
        start_new_session=True,
    )
    try:
        both = [tmp_path / "0.pid", tmp_path / "1.pid"]
        assert wait_until(lambda: all(file.exists() and file.read_text(encoding="utf-8") for file in both))
        workers = [int(file.read_text(encoding="utf-8")) for file in both]
        assert all(map(alive, workers))
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        assert wait_until(lambda: not any(map(alive, workers)), 20)
    finally:
        try:
            os.killpg(parent.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        parent.wait()


# --- text -------------------------------------------------------------------------------------------------------------


def unnamed(tree):
    """Calls that read or write text without naming its encoding, so that they take whatever the system says."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        given = {word.arg: word.value for word in node.keywords}
        modes = [given.get("mode"), *node.args[(0 if isinstance(node.func, ast.Attribute) else 1) :][:1]]
        mode = next((m.value for m in modes if isinstance(m, ast.Constant) and isinstance(m.value, str)), "")
        home = getattr(getattr(node.func, "value", None), "id", "")
        text = name in ("read_text", "write_text") or (name == "open" and home not in ("os", "gzip", "self", "Image"))
        as_text = isinstance(given.get("text"), ast.Constant) and given["text"].value is True
        if "encoding" not in given and ((text and "b" not in mode) or as_text):
            yield node


def test_encodings_are_named():
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, encoding="utf-8", check=True)
    faults = []
    for name in tracked.stdout.split():
        tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
        faults += [f"{name}:{call.lineno}" for call in unnamed(tree)]
    assert not faults


@pytest.mark.parametrize(
    ("line", "count"),
    [
        ("open(p)", 1),
        ("open(p, 'w')", 1),
        ("p.open()", 1),
        ("p.read_text()", 1),
        ("p.write_text(s)", 1),
        ("subprocess.run(c, text=True)", 1),
        ("open(p, 'rb')", 0),
        ("new_output(text='a')", 0),
        ("p.open('wb')", 0),
        ("open(p, encoding='utf-8')", 0),
        ("os.open(p, 0)", 0),
        ("subprocess.run(c, encoding='utf-8')", 0),
    ],
)
def test_what_names_no_encoding(line, count):
    assert len(list(unnamed(ast.parse(line)))) == count


def test_a_script_keeps_its_line_ends(tmp_path):
    """In a clone whose owner turns line ends into those of Windows."""
    names = ["tools/nbval.sh", ".ci/run", "Makefile", "book/intro.md", "book/_static/mathjax/LICENSE"]
    told = subprocess.run(
        ["git", "-c", "core.autocrlf=true", "check-attr", "text", "eol", "--", *names],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
        check=True,
    ).stdout
    for name in names[:-1]:
        assert f"{name}: text: auto\n" in told and f"{name}: eol: lf\n" in told
    assert f"{names[-1]}: text: unset\n" in told
    home = tmp_path / "home"
    home.mkdir()
    for name in (".gitattributes", "tools/nbval.sh"):
        (home / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, home / name)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "core.autocrlf=true"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *words], cwd=home, check=True, capture_output=True)
    subprocess.run([*git, "clone", "-q", home, tmp_path / "clone"], check=True, capture_output=True)
    assert (tmp_path / "clone/tools/nbval.sh").read_bytes() == (ROOT / "tools/nbval.sh").read_bytes()


# --- the Makefile -----------------------------------------------------------------------------------------------------


def make(*words, home=ROOT, **variables):
    bare = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    command = ["make", "--no-print-directory", *words]
    return subprocess.run(command, cwd=home, env=bare | variables, capture_output=True, encoding="utf-8")


def test_make_uses_this_library_and_no_other():
    done = make("--eval", 'show: ; @echo "[$$PYTHONPATH]"', "show", PYTHONPATH="/somebody/elses")
    assert done.stdout == "[]\n", done.stderr


@pytest.fixture
def stub(tmp_path):
    """The Makefile alone, with a Python that does as it is told."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "nsgf_lite").mkdir()

    def python(lines):
        file = tmp_path / "python"
        file.write_text(f"#!/bin/sh\n{lines}\n", encoding="utf-8")
        file.chmod(0o755)
        return f"PYTHON={file}"

    return tmp_path, python


def test_a_folder_that_cannot_be_written_is_no_missing_module(stub):
    home, python = stub
    given = python('case "$*" in *venv\\ .venv*) echo "Permission denied: .venv" >&2; exit 1;; esac; exit 0')
    done = make("install", given, home=home)
    assert done.returncode and "Permission denied" in done.stderr and "python3-venv" not in done.stderr
    given = python('case "$*" in *ensurepip*) echo "No module" >&2; exit 1;; esac; exit 0')
    done = make("install", given, home=home)
    assert done.returncode and "apt install python3-venv" in done.stderr and "No module" not in done.stderr


def test_a_taken_port_is_named_in_one_line(stub):
    import socket

    home, _ = stub
    (home / "_build" / "html").mkdir(parents=True)
    for name in ("_build/html/index.html", ".venv/.installed", ".venv/.torch", "constraints.txt", "pyproject.toml"):
        (home / name).parent.mkdir(exist_ok=True)
        (home / name).touch()
    (home / ".venv/.installed").touch()
    (home / ".venv/bin").mkdir()
    (home / ".venv/bin/python").symlink_to(sys.executable)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = make("serve", f"PORT={port}", "-o", ".venv/.installed", home=home)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("make:")]
    assert done.returncode and not done.stdout
    assert lines == [f"Port {port} is taken: name another one, make serve PORT=8001"]
