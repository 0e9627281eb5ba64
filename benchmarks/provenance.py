"""Where a recorded figure comes from: every file under book/results/ carries this, and a checksum of what it says."""

import hashlib
import json
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from benchmarks.pieces import keep_text
from nsgf_lite.training.checkpoints import held

ROOT = Path(__file__).resolve().parent.parent


def provenance(command: str, seconds: float, libraries: list[str]) -> dict:
    """Commit, machine, seconds, command, date and versions of a run that ends now."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, encoding="utf-8", cwd=ROOT).stdout.strip()

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        model = next((s.split(":")[1].strip() for s in lines if s.startswith("model name")), model)
    return {
        "commit": git("rev-parse", "HEAD"),
        "uncommitted changes": bool(git("status", "--porcelain", "--", "nsgf_lite", "benchmarks", "tests")),
        "machine": f"{model}, one thread a process",
        "seconds": round(seconds, 1),
        "command": " ".join([command, *sys.argv[1:]]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "versions": {name: version(name) for name in libraries} | {"python": platform.python_version()},
    }


def checksum(record: dict) -> str:
    """Of what a record says, whatever its layout: all but the checksum itself."""
    said = {name: value for name, value in record.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(said, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:32]


def writable(path: Path) -> None:
    """OSError, naming the path, unless the record can be written there: asked before the work."""
    with held(path):
        pass


def write_record(path: Path, record: dict, text: str | None = None) -> None:
    """Write a record atomically, with its checksum; `text` is the record as JSON in a layout of one's own."""
    text = json.dumps(record, indent=1, ensure_ascii=False) if text is None else text
    said = json.loads(text)
    inside, last = text.rstrip().removesuffix("}").rstrip(), f'"checksum": "{checksum(said)}"'
    if "checksum" in said:
        raise ValueError("the record has a checksum already")
    separator = ",\n " if "\n" in inside else ", "
    keep_text(path, f"{inside}{separator}{last}{chr(10) if chr(10) in inside else ''}}}\n")


def read_record(path: Path) -> dict:
    """The record; ValueError if it does not say what was written."""
    record = json.loads(path.read_text(encoding="utf-8"))
    if record.get("checksum") != checksum(record):
        raise ValueError(f"{path.name} is not as it was recorded: its content does not have its checksum")
    return record
