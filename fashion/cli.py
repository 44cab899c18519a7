"""The command line: makes flags from dataclasses, reports a user's mistake as one line, and sets the exit code.

Imports neither Ray nor torch, so that `--help` prints at once.
"""

import argparse
import contextlib
import errno
import io
import itertools
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import tyro

from fashion.config import UserError

T = TypeVar("T")

# Error numbers of a disk that is full, read-only or gone, and None, which pyarrow raises when an object store no longer
# answers. Neither the command nor the program is at fault.
STORAGE_ERRORS = (None, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.ESTALE)
HORIZONTAL_RULE = re.compile("[-\u2500\u2570\u256f]{3,}")
START_AGAIN = "start the same command again"
RESUME = "use --resume"
# A variable that is set to nothing counts as unset.
DEFAULT_STORAGE = os.environ.get("FASHION_STORAGE") or "./results"
DEFAULT_SOURCE = os.environ.get("FASHION_MNIST_SOURCE") or "auto"


def parse(kind: type[T], argv: Sequence[str], *, prog: str, description: str, default: T | None = None) -> T:
    """Parse `argv` into the dataclass `kind`; nested dataclasses share one flat set of flags.

    A wrong or missing flag raises a `UserError` of one line; `--help` prints and exits with 0.
    """
    refuse_repeated_flags(argv)
    errors = io.StringIO()
    options: dict[str, Any] = {} if default is None else {"default": default}
    flat = (tyro.conf.OmitArgPrefixes,)
    try:
        with contextlib.redirect_stderr(errors):
            parsed: T = tyro.cli(kind, args=list(argv), prog=prog, description=description, config=flat, **options)
            return parsed
    except SystemExit as stop:
        if stop.code == 0:
            raise
        raise UserError(f"{unframe(errors.getvalue())}; see {prog} --help") from None


def refuse_repeated_flags(argv: Sequence[str]) -> None:
    """Raise `UserError` if a flag is given twice; the parser would silently use the last one."""
    names = [word.partition("=")[0].replace("_", "-") for word in argv if word.startswith("--")]
    for name, times in Counter(names).items():
        if times > 1:
            raise UserError(f"{name} is given {times} times; give it once, several values after it where it takes them")


def unframe(box: str) -> str:
    """Return tyro's framed error as one line: the message, and the flag that was perhaps meant.

    The first line of `box` is a title, and horizontal rules separate the sections below. On a terminal that does not
    take UTF-8, the frame and the rules consist of blanks and '-'.
    """
    lines = [line.strip("\u2502 ") for line in box.splitlines()[1:]]
    parts = [" ".join(part) for is_rule, part in itertools.groupby(lines, HORIZONTAL_RULE.fullmatch) if not is_rule]
    # "Error parsing" is followed by a flag, which helps the user, or by one of our classes, which does not.
    message = re.sub(r"^Error parsing (?:(?!--)[^:]*: )?", "", " ".join(parts[0].split()))
    meant = re.search(r"Perhaps you meant:\s+(--[\w-]+)", " ".join(parts))
    return message + (f" (perhaps {meant.group(1)})" if meant else "")


def peek(argv: Sequence[str], *names: str) -> dict[str, str | None]:
    """Return the values of a few flags, on which the real parse depends; a flag without a value is '', a missing one
    None.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in names:
        parser.add_argument(name, nargs="?", const="")
    known, _ = parser.parse_known_args([with_dashes(word) for word in argv])
    return {name: getattr(known, name.lstrip("-").replace("-", "_")) for name in names}


def with_dashes(word: str) -> str:
    """Return a flag with '-' for each '_' in its name; its value stays. The real parse takes both spellings."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def run(
    main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None, *, again: str = START_AGAIN
) -> NoReturn:
    """Call `main` and exit: with 0 if it returns, 2 after a user's mistake (one line), 1 after anything else.

    `again` is what to do to go on, once a storage that failed is right again.
    """
    # When a command is interrupted, a thread that still calls Ray would make Ray start another cluster.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    try:
        main(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        if error.errno not in STORAGE_ERRORS:
            raise
        message = " ".join(str(error).split())
        print(f"error: {message}; make it answer, make room there or give access, then {again}", file=sys.stderr)
        sys.exit(1)
    sys.exit(0)
