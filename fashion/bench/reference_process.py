"""Starts, times and stops the reference programs that `jobs.bench` compares the job with.

A reference program reads requests from its standard input, one per line: a number of steps to train. To each it
responds with a line that holds its images/s. It exits at the end of its input. This module imports the standard library
only, so that a reference program loads nothing that it does not need itself.
"""

import contextlib
import dataclasses
import importlib.util
import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from fashion.config import RAY_ENVIRONMENT, ScaleConfig, flag, require

ROOT = Path(__file__).resolve().parents[2]
RATE_PREFIX = "images/s: "
SECONDS_TO_EXIT = 60.0
# Environment variables that Ray sets for its workers, or that this project sets for Ray. A user's own program runs
# without them.
SET_BY_RAY = {
    *RAY_ENVIRONMENT,
    *("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "MASTER_ADDR", "MASTER_PORT"),
    *("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
}


def torchrun_command(storage: str, batch_size: int, num_workers: int, *style: str) -> list[str]:
    """Return the command of `fashion.bench.reference_ddp` under torchrun; `style` are further flags of the program."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_workers}"]
    flags = ["--storage", storage, "--batch-size", str(batch_size), *style]
    return [*launcher, "-m", "fashion.bench.reference_ddp", *flags]


def keras_command(storage: str, batch_size: int, *until: str) -> list[str]:
    """Return the command of `fashion.bench.reference_keras`; `until` are further flags of the program."""
    flags = ["--storage", storage, "--batch-size", str(batch_size), *until]
    return [sys.executable, "-m", "fashion.bench.reference_keras", *flags]


def job_flags(storage: str, scale: ScaleConfig, run_id: str, *more: str) -> list[str]:
    """Return the flags of `jobs.train` for a run with this worker group; `more` are further flags."""
    values = {field.name: getattr(scale, field.name) for field in dataclasses.fields(scale)}
    shape = {flag(name): str(value) for name, value in values.items() if value is not None}
    return ["--storage", storage, "--run-id", run_id, *itertools.chain.from_iterable(shape.items()), *more]


def has_keras() -> bool:
    """Tell whether the dependency group `keras` is installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("keras", "tensorflow"))


def require_keras(row: str) -> None:
    """Raise `UserError` unless Keras, which the row `row` needs, is installed."""
    require(
        has_keras(),
        f"--rows {row} needs Keras on TensorFlow, which is not installed (it runs on Linux, x86-64, Python 3.11 to "
        "3.13); get it with: uv sync --frozen --inexact --group keras",
    )


def environment_without_ray(**settings: str) -> dict[str, str]:
    """Return this process' environment without the variables of Ray, and with `settings`."""
    kept = {k: v for k, v in os.environ.items() if k not in SET_BY_RAY and not k.startswith("RAY_")}
    return kept | settings


class ReferenceProcess:
    """A running reference program. A context manager: the program is stopped at the end of the `with` block."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self._command = command
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in __exit__
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
            cwd=ROOT,
        )

    def measure(self, steps: int) -> float:
        """Return the images/s of the next `steps` steps.

        Raises `RuntimeError`, with the end of the program's standard error, if the program has exited.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # the program has exited; the loop below finds no response
            self._process.stdin.write(f"{steps}\n")
            self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith(RATE_PREFIX):
                return float(line.removeprefix(RATE_PREFIX))
        self._process.wait()
        self._errors.seek(0)
        raise RuntimeError(f"{' '.join(self._command)} ended: {tail_of(self._errors.read())}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._process.communicate(timeout=SECONDS_TO_EXIT)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            self._process.communicate()
        self._errors.close()


def requests() -> Iterator[int]:
    """Yield the requested numbers of steps. Called by a reference program."""
    for line in sys.stdin:
        yield int(line)


def respond(rate: float) -> None:
    """Respond to a request with `rate` in images/s. Called by a reference program."""
    print(f"{RATE_PREFIX}{rate}", flush=True)


def run_and_read(command: list[str], environment: dict[str, str]) -> list[str]:
    """Run a program to its end; return the lines that it printed.

    Raises `RuntimeError`, with the end of its standard error, if it fails.
    """
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {tail_of(done.stderr)}")
    return done.stdout.splitlines()


def tail_of(errors: str) -> str:
    """Return the last 1000 characters of a program's standard error as one line."""
    return " ".join(errors.split())[-1000:]
