"""Programs that `jobs.bench` measures the job against: how they are started, asked, and stopped.

A peer waits for lines on its standard input. Each is a number of steps to train; it answers with a line of images/s.
At the end of its input it ends. Standard library alone, so that a peer loads no more than it needs itself.
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
ANSWER = "images/s: "
SECONDS_TO_END = 60.0
# What Ray, or this project's way to start it, sets for its workers; a user's own program runs without.
SET_BY_RAY = {
    *RAY_ENVIRONMENT,
    *("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "MASTER_ADDR", "MASTER_PORT"),
    *("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
}


def torchrun_command(storage: str, batch_size: int, num_workers: int, *style: str) -> list[str]:
    """Return the command of the DDP script under torchrun; `style` are further flags of `fashion.bench.peer_ddp`."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_workers}"]
    return [*launcher, "-m", "fashion.bench.peer_ddp", "--storage", storage, "--batch-size", str(batch_size), *style]


def keras_command(storage: str, batch_size: int, *until: str) -> list[str]:
    """Return the command of the Keras script; `until` are further flags of `fashion.bench.peer_keras`."""
    return [
        sys.executable,
        "-m",
        "fashion.bench.peer_keras",
        "--storage",
        storage,
        "--batch-size",
        str(batch_size),
        *until,
    ]


def job_flags(storage: str, scale: ScaleConfig, run_id: str, *more: str) -> list[str]:
    """Return the flags of `jobs.train` for a run with this worker group; `more` are further flags."""
    shape = {flag(field.name): str(getattr(scale, field.name)) for field in dataclasses.fields(scale)}
    return ["--storage", storage, "--run-id", run_id, *itertools.chain.from_iterable(shape.items()), *more]


def has_keras() -> bool:
    """Tell whether the dependency group `keras` is installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("keras", "tensorflow"))


def require_keras(row: str) -> None:
    """Raise `UserError` unless Keras is there."""
    require(
        has_keras(),
        f"--rows {row} needs Keras on TensorFlow, which is not installed (it runs on Linux, x86-64, Python 3.11 to "
        "3.13); get it with: uv sync --frozen --inexact --group keras",
    )


def plain_environment(**settings: str) -> dict[str, str]:
    """Return this process' environment without what belongs to Ray, and `settings`."""
    kept = {k: v for k, v in os.environ.items() if k not in SET_BY_RAY and not k.startswith("RAY_")}
    return kept | settings


class Peer:
    """A program that is asked for its rate; within the `with` block it lives."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self._command = command
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the peer
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
            cwd=ROOT,
        )

    def ask(self, steps: int) -> float:
        """Return the images/s of the next `steps` steps. Raises `RuntimeError`, with its last words, if it is gone."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # there will be no answer either
            self._process.stdin.write(f"{steps}\n")
            self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith(ANSWER):
                return float(line.removeprefix(ANSWER))
        self._process.wait()
        self._errors.seek(0)
        raise RuntimeError(f"{' '.join(self._command)} ended: {last_words(self._errors.read())}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._process.communicate(timeout=SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            self._process.communicate()
        self._errors.close()


def questions() -> Iterator[int]:
    """Yield, in the peer, the numbers of steps that it is asked for."""
    for line in sys.stdin:
        yield int(line)


def answer(rate: float) -> None:
    """Answer, in the peer, with images/s."""
    print(f"{ANSWER}{rate}", flush=True)


def run_and_read(command: list[str], environment: dict[str, str]) -> list[str]:
    """Run a program to its end; return the lines it printed. Raises `RuntimeError` with its last words if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {last_words(done.stderr)}")
    return done.stdout.splitlines()


def last_words(errors: str) -> str:
    """Return the end of what a program wrote to its standard error, in one line."""
    return " ".join(errors.split())[-1000:]
