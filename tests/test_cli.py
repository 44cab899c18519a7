"""The command line: what is read of the flags before the real parse."""

import pytest

from fashion import cli


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
