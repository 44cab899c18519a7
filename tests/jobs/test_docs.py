"""Every command and query that README and docs show, read from the text: targets, flags, columns and files exist."""

import ast
import importlib
import importlib.util
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pytest
from conftest import ROOT

from fashion import cli
from fashion.config import UserError
from fashion.reports import tables
from fashion.reports.schemas import SCHEMAS
from fashion.storage import open_storage

PAGES = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page: str, language: str) -> list[str]:
    """Return the fenced blocks of a page in a language; '' for commands."""
    return [code for found, code in BLOCK.findall((ROOT / page).read_text()) if found == language]


def commands_in(text: str) -> Iterator[list[str]]:
    """Yield the words of each command of a Markdown text, in fenced blocks and between backticks."""
    fenced = "\n".join(code for language, code in BLOCK.findall(text) if not language)
    spans = re.findall(r"`([^`\n]+)`", BLOCK.sub("", text))
    for line in [*fenced.splitlines(), *spans]:
        for part in re.split(r" && |; ", re.sub(r"\s+# .*", "", line.strip())):
            words = shlex.split(part, comments=False) if part.count("'") % 2 == 0 else []
            if words and (words[0] == "make" or "-m" in words):
                yield words


def check_command(words: list[str]) -> None:
    """Raise unless make knows the target, and the job that is run knows all flags."""
    if words[0] == "make":
        if len(words) < 2 or "=" in words[1]:
            return
        for line in made(words[1:]):
            check_job(line)
    else:
        check_job(words[words.index("-m") + 1 :])


def made(arguments: list[str]) -> list[list[str]]:
    """Return the commands that a target of make runs."""
    if arguments[0] in ("help", "setup", "check", "fmt", "test", "test-quick", "clean", "up", "down", "quickstart"):
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert arguments[0] in targets, arguments
        return []
    command = ["make", "--no-print-directory", "-n", "-o", ".venv/.installed", "RUN=", "RUN_ID=a", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)
    assert done.returncode == 0, (arguments, done.stderr)
    recipe = done.stdout.replace("\\\n", " ")
    lines = [shlex.split(line) for line in recipe.splitlines() if re.match(r"\s*(jobs|fashion)\.", line)]
    assert lines, (arguments, done.stdout)
    return lines


def check_job(words: list[str]) -> None:
    """Raise `UserError` if a job does not know its flags; other modules must exist."""
    if words[0] == "fashion.cluster.head":
        words = words[2:]
    module = importlib.import_module(words[0]) if words[0].startswith("jobs.") else None
    if module is None:
        assert words[0] in ("pytest", "ray.util.state") or importlib.util.find_spec(words[0]), words
        assert all((ROOT / word).exists() for word in words[1:] if word.endswith(".py")), words
        return
    flags = [word for word in words[1:] if word not in ("...", "…")]
    if "--help" in flags or not flags:
        return
    cli.parse(module.Flags, flags, prog=words[0], description="")


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_taken(page: str) -> None:
    for words in commands_in((ROOT / page).read_text()):
        check_command(words)


@pytest.mark.parametrize(
    "text",
    [
        "`make trian`",
        "`make train LR=fast`",
        "```\npython -m jobs.train --lerning-rate 1\n```",
        "```\nray job submit -- python -m jobs.tune --num-sample 3\n```",
    ],
)
def test_a_wrong_command_is_found(text: str) -> None:
    [words] = commands_in(text)
    with pytest.raises((UserError, AssertionError)):
        check_command(words)


VALUES: dict[str, Any] = {"string": "a", "double": 0.5, "float": 0.5, "bool": True}


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `results/reports`, one row in each table."""
    folder = tmp_path_factory.mktemp("docs")
    storage = open_storage(str(folder / "results"))
    for table, schema in SCHEMAS.items():
        row = {field.name: VALUES.get(str(field.type), 1) for field in schema}
        row |= {name: None for name in row if name.endswith("_at")}
        row |= {"probabilities": [0.1] * 10} if "probabilities" in row else {}
        tables.write_table(storage, table, "a", [row])
    return folder


@pytest.mark.parametrize("page", PAGES)
def test_queries_run(page: str, reports: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(reports)
    for code in blocks(page, "sql"):
        for query in filter(str.strip, code.split(";")):
            duckdb.sql(query).fetchall()
    for code in blocks(page, "python"):
        tree = ast.parse(code)
        if "results/reports" in code:
            exec(compile(tree, page, "exec"), {})
    assert len(pd.read_parquet("results/reports/runs")) == 1


def test_a_wrong_column_is_found(reports: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(reports)
    with pytest.raises(duckdb.BinderException):
        duckdb.sql("SELECT val_acuracy FROM read_parquet('results/reports/runs/**/*.parquet')")


def test_columns_are_all_told() -> None:
    text = (ROOT / "docs" / "reports.md").read_text()
    for table, schema in SCHEMAS.items():
        section = text[text.index(f"**{table}**") :]
        assert [name for name in schema.names if f"| `{name}` |" not in section] == [], table


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    named = re.findall(r"`((?:fashion|jobs|tests|docs)/[\w./-]*)`", text)
    linked = [(ROOT / page).parent / link for link in re.findall(r"\]\(([\w./-]+)\)", text)]
    assert [str(path) for path in [*(ROOT / name for name in named), *linked] if not path.exists()] == []


def test_the_readme_is_read_in_five_minutes() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 200
    assert next(number for number, line in enumerate(lines, 1) if line.startswith("make ")) <= 15
    assert next(number for number, line in enumerate(lines, 1) if line.startswith("ray job submit")) <= 60
    rows = [line for line in lines if line.startswith("| `") and "study" in line]
    assert all(re.search(r"\| (n = 1|\d+)", row) for row in rows)
