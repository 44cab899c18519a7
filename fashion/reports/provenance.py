"""Identifies the code and the machine of a run: hash of the sources, versions, hardware."""

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
    """Return the SHA-256 over the paths and contents of all Python files of `fashion` and `jobs`.

    Rows of the reports carry the hash, which shows what code wrote them.
    """
    package = Path(__file__).resolve().parents[1]
    folders = [package, package.parent / "jobs"]
    digest = hashlib.sha256()
    for path in sorted(path for folder in folders for path in folder.rglob("*.py")):
        digest.update(f"{path.relative_to(package.parent).as_posix()}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def warn_of_other_code(run_id: str, earlier: dict[str, Any]) -> None:
    """Print a warning if other code wrote `earlier`, the `runs` row of a run that is resumed.

    The row that replaces it will name only the code that resumes the run.
    """
    old, new = earlier["source_hash"], source_hash()
    if old not in (None, new):
        print(f"warning: run {run_id} was trained so far by other code ({old[:12]}, now {new[:12]})", file=sys.stderr)


def versions() -> dict[str, str]:
    """Return the columns with the installed versions of Ray and torch, without importing them."""
    return {"ray_version": version("ray"), "torch_version": version("torch")}


def hardware() -> str:
    """Return this machine's processor model and core count, such as "AMD EPYC 7763, 2 cores"."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in read_lines(cpuinfo) if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def read_lines(path: Path) -> list[str]:
    """Return a text file's lines; an empty list if it does not exist."""
    return path.read_text().splitlines() if path.exists() else []
