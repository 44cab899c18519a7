"""The command line: flags from dataclasses, users' mistakes as one line, exit codes 0, 1 and 2.

Imports neither Ray nor torch, so that `--help` answers at once.
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

# A disk that is full, read-only or gone by now, a store that no longer answers (pyarrow gives that no number): no
# mistake of the command, and no fault of the program.
STORAGE_ERRORS = (None, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.ESTALE)
RULE = re.compile("[-\u2500\u2570\u256f]{3,}")
DEFAULT_STORAGE = os.environ.get("FASHION_STORAGE", "./results")


def parse(kind: type[T], argv: Sequence[str], *, prog: str, description: str, default: T | None = None) -> T:
    """Parse `argv` into the dataclass `kind`; nested dataclasses share one flat set of flags.

    A wrong or missing flag becomes a `UserError` of one line; `--help` prints and exits with 0.
    """
    refuse_repeated(argv)
    complaint = io.StringIO()
    options: dict[str, Any] = {} if default is None else {"default": default}
    flat = (tyro.conf.OmitArgPrefixes,)
    try:
        with contextlib.redirect_stderr(complaint):
            parsed: T = tyro.cli(kind, args=list(argv), prog=prog, description=description, config=flat, **options)
            return parsed
    except SystemExit as stop:
        if stop.code == 0:
            raise
        raise UserError(f"{one_line(complaint.getvalue())}; see {prog} --help") from None


def refuse_repeated(argv: Sequence[str]) -> None:
    """Raise `UserError` if a flag is given twice: the parser would take the last one without a word."""
    names = [word.partition("=")[0].replace("_", "-") for word in argv if word.startswith("--")]
    for name, times in Counter(names).items():
        if times > 1:
            raise UserError(f"{name} is given {times} times; give it once, several values after it where it takes them")


def one_line(box: str) -> str:
    """Fold tyro's framed message into one line: the message, and the flag that was perhaps meant.

    The title comes first, and rules part what follows; where the terminal is not known to take UTF-8, the frame and
    the rules are of blanks and '-'.
    """
    lines = [line.strip("\u2502 ") for line in box.splitlines()[1:]]
    parts = [" ".join(part) for is_rule, part in itertools.groupby(lines, RULE.fullmatch) if not is_rule]
    # What is named there is a flag, which helps, or a class of ours, which does not.
    message = re.sub(r"^Error parsing (?:(?!--)[^:]*: )?", "", " ".join(parts[0].split()))
    meant = re.search(r"Perhaps you meant:\s+(--[\w-]+)", " ".join(parts))
    return message + (f" (perhaps {meant.group(1)})" if meant else "")


def peek(argv: Sequence[str], *names: str) -> dict[str, str | None]:
    """Return the values of a few flags before the real parse, which depends on them; `--x` without a value is ''."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in names:
        parser.add_argument(name, nargs="?", const="")
    known, _ = parser.parse_known_args([spelt(word) for word in argv])
    return {name: getattr(known, name.lstrip("-").replace("-", "_")) for name in names}


def spelt(word: str) -> str:
    """Return a flag with '-' for each '_' of its name, as the real parse takes both; its value stays as it is."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def run(main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> NoReturn:
    """Call `main` and exit: 0 done, 2 the user's mistake (one line), 1 anything else."""
    # A thread that still speaks to Ray while an interrupted command ends would start another cluster.
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
        said = " ".join(str(error).split())
        print(f"error: {said}; make it answer, make room there or give access, then use --resume", file=sys.stderr)
        sys.exit(1)
    sys.exit(0)
