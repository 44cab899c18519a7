"""What a document in Markdown holds, and what is wrong with it: see tests/jobs/test_docs.py.

`make -n` with `RUN=echo` prints the commands of a target, and each job's own `main` parses them; nothing is trained,
and Ray is not started. Queries run over the reports in the working directory.
"""

import ast
import contextlib
import functools
import importlib
import io
import itertools
import os
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import duckdb
import pytest
from conftest import ROOT

from fashion import cli
from fashion.config import UserError

JOBS = sorted(path.stem for path in ROOT.glob("jobs/*.py") if path.stem != "__init__")
MAKEFILE = (ROOT / "Makefile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MARKERS = {text.partition(":")[0] for text in PROJECT["tool"]["pytest"]["ini_options"]["markers"]}
PYTHON = ("python", ".venv/bin/python")
RAY = ("job submit", "job stop", "up", "down", "dashboard", "get-auth-token", "status")
FILE_TYPES = (".py", ".yaml", ".toml", ".lock", ".md", ".parquet")
REQUIRED = {"evaluate": ["--run-id", "mine"], "predict": ["--images", "photos", "--out", "predictions"]}


# --- what a document holds ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fence:
    """A fenced block: its language, the number of its first line, its text."""

    language: str
    line: int
    text: str


def fences_of(text: str) -> list[Fence]:
    """Return the fenced blocks of a document."""
    found, begun = [], None
    lines = text.splitlines()
    for number, line in enumerate(lines, start=1):
        if line.startswith("```"):
            if begun is None:
                begun = number
            else:
                found.append(Fence(lines[begun - 1][3:].strip(), begun + 1, "\n".join(lines[begun : number - 1])))
                begun = None
    assert begun is None, f"the block of line {begun} has no end"
    return found


def shell_lines(text: str) -> list[tuple[int, str]]:
    """Return the lines of the blocks of shell commands, those without a language, with their numbers."""
    blocks = [fence for fence in fences_of(text) if fence.language in ("", "sh", "bash")]
    lines = [(fence.line + k, line) for fence in blocks for k, line in enumerate(fence.text.splitlines())]
    return [(number, line) for number, line in lines if line.strip()]


def prose_of(text: str) -> str:
    """Return a document without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def inline_code(text: str) -> list[str]:
    """Return what stands in backticks in text and tables; a line's end within counts as a blank."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose_of(text))]


# --- commands -------------------------------------------------------------------------------------------------------


SCALE = [f"fashion.bench.scale.{name}" for name in ("growth", "kills", "placement", "slow_store")]
"""Modules that are commands too. They load Ray before they parse, so their flags are read from their source."""


class Parsed(Exception):
    """A job has parsed its flags; nothing after that is wanted."""


@contextlib.contextmanager
def jobs_end_after_parsing() -> Iterator[None]:
    """Let each job's `main` end with `Parsed` once its flags are parsed, before anything is imported or started."""
    parse = cli.parse

    def parse_and_stop(*arguments: Any, **options: Any) -> Any:
        parse(*arguments, **options)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "parse", parse_and_stop)
        patch.setattr(cli, "DEFAULT_STORAGE", "./results")
        yield


@functools.cache
def check_job(module: str, *flags: str) -> str:
    """Return what is wrong with `python -m MODULE FLAGS`, an empty text if nothing is. Ray is not started."""
    name = module.removeprefix("jobs.")
    if not module.startswith("jobs.") or name not in JOBS:
        return f"there is no module {module}"
    if name == "bench" and "--rows" in flags:
        letters = re.findall(r"\b([a-z]) \(", (ROOT / "jobs" / "bench.py").read_text())
        unknown = set(flags[flags.index("--rows") + 1].split(",")) - set(letters)
        if unknown:
            return f"--rows {','.join(sorted(unknown))} does not exist"
    try:
        with jobs_end_after_parsing(), contextlib.redirect_stdout(io.StringIO()):
            importlib.import_module(module).main(flags)
    except Parsed:
        return ""
    except UserError as error:
        return str(error)
    except SystemExit as stop:  # --help
        return "" if stop.code == 0 else f"exit code {stop.code}"
    return f"{module} did not parse its flags"


@functools.cache
def run_make(*words: str) -> tuple[int, str]:
    """Return the exit code of `make WORDS`, and what it printed in place of running anything."""
    command = ["make", "-n", "--no-print-directory", "-o", ".venv/.installed", "RUN=echo", *words]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={"PATH": os.environ["PATH"]}, check=False
    )
    return done.returncode, (done.stdout + (done.stderr if done.returncode else "")).replace("\\\n", " ")


def check_make(words: Sequence[str]) -> Iterator[str]:
    """Yield what is wrong with `make WORDS`: its targets, its variables, the commands that come of it."""
    storage = f"STORAGE={Path.cwd() / 'results'}"
    code, printed = run_make(storage, *words)
    if code:
        yield printed.strip().splitlines()[-1]
        return
    for number, word in enumerate(words):
        name, equals, _ = word.partition("=")
        others = [*words[:number], *words[number + 1 :]]
        # The target `setup` is up to date here, so nothing is printed.
        if equals and not re.search(rf"(\$\(|[ ,]){name}[,)]", MAKEFILE):
            yield f"the Makefile has no variable {name}"
        elif equals and "setup" not in words and run_make(storage, *others) == (code, printed):
            yield f"{word} changes nothing"
    for line in printed.splitlines():
        plain = line.strip().removeprefix("echo ")
        if re.match(r"(jobs\.|fashion\.)", plain):
            yield from check_module(shlex.split(plain))
        elif " -m pytest" in plain:
            yield from check_command(shlex.split(plain))


def check_module(words: Sequence[str]) -> Iterator[str]:
    """Yield what is wrong with `python -m WORDS`."""
    module, *rest = words
    if module == "pytest":
        yield from check_pytest(rest)
    elif module == "fashion.cluster.head":
        if rest[0] not in ("up", "down", "status", "submit"):
            yield f"{module} does not know {rest[0]}"
        if rest[0] == "submit":
            yield from check_module(rest[1:])
    elif module in SCALE:
        known = flags_of_source(ROOT / f"{module.replace('.', '/')}.py")
        yield from (f"{module} has no flag {word}" for word in rest if word.startswith("--") and word not in known)
    elif found := check_job(module, *rest):
        yield found


@functools.cache
def flags_of_source(path: Path) -> frozenset[str]:
    """Return the flags of a module: the fields of its dataclass `Flags`."""
    classes = [each for each in ast.walk(ast.parse(path.read_text())) if isinstance(each, ast.ClassDef)]
    (flags,) = (each for each in classes if each.name == "Flags")
    names = [
        each.target.id for each in flags.body if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
    ]
    return frozenset(f"--{name.replace('_', '-')}" for name in names)


def check_pytest(words: Sequence[str]) -> Iterator[str]:
    """Yield which files, tests and markers of a pytest command do not exist."""
    remaining = iter(words)
    for word in remaining:
        if word == "-m":
            names = set(re.findall(r"\w+", next(remaining))) - {"and", "or", "not"}
            yield from (f"there is no marker {name}" for name in sorted(names - MARKERS))
        elif word in ("-n", "--dist"):
            next(remaining)
        elif not word.startswith("-"):
            file, _, test = word.partition("::")
            if not (ROOT / file).exists() or (test and f"def {test}(" not in (ROOT / file).read_text()):
                yield f"{word} does not exist"


def check_command(words: Sequence[str]) -> Iterator[str]:
    """Yield what is wrong with one command."""
    words = list(itertools.dropwhile(lambda word: re.match(r"[A-Z_]+=", word), words))
    match words:
        case []:
            pass
        case ["env", *rest]:
            yield from check_command(rest)
        case ["make", *rest]:
            yield from check_make(rest)
        case [program, "-m", *rest] if program in PYTHON or program.startswith(".rays/"):
            yield from check_module(rest)
        case [program, "tests/forkserver/run.py", *rest] if program in PYTHON:
            yield from check_command(rest)
        case ["pytest", *rest]:
            yield from check_pytest(rest)
        case ["ray", *rest]:
            if not any(rest[: len(each.split())] == each.split() for each in RAY):
                yield f"ray {' '.join(rest[:2])} is not known"
            if "--" in rest:
                yield from check_command(rest[rest.index("--") + 1 :])
            yield from missing(word for word in rest if word.endswith(".yaml"))
        case ["kubectl", "apply", "-f", file]:
            yield from missing([file])
        case ["uv", "sync", *rest]:
            groups = [rest[k + 1] for k, word in enumerate(rest) if word == "--group"]
            yield from (f"there is no group {name}" for name in groups if name not in PROJECT["dependency-groups"])
        case ["export", *rest]:
            yield from (f"export {word} sets nothing" for word in rest if "=" not in word)
        case ["tensorboard", "--logdir", _]:
            pass
        case _:
            yield f"{words[0]} is no command that is known here"


def missing(files: Iterator[str] | Sequence[str]) -> Iterator[str]:
    """Yield which files of the repository do not exist."""
    yield from (f"{file} does not exist" for file in files if not (ROOT / file).exists())


def check_line(line: str) -> list[str]:
    """Return what is wrong with a line of shell commands."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
    lexer.whitespace_split = True
    parts = [list(part) for is_end, part in itertools.groupby(lexer, lambda word: word in ("&&", ";")) if not is_end]
    return [f"{line.strip()}: {each}" for part in parts for each in check_command(part)]


# --- flags, variables and paths in the text -------------------------------------------------------------------------


@functools.cache
def flags_of(job: str) -> frozenset[str]:
    """Return the flags that a job takes."""

    def names(kind: Any) -> Iterator[str]:
        for name, hint in ((field.name, get_type_hints(kind)[field.name]) for field in fields(kind)):
            if is_dataclass(hint):
                yield from names(hint)
            else:
                yield from (f"--{name}".replace("_", "-"), f"--no-{name}".replace("_", "-"))

    return frozenset(names(importlib.import_module(f"jobs.{job}").Flags))


def check_flag(words: Sequence[str]) -> Iterator[str]:
    """Yield what is wrong with a flag and its values, if any; a job that takes them is enough. `N` is a number."""
    name, *values = words
    takers = [job for job in JOBS if name in flags_of(job)]
    if not takers:
        yield f"no job has the flag {name}"
    elif values:
        given = [name, *("2" if value == "N" else value for value in values)]
        found = [check_job(f"jobs.{job}", *REQUIRED.get(job, []), *given) for job in takers]
        if all(found):
            yield found[0]


def check_inline(code: str) -> Iterator[str]:
    """Yield what is wrong with what stands in backticks: a command, a flag, a variable, or a path."""
    if re.match(r"(make|pytest|ray|kubectl|tensorboard|uv|python|\.venv/bin/python) ", code):
        yield from check_line(code)
    elif code.startswith("--"):
        yield from check_flag(shlex.split(code))
    elif assigned := re.match(r"([A-Z_]{3,})=", code):
        name, tests = assigned.group(1), "".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
        read = re.search(rf"\b{name}\b", MAKEFILE + (ROOT / "fashion" / "config.py").read_text())
        if not read and f'environ.get("{name}"' not in tests:
            yield f"nobody reads the variable {assigned.group(1)}"
    elif re.fullmatch(r"\.?\w[\w./-]*", code) and "//" not in code:
        known = (ROOT / code.partition("/")[0]).is_dir() and "/" in code and not code.startswith(("results", ".venv"))
        if (known or code.endswith(("/", *FILE_TYPES))) and not (ROOT / code).exists():
            yield f"{code} does not exist"


def check_links(text: str, folder: Path) -> Iterator[str]:
    """Yield the links and pictures of a document in `folder` that lead nowhere."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(text)):
        if "://" not in target and not (folder / target.partition("#")[0]).exists():
            yield f"the link {target} leads nowhere"


# --- queries --------------------------------------------------------------------------------------------------------


def check_sql(block: str) -> Iterator[str]:
    """Yield which statements of a block fail over the reports in the working directory, or find nothing there."""
    for statement in duckdb.extract_statements(block):
        try:
            rows = duckdb.sql(statement.query).fetchall()
        except duckdb.Error as error:
            yield f"{statement.query.strip()}: {error}"
        else:
            if not rows:
                yield f"{statement.query.strip()}: finds nothing"


def check_python(block: str) -> Iterator[str]:
    """Yield what is wrong with a block of Python, run in the working directory.

    What loads a network is not run, since to train one takes seconds: the names that it takes from modules must exist.
    """
    if "torch" not in block and "fashion.inference" not in block:
        try:
            exec(compile(block, "document", "exec"), {})
        except Exception as error:  # whatever a reader of the text would run into
            yield f"{block.strip().splitlines()[-1]}: {error!r}"
        return
    tree = ast.parse(block)
    for node in ast.walk(tree):
        for alias in node.names if isinstance(node, ast.ImportFrom) else ():
            if not hasattr(importlib.import_module(node.module or ""), alias.name):
                yield f"{node.module} has no {alias.name}"
    modules = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    for node in ast.walk(tree):
        parts = ast.unparse(node).split(".") if isinstance(node, ast.Attribute) else []
        if parts and parts[0] in modules and all(part.isidentifier() for part in parts):
            try:
                functools.reduce(getattr, parts[1:], importlib.import_module(parts[0]))
            except AttributeError as error:
                yield f"{'.'.join(parts)}: {error}"


# --- a whole document -----------------------------------------------------------------------------------------------


def complaints(text: str, folder: Path = ROOT, *, run_python: bool = True) -> list[str]:
    """Return all that is wrong with a document that lies in `folder`; its Python may be left alone."""
    found = [f"line {number}: {each}" for number, line in shell_lines(text) for each in check_line(line)]
    for code in dict.fromkeys(inline_code(text)):
        found += [f"`{code}`: {each}" for each in check_inline(code)]
    found += check_links(text, folder)
    for fence in fences_of(text):
        if fence.language == "sql" or (fence.language == "python" and run_python):
            check = check_sql if fence.language == "sql" else check_python
            found += [f"line {fence.line}: {each}" for each in check(fence.text)]
    return found
