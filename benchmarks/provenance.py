"""Where a recorded figure comes from: every file under book/results/ carries this."""

import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def provenance(command: str, seconds: float, libraries: list[str]) -> dict:
    """Commit, machine, seconds, command, date and versions of a run that ends now."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, cwd=ROOT).stdout.strip()

    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        model = next(s.split(":")[1].strip() for s in open("/proc/cpuinfo") if s.startswith("model name"))
    return {
        "commit": git("rev-parse", "HEAD"),
        "uncommitted changes": bool(git("status", "--porcelain", "--", "nsgf_lite", "benchmarks", "tests")),
        "machine": f"{model}, one thread a process",
        "seconds": round(seconds, 1),
        "command": " ".join([command, *sys.argv[1:]]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "versions": {name: version(name) for name in libraries} | {"python": platform.python_version()},
    }
