import json
import math
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
os.environ.setdefault("OMP_NUM_THREADS", "1")


def require(condition, reason, where="CI"):
    """Skip the test unless the condition holds; where the environment variable is set nothing may be missing: fail."""
    if condition:
        return
    if os.environ.get(where):
        pytest.fail(f"missing on CI: {reason}", pytrace=False)
    pytest.skip(reason)


def wheel_kernel():
    """The kernel that sees only the built wheel; this Python's own if it was not made and CI is not set."""
    from jupyter_client.kernelspec import KernelSpecManager

    if "nsgf-wheel" in KernelSpecManager().find_kernel_specs():
        return "nsgf-wheel"
    if os.environ.get("CI"):
        pytest.fail("missing on CI: the kernel nsgf-wheel (make wheel)", pytrace=False)
    return "python3"


def sharp(measured, bound, at_least=1 / 3):
    """The bound holds here and nearly bites: with its constant times `at_least` the statement would be false.

    Where the environment variable NSGF_SHARP names a file, a line with the ratio is added to it: the theorem index
    shows the largest of each theorem.
    """
    measured, bound = float(measured), float(bound)
    assert math.isfinite(measured) and math.isfinite(bound) and bound > 0, f"{measured} against {bound}"
    assert measured <= bound * (1 + 1e-9), f"the bound is broken: {measured:.6g} > {bound:.6g}"
    assert measured > at_least * bound, f"the bound does not bite: {measured:.6g} of {bound:.6g}"
    if file := os.environ.get("NSGF_SHARP"):
        line = {"test": os.environ["PYTEST_CURRENT_TEST"], "ratio": measured / bound, "at_least": at_least}
        with open(file, "a", encoding="utf-8") as record:
            record.write(json.dumps(line) + "\n")


def damaged(what, holds):
    """The statement damaged in a sign, exponent, constant or hypothesis is false here: `holds` is what it says."""
    assert not bool(holds), f"the damaged statement holds: {what}"


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data():
    """The folder of recorded data beside the repository."""
    folder = ROOT.parent / "shared" / "data"
    require(folder.is_dir(), "../shared/data, the recorded data sets", where="NSGF_CI")
    return folder
