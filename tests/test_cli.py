"""The command line: flags that are read before the real parse, and errors as one line."""

import contextlib
import io
import socket
from dataclasses import dataclass

import pytest
from conftest import call_job
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
    assert done.stderr.endswith("use --resume\n") and done.stderr.count("\n") == 1
