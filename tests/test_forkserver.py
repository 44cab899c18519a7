"""The fork server of the tests: what it forks is, to whoever started it, the process that was started."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import hosts
import pytest
from conftest import wait_for
from forkserver.run import FOLDER

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(FOLDER not in os.environ, reason="there is no fork server"),
]


def write_script(path: Path, code: str) -> Path:
    """Write a script that knows whether torch had been imported before it began."""
    path.parent.mkdir(parents=True, exist_ok=True)
    modules = "atexit, os, signal, socket, sys, threading, time"
    path.write_text(f"import {modules}\nhas_torch = 'torch' in sys.modules\n{code}")
    return path


def start(folder: Path, code: str, **environment: str) -> subprocess.Popen[str]:
    """Start a script whose path looks like that of one of Ray's workers."""
    script = write_script(Path(tempfile.mkdtemp(dir=folder), "ray", "default_worker.py"), code)
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


def test_a_job_of_the_project_is_forked_too(tmp_path: Path) -> None:
    write_script(tmp_path / "jobs" / "shown.py", "print(has_torch, __name__, sys.argv, sys.path[0] == os.getcwd())")
    (tmp_path / "jobs" / "__init__.py").touch()
    command = [sys.executable, "-m", "jobs.shown", "--word"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == f"True __main__ ['{tmp_path}/jobs/shown.py', '--word'] True\n", done.stderr


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("sys.exit('no')", 1, "no\nends\n"),
        ("sys.exit()", 0, "ends\n"),
        ("threading.Timer(0.5, print, ['later']).start()", 0, "later\nends\n"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\nends\n"),
        ("os._exit(4)", 4, ""),
    ],
)
def test_it_ends_as_python_does(code: str, status: int, said: str, tmp_path: Path) -> None:
    process = start(tmp_path, f"assert has_torch\natexit.register(print, 'ends')\n{code}")
    told = process.communicate()[0]
    assert (process.returncode, told[-len(said) or len(told) :]) == (status, said)


@pytest.mark.skipif(bool(hosts.why_not()), reason=hosts.why_not() or "hosts")
def test_on_a_host_it_is_a_process_of_that_host(tmp_path: Path) -> None:
    told = write_script(tmp_path / "ray" / "default_worker.py", "print(has_torch, socket.gethostname(), os.getpid())")
    waits = write_script(tmp_path / "a" / "ray" / "default_worker.py", "print('waits', flush=True); time.sleep(600)")
    with hosts.open_hosts(1) as made:
        [host] = made.hosts
        done = made.run(host, sys.executable, str(told))
        has_torch, name, number = done.stdout.split()
        assert (has_torch, name) == ("True", "host1"), done.stderr
        assert int(number) < 100, "a host has few processes, which it numbers by itself"
        process = made.popen(host, sys.executable, str(waits), log=tmp_path / "log")
        wait_for(lambda: "waits" in (tmp_path / "log").read_text(), "script", 60)
        assert sum(str(waits) in line for line in made.processes(host).values()) == 1, "its proxy; the other is forked"
        [forked] = [pid for pid, line in made.processes(host).items() if "forkserver/server.py" in line]
        os.kill(forked, signal.SIGKILL)
        assert process.wait(60) != 0
        assert not made.processes(host)


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
