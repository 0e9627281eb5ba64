"""The benchmark in the plane: its search brackets, its test says what the protocol says, its pieces know their code."""

import fcntl
import json
import math
import os
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

import nsgf_lite as nl
from benchmarks import table1


def test_the_search_brackets():
    """A bowl on the grid, its bottom away from the start: every knob is seen between two neighbours that are worse."""
    start = table1.METHODS["NSGF"].start
    goal = {**start, "rate": 1e-2, "eps": 0.005}

    def bowl(choice):
        return 1 + sum(math.log(choice[knob] / goal[knob]) ** 2 for knob in choice)

    best, trace, wanted = table1.search(start, bowl)
    assert best == goal
    assert not wanted
    assert len(trace) <= table1.TRIALS
    assert len({table1.label(choice) for choice in trace}) == len(trace)
    seen = table1.bracketed([{**choice, "ratio": bowl(choice)} for choice in trace], best)
    assert seen == {knob: knob != "eps" for knob in best}  # eps has come to the end of its grid
    few = [{**choice, "ratio": bowl(choice)} for choice in trace if choice["step"] == start["step"]]
    assert not table1.bracketed(few, best)["step"]
    # two knobs alone are tried around the bottom itself
    short = {"rate": 1e-3, "ema": 0.97}
    best, trace, _ = table1.search(short, lambda choice: bowl({**goal, **choice}))
    assert best == {"rate": 1e-2, "ema": 0.99}
    assert all(choice in trace for knob in best for choice in table1.neighbours(best, knob))
    # never a pool that does not hold a minibatch
    assert table1.neighbours({"points": 4096, "minibatch": 2048}, "points") == [{"points": 16384, "minibatch": 2048}]
    # one knob at a time, and the trials end the search
    steep, trace, _ = table1.search(start, lambda choice: -sum(choice.values()))
    assert len(trace) <= table1.TRIALS
    assert steep["minibatch"] == table1.KNOBS["minibatch"][-1]


def test_the_search_waits_for_what_it_has_not_seen():
    start = table1.METHODS["SI"].start
    assert table1.search(start, lambda choice: None) == (start, [], [start])
    best, trace, wanted = table1.search(start, lambda choice: 1.0 if choice == start else None)
    assert (best, trace) == (start, [start])
    assert [choice["rate"] for choice in wanted] == [1e-3, 1e-2]


def differences(gap, noise, seeds=10, draws=20):
    """Seeds by draws, the mean `gap`, the same spread in both."""
    return [[gap + noise * ((-1) ** s + (-1) ** k) for k in range(draws)] for s in range(seeds)]


def test_the_verdict():
    """Margin .03: inside it, outside, too noisy to say, and too few seeds."""
    say = {
        name: table1.compared(differences(*given), 1.0)["verdict"]
        for name, given in {
            "equivalent": (0.01, 0.005),
            "worse": (0.05, 0.005),
            "better": (-0.05, 0.005),
            "undecided": (0.02, 0.04),
            "few": (0.05, 0.005, 9),
        }.items()
    }
    assert say == {name: name if name != "few" else "undecided" for name in say}
    # seen, and below the margin
    cell = table1.compared(differences(0.02, 0.001), 1.0)
    assert cell["gap"] > cell["half"]
    assert cell["verdict"] == "equivalent"
    # ten seeds alike do not make up for draws that are not
    by_draw = [[0.02 * (-1) ** k for k in range(4)]] * 10
    assert table1.compared(by_draw, 1.0)["half"] > 0.02
    # the interval by hand: t with 9 degrees of freedom, and the variances of the means of rows and of columns
    cell = table1.compared(differences(0.0, 1.0), 1.0)
    assert cell["half"] == pytest.approx(1.833113 * (10 / 9 / 10 + 20 / 19 / 20) ** 0.5, rel=1e-5)
    cells = ["equivalent"] * 10
    assert table1.overall(cells) == "equivalent"
    assert table1.overall(cells[1:]) == "undecided"
    assert table1.overall([*cells[1:], "worse"]) == "behind"
    assert table1.overall([*cells[2:], "worse", "better"]) == "undecided"


def test_pieces_of_other_code_are_refused(tmp_path, monkeypatch):
    file = tmp_path / "piece.json"
    table1.keep(file, {"w2": [1.0]}, time.process_time())
    assert table1.read(file)["w2"] == [1.0]
    other = json.loads(file.read_text(encoding="utf-8")) | {"identity": "0" * 16}
    file.write_text(json.dumps(other), encoding="utf-8")
    with pytest.raises(ValueError, match="made by other code"):
        table1.read(file)
    file.write_text('{"identity": "', encoding="utf-8")
    with pytest.raises(ValueError, match="damaged"):
        table1.read(file)
    monkeypatch.setenv("NSGF_TABLE1_WORK", str(tmp_path))
    assert table1.part(5000, "tune", "NSGF", "0.003-0.99", "moons").parent.parent == tmp_path / "5000" / "tune" / "NSGF"
    assert table1.part("a-0.99").name == "a-0.99.json"


def test_no_work_in_the_folder_of_another(tmp_path):
    """A folder in use is left alone, and one of other code is refused before the work."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "benchmarks.table1", "--work", str(tmp_path), "--workers", "1"]
    with open(tmp_path / "lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=ROOT, env=environment)
    assert done.returncode
    assert f"another run works in {tmp_path}" in done.stderr
    (tmp_path / "floor").mkdir()
    (tmp_path / "floor" / "moons.json").write_text('{"identity": "else"}', encoding="utf-8")
    done = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=ROOT, env=environment)
    assert done.returncode
    assert f"{tmp_path}/floor/moons.json was made by other code" in done.stderr


WORKER = """
import os, sys, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from benchmarks.table1 import with_parent

def number():
    print(os.getpid(), flush=True)
    time.sleep(60)

if __name__ == "__main__":
    with ProcessPoolExecutor(1, get_context("spawn"), with_parent, (os.getpid(),)) as pool:
        pool.submit(number)
        time.sleep(60)
"""


def alive(number):
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    state = (
        open(f"/proc/{number}/stat", encoding="utf-8").read().rpartition(")")[2].split()[0]
        if os.path.exists("/proc/1")
        else "R"
    )
    return state != "Z"


def test_workers_end_with_their_parent(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, encoding="utf-8", env=environment)
    child = int(parent.stdout.readline())
    assert alive(child)
    parent.kill()
    parent.wait()
    for _ in range(100):
        if not alive(child):
            break
        time.sleep(0.2)
    assert not alive(child)
    parent.stdout.close()


def test_a_jko_flow_is_called_as_the_others_are(tmp_path):
    """Its own number of steps, optimiser steps shared with the critic, the same again from a file."""
    choice, (source, target) = {"rate": 1e-3, "time": 2.0, "ascents": 3.0}, table1.SETS["moons"]
    make = table1.METHODS["JKO-Flow"].make
    model = make(2, None, choice, target)
    assert model.flow.step == 1.0 and model.flow.functional == nl.functionals.JSD(target)
    model.fit(source, target, table1.training(choice, 19), seed=0, progress=False)
    with pytest.raises(ValueError, match="at least 2 steps.*got 1"):  # a quarter of seven: three are the critic's
        make(2, None, choice, target).fit(source, target, table1.training(choice, 7), seed=0, progress=False)
    start = source.sample(20, torch.Generator().manual_seed(0))
    x = model.sample(20, 2, "euler", start=start)
    assert torch.equal(model.path(20, 2, start=start)[-1], x) and not torch.equal(x, start)
    with pytest.raises(ValueError, match="steps must be those of the training, 2, got 3"):
        model.sample(20, 3, "euler", start=start)
    model.save(tmp_path / "flow.safetensors")
    assert torch.equal(
        make(2, None, choice, target).load(tmp_path / "flow.safetensors").sample(20, 2, "", start=start), x
    )


def test_a_sample_that_left_the_numbers_is_an_infinite_score_and_a_lost_cell(tmp_path, monkeypatch):
    """Whatever the rest: worse for the one that it happens to, undecided for both, and counted."""
    monkeypatch.setenv("NSGF_TABLE1_WORK", str(tmp_path))

    class Lost:
        def sample(self, n, steps, solver, start):
            return torch.cat([start[:-1], torch.full_like(start[:1], math.inf)])

    assert table1.scores(Lost(), "moons", 10, 2, 0) == [math.inf, math.inf]
    assert table1.mean([1.0, math.inf, 3.0]) == 2.0 and table1.mean([math.inf]) == math.inf
    far = {}
    for lost in ((), ("NSGF",), ("OT-CFM",), table1.PAIR):
        for method in table1.PAIR:
            for seed in range(table1.PAIR_SEEDS):
                w2 = [0.5 if method == "NSGF" else 1.0] * 20
                w2[3] = math.inf if method in lost and seed == 9 else w2[3]
                each = {"w2": w2, "seconds": 1.0}
                table1.keep(table1.part(7, "run", method, "moons", seed), {"10": each, "100": each}, 0.0)
        far[lost] = table1.pair("moons", "10", 7, 1.0)
    assert [cell["verdict"] for cell in far.values()] == ["better", "worse", "better", "undecided"]
    assert [cell["left"] for cell in far.values()] == [[0, 0], [1, 0], [0, 1], [1, 1]]
    assert [len(cell["by_seed"]) for cell in far.values()] == [10, 9, 9, 9]
    row = table1.row("NSGF", "moons", "10", 7, 1.0)
    assert row["left"] == 1 and row["w2"] == 0.5 and len(row["by_seed"]) == 10


def test_pieces_of_code_that_gives_the_same_are_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("NSGF_TABLE1_WORK", str(tmp_path))
    file = table1.part("floor", "moons")
    for whose in (*table1.ALIKE, table1.identity(), "another"):
        table1.pieces.keep(file, {"identity": whose, "w2": [1.0]})
        if whose == "another":
            with pytest.raises(ValueError, match="was made by other code"):
                table1.read(file)
        else:
            assert table1.read(file)["w2"] == [1.0]
