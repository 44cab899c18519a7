"""The head node's command, as far as it needs no head node: what it refuses, and what Ctrl-C leaves."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fashion.cluster import head


@pytest.mark.parametrize("port", [" ", "http", "0", "65536", "-1", "8.5"])
def test_a_port_that_is_none(port: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("DASHBOARD_PORT", port)
    with pytest.raises(SystemExit) as stop:
        head.main(["up"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: DASHBOARD_PORT {port!r} must be a number from 1 to 65535\n"


def test_after_ctrl_c_the_job_can_be_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    env = tmp_path / "env"
    env.write_text("export RAY_ADDRESS='x'\n")
    monkeypatch.setattr(head, "ENV", env)
    monkeypatch.setattr(head, "running_head", dict)
    monkeypatch.setattr(subprocess, "run", interrupt)
    with pytest.raises(SystemExit) as stop:
        head.main(["submit", "jobs.train"])
    assert stop.value.code == 1
    told = capsys.readouterr().err.splitlines()
    name = told[0].split()[1]
    assert told[0] == f"job {name} goes on without being followed"
    assert told[1].startswith(f"follow it again: . {env}; ") and told[1].endswith(f"ray job logs --follow {name}")
    assert told[2].startswith(f"stop it: . {env}; ") and told[2].endswith(f"ray job stop {name}")


@pytest.mark.parametrize("name", ["venv", "my venv", "a$b"])
def test_ray_is_started_by_a_path_of_one_word(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / name / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("")
    monkeypatch.setattr(sys, "prefix", str(tmp_path / name))
    monkeypatch.setattr(sys, "executable", str(python))
    plain = head.plain_python(str(tmp_path))
    assert shlex.quote(str(plain)) == str(plain)
    assert plain.samefile(python)
    assert (plain == python) is (name == "venv")
