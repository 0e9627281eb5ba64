"""Give the book another public address: `make repository URL=https://host/owner/name`.

The address is set once, as repository.url in _config.yml; whatever else spells it out (citation, package metadata,
README, the Colab notebooks) is rewritten here. The tests hold all of them to the setting.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def address(root: Path = ROOT) -> str:
    """repository.url of _config.yml."""
    found = re.search(r"^repository:\n\s+url:\s*(\S+)", (root / "_config.yml").read_text(encoding="utf-8"), flags=re.M)
    if not found:
        raise SystemExit("_config.yml has no repository.url")
    return found[1]


def tracked(root: Path = ROOT) -> list[Path]:
    """The project's own text files: what git knows (or, in a plain folder, what is there), less vendored files."""
    known = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, encoding="utf-8")
    if known.returncode == 0 and known.stdout:
        names = known.stdout.split("\0")
    else:
        names = [path.relative_to(root).as_posix() for path in root.rglob("*")]
    outside = (".venv", ".git/", "_build/", "book/_static/mathjax/", "book/_static/widgets/", "dist/")
    return [root / name for name in names if name and not name.startswith(outside) and (root / name).is_file()]


def replace(new: str, root: Path = ROOT) -> list[str]:
    """Write the new address wherever the old one stood; returns the files that changed."""
    if not re.fullmatch(r"https://[\w.-]+(/[\w.-]+){2,}", new) or new.endswith((".git", "/")):
        raise SystemExit(f"URL: expected https://host/owner/name (no .git, no slash at the end), got {new!r}")
    whole = re.compile(re.escape(address(root).encode()) + rb"(?![\w-])")
    changed = []
    for path in tracked(root):
        before = path.read_bytes()
        after = whole.sub(lambda _: new.encode(), before)
        if after != before:
            path.write_bytes(after)
            changed.append(path.relative_to(root).as_posix())
    return changed


if __name__ == "__main__":
    for name in replace(sys.argv[1] if len(sys.argv) > 1 else ""):
        print(name)
