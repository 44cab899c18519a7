"""README.md and docs/*.md: every command parses, every query runs over small reports, every path exists.

The last tests prove on made-up lines that a wrong flag, target, column or path is found.
"""

import json
import re
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from conftest import ROOT
from documents import MAKEFILE, complaints, shell_lines

from fashion.config import TrainConfig
from fashion.data.images import predictions as image_predictions
from fashion.reports import runs, tables
from fashion.reports.schemas import SCHEMAS
from fashion.search.space import SearchConfig
from fashion.search.stored_settings import write_settings
from fashion.storage import Storage, open_storage

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")

# Their blocks build on each other: tests/jobs/test_tour.py runs them.
RUN_WHOLE = ("docs/tour.md",)
DOCUMENTS = sorted(path.relative_to(ROOT).as_posix() for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")])


@pytest.fixture(scope="module")
def small_reports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `results`, small reports of a run, a trial and all else, and with `docs`, the recorded ones."""
    folder = tmp_path_factory.mktemp("reader")
    storage = open_storage(str(folder / "results"))
    config_json = json.dumps(TrainConfig().to_dict())
    special: dict[str, Any] = {"search_id": "mine", "label": 1, "predicted": 2, "config_json": config_json}
    for table in SCHEMAS:
        for run_id, kind, split in (("mine", "train", "test"), ("mine-t0000", "trial", "val")):
            row = {field.name: example(field.type) for field in SCHEMAS[table]}
            row |= special | {"kind": kind, "split": split}
            tables.write_table(storage, table, run_id, [{name: row[name] for name in SCHEMAS[table].names}])
    assert runs.stored_config(storage, "mine") == TrainConfig()
    told = {"dataset": "fashion-mnist", "dataset_sha256": "", "source_hash": ""}
    write_settings(storage, "mine", SearchConfig(), TrainConfig(), told)
    write_small_predictions(open_storage(str(folder / "results" / "predictions")))
    (folder / "docs").symlink_to(ROOT / "docs")
    return folder


def write_small_predictions(out: Storage) -> None:
    """Write predictions on two images, one of which could not be read."""
    values = np.full((2, 10), 0.1, np.float32)
    paths, labels = pa.array(["a.png", "b.png"]), np.array([3, 0], np.uint8)
    table = image_predictions.make_part(paths, pa.nulls(2, pa.int64()), labels, values, [None, "it is empty"])
    image_predictions.write_part(out, 0, table)


def example(kind: pa.DataType) -> Any:
    """Return a value of an Arrow type."""
    if pa.types.is_timestamp(kind):
        return datetime.now(UTC)
    if pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind):
        return [0.1] * 10
    if pa.types.is_string(kind):
        return "some"
    return True if pa.types.is_boolean(kind) else 0.5 if pa.types.is_floating(kind) else 1


@pytest.fixture
def reader(small_reports: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the folder with the small reports the working directory."""
    monkeypatch.chdir(small_reports)


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize("name", DOCUMENTS)
def test_what_a_document_says_can_be_done(name: str) -> None:
    path = ROOT / name
    assert complaints(path.read_text(), path.parent, run_python=name not in RUN_WHOLE) == []


def test_every_target_and_every_job_is_in_a_document() -> None:
    text = "\n".join((ROOT / name).read_text() for name in DOCUMENTS)
    targets = re.findall(r"^([a-z-]+):.*## ", MAKEFILE, flags=re.MULTILINE)
    assert [target for target in targets if not re.search(rf"make {target}\b", text)] == []


def test_the_readme_can_be_read_in_five_minutes() -> None:
    text = (ROOT / "README.md").read_text()
    lines = text.splitlines()
    assert len(lines) <= 200
    assert max(map(len, lines)) <= 120
    assert [line for number, line in shell_lines(text) if number <= 15]
    assert any("ray job submit" in line for number, line in shell_lines(text) if number <= 60)


def test_the_readme_has_one_table_of_results_that_says_n() -> None:
    section = (ROOT / "README.md").read_text().partition("## Results")[2].partition("\n## ")[0]
    head, _, *rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    assert head == ["what", "figure", "n", "spread", "hardware"]
    assert 1 <= len(rows) <= 8
    assert all(len(row) == len(head) for row in rows)
    assert all(row[2] == "n = 1" or int(row[2].split()[0]) >= 3 for row in rows)


def columns_told(text: str) -> dict[str, list[str]]:
    """Return the columns in the tables below the headings that name a table of the reports."""
    sections = re.split(r"^### `(\w+)`$", text, flags=re.MULTILINE)[1:]
    found = dict(zip(sections[::2], sections[1::2], strict=True))
    return {
        table: re.findall(r"^\| `(\w+)` \|", re.split(r"^##", body, flags=re.MULTILINE)[0], flags=re.MULTILINE)
        for table, body in found.items()
    }


def test_every_column_is_explained() -> None:
    told = columns_told((ROOT / "docs" / "reports.md").read_text())
    assert told == {table: schema.names for table, schema in SCHEMAS.items()} and list(told) != []


def bare_promises(text: str) -> list[str]:
    """Return the paragraphs and points of a list that promise the same bits and do not say on which devices."""
    parts = [" ".join(part.split()) for part in re.split(r"\n\n|\n- ", text)]
    return [part for part in parts if "same bits" in part and not re.search(r"\b[CG]PUs?\b", part)]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_same_bits_are_promised_of_a_kind_of_device(name: str) -> None:
    """GPUs repeat theirs only if they are asked to, and those of another kind have others."""
    assert bare_promises((ROOT / name).read_text()) == []


WRONG = {
    "```\nmake trian\n```": "No rule to make target 'trian'",
    "```\nmake train EPOCH=3\n```": "no variable EPOCH",
    "```\nmake evaluate RUN_ID=mine LR=3\n```": "LR=3 changes nothing",
    "```\nmake evaluate\n```": "--run-id",
    '```\nmake train ARGS="--erasing 0.1"\n```': "--erasing",
    "```\nmake train RUN_ID=other ARGS=--resume\n```": "--run-id other does not exist",
    "A table: | `make study PARTS=paddings` |": "--parts paddings does not exist",
    "```\nmake help && make bench ARGS='--rows a,z'\n```": "--rows z does not exist",
    "```\npython -m jobs.trian\n```": "no module jobs.trian",
    "```\n.venv/bin/python -m fashion.bench.scale.growth --trails 9\n```": "has no flag --trails",
    "```\nLR=1 .venv/bin/python -m jobs.train --padding round\n```": "'round'",
    "```\nray job submit --working-dir . -- python -m jobs.train --gpu yes\n```": "--gpu",
    "```\nray start\n```": "ray start is not known",
    "```\nray up cluster.yml cluster2.yaml\n```": "cluster2.yaml does not exist",
    "```\nkubectl apply -f jobs/job.yaml\n```": "jobs/job.yaml does not exist",
    "```\nuv sync --group kera\n```": "no group kera",
    "```\npython -m fashion.cluster.head start\n```": "does not know start",
    "```\nmkae train\n```": "mkae is no command",
    "`pytest tests/test_nothing.py`": "tests/test_nothing.py does not exist",
    "`pytest tests/jobs/test_docs.py::test_nothing`": "test_nothing does not exist",
    '`pytest -m "not rays"`': "no marker rays",
    "`--emma-decay 0.9`": "no job has the flag --emma-decay",
    "`--ema-decay 9`": "--ema-decay 9.0 must lie in",
    "`EPOCHEN=3`": "nobody reads the variable EPOCHEN",
    "`fashion/nothing.py`": "fashion/nothing.py does not exist",
    "`nothing/`": "nothing/ does not exist",
    "[a guide](docs/nothing.md)": "docs/nothing.md leads nowhere",
    "```sql\nSELECT acuracy FROM read_parquet('results/reports/runs/**/*.parquet')\n```": "acuracy",
    "```sql\nSELECT 1;\nSELECT run_id FROM read_parquet('results/reports/runs/**/*.parquet') WHERE lr > 9\n```": "lr",
    "```sql\nSELECT 1 WHERE 1 = 2\n```": "finds nothing",
    "```python\nimport pandas as pd\n\npd.read_parquet('results/reports/runs')['val_acuracy']\n```": "val_acuracy",
    "```python\nfrom fashion.inference import Clasifier\n```": "fashion.inference has no Clasifier",
    "```python\nimport torch\n\ntorch.export.lode('model.pt2')\n```": "lode",
}


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_is_found(text: str) -> None:
    (found,) = complaints(text)
    assert WRONG[text] in found


def test_every_column_of_predictions_is_explained() -> None:
    section = (ROOT / "docs" / "predict.md").read_text().partition("## What it writes")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE) == image_predictions.SCHEMA.names


def test_a_column_that_is_not_explained_is_found() -> None:
    text = "### `confusion`\n\n| column | unit |\n|---|---|\n| `split` | |\n| `labl` | |\n\n## Else\n\n| `x` | |\n"
    assert columns_told(text) == {"confusion": ["split", "labl"]}


def test_a_promise_without_a_device_is_found() -> None:
    assert bare_promises("On CPUs the same\nbits.\n\n- one\n- the same\nbits\n- a GPU") == ["the same bits"]


RIGHT = """
Text with `make`, `images/s`, `results/report.html`, `runs/<id>/`, `--first '{"lr": 0.001}'`, `make down up`,
`--num-workers 2:8`, `fashion/config.py` and [a page](https://example.org/x).

```
export RAY_ADDRESS=http://HEAD:8265
make train PRESET=best ARGS="--erase 0.1"   # with a remark; and its sign
make train RUN_ID=mine ARGS=--resume
.venv/bin/python -m jobs.tune --search-id mine --resume
make test
```

```text
<storage>/anything
```
"""


@pytest.mark.usefixtures("reader")
def test_what_is_right_passes() -> None:
    assert complaints(RIGHT) == []
