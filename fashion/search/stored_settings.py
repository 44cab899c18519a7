"""The settings of a search in `search.json`: written before its first trial, compared on `--resume`."""

import json
from typing import Any

from fashion.config import TrainConfig, UserError, check_run_id, flag, parse_object, require
from fashion.reports import schemas
from fashion.search.space import SearchConfig
from fashion.storage import Storage

STATE_FILE = "search.json"
STATE_VERSION = 2
"""Version of the format of `STATE_FILE`; a search of another version is not resumed."""


def settings_place(search_id: str) -> tuple[str, ...]:
    """Return the path of a search's `STATE_FILE`, as parts below the storage root."""
    return (schemas.SEARCHES_FOLDER, search_id, STATE_FILE)


def write_settings(
    storage: Storage, search_id: str, config: SearchConfig, base: TrainConfig, identity: dict[str, Any]
) -> None:
    """Write the search's settings, and the columns of `identity` that name its data and its code."""
    state = {
        "state_version": STATE_VERSION,
        "search": config.to_dict(),
        "base": base.to_dict(),
        **{name: identity[name] for name in ("dataset", "dataset_sha256", "source_hash")},
    }
    storage.write_bytes(json.dumps(state, indent=2).encode(), *settings_place(search_id))


def read_settings(storage: Storage, search_id: str) -> dict[str, Any]:
    """Return what `write_settings` wrote.

    Raises `UserError` if the search does not exist, or if its file is damaged or of another version.
    """
    check_run_id(search_id, name="--search-id")
    place = settings_place(search_id)
    require(storage.exists(*place), f"--search-id {search_id} does not exist in {storage.uri}; leave out --resume")
    try:
        state = parse_object(storage.read_bytes(*place))
        version = state["state_version"]
    except (ValueError, KeyError, OSError) as error:
        raise UserError(f"{storage.show(*place)} is damaged ({error}); start another search") from error
    require(version == STATE_VERSION, f"{storage.show(*place)} has version {version}, expected {STATE_VERSION}")
    return state


def stored_settings(storage: Storage, search_id: str) -> tuple[SearchConfig, TrainConfig]:
    """Return the settings that a search was started with; raises `UserError` as `read_settings` does."""
    state = read_settings(storage, search_id)
    try:
        return SearchConfig.from_dict(state["search"]), TrainConfig.from_dict(state["base"])
    except (ValueError, KeyError) as error:
        place = storage.show(*settings_place(search_id))
        raise UserError(f"{place} is damaged ({error}); start another search") from error


def check_new_search(storage: Storage, search_id: str) -> None:
    """Raise `UserError` if the folder of a search of that name exists."""
    require(
        not storage.exists(schemas.SEARCHES_FOLDER, search_id),
        f"--search-id {search_id} exists already in {storage.uri}; add --resume to continue it, or name another",
    )


def check_same_search(storage: Storage, search_id: str, config: SearchConfig, base: TrainConfig) -> None:
    """Raise `UserError` naming each setting in which a resumed search differs from the stored one."""
    given = {**base.to_dict(), **config.to_dict()}
    stored_config, stored_base = stored_settings(storage, search_id)
    stored = {**stored_base.to_dict(), **stored_config.to_dict()}
    differing = [f"{flag(name)} {given[name]} (was {stored[name]})" for name in stored if given[name] != stored[name]]
    require(
        not differing,
        f"--resume {search_id} was given other settings: {', '.join(differing)}; leave them out, or start a new search",
    )
