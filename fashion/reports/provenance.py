"""What identifies the code and the machine of a run: hash of the sources, versions, hardware."""

import functools
import hashlib
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any


@functools.cache
def source_hash() -> str:
    """Return the SHA-256 over the project's Python files that run here: proves which code made a row."""
    package = Path(__file__).resolve().parents[1]
    folders = [package, package.parent / "jobs"]
    digest = hashlib.sha256()
    for path in sorted(path for folder in folders for path in folder.rglob("*.py")):
        digest.update(f"{path.relative_to(package.parent).as_posix()}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def warn_of_other_code(run_id: str, earlier: dict[str, Any]) -> None:
    """Say so on standard error if other code than this wrote a run's row: the row will name this code alone."""
    began, now = earlier["source_hash"], source_hash()
    if began not in (None, now):
        print(f"warning: run {run_id} was trained so far by other code ({began[:12]}, now {now[:12]})", file=sys.stderr)


def versions() -> dict[str, str]:
    """Return the installed versions that runs record, without importing the packages."""
    return {"ray_version": version("ray"), "torch_version": version("torch")}


def hardware() -> str:
    """Return the driver's processor and core count in words."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in read_lines(cpuinfo) if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def read_lines(path: Path) -> list[str]:
    """Return a text file's lines, none if it does not exist."""
    return path.read_text().splitlines() if path.exists() else []
