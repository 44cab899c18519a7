"""The command line: flags that are read before the real parse, and errors as one line."""

import contextlib
import errno
import io
import runpy
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, call_job
from pyarrow import fs as pafs

from fashion import cli
from fashion.config import UserError


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        (["--run-id", "a_b"], "a_b"),
        (["--run_id=a_b"], "a_b"),
        (["--run-id=x_1=y_2"], "x_1=y_2"),
        (["--run_id"], ""),
        (["--other", "1"], None),
    ],
)
def test_a_flag_is_found_in_both_spellings_and_its_value_kept(argv: list[str], value: str | None) -> None:
    assert cli.peek(argv, "--run-id") == {"--run-id": value}


@dataclass(frozen=True, kw_only=True)
class Flags:
    """What a command might take."""

    rate: float = 0.1
    """Some number."""


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])  # tyro draws another frame for each
@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--rate", "fast"], "--rate: could not convert string to float: 'fast'; see x --help"),
        (["--rat", "1"], "Unrecognized options: --rat, 1 (perhaps --rate); see x --help"),
    ],
)
def test_a_wrong_flag_is_one_line_whatever_the_terminal_takes(argv: list[str], told: str, encoding: str) -> None:
    screen = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    with contextlib.redirect_stdout(screen), pytest.raises(UserError) as refused:
        cli.parse(Flags, argv, prog="x", description="")
    assert str(refused.value) == told


def test_a_store_that_no_longer_answers_is_one_line() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and does not listen
        store = pafs.S3FileSystem(
            endpoint_override=f"127.0.0.1:{closed.getsockname()[1]}",
            scheme="http",
            region="us-east-1",
            access_key="key",
            secret_key="secret",
            retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=1),
        )
        done = call_job(lambda _: store.get_file_info("bucket/folder"))
    assert done.returncode == 1
    assert done.stderr.startswith("error: When getting information for key 'folder'")
    assert done.stderr.endswith(", then start the same command again\n") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("[!_]*.py")), ids=lambda path: path.stem)
def test_the_advice_is_a_flag_that_the_job_has(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = cli.run

    def run(main: Callable[[Sequence[str]], None], **options: Any) -> None:
        def fill(argv: Sequence[str]) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with pytest.raises(SystemExit) as stop:
            ended(fill, [], **options)
        assert stop.value.code == 1

    monkeypatch.setattr(cli, "run", run)
    flags = runpy.run_path(str(path), run_name="__main__").get("Flags")
    has_resume = flags is not None and "resume" in {field.name for field in fields(flags)}
    assert has_resume == (path.stem in ("train", "tune"))
    told = "use --resume" if has_resume else "start the same command again"
    assert capsys.readouterr().err.endswith(f"or give access, then {told}\n")


def test_a_variable_set_to_nothing_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FASHION_STORAGE", "FASHION_MNIST_SOURCE"):
        monkeypatch.setenv(name, "")
    defaults = runpy.run_path(str(ROOT / "fashion" / "cli.py"))
    assert (defaults["DEFAULT_STORAGE"], defaults["DEFAULT_SOURCE"]) == ("./results", "auto")
