"""The file `search.json`: the settings of a search, written before its first trial and compared on `--resume`."""

import json
from typing import Any

from fashion.config import TrainConfig, UserError, check_run_id, flag, parse_object, require
from fashion.reports import schemas
from fashion.search.space import SearchConfig
from fashion.storage import Storage

STATE_FILE = "search.json"
STATE_VERSION = 2


def state_place(search_id: str) -> tuple[str, ...]:
    """Return where `search.json` of a search lies, as parts of a path in the storage."""
    return (schemas.SEARCHES_FOLDER, search_id, STATE_FILE)


def write_state(
    storage: Storage, search_id: str, config: SearchConfig, base: TrainConfig, identity: dict[str, Any]
) -> None:
    """Write the settings of a search, and the identity of its data and code."""
    state = {
        "state_version": STATE_VERSION,
        "search": config.to_dict(),
        "base": base.to_dict(),
        **{name: identity[name] for name in ("dataset", "dataset_sha256", "source_hash")},
    }
    storage.write_bytes(json.dumps(state, indent=2).encode(), *state_place(search_id))


def read_state(storage: Storage, search_id: str) -> dict[str, Any]:
    """Return what `write_state` wrote; raises `UserError` if there is no such search, or its file is damaged."""
    check_run_id(search_id, name="--search-id")
    place = state_place(search_id)
    require(storage.exists(*place), f"--search-id {search_id} does not exist in {storage.uri}; leave out --resume")
    try:
        state = parse_object(storage.read_bytes(*place))
        version = state["state_version"]
    except (ValueError, KeyError, OSError) as error:
        raise UserError(f"{storage.show(*place)} is damaged ({error}); start another search") from error
    require(version == STATE_VERSION, f"{storage.show(*place)} has version {version}, expected {STATE_VERSION}")
    return state


def stored_settings(storage: Storage, search_id: str) -> tuple[SearchConfig, TrainConfig]:
    """Return what a search was started with; raises `UserError` as `read_state` does."""
    state = read_state(storage, search_id)
    try:
        return SearchConfig.from_dict(state["search"]), TrainConfig.from_dict(state["base"])
    except (ValueError, KeyError) as error:
        place = storage.show(*state_place(search_id))
        raise UserError(f"{place} is damaged ({error}); start another search") from error


def check_new_search(storage: Storage, search_id: str) -> None:
    """Raise `UserError` if the storage holds a search of that name."""
    require(
        not storage.exists(schemas.SEARCHES_FOLDER, search_id),
        f"--search-id {search_id} exists already in {storage.uri}; add --resume to continue it, or name another",
    )


def check_same_search(storage: Storage, search_id: str, config: SearchConfig, base: TrainConfig) -> None:
    """Raise `UserError` naming each setting in which a resumed search differs from the stored one."""
    requested = {**base.to_dict(), **config.to_dict()}
    stored_config, stored_base = stored_settings(storage, search_id)
    stored = {**stored_base.to_dict(), **stored_config.to_dict()}
    differing = [
        f"{flag(name)} {requested[name]} (was {stored[name]})" for name in stored if requested[name] != stored[name]
    ]
    require(
        not differing,
        f"--resume {search_id} was given other settings: {', '.join(differing)}; leave them out, or start a new search",
    )
