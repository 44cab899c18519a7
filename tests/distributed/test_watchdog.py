"""A process that hangs, seen from outside."""

import signal
import subprocess
import sys
import time

import pytest

from fashion.distributed.watchdog import Watchdog

pytestmark = pytest.mark.slow

HANGS = """
import sys, time
from fashion.distributed.watchdog import Watchdog

def stuck_here():
    {stuck}

with Watchdog(6.0, lambda stacks: print(stacks, flush=True)) as watchdog:
    for _ in range(40):
        time.sleep(0.2)
        watchdog.beat()
    print("worked for 8 s", flush=True)
    stuck_here()
"""


def hang(stuck: str) -> subprocess.CompletedProcess[str]:
    code = HANGS.format(stuck=stuck)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)


def test_a_process_without_progress_is_ended_with_its_stacks() -> None:
    done = hang("time.sleep(1000)")
    assert done.returncode == -signal.SIGKILL
    told, _, stacks = done.stdout.partition("\n")
    assert told == "worked for 8 s"
    assert "in stuck_here" in stacks


def test_code_that_never_lets_go_of_python_is_ended_too() -> None:
    # A function of C that is called without letting go of the lock, and sleeps.
    done = hang('__import__("ctypes").PyDLL(None).sleep(1000)')
    assert done.returncode == 1
    assert "in stuck_here" in done.stderr


def test_it_goes_with_its_block_and_zero_means_never() -> None:
    for timeout_s in (4.0, 0.0):
        with Watchdog(timeout_s, lambda stacks: None):
            time.sleep(0.1)
    time.sleep(7)  # faulthandler would end the process after 6 s
