"""Reads rows of the `runs` table, and compares a run's stored settings with those of a command."""

import json
from typing import Any

from fashion.config import TrainConfig, UserError, flag, parse_object, require
from fashion.reports import tables
from fashion.reports.schemas import REPORTS_FOLDER, RUNS_FOLDER
from fashion.storage import Storage


def find_run(storage: Storage, run_id: str) -> dict[str, Any] | None:
    """Return the `runs` row of `run_id`, or None; raises `UserError` if the report is damaged."""
    rows = tables.read_table(storage, "runs", run_id)
    return rows[0] if rows else None


def load_run(storage: Storage, run_id: str) -> dict[str, Any]:
    """Return the `runs` row of `run_id`; raises `UserError`, naming the latest ids, if there is none."""
    row = find_run(storage, run_id)
    if row is None:
        known = list_runs(storage)
        names = f"there are {', '.join(known[-5:])}" if known else "there are none yet"
        raise UserError(f"--run-id {run_id} does not exist in {storage.uri}; {names}")
    return row


def list_runs(storage: Storage) -> list[str]:
    """Return the ids of all runs, sorted; raises `UserError` if the file of a search is damaged."""
    names = [name for name in storage.list(REPORTS_FOLDER, "runs") if not name.startswith(".")]
    found = {tables.owner(name) for name in names}
    for name in names:
        if not tables.owner(name):
            found |= set(tables.read_file(storage, REPORTS_FOLDER, "runs", name)["run_id"].to_pylist())
    return sorted(found - {""})


def config_json(config: TrainConfig) -> str:
    """Return the settings in the form of the column `config_json`."""
    return json.dumps(config.to_dict(), sort_keys=True)


def stored_config(storage: Storage, run_id: str) -> TrainConfig:
    """Return the settings that a run was started with; raises `UserError` if there is no such run, or no settings."""
    return config_of(storage, run_id, load_run(storage, run_id))


def config_of(storage: Storage, run_id: str, row: dict[str, Any]) -> TrainConfig:
    """Return the settings in the `runs` row `row`; raises `UserError` if they are missing or damaged."""
    try:
        return TrainConfig.from_dict(parse_object(row["config_json"] or ""))
    except ValueError as error:
        place = storage.show(REPORTS_FOLDER, "runs", run_id)
        raise UserError(f"{place} is damaged: config_json cannot be used ({error}); start another run") from error


def differing_settings(storage: Storage, run_id: str, config: TrainConfig) -> list[str]:
    """Return each setting in which `config` differs from the stored run's, as a flag with both values."""
    stored = stored_config(storage, run_id).to_dict()
    given = config.to_dict()
    return [f"{flag(name)} {given[name]} (was {stored[name]})" for name in stored if given[name] != stored[name]]


def check_same_config(storage: Storage, run_id: str, config: TrainConfig) -> None:
    """Raise `UserError` naming each setting in which `config` differs from the stored run's."""
    differing = differing_settings(storage, run_id, config)
    require(
        not differing,
        f"--resume {run_id} was given other settings: {', '.join(differing)}; leave them out, or start a new run",
    )


def check_new_run(storage: Storage, run_id: str) -> None:
    """Raise `UserError` if the storage holds a row or a folder of a run `run_id`."""
    exists = find_run(storage, run_id) is not None or storage.exists(RUNS_FOLDER, run_id)
    require(
        not exists, f"--run-id {run_id} exists already in {storage.uri}; add --resume to continue it, or name another"
    )
