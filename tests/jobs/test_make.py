"""What `make` hands to the commands: variables become flags, the stand-in is named where it is taken.

`RUN=echo` prints the commands in place of running them; nothing is set up.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run make without the user's own variables; neither make nor one that it starts sets up anything."""
    up_to_date = ["-o", ".venv/.installed"]
    command = ["make", "--no-print-directory", *up_to_date, f"MAKE={' '.join(['make', *up_to_date])}", *arguments]
    variables = {"PATH": os.environ["PATH"], **environment}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=variables, timeout=300, check=False)


def commands(*arguments: str, **environment: str) -> list[list[str]]:
    """Return the words of each command that make would run."""
    done = make("RUN=echo", "STORAGE=/s", *arguments, **environment)
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]


TRAIN = ["jobs.train", "--storage", "/s", "--num-workers", "2"]
EVALUATE = ["jobs.evaluate", "--storage", "/s", "--run-id", "a", "--split", "test"]
LINES = {
    "train": TRAIN,
    "train RUN_ID=a LR=0.1 SOURCE=synthetic": [*TRAIN, "--run-id", "a", "--lr", "0.1", "--source", "synthetic"],
    "train ARGS=--resume NUM_WORKERS=1:2": [*TRAIN[:-1], "1:2", "--resume"],
    "evaluate RUN_ID=a EXPORT=/model": [*EVALUATE, "--num-workers", "2", "--export", "/model"],
    "predict RUN_ID=a IMAGES=s3://b/*.png PREDICTIONS=/o PHOTO=yes USE_GPU=no": [
        *("jobs.predict", "--storage", "/s", "--images", "s3://b/*.png", "--out", "/o", "--run-id", "a", "--photo"),
        *("--num-workers", "2", "--use-gpu", "no"),
    ],
    "predict MODEL=/m IMAGES=/i PREDICTIONS=s3://b/o COLUMN=x": [
        *("jobs.predict", "--storage", "/s", "--images", "/i", "--out", "s3://b/o", "--model", "/m", "--column", "x"),
        *("--num-workers", "2"),
    ],
    "prepare": ["jobs.prepare", "--storage", "/s"],
    "prepare SOURCE=synthetic VAL_ROWS=100 SEED=1": [
        *("jobs.prepare", "--storage", "/s"),
        *("--source", "synthetic", "--val-rows", "100", "--seed", "1"),
    ],
    "evaluate RUN_ID=a CPUS_PER_WORKER=0.5 USE_GPU=no ARGS=--x": [
        *(*EVALUATE, "--num-workers", "2", "--cpus-per-worker", "0.5", "--use-gpu", "no", "--x"),
    ],
    "bench CPUS_PER_WORKER=0.5 USE_GPU=no ARGS=--x": [
        *("jobs.bench", "--storage", "/s", "--num-workers", "2", "--cpus-per-worker", "0.5", "--use-gpu", "no", "--x"),
    ],
}


@pytest.mark.parametrize("line", LINES)
def test_variables_become_flags(line: str) -> None:
    assert commands(*line.split()) == [LINES[line]]


@pytest.mark.parametrize(
    ("named", "variable", "expected"),
    [
        ("", "", []),
        ("", "fashion", ["--source", str(ROOT / "fashion")]),
        ("", "synthetic", ["--source", "synthetic"]),
        ("", "/nowhere", ["--source", "/nowhere"]),
        ("auto", "fashion", ["--source", "auto"]),
        ("fashion", "", ["--source", str(ROOT / "fashion")]),
    ],
)
def test_a_submitted_job_is_given_one_source_and_a_folder_in_full(
    named: str, variable: str, expected: list[str]
) -> None:
    """It runs in another folder, without this shell's variables."""
    (words,) = commands("submit-train", f"SOURCE={named}", FASHION_MNIST_SOURCE=variable)
    # `echo` prints the words with blanks between them, and the folder of this clone may hold some.
    assert " ".join(words) == " ".join(["fashion.cluster.head", "submit", *TRAIN, *expected])


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("evaluate", "no RUN_ID is given; name the run, as in: make evaluate RUN_ID=mine"),
        ("predict", "no IMAGES are given; name them, as in: make predict RUN_ID=mine IMAGES=folder"),
    ],
)
def test_a_target_asks_for_what_it_needs(target: str, told: str) -> None:
    done = make(target, "RUN=echo")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines()[0] == f"error: {told}"


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """A script in place of Python that answers as `jobs.prepare` does and prints every other command."""
    script = tmp_path / "run"
    script.write_text('#!/bin/sh\n[ $1 = jobs.prepare ] && { echo "$TOLD"; echo "$@" >&2; exit $CODE; }; echo "$@"\n')
    script.chmod(0o755)
    return script


@pytest.mark.parametrize(
    ("dataset", "source"), [("fashion-mnist", ""), ("fashion-mnist-synthetic", " --source synthetic")]
)
def test_quickstart_trains_on_what_was_prepared(prepared: Path, tmp_path: Path, dataset: str, source: str) -> None:
    told = f"prepared: {dataset}, 55000 train, 5000 val, 10000 test rows"
    out = tmp_path / "page.html"
    done = make("quickstart", f"RUN={prepared}", "STORAGE=/s", "RUN_ID=a", f"OUT={out}", TOLD=told, CODE="0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        told,
        f"{' '.join(TRAIN)} --run-id a --epochs 1{source}",
        "jobs.evaluate --storage /s --run-id a --split val --num-workers 2",
        f"jobs.report --storage /s --out {out}",
    ]
    assert done.stderr.splitlines() == ["jobs.prepare --storage /s --or-synthetic"]


def test_quickstart_ends_where_preparing_fails(prepared: Path) -> None:
    done = make("quickstart", f"RUN={prepared}", "STORAGE=/s", TOLD="", CODE="2")
    assert done.returncode == 2
    assert done.stdout.strip() == ""


# --- paths with blanks and other signs ------------------------------------------------------------------------------

SIGNS = (
    "b c",
    " lead",
    "trail ",
    "$HOME",
    "$(x)",
    "`id`",
    "q'u\"o",
    "x;y&z|",
    "#h",
    "50%",
    "*?[a]",
    "-dash",
    "\\",
    "\t",
    "é",
)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with blanks that holds the Makefile alone, and a script in place of Python that prints its words."""
    folder = tmp_path / "a b" / "my clone"
    folder.mkdir(parents=True)
    (folder / "Makefile").write_text((ROOT / "Makefile").read_text())
    (folder / ".venv").mkdir()
    for name in ("uv.lock", "pyproject.toml", ".venv/.installed"):  # the last is the newest: nothing is set up
        (folder / name).touch()
    (folder / "run").write_text('#!/bin/sh\nprintf "[%s]" "$@"\necho\n')
    (folder / "run").chmod(0o755)
    return folder


def in_clone(clone: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["make", "--no-print-directory", "-o", ".venv/.installed", "RUN=./run", *arguments]
    variables = {"PATH": os.environ["PATH"], **environment}
    return subprocess.run(command, capture_output=True, text=True, cwd=clone, env=variables, timeout=60, check=False)


TARGETS = {
    "prepare": "storage source",
    "train": "storage source",
    "tune": "storage source",
    "study": "storage source",
    "submit-train": "storage source",
    "submit-tune": "storage source",
    "evaluate": "storage export",
    "predict": "storage images out model",
    "report": "storage out csv predictions",
    "bench": "storage",
}


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_hands_on_paths_as_they_are(clone: Path, target: str) -> None:
    for sign in SIGNS if target in ("train", "report") else SIGNS[:4]:
        value = f"d/{sign}/x{sign}" if sign != "-dash" else sign
        flags = dict.fromkeys(TARGETS[target].split(), value)
        others = {"out": "PREDICTIONS"} if target == "predict" else {}
        given = [f"{others.get(name, name.upper())}={value}" for name in flags]
        done = in_clone(clone, target, "RUN_ID=a", *given)
        assert done.returncode == 0, done.stderr
        for name in flags:
            assert f"[--{name}][{clone / value}]" in done.stdout, (sign, done.stdout)


def test_paths_reach_commands_from_the_environment_too(clone: Path) -> None:
    (line,) = in_clone(
        clone, "submit-train", FASHION_STORAGE="c d/$x", FASHION_MNIST_SOURCE="/m y/'s"
    ).stdout.splitlines()
    assert f"[--storage][{clone}/c d/$x]" in line
    assert "[--source][/m y/'s]" in line
    (line,) = in_clone(clone, "train", "STORAGE=s3://b/c d", "SOURCE=auto").stdout.splitlines()
    assert "[--storage][s3://b/c d]" in line and "[--source][auto]" in line
    (line,) = in_clone(clone, "train", "STORAGE=~/c d", HOME="/h o").stdout.splitlines()
    assert "[--storage][/h o/c d]" in line


def test_quickstart_keeps_paths_whole_over_all_its_commands(clone: Path) -> None:
    done = in_clone(clone, "quickstart", "STORAGE=c d/$s", "SOURCE=/e f/'q", "OUT=o p/$y.html", "RUN_ID=a")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.count(f"[{clone}/c d/$s]") for line in lines] == [1, 1, 1, 1]
    assert [line.count("[--source][/e f/'q]") for line in lines] == [1, 1, 0, 0]
    assert f"[--out][{clone}/o p/$y.html]" in lines[-1]
    assert (clone / "o p").is_dir()


@pytest.mark.parametrize(
    "name", ["STORAGE", "SOURCE", "OUT", "EXPORT", "CSV", "IMAGES", "PREDICTIONS", "MODEL", "RUN_ID"]
)
def test_a_line_break_is_refused_by_name(clone: Path, name: str) -> None:
    done = in_clone(clone, "train", f"{name}=a\nb")
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert f"{name} holds a line break" in line
