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
