"""Runs of `jobs.train` as processes that tests break, and what becomes of them."""

import contextlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from conftest import ROOT, job_environment
from forkserver.run import FOLDER
from tensorboardX.proto.event_pb2 import Event
from torch import Tensor

from fashion.reports import runs, tables
from fashion.storage import Storage
from fashion.training import checkpoint
from fashion.training.checkpoint_manager import name_of

EPOCHS = 2
EVERY_S = 2.0
# Everything that draws at random is on.
RECIPE = [
    "--preset=smoke",
    "--epochs=2",
    "--global-batch-size=32",
    "--dropout-conv=0.05",
    "--dropout-fc=0.1",
    "--flip=random",
    "--shift=1",
    "--start-or-resume",
]
# Where a CPU has no bf16, or plays one that has none, a step in bf16 takes about twice as long.
HAS_BF16 = "ONEDNN_MAX_CPU_ISA" not in os.environ and bool(
    {"avx512_bf16", "amx_bf16"} & {name for name, there in torch.cpu.get_capabilities().items() if there}
)
# Long enough to be broken in the middle: steps of an epoch, after each ten at most of which the ranks synchronise.
ROWS = {"fp32": 320, "bf16": 320 if HAS_BF16 else 160}
TIMES = ("epoch_time_s", "data_wait_s", "images_per_s")
# With its driver a cluster's GCS is gone: a raylet looks for it for 10 s, its agent tries to tell it so for 60 s.
LEFT_AFTER_S = 600

Outcome = tuple[list[dict[str, Any]], dict[str, Tensor]]
"""`epochs` rows without times, and weights."""
Unbroken = Callable[[str], Outcome]
"""What a run gives that nothing happens to, by precision."""


DRIVERS: list["Driver"] = []
"""All that were started."""


class Driver:
    """`jobs.train` as a process, and all that it starts. It makes a checkpoint every `every_s` seconds; with 0, the
    first one after its first step.
    """

    def __init__(
        self,
        storage: Storage,
        run_id: str,
        *flags: str,
        precision: str = "fp32",
        every_s: float = EVERY_S,
        **environment: str,
    ) -> None:
        command = [sys.executable, "-m", "jobs.train", "--storage", storage.uri, "--run-id", run_id]
        command += [
            f"--precision={precision}",
            f"--max-train-rows={ROWS[precision]}",
            f"--checkpoint-every-s={every_s}",
        ]
        self.process = subprocess.Popen(
            [*command, *RECIPE, *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=job_environment() | {"FASHION_MNIST_SOURCE": "auto"} | environment,
            cwd=ROOT,
        )
        self.seen: dict[int, psutil.Process] = {}
        self.said = ""
        self._me = psutil.Process(self.process.pid)
        DRIVERS.append(self)

    @property
    def pid(self) -> int:
        """The number that it knows itself by."""
        return stood_for(self._me).pid

    def look(self) -> list[psutil.Process]:
        """Return what it has started and what lives, and remember it."""
        self.seen |= {each.pid: each for each in family(self._me)[1:]}
        return [each for each in self.seen.values() if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]

    def workers(self) -> list[psutil.Process]:
        return [each for each in self.look() if command_of(each).startswith("ray::RayTrainWorker")]

    def victims(self, kind: str, chance: random.Random) -> list[psutil.Process]:
        """Return a worker, the driver, or what a lost node takes with it: its raylet and all workers. None are left of
        a run that is over.
        """
        if kind == "driver":
            return [self._me] if self._me.is_running() else []
        workers = self.workers()
        if kind == "node":
            return [each for each in self.look() if is_raylet(each)] + workers
        return [chance.choice(workers)] if workers else []

    def wait(self) -> str:
        """Wait for its end; return what it said."""
        while self.process.poll() is None and self.process.stdout is not None:
            self.look()
            self.said += self.process.stdout.readline()
        self.said += self.process.communicate(timeout=1800)[0]
        return self.said

    def wait_for(self, what: Callable[[], Any], seconds: float = 900.0) -> Any:
        deadline = time.monotonic() + seconds
        while not (found := what()):
            assert time.monotonic() < deadline, "it did not come to that"
            assert self.process.poll() is None, self.process.communicate()[0]
            time.sleep(0.1)
        return found

    def left(self) -> list[str]:
        """Return the commands of what it started and what does not end by itself."""
        deadline = time.monotonic() + LEFT_AFTER_S
        while (left := self.look()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return [command_of(each) for each in left]


def stood_for(process: psutil.Process) -> psutil.Process:
    """Return the process that a proxy stands for, and any other process itself: see `forkserver`."""
    with contextlib.suppress(OSError, psutil.NoSuchProcess):
        return psutil.Process(int(Path(os.environ.get(FOLDER, os.devnull), str(process.pid)).read_text()))
    return process


def family(process: psutil.Process) -> list[psutil.Process]:
    """Return a process and all that it started, with what these stand for."""
    # Of each process of the machine its parent is read once: to ask each of the family for its children would take a
    # tenth of a second, and drivers are looked at ten times in one.
    children: dict[int, list[psutil.Process]] = {}
    for each in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess):
            children.setdefault(each.ppid(), []).append(each)
    found = [process]
    for each in found:  # it grows meanwhile
        found += children.get(each.pid, [])
        if (other := stood_for(each)) != each:
            found.append(other)
    return found


def is_raylet(process: psutil.Process) -> bool:
    return command_of(process).partition(" ")[0].endswith("raylet/raylet")


def command_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def curves_of(folder: Path) -> dict[tuple[str, int], float]:
    """Return the figures that lie in a folder for TensorBoard: name and epoch -> value."""
    values = {}
    for path in folder.glob("events.out.tfevents.*"):
        content = path.read_bytes()
        while content:  # length (8 bytes), its sum (4), the event, its sum (4)
            size = int.from_bytes(content[:8], "little")
            event = Event.FromString(content[12 : 12 + size])
            values |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
            content = content[16 + size :]
    return values


def outcome(storage: Storage, run_id: str) -> Outcome:
    """Return a finished run's `epochs` rows without the times, and the weights after its last step."""
    row = runs.load_run(storage, run_id)
    assert row["status"] == "completed", row
    rows = [
        {name: value for name, value in each.items() if name not in TIMES}
        for each in tables.read_table(storage, "epochs", run_id)
    ]
    content = storage.read_bytes("runs", run_id, name_of(EPOCHS), checkpoint.WEIGHTS)
    return rows, checkpoint.load_weights(content)


def assert_unharmed(storage: Storage, run_id: str, unbroken: Outcome) -> None:
    rows, weights = outcome(storage, run_id)
    assert rows == unbroken[0]
    assert len(rows) == 2 * EPOCHS
    assert all(torch.equal(weights[name], unbroken[1][name]) for name in unbroken[1])
