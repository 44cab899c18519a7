"""The fork server of the tests: what it forks is, to whoever started it, the process that was started."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import FORKSERVER_FOLDER, wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(FORKSERVER_FOLDER not in os.environ, reason="there is no fork server"),
]


def start(folder: Path, code: str, **environment: str) -> subprocess.Popen[str]:
    """Start a script whose path looks like that of one of Ray's workers."""
    script = Path(tempfile.mkdtemp(dir=folder), "ray", "default_worker.py")
    script.parent.mkdir()
    script.write_text(f"import os, signal, sys, time\nhas_torch = 'torch' in sys.modules\n{code}")
    command = [sys.executable, "-u", str(script), "--word"]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder, env=os.environ | environment
    )


def test_it_has_imported_torch_and_runs_where_and_as_it_was_started(tmp_path: Path) -> None:
    # torch itself sets the second variable, when it exports a network, and `ray.init` the third.
    settings = {"OWN": "a b", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONBREAKPOINT": "ray.util.rpdb.set_trace"}
    process = start(tmp_path, "print(has_torch, os.getcwd(), os.environ['OWN'], sys.argv[1:])\nsys.exit(3)", **settings)
    assert process.communicate()[0] == f"True {tmp_path} a b ['--word']\n"
    assert process.returncode == 3


def test_other_settings_of_a_library_are_taken_by_a_process_of_its_own(tmp_path: Path) -> None:
    process = start(tmp_path, "print(has_torch, os.environ['OMP_DYNAMIC'])", OMP_DYNAMIC="true")
    assert process.communicate()[0] == "False true\n"


def test_signals_reach_it_and_a_kill_ends_both(tmp_path: Path) -> None:
    wait = "print(os.getpid())\ntime.sleep(600)"
    told = start(tmp_path, f"signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))\n{wait}")
    killed, child = start(tmp_path, wait), start(tmp_path, wait)
    numbers = [int(each.stdout.readline()) for each in (told, killed, child) if each.stdout]
    told.terminate()
    assert told.wait() == 5
    killed.kill()
    killed.wait()
    wait_for(lambda: not Path(f"/proc/{numbers[1]}").exists(), "end of what was forked", 60)
    os.kill(numbers[2], signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
