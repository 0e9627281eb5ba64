import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
os.environ.setdefault("OMP_NUM_THREADS", "1")


def require(condition, reason):
    """Go on if the condition holds; otherwise skip the test, or fail it where CI is set: there nothing may be missing."""
    if condition:
        return
    if os.environ.get("CI"):
        pytest.fail(f"missing on CI: {reason}", pytrace=False)
    pytest.skip(reason)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data():
    """The folder of recorded data beside the repository."""
    folder = ROOT.parent / "shared" / "data"
    require(folder.is_dir(), "../shared/data, the recorded data sets")
    return folder
